"""Tests of what jaxprune's ``training`` does."""
