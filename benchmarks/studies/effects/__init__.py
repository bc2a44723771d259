"""Which published effects of pruning appear here."""
