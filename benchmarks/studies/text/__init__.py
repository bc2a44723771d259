"""What pruning does to a text encoder that is fine-tuned."""
