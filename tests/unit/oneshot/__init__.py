"""Tests of what jaxprune's ``oneshot`` does."""
