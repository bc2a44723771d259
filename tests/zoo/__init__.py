"""Real networks, written by others: compaction is exact on all of them."""
