"""What all tests share: hypothesis, memory maps, float64 where a test asks for it, no windows."""
# ruff: noqa: E402  JAX reads the environment when it is imported.

import gc
import os
from importlib import metadata
from pathlib import Path

# XLA's programs are kept, also the many small ones: tests compile the same ones again and again.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Compiling is most of the time, so that XLA leaves out what only makes programs fast: half of it
# is saved. Doctests, notebooks and benchmarks run with all optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA otherwise cuts a program into up to 32 pieces that threads compile: half of it is saved again.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib").startswith("0.10."):  # XLA ends a process for a flag it does not know
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

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
    parser.addoption("--rest", action="store_true", help="run what --whole adds")


def named(config):
    """Returns the paths on the command line: what is slow in them runs."""
    paths = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    return [path for path in paths if path != HERE]


def pytest_ignore_collect(collection_path, config):
    if collection_path.parent != HERE or collection_path.name not in SLOW:
        return None
    asked = [path for path in named(config) if path.is_relative_to(collection_path)]
    whole = config.getoption("whole") or config.getoption("rest")
    return None if asked or whole else True


def is_slow(item):
    return "slow" in item.keywords or item.path.relative_to(HERE).parts[0] in SLOW


def pytest_collection_modifyitems(config, items):
    if config.getoption("whole"):
        return
    if config.getoption("rest"):
        left = [item for item in items if not is_slow(item)]
    else:
        paths = named(config)
        left = [item for item in items if "slow" in item.keywords and item.path not in paths]
    if left:
        out = set(left)
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=left)


def pytest_collection_finish(session):
    """Garbage is looked for seldom: tracing makes many objects that live. It saves a sixth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_configure(config):
    config.pluginmanager.register(memory_maps.Watch(memory_maps.SHARE * memory_maps.limit()))


@pytest.fixture
def x64():
    """Runs one test in float64; the tests are otherwise in JAX's default float32."""
    with jax.enable_x64(True):
        yield
