"""Tests of what jaxprune's ``compaction`` does."""
