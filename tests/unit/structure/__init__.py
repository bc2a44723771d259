"""Tests of what jaxprune's ``structure`` does."""
