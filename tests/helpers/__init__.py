"""What tests share: oracles, coverings, memory maps."""
