"""Tests of what jaxprune's ``artefacts`` does."""
