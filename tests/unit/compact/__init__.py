"""Tests of what jaxprune's ``compact`` does."""
