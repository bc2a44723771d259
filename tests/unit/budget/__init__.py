"""Tests of what jaxprune's ``budget`` does."""
