"""Properties that hold for any input, by hypothesis and against slow oracles."""
