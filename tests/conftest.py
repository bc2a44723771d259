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


HERE = Path(__file__).parent
# `python -m pytest` leaves these folders out, and tests that are marked slow.
SLOW = ("zoo", "fuzz", "runtimes", "studies")


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="run what is slow, too")


def named(config):
    """Returns the paths on the command line: what is slow in them runs."""
    paths = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    return [path for path in paths if path != HERE]


def pytest_ignore_collect(collection_path, config):
    if collection_path.parent != HERE or collection_path.name not in SLOW:
        return None
    asked = [path for path in named(config) if path.is_relative_to(collection_path)]
    return None if asked or config.getoption("whole") else True


def pytest_collection_modifyitems(config, items):
    paths = named(config)
    slow = [item for item in items if "slow" in item.keywords and item.path not in paths]
    if slow and not config.getoption("whole"):
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def pytest_configure(config):
    config.pluginmanager.register(memory_maps.Watch(memory_maps.SHARE * memory_maps.limit()))


@pytest.fixture
def x64():
    """Runs one test in float64; the tests are otherwise in JAX's default float32."""
    with jax.enable_x64(True):
        yield
