"""Measured times of groups of operations at candidate widths, kept on disk.

A machine is slower for seconds at a time (other processes, other guests of the same processor). So
nothing is timed to the end at once: all that is missing is compiled, and then timed in several
passes over everything, of which the least counts.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.budget.groups import Group, evaluate
from jaxprune.compaction.blocks import View
from jaxprune.ir.axes import Axis
from jaxprune.measuring import environment

PASSES = 4  # Each group is timed so many times, and the least counts: noise only ever adds.
ROUND = 0.004  # One timing lasts at least so many seconds.
BATCH = 400  # So many programs are compiled, then timed; an interrupted run loses one batch.
IDENTITY = ("device", "platform", "cpu_count", "jax", "jaxlib")  # A time holds where these are.

Progress = Callable[[Iterable[Any]], Iterable[Any]]  # It passes items on, as tqdm.tqdm does.
Timer = Callable[[], float]  # It runs a compiled program and returns seconds of one turn.


class LatencyTable:
    """How long operations take on this device: measured once, then read from a file.

    The file belongs to one device and one pair of jax and jaxlib versions. It is written while
    measuring, so that an interrupted run goes on where it was.

    Args:
      path: a JSON file; None for one named by device and versions under ``$JAXPRUNE_CACHE`` or
        ``~/.cache/jaxprune``; False keeps the times in memory only.

    Raises:
      ValueError: for a file of another device or other versions, or one that can't be read.

    Example:
      >>> import jaxprune as jp
      >>> table = jp.budget.LatencyTable(False)
      >>> len(table)
      0
    """

    def __init__(self, path: str | Path | None | bool = None):
        self.path = None if path is False else Path(default_path() if path is None else str(path))
        self.identity = {name: environment()[name] for name in IDENTITY}
        self.seconds: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            self.seconds = self._read(self.path)

    def __len__(self) -> int:
        return len(self.seconds)

    def _read(self, path: Path) -> dict[str, float]:
        try:
            content = json.loads(path.read_text())
            identity, seconds = dict(content["identity"]), dict(content["seconds"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"the latency table {path} can't be read ({type(error).__name__}: {error}); delete "
                "it to measure again"
            ) from error
        differing = [
            f"{name}: {identity.get(name)!r} there, {value!r} here"
            for name, value in self.identity.items()
            if identity.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the latency table {path} was measured elsewhere ({'; '.join(differing)}); "
                "write jp.budget.LatencyTable() for a table of this device, or name a new file"
            )
        return seconds

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": self.identity, "seconds": self.seconds}, indent=0)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text)
        part.replace(self.path)

    def measure(
        self, wanted: Mapping[str, Callable[[], Timer]], progress: Progress | None = None
    ) -> None:
        """Compiles and times what isn't known yet; ``wanted`` compiles, by name."""
        missing = [name for name in wanted if name not in self.seconds]
        watched = iter(missing if progress is None else progress(missing))
        while names := list(itertools.islice(watched, BATCH)):
            timers = {name: wanted[name]() for name in names}
            found = dict.fromkeys(names, float("inf"))
            for _ in range(PASSES):
                found = {name: min(found[name], timer()) for name, timer in timers.items()}
            self.seconds |= found
            self.save()


def default_path() -> str:
    """Where the table of this device is kept."""
    here = environment()
    parts = [str(here[name]) for name in IDENTITY]
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower())
    root = os.environ.get("JAXPRUNE_CACHE") or Path.home() / ".cache" / "jaxprune"
    return str(Path(root) / "latency" / f"{name}.json")


# ---------------------------------------------------------------------------------- one group


def time_group(group: Group, counts: Mapping[Axis, int]) -> Timer:
    """Compiles a group at the given counts; the timer gives seconds of one run.

    It runs many times within one compiled loop, so that no call from Python is timed. Its results
    are what the loop carries, so that all of them are written.
    """
    view = View({d: np.arange(n) for d, n in counts.items()})

    def body(_: Any, carry: Any) -> Any:
        xs, _ = lax.optimization_barrier(carry)  # Each run waits for the one before.
        ys = zip(group.outs, evaluate(group, view, xs), strict=True)
        return xs, [jnp.asarray(y, v.aval.dtype) for v, y in ys]

    def run(count: Any, *xs: Any) -> Any:
        ys = [jnp.zeros(view.shape(v.axes), v.aval.dtype) for v in group.outs]
        return lax.fori_loop(0, count, body, (list(xs), ys))[1]

    xs = [jax.ShapeDtypeStruct(view.shape(v.axes), v.aval.dtype) for v in group.ins]
    compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((), jnp.int32), *xs).compile()
    return timer(compiled, lambda: [_example(x.shape, x.dtype) for x in xs])


def timer(run: Callable[..., Any], make: Callable[[], Sequence[Any]]) -> Timer:
    """Seconds of one turn of ``run(count, *make())``, a compiled loop, each time it is called."""
    count = 1

    def seconds(xs: Sequence[Any], count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(np.int32(count), *xs))
        return time.perf_counter() - start

    def measure() -> float:
        nonlocal count
        xs = make()
        seconds(xs, 1)  # This touches new pages and warms caches.
        while (took := seconds(xs, count)) < ROUND and count < 1 << 20:
            count = max(2 * count, int(1.2 * count * ROUND / max(took, 1e-9)))
        return took / count

    return measure


def _example(shape: tuple[int, ...], dtype: Any) -> Any:
    """Numbers that no fast path is there for; zeros for indices, which are always inside."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros(shape, dtype)
    size = math.prod(shape)
    return jnp.array(_numbers(1 << size.bit_length())[:size].reshape(shape), dtype)


@functools.lru_cache(maxsize=4)
def _numbers(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size, np.float32)
