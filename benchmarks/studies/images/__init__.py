"""What pruning does to image classifiers."""
