"""How fast pruned networks, and the library itself, are."""
