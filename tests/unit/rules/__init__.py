"""Tests of what jaxprune's ``rules`` does."""
