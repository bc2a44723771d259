"""Tests by kind: CONTRIBUTING.md says which run when."""
