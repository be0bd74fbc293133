"""What a run stands on: its work folder, checkpoints, processes, the mesh of devices, and what watches it."""
