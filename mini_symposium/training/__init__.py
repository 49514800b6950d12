"""Training: the trainer and its log, checkpoints, what fits in memory, grids and sweeps."""
