"""Models larger than memory: checkpoints that are read, pruned and written block by block."""
