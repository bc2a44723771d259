"""What all tests share: hypothesis, memory maps, float64 where a test asks for it, no windows."""
# ruff: noqa: E402  JAX reads the environment when it is imported.

import os
from pathlib import Path

# XLA's programs are kept, also the many small ones: tests compile the same ones again and again.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import memory_maps

os.environ.setdefault("MPLBACKEND", "Agg")

# Deadlines: a first example compiles. In CI the examples are the same in each run.
settings.register_profile(
    "jaxprune",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("jaxprune")


def pytest_configure(config):
    config.pluginmanager.register(memory_maps.Watch(memory_maps.SHARE * memory_maps.limit()))


@pytest.fixture
def x64():
    """Runs one test in float64; the tests are otherwise in JAX's default float32."""
    with jax.enable_x64(True):
        yield
