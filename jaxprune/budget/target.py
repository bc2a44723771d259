"""What is asked for: a speed-up, a time, FLOPs, parameters, bytes, or several at once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

TIMED = ("speedup", "latency")
COUNTED = ("flops", "params", "bytes", "active_params", "kv_cache", "peak_memory")


@dataclass(frozen=True)
class Target:
    """A budget for :func:`jp.search`; all that are given must be met.

    Attributes:
      speedup: at least so many times as fast as the dense network, from one interleaved run.
      latency: at most so many seconds for one call.
      flops, params, bytes: at most so many, as :func:`jp.cost` counts them; a number up to 1 is a
        fraction of the dense network's.
      active_params: likewise, the parameters that one token uses: of experts those it chooses.
      kv_cache: likewise, the bytes of what a decode step hands back anew, at the batch and length
        of the cache in params.
      peak_memory: likewise, the bytes that are there at once, parameters among them.

    Raises:
      TypeError: for a target that isn't one number.
      ValueError: for no target, or one that isn't positive and finite, or a speedup below 1.

    Example:
      >>> import jaxprune as jp
      >>> jp.Target(speedup=2.0, params=0.5)
      Target(speedup=2.0, params=0.5)
    """

    speedup: float | None = None
    latency: float | None = None
    flops: float | None = None
    params: float | None = None
    bytes: float | None = None
    active_params: float | None = None
    kv_cache: float | None = None
    peak_memory: float | None = None

    def __post_init__(self) -> None:
        if not self.given:
            raise ValueError(
                "Target got nothing to aim at; write jp.Target(speedup=2.0), or latency=seconds, "
                "flops=, params=, bytes=, active_params=, kv_cache=, peak_memory="
            )
        for name, value in self.given.items():
            least = 1 if name == "speedup" else 0
            found = positive(f"Target({name}={value!r})", value, least)
            object.__setattr__(self, name, found)  # Arrays become numbers: targets can be hashed.

    @property
    def given(self) -> dict[str, float]:
        """What is asked for, by name."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def timed(self) -> bool:
        return any(name in self.given for name in TIMED)

    def budgets(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, by cost: "latency" in seconds, and those that are counted."""
        limits = {
            name: value * dense[name] if self.is_fraction(name) else value
            for name, value in self.given.items()
            if name in COUNTED
        }
        seconds = [self.latency] if self.latency is not None else []
        seconds += [dense["latency"] / self.speedup] if self.speedup is not None else []
        return limits | ({"latency": min(seconds)} if seconds else {})

    def is_fraction(self, name: str) -> bool:
        return name in COUNTED and 0 < self.given.get(name, 2) <= 1

    def in_units(self, costs: Mapping[str, float], dense: Mapping[str, float]) -> Budget:
        """Costs in the units in which the target is given."""
        found = {
            name: value / dense[name] if self.is_fraction(name) else value
            for name, value in costs.items()
        }
        if "latency" in costs:
            found["speedup"] = dense["latency"] / costs["latency"]
        return Budget(found)

    def __repr__(self) -> str:
        return f"Target({', '.join(f'{k}={v}' for k, v in self.given.items())})"


class Budget(dict[str, float]):
    """Costs by name, readable as attributes, too: ``budget.speedup``.

    Raises:
      AttributeError: for a cost that isn't there.

    Example:
      >>> from jaxprune.budget.target import Budget
      >>> Budget(flops=0.5).flops
      0.5
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no {name!r} among {sorted(self)}")


# ------------------------------------------------------------------------------------ checks


def positive(said: str, value: Any, least: int = 0) -> Any:
    """``value`` as a Python number; raises unless it is one above 0, finite, at least ``least``."""
    wanted = f"{said}: wanted a finite number " + (f"of {least} or more" if least else "above 0")
    number = as_number(value)
    if number is None or isinstance(number, bool):
        raise TypeError(wanted)
    if not (0 < number < math.inf and number >= least):
        raise ValueError(wanted)
    return number


def as_number(value: Any) -> Any:
    """One real number of Python, numpy or JAX as one of Python; None for anything else."""
    kinds = (numbers.Real, np.generic, np.ndarray, jax.Array)
    array = np.asarray(value) if isinstance(value, kinds) else np.empty(0)
    number = array.item() if array.shape == () else None
    return number if isinstance(number, numbers.Real) else None
