"""Provides what a run needs around its training: work folder, checkpoints, processes, devices, and what watches it."""
