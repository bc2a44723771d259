"""Tests of what jaxprune's ``ir`` does."""
