"""The main job, ``python -m benchmarks``: train, prune, compact and time a real network."""
