"""The main job: what pruning does to accuracy, size, FLOPs and time of a real network."""
