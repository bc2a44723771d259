"""Compiled loops over groups of operations, and what one turn of them takes."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.budget.groups import Group, evaluate
from jaxprune.compaction.blocks import View
from jaxprune.ir.axes import Axis

ROUND = 0.002  # One timing lasts at least so many seconds.

Timer = Callable[[], float]  # It runs a program and returns seconds of one turn.


class Loop:
    """Seconds of one turn of ``run(count, *make())``, a lowered loop, each time it is called.

    Args:
      lowered: the loop, to be compiled by :meth:`compile`.
      make: makes its arguments, which are held only while it runs.
    """

    def __init__(self, lowered: Any, make: Callable[[], Sequence[Any]]):
        self.lowered, self.make, self.count = lowered, make, 1

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """The compiled program."""
        return self.lowered.compile()

    def compile(self) -> None:
        """Compiles, if that wasn't done yet."""
        self.run  # noqa: B018

    def __call__(self) -> float:
        xs = self.make()
        self._seconds(xs, 1)  # This touches new pages and warms caches.
        while (took := self._seconds(xs, self.count)) < ROUND and self.count < 1 << 20:
            more = int(1.2 * self.count * ROUND / max(took, 1e-9))
            self.count = max(2 * self.count, more)
        return took / self.count

    def _seconds(self, xs: Sequence[Any], count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.run(np.int32(count), *xs))
        return time.perf_counter() - start


def compile_all(lowered: Iterable[Any]) -> list[Any]:
    """Compiles what can be compiled, side by side on all cores; XLA holds no lock meanwhile."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(lambda x: x.compile(), [x for x in lowered if hasattr(x, "compile")]))


def time_group(group: Group, counts: Mapping[Axis, int]) -> Loop:
    """A group at the given counts, lowered, to be compiled and timed.

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
    lowered = jax.jit(run).lower(jax.ShapeDtypeStruct((), jnp.int32), *xs)
    return Loop(lowered, lambda: [example(x.shape, x.dtype) for x in xs])


def example(shape: tuple[int, ...], dtype: Any) -> Any:
    """Numbers that no fast path is there for; zeros for indices, which are always inside."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros(shape, dtype)
    size = math.prod(shape)
    return jax.device_put(_numbers(1 << size.bit_length())[:size].reshape(shape).astype(dtype))


@functools.lru_cache(maxsize=4)
def _numbers(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size, np.float32)
