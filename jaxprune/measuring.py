"""Timing: jitted, warmed up, synchronised; several functions interleaved in one run.

What makes a timing wrong, and what is done here: compilation (two calls before the clock starts);
asynchronous dispatch (each round ends when its results are there); a coarse clock (a round makes
as many calls as it takes to be long); arguments copied to the device in each call (placed once);
constant folding (arrays are arguments, an empty list of them is an error); a machine that is slower
for a while (functions take turns, in a new order each round, and ratios are taken within a round).
"""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from jaxprune import _tables as tables
from jaxprune._calls import calls_fn
from jaxprune._load import load, spread
from jaxprune._progress import Progress, Row, track, working
from jaxprune._renamed import renamed
from jaxprune.costs.api import check_call
from jaxprune.typing import path_str

Fn = Callable[..., Any]

WIDE = 0.1  # Quartiles that are further apart than this share of the median are told.


class Ratio(NamedTuple):
    """Quartiles of a ratio; ``median`` is the one to quote."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one function, by :func:`benchmark` or :func:`compare`.

    Attributes:
      samples: one per round, in their order: the mean over its calls, in seconds.
      calls: calls per round.
      device: kind of the device that ran it, "NVIDIA H100 80GB HBM3".
      arguments: what each argument was, "float32[256,28,28,1]".
      load: processes per core that wanted to run, NaN where it isn't known.
      runtime: the engine that ran it, with its options and versions; "xla" is this process.
    """

    samples: tuple[float, ...]
    calls: int
    device: str
    arguments: tuple[str, ...]
    load: float = math.nan
    runtime: str = "xla"

    @property
    def median(self) -> float:
        """The median over rounds, in seconds."""
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile over rounds, in seconds."""
        low, high = np.quantile(self.samples, [0.25, 0.75])
        return float(low), float(high)

    @property
    def note(self) -> str:
        """What must be known where the quartiles are too far apart, else empty."""
        apart = spread(self.samples)
        if not apart > WIDE:
            return ""
        busy = "unknown" if math.isnan(self.load) else f"{self.load:.1f} processes per core"
        return f"quartiles are {apart:.0%} apart (load: {busy}); time again on a quieter machine"

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists and numbers."""
        return {
            "median_seconds": self.median,
            "quartiles_seconds": list(self.quartiles),
            "samples_seconds": list(self.samples),
            "calls_per_round": self.calls,
            "device": self.device,
            "arguments": list(self.arguments),
            "load": None if math.isnan(self.load) else self.load,
            "runtime": self.runtime,
        }

    def _milliseconds(self) -> tuple[str, str]:
        """The median and the quartiles as text."""
        low, high = (q * 1e3 for q in self.quartiles)
        return f"{self.median * 1e3:.4g}", f"{low:.4g} - {high:.4g}"

    @property
    def _where(self) -> str:
        """The device, and the engine if it isn't XLA."""
        return self.device if self.runtime == "xla" else f"{self.device} in {self.runtime}"

    def _repr_html_(self) -> str:
        heads = ("median [ms]", "quartiles", "rounds", "device")
        row = (*self._milliseconds(), f"{len(self.samples)} of {self.calls} calls", self._where)
        return tables.html([tables.Table(heads, [row])])

    def __str__(self) -> str:
        low, high = (q * 1e3 for q in self.quartiles)
        return (
            f"{self.median * 1e3:.4g} ms [{low:.4g}, {high:.4g}] on {self._where}, "
            f"{len(self.samples)} rounds of {self.calls} calls"
            + (self.note and f"\nnote: {self.note}")
        )


@dataclass(frozen=True)
class Comparison(tables.Shown):
    """Timings of one interleaved run, by :func:`compare`; ``print`` it to see the table.

    Attributes:
      timings: name -> :class:`Timing`.
      ratios: name -> :class:`Ratio`, the speed-up: the baseline's time over its own, within each
        round, as (first quartile, median, third quartile).
      baseline: name of the baseline.
    """

    timings: dict[str, Timing]
    ratios: dict[str, Ratio]
    baseline: str

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists and numbers, with the machine and the versions."""
        return {
            "environment": environment(),
            "baseline": self.baseline,
            "timings": {
                name: {**timing.to_json(), "speedup": self.ratios[name]._asdict()}
                for name, timing in self.timings.items()
            },
        }

    def _parts(self) -> Iterator[tables.Part]:
        last = f"speed-up over {self.baseline} [quartiles]"
        rows = [self._row(name) for name in self.timings]
        yield tables.Table(("function", "median [ms]", "quartiles", last), rows, (1, 2))
        t = self.timings[self.baseline]
        yield f"{t.device}, {len(t.samples)} interleaved rounds"
        yield from (f"note: {name}: {t.note}" for name, t in self.timings.items() if t.note)

    def _row(self, name: str) -> tuple[str, ...]:
        median, spread = self.timings[name]._milliseconds()
        low, mid, high = self.ratios[name]
        return name, median, spread, f"{mid:.2f} x [{low:.2f}, {high:.2f}]"


@renamed("jp.benchmark", rounds="repeats")
@calls_fn("jp.benchmark")
def benchmark(
    fn: Fn,
    *args: Any,
    repeats: int = 15,
    min_round: float = 0.01,
    progress: Progress = None,
    runtime: Any = None,
) -> Timing:
    """Returns how long one call ``fn(*args)`` takes, in seconds; compilation excluded.

    On a CPU each call is waited for. On an accelerator the calls of a round are queued, so that the
    time is the device's wherever a call keeps it busy for longer than Python takes to queue it.
    In another runtime a call goes from NumPy arrays to NumPy arrays.

    Args:
      fn: a function of arrays: plain (it is jitted), jitted, or compiled, for a runtime as well.
      *args: arrays; they are placed on the device once.
      repeats: number of rounds, each of which is one sample.
      min_round: seconds that a round lasts at least; it makes as many calls as that takes.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        rounds, such as ``tqdm.tqdm``.
      runtime: where it runs, ``jp.runtimes.onnx()``; None is XLA. Parameters that come first are
        part of the engine's program, as they are when it serves.

    Returns:
      A :class:`Timing`.

    Raises:
      TypeError: when fn isn't callable, or an argument holds something that isn't an array.
      ValueError: for repeats < 1, without arguments, or for a function that donates them.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> t = jp.benchmark(jnp.sin, jnp.ones(8), repeats=3)
      >>> 0 < t.quartiles[0] <= t.median <= t.quartiles[1], len(t.samples)
      (True, 3)
    """
    _check_repeats("jp.benchmark", repeats)
    with working("jp.benchmark", progress):
        write = "jp.benchmark(fn, params, x)"
        ready = _prepare("jp.benchmark", write, fn, args, min_round, runtime)
        before = load()
        samples = [ready.round() for _ in track(range(repeats), "rounds", progress)]
        return ready.timing(samples, max(before, load()))


@renamed("jp.compare", rounds="repeats")
@calls_fn("jp.compare")
def compare(
    entries: Mapping[str, tuple[Fn, tuple[Any, ...]]],
    *,
    repeats: int = 15,
    baseline: str | None = None,
    min_round: float = 0.01,
    progress: Progress = None,
    runtime: Any = None,
) -> Comparison:
    """Returns the timings of several functions and their speed-ups, from one interleaved run.

    Each round times every function once, in a new random order. Ratios are taken within a round,
    so that what slows the machine for a while slows both sides.

    Args:
      entries: ``{name: (fn, args)}``, args the tuple of fn's arguments.
      repeats: number of rounds, each of which times every function once.
      baseline: the name that the others are compared with; the first one if None.
      min_round: seconds that each function's part of a round lasts at least.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        rounds, such as ``tqdm.tqdm``.
      runtime: where all of them run, as for :func:`benchmark`; or ``{name: runtime}``, so that
        engines take turns in one run. What has no runtime there runs in XLA.

    Returns:
      A :class:`Comparison`.

    Raises:
      TypeError: when an entry isn't (fn, args), and as :func:`benchmark`.
      ValueError: for no entries, repeats < 1, an unknown baseline, or a runtime for what isn't an
        entry, and as :func:`benchmark`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> x = jnp.ones((4, 4))
      >>> c = jp.compare({"two": (lambda x: x @ x, (x,)), "one": (jnp.sin, (x,))}, repeats=3)
      >>> c.baseline, c.ratios["two"]
      ('two', Ratio(low=1.0, median=1.0, high=1.0))
    """
    _check_entries(entries)
    _check_repeats("jp.compare", repeats)
    base = next(iter(entries)) if baseline is None else baseline
    if base not in entries:
        raise ValueError(f"baseline {base!r} of jp.compare is not among {list(entries)}")
    with working("jp.compare", progress) as row:
        race = Race(entries, min_round, row, _runtimes(entries, runtime))
        race.run(repeats, progress)
    return race.comparison(base)


def environment() -> dict[str, Any]:
    """Returns the device, the versions and the cores: what belongs beside every timing."""
    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)  # what this process may use, on Linux
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        "machine": platform.machine(),
        "cpu_count": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
    }


class Race:
    """Functions that are compiled and warm, and take turns.

    Args:
      entries, min_round: of :func:`compare`.
      row: says which one is compiled.
      runtimes: name -> runtime, of those that don't run in XLA.

    Attributes:
      samples: name -> seconds per call, one for each round that it was in.
    """

    def __init__(
        self,
        entries: Mapping[str, tuple[Fn, tuple[Any, ...]]],
        min_round: float,
        row: Row,
        runtimes: Mapping[str, Any],
    ):
        self._ready, self._shuffle, self._load = {}, random.Random(0).shuffle, load()
        for name, (fn, args) in entries.items():
            row.now = f"compiling {name}"
            who = f"entry {name!r} of jp.compare"
            write = f"jp.compare({{{name!r}: (fn, (params, x))}})"
            self._ready[name] = _prepare(who, write, fn, args, min_round, runtimes.get(name))
        self.samples: dict[str, list[float]] = {name: [] for name in entries}
        row.now = ""

    def run(
        self, rounds: int, progress: Progress = False, names: Iterable[str] | None = None
    ) -> None:
        """Every function once per round, in an order of its own: no one always follows the same."""
        order = list(self._ready if names is None else names)
        for _ in track(range(rounds), "rounds", progress):
            self._shuffle(order)
            for name in order:
                self.samples[name].append(self._ready[name].round())

    def comparison(self, base: str) -> Comparison:
        """What was found so far."""
        busy = max(self._load, load())
        timings = {n: self._ready[n].timing(found, busy) for n, found in self.samples.items()}
        ratios = {n: _ratio(self.samples[base], found) for n, found in self.samples.items()}
        return Comparison(timings, ratios, base)


class _Ready(NamedTuple):
    """A function that is compiled and warm, on its placed arguments."""

    fn: Fn
    args: tuple[Any, ...]
    calls: int  # per round

    def round(self) -> float:
        """Seconds per call. A CPU may run queued calls side by side: there each is waited for."""
        wait = _device(self.args).platform == "cpu" and not hasattr(self.fn, "runtime")
        start = time.perf_counter()
        for _ in range(self.calls):
            out = self.fn(*self.args)
            if wait:
                jax.block_until_ready(out)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / self.calls

    def timing(self, samples: Sequence[float], busy: float) -> Timing:
        kind = _device(self.args).device_kind
        where = self.fn.runtime.key if hasattr(self.fn, "runtime") else "xla"
        told = tuple(map(_describe, self.args))
        return Timing(tuple(samples), self.calls, kind, told, busy, where)


def _prepare(
    who: str, write: str, fn: Fn, args: tuple[Any, ...], min_round: float, runtime: Any = None
) -> _Ready:
    """Compiles, warms up, and finds how many calls make a round."""
    check_call(who, write, fn, args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{who} wants arrays with values, argument {path_str(path)} is {leaf}; make one, "
                "jnp.zeros(x.shape, x.dtype), or count without computing: jp.cost"
            )
    run = _compiled(runtime, fn, args)
    if hasattr(run, "runtime"):
        ready = _Ready(run, run.place(args), calls=1)
    else:
        is_ready = hasattr(fn, "lower") or isinstance(fn, jax.stages.Compiled)
        ready = _Ready(fn if is_ready else jax.jit(fn), jax.device_put(args), calls=1)
    jax.block_until_ready(ready.fn(*ready.args))
    arrays = [x for x in jax.tree.leaves(ready.args) if isinstance(x, jax.Array)]
    if any(x.is_deleted() for x in arrays):
        raise ValueError(
            f"{who} is a function that donates its arguments: they are gone after the first call; "
            "jit it without donate_argnums"
        )
    ready.round()
    while (seconds := ready.round() * ready.calls) < min_round:
        wanted = math.ceil(1.2 * ready.calls * min_round / seconds)
        ready = ready._replace(calls=min(wanted, 8 * ready.calls))
    return ready


def _compiled(runtime: Any, fn: Fn, args: tuple[Any, ...]) -> Any:
    """A function in a runtime; what is compiled for one already stays."""
    outside = runtime is not None and runtime.engine is not None
    return runtime(fn, *args) if outside and not hasattr(fn, "runtime") else fn


def _runtimes(entries: Mapping[str, Any], runtime: Any) -> Mapping[str, Any]:
    """The runtime of each entry."""
    if not isinstance(runtime, Mapping):
        return dict.fromkeys(entries, runtime)
    if unknown := [name for name in runtime if name not in entries]:
        raise ValueError(
            f"jp.compare got a runtime for {unknown[0]!r}, which is not among {list(entries)}"
        )
    return runtime


def _ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    return Ratio(*map(float, np.quantile(np.divide(base, other), [0.25, 0.5, 0.75])))


def _check_repeats(who: str, repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"{who} wants repeats >= 1, got {repeats}")


def _check_entries(entries: Any) -> None:
    write = "jp.compare({'dense': (fn, (params, x)), ...})"
    if not isinstance(entries, Mapping):
        raise TypeError(f"jp.compare wants a dict, {write}, got {type(entries).__name__}")
    if not entries:
        raise ValueError(f"jp.compare got no entries; write {write}")
    for name, entry in entries.items():
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], tuple)):
            got = [type(x).__name__ for x in entry] if isinstance(entry, tuple) else entry
            raise TypeError(
                f"entry {name!r} of jp.compare wants (fn, args) with a tuple of arguments, "
                f"{write}, got {got}"
            )


def _device(args: tuple[Any, ...]) -> jax.Device:
    """Where the arguments lie (the first device, if on several), or where JAX computes."""
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.Array):
            return min(leaf.devices(), key=lambda device: device.id)
        return jax.devices("cpu")[0]
    return jax.devices()[0]


def _describe(arg: Any) -> str:
    leaves = jax.tree.leaves(arg)
    if len(leaves) == 1:
        return f"{leaves[0].dtype}[{','.join(map(str, leaves[0].shape))}]"
    types = sorted({str(leaf.dtype) for leaf in leaves})
    return f"{len(leaves)} leaves, {sum(x.size for x in leaves):,} entries, {' '.join(types)}"
