"""What all tests of searches share: one table of times."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """One cache for all tests, so that nothing is measured twice."""
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
