"""Pretrained text and speech models: what pruning leaves of their quality, and how fast."""
