"""What all tests share: how hypothesis runs, float64 where a test asks for it, no windows."""

import os

import jax
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("MPLBACKEND", "Agg")

# Deadlines: a first example compiles. In CI the examples are the same in each run.
settings.register_profile(
    "jaxprune",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("jaxprune")


@pytest.fixture
def x64():
    """Runs one test in float64; the tests are otherwise in JAX's default float32."""
    with jax.enable_x64(True):
        yield
