"""Timing: jitted, warmed up, synchronised; several functions interleaved in one run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_LEAST_SECONDS = 5e-3  # a round is long enough for the clock


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
      median: of the rounds.
      quartiles: first and third.
      samples: every round, raw.
      device: kind of the device that ran it.
    """

    median: float
    quartiles: tuple[float, float]
    samples: tuple[float, ...]
    device: str


@dataclass(frozen=True)
class Comparison:
    """Timings of one interleaved run, and ratios baseline / other per round.

    Attributes:
      timings: name -> :class:`Timing`.
      ratios: name -> (first quartile, median, third quartile) of baseline time / its time: the
        speed-up over the baseline.
      baseline: name of the baseline.
    """

    timings: dict[str, Timing]
    ratios: dict[str, tuple[float, float, float]]
    baseline: str

    def __str__(self) -> str:
        width = max(map(len, self.timings))
        lines = [f"{'':<{width}}  median [ms]  speed-up over {self.baseline} [quartiles]"]
        for name, t in self.timings.items():
            low, mid, high = self.ratios[name]
            lines.append(
                f"{name:<{width}}  {t.median * 1e3:>11.3f}  {mid:.2f} [{low:.2f}, {high:.2f}]"
            )
        return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Device, versions and cores, for the record beside every timing."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def _prepare(fn: Any, args: tuple[Any, ...]) -> tuple[Callable[..., Any], Any, int]:
    """Compiles, warms up, and finds how many calls make a round."""
    if not callable(fn):
        raise TypeError(f"wanted a function to time, got {type(fn).__name__}")
    for leaf in jax.tree.leaves(args):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int)):
            raise TypeError(
                f"an argument holds {type(leaf).__name__}, not an array; close over what is "
                "static: lambda params, x: fn(params, x, train=False)"
            )
    placed = jax.device_put(args)
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    for _ in range(2):
        jax.block_until_ready(jitted(*placed))
    calls, seconds = 1, 0.0
    while True:
        seconds = _round(jitted, placed, calls) * calls
        if seconds >= _LEAST_SECONDS or calls >= 1 << 14:
            return jitted, placed, calls
        calls *= 2


def _round(jitted: Any, placed: Any, calls: int) -> float:
    out = None
    start = time.perf_counter()
    for _ in range(calls):
        out = jitted(*placed)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def _timing(samples: list[float]) -> Timing:
    low, mid, high = np.quantile(samples, [0.25, 0.5, 0.75])
    kind = jax.devices()[0].device_kind
    return Timing(float(mid), (float(low), float(high)), tuple(samples), kind)


def benchmark(fn: Callable[..., Any], *args: Any, rounds: int = 15) -> Timing:
    """Times ``fn(*args)``: compilation excluded, results waited for.

    Args:
      fn: a function of arrays, jitted or not; what it closes over is compiled in.
      *args: arrays, placed on the device once.
      rounds: number of samples; each is the mean of as many calls as the clock needs.

    Returns:
      A :class:`Timing`, in seconds per call.

    Raises:
      ValueError: for rounds < 1. TypeError: for arguments that are no arrays.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.benchmark(jnp.sin, jnp.ones(8), rounds=3).median > 0
      True
    """
    return compare({"fn": (fn, args)}, rounds=rounds).timings["fn"]


def compare(
    entries: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]],
    *,
    rounds: int = 15,
    baseline: str | None = None,
) -> Comparison:
    """Times several functions in interleaved rounds of one run.

    Each round times every function once, starting at another one each time; ratios are taken
    within a round, so that what slows the machine for a while slows both sides.

    Args:
      entries: name -> (function, its arguments).
      rounds: number of rounds.
      baseline: the name to compare with; default the first.

    Raises:
      ValueError: for no entries, rounds < 1, or an unknown baseline.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> x = jnp.ones(8)
      >>> sorted(jp.compare({"sin": (jnp.sin, (x,)), "cos": (jnp.cos, (x,))}, rounds=2).ratios)
      ['cos', 'sin']
    """
    if not entries:
        raise ValueError("compare got no entries; pass {'dense': (fn, (params, x)), ...}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; wanted at least 1")
    names = list(entries)
    base = names[0] if baseline is None else baseline
    if base not in entries:
        raise ValueError(f"baseline {base!r} is not among {names}")
    ready = {name: _prepare(fn, tuple(args)) for name, (fn, args) in entries.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(_round(*ready[name]))
    timings = {name: _timing(found) for name, found in samples.items()}
    ratios = {
        name: tuple(map(float, np.quantile(np.divide(samples[base], found), [0.25, 0.5, 0.75])))
        for name, found in samples.items()
    }
    return Comparison(timings, ratios, base)  # type: ignore[arg-type]
