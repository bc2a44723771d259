"""Tests of what jaxprune's ``calibration`` does."""
