"""Tests of what jaxprune's ``jaxpr`` does."""
