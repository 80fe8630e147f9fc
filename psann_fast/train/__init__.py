"""Training: precision, optimizer, loop, run folder, checkpoints."""
