"""What pruning costs speech recognition, and what it gains in time."""
