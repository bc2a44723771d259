"""Tests of what jaxprune's ``scores`` does."""
