"""What a group of operations takes in another runtime: calls of a program of the group alone."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.budget.clock import ROUND, example
from jaxprune.budget.groups import Group, evaluate
from jaxprune.compaction.blocks import View
from jaxprune.ir.axes import Axis

LEAST = 0.05  # Of a call so much at least counts, whatever a call of nothing takes.
NOTHING = 1e-9  # Seconds of what the engine computes when it compiles.


class Calls:
    """Seconds of one call, beyond those of a call that computes nothing, each time it is called.

    The program is made at the first call: converters replace functions of JAX while they run, so
    that not even two of them may run side by side.
    """

    def __init__(self, make: Callable[[], Callable[[], Any]], nothing: Callable[[], float]):
        self.make, self.nothing, self.count = make, nothing, 1

    @functools.cached_property
    def run(self) -> Callable[[], Any]:
        """The compiled program on its arguments."""
        return self.make()

    def __call__(self) -> float:
        self.run()
        while (took := self._seconds()) < ROUND and self.count < 1 << 20:
            more = int(1.2 * self.count * ROUND / max(took, 1e-9))
            self.count = max(2 * self.count, more)
        each = took / self.count
        return max(each - self.nothing(), LEAST * each)

    def _seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self.count):
            self.run()
        return time.perf_counter() - start


def time_group(runtime: Any, group: Group, counts: Mapping[Axis, int]) -> Callable[[], float]:
    """A group at the given counts, to be compiled and timed in a runtime.

    What is made of parameters alone is part of the program, as it is in the whole network.
    """
    if all(v in group.weights for v in group.ins):
        return lambda: NOTHING
    view = View({d: np.arange(n) for d, n in counts.items()})

    def make() -> Callable[[], Any]:
        xs = [np.asarray(example(view.shape(v.axes), v.aval.dtype)) for v in group.ins]
        free = [x for v, x in zip(group.ins, xs) if v not in group.weights]

        def fn(*given: Any) -> list[Any]:
            rest = iter(given)
            every = [x if v in group.weights else next(rest) for v, x in zip(group.ins, xs)]
            return evaluate(group, view, list(map(jnp.asarray, every)))

        return functools.partial(_compiled(runtime, fn, free), *free)

    return Calls(make, functools.partial(_call, runtime))


def _compiled(runtime: Any, fn: Callable[..., Any], xs: list[Any]) -> Callable[..., Any]:
    """In the runtime; in float where the group has nothing that it quantises."""
    options = runtime.options._replace(calibration=[tuple(xs)], keep_float=())
    from jaxprune.runtimes import NothingQuantized

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return runtime.replace(options)(fn, *xs, check=False)
        except NothingQuantized:
            return runtime.replace(options._replace(quantize=None))(fn, *xs, check=False)


@functools.cache
def _call(runtime: Any) -> float:
    """Seconds of a call that computes next to nothing."""
    x = np.ones(1, np.float32)
    calls = Calls(
        lambda: functools.partial(
            runtime.replace(runtime.options._replace(quantize=None, keep_float=()))(
                lambda x: x + 1, x, check=False
            ),
            x,
        ),
        lambda: 0.0,
    )
    return min(calls() for _ in range(5))
