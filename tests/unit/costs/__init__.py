"""Tests of what jaxprune's ``costs`` does."""
