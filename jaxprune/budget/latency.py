"""Measured times of single operations at candidate widths, kept on disk."""

from __future__ import annotations

import hashlib
import json
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

from jaxprune.axes import Axis
from jaxprune.budget.operations import Operation
from jaxprune.compact.blocks import View
from jaxprune.measure import environment
from jaxprune.rules import registry

ROUNDS = 3  # timings of one operation, of which the least counts: noise only ever adds
ROUND = 0.004  # seconds of one timing, at least
SAVE_EVERY = 20  # measurements: what an interrupted run loses at most
ALIGNMENTS = (64, 32, 16, 8, 4, 2, 1)
ENOUGH = 0.05  # a coarser alignment counts when it is faster by more than this
IDENTITY = ("device", "platform", "cpu_count", "jax", "jaxlib")  # what a time belongs to

Progress = Callable[[Iterable[Any]], Iterable[Any]]  # such as tqdm.tqdm


class LatencyTable:
    """How long operations take on this device: measured once, then read from a file.

    The file belongs to one device and one pair of jax and jaxlib versions. It is written while
    measuring, so that an interrupted run goes on where it was.

    Args:
      path: a JSON file; None for one named by device and versions under ``$JAXPRUNE_CACHE`` or
        ``~/.cache/jaxprune``; False keeps the times in memory only.

    Raises:
      ValueError: for a file of another device or other versions.

    Example:
      >>> import jaxprune as jp
      >>> table = jp.LatencyTable(False)
      >>> len(table)
      0
    """

    def __init__(self, path: str | Path | None | bool = None):
        self.path = None if path is False else Path(default_path() if path is None else str(path))
        self.identity = {name: environment()[name] for name in IDENTITY}
        self.seconds: dict[str, float] = {}
        self._unsaved = 0
        if self.path is not None and self.path.exists():
            self.seconds = self._read(self.path)

    def __len__(self) -> int:
        return len(self.seconds)

    def _read(self, path: Path) -> dict[str, float]:
        content = json.loads(path.read_text())
        differing = [
            f"{name}: {content.get('identity', {}).get(name)!r} there, {value!r} here"
            for name, value in self.identity.items()
            if content.get("identity", {}).get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the latency table {path} was measured elsewhere ({'; '.join(differing)}); "
                "write jp.LatencyTable() for a table of this device, or name a new file"
            )
        return content["seconds"]

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self._unsaved = 0
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": self.identity, "seconds": self.seconds}, indent=0)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text)
        part.replace(self.path)

    def measure(
        self, wanted: Mapping[str, Callable[[], float]], progress: Progress | None = None
    ) -> None:
        """Runs the measurements whose names are not known yet."""
        missing = [name for name in wanted if name not in self.seconds]
        for name in progress(missing) if progress is not None else missing:
            self.seconds[name] = wanted[name]()
            self._unsaved += 1
            if self._unsaved >= SAVE_EVERY:
                self.save()
        if self._unsaved:
            self.save()

    def alignment(self, dtype: Any) -> int:
        """The multiple of which this device wants widths, found by timing matrix products.

        The finest of 1, 2, 4, ... 64 for which no coarser one costs over 5 % less per unit.
        """
        name = f"alignment {jnp.dtype(dtype).name}"
        if name not in self.seconds:
            self.measure({name: lambda: float(find_alignment(jnp.dtype(dtype)))})
        return int(self.seconds[name])


def default_path() -> str:
    """Where the table of this device is kept."""
    here = environment()
    parts = [str(here[name]) for name in IDENTITY]
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower())
    root = os.environ.get("JAXPRUNE_CACHE") or Path.home() / ".cache" / "jaxprune"
    return str(Path(root) / "latency" / f"{name}.json")


# ------------------------------------------------------------------------------ one operation


def name_of(op: Operation, counts: dict[Axis, int]) -> str:
    """What a time is kept under: equal for equal work, wherever it stands in a network."""
    ins, outs = ([_type(v, counts) for v in vs] for vs in (op.step.ins, op.step.outs))
    text = f"{op.step.name} {' '.join(ins)} -> {' '.join(outs)}"
    params = ", ".join(f"{k}={v}" for k, v in sorted(op.step.params.items()) if v is not None)
    return f"{text} {hashlib.sha256(params.encode()).hexdigest()[:10]}"


def _type(value: Any, counts: dict[Axis, int]) -> str:
    shape = View({d: np.arange(n) for d, n in counts.items()}).shape(value.axes)
    return f"{value.aval.dtype}[{','.join(map(str, shape))}]"


def time_operation(op: Operation, counts: dict[Axis, int]) -> float:
    """Seconds of one run of an operation at the given counts.

    It runs many times within one compiled loop, so that no call from Python is timed.
    """
    view = View({d: np.arange(n) for d, n in counts.items()})
    rule = registry.rule_of(op.step)
    xs = [_example(v, view) for v in op.step.ins]

    def body(_: Any, carry: Any) -> Any:
        xs, _ = lax.optimization_barrier(carry)  # each run waits for the one before
        ys = rule.evaluate(view, op.step, list(xs))  # type: ignore[union-attr]
        return xs, lax.optimization_barrier(ys)[0].ravel()[0].astype(jnp.float32)

    def run(count: Any, *xs: Any) -> Any:
        return lax.fori_loop(0, count, body, (xs, jnp.float32(0)))[1]

    return seconds_per_run(jax.jit(run), xs)


def seconds_per_run(run: Callable[..., Any], xs: Sequence[Any]) -> float:
    """Least seconds of one turn of ``run(count, *xs)``, a compiled loop."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(count, *xs))
        return time.perf_counter() - start

    seconds(1)  # compiles
    count = 1
    while (took := seconds(count)) < ROUND:
        count = max(2 * count, int(1.2 * count * ROUND / max(took, 1e-9)))
        count = min(count, 1 << 20)
    return min(took, *(seconds(count) for _ in range(ROUNDS - 1))) / count


def _example(value: Any, view: View) -> Any:
    """Numbers that no fast path is there for; zeros for indices, which are always inside."""
    shape, dtype = view.shape(value.axes), value.aval.dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros(shape, dtype)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


# ---------------------------------------------------------------------------------- alignment


def find_alignment(dtype: Any, rows: int = 256, near: int = 512) -> int:
    """See :meth:`LatencyTable.alignment`; widths just below ``near``, so that sizes hardly differ.

    A width counts with its seconds per unit; all are timed in turns, and the least of each counts.
    """
    widths = {a: near - a for a in ALIGNMENTS}  # a divides near - a, and 2 a doesn't
    runs = {a: _product(rows, width, dtype) for a, width in widths.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for a, (run, xs) in runs.items():
            best[a] = min(best[a], seconds_per_run(run, xs) / widths[a] ** 2)
    return coarsest_worth(best)


def coarsest_worth(cost: dict[int, float]) -> int:
    """The finest alignment for which no coarser one is cheaper by more than ``ENOUGH``."""
    for a in sorted(cost):
        if all(cost[a] <= (1 + ENOUGH) * cost[b] for b in cost if b > a):
            return a
    return max(cost)


def _product(rows: int, width: int, dtype: Any) -> tuple[Callable[..., Any], list[Any]]:
    x, w = jnp.ones((rows, width), dtype), jnp.ones((width, width), dtype)

    def body(_: Any, x: Any) -> Any:
        return lax.optimization_barrier(x @ w / width)

    return jax.jit(lambda count, x: lax.fori_loop(0, count, body, x)), [x]
