"""Data: where images come from, label noise, the trusted split, augmentation, and batches as global arrays."""
