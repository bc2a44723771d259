"""What a search is given besides scores and a target: which counts are allowed, and by what."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.budget.latency import LatencyTable
from jaxprune.budget.roofline import Device
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.select import chosen_dims

FLOOR = 1 / 8  # So much of each dimension stays by default: the nearly empty don't train back.

Limits = Mapping[str, float]


def limits_of(
    structure: Structure, names: Sequence[str], minimum: Limits | None, maximum: Limits | None
) -> dict[str, tuple[int, int]]:
    """The least and the largest count of each dimension.

    Raises:
      TypeError: for limits that aren't a mapping.
      ValueError: for a pattern that names none of the dimensions, a value that is no count of
        theirs, or a minimum above the maximum.
    """
    sizes = {name: structure.dims[name].size for name in names}
    fewest = {name: structure.dims[name].least for name in names}  # so many are chosen at a time
    limits = {n: (max(math.ceil(FLOOR * size), fewest[n]), size) for n, size in sizes.items()}
    for name, most in _counts(structure, sizes, "maximum", maximum):
        limits[name] = min(limits[name][0], most), max(most, fewest[name])
    for name, least in _counts(structure, sizes, "minimum", minimum):
        limits[name] = max(least, fewest[name]), limits[name][1]
        _check_order(name, *limits[name])
    return limits


def _counts(
    structure: Structure, sizes: Mapping[str, int], which: str, given: Limits | None
) -> Iterator[tuple[str, int]]:
    """(dimension, units) for each dimension that each pattern names, in order."""
    if not isinstance(given or {}, Mapping):
        raise TypeError(f'{which} is {given!r}; write {which}={{"*": 64}} for all dimensions')
    for pattern, value in (given or {}).items():
        inside = [n for n in chosen_dims(structure, pattern, which) if n in sizes]
        if not inside:
            raise ValueError(
                f"{which}={{{pattern!r}: {value}}} names none of the dimensions that may "
                "change; correct it, or choose more of them by dims="
            )
        for name in inside:
            count = _count(value, sizes[name])
            if count is None or (which == "maximum" and count < 1):
                raise ValueError(
                    f"{which}={{{pattern!r}: {value!r}}}: {name} has {sizes[name]} units; wanted a "
                    "number of units, or a fraction as a float of 1.0 at most"
                )
            yield name, count


def least_of(
    structure: Structure, most: Mapping[str, int], minimum: Limits | None
) -> dict[str, int]:
    """The least count of each dimension in ``most`` as ``minimum`` has it, 0 where it has none."""
    maximum = {glob.escape(name): count for name, count in most.items()}
    given = {"*": 0, **minimum} if isinstance(minimum, Mapping) else minimum or {"*": 0}
    every = limits_of(structure, list(most), given, maximum)
    return {name: least for name, (least, _) in every.items()}


def _count(value: Any, size: int) -> int | None:
    """Units from a whole number, or from a fraction: a float of 1.0 at most."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return None
    if isinstance(value, (float, np.floating)) and 0 <= value <= 1:
        return round(float(value) * size)
    return int(value) if 0 <= value <= size and value == int(value) else None


def check_kinds(structure: Structure, params: Any, device: Any, table: Any, round_to: Any) -> None:
    """Raises unless each is what it is meant to be, and the structure that of params."""
    if not (device is None or isinstance(device, (str, Device))):
        raise TypeError(
            f"device is {device!r}; wanted a name among jp.budget.DEVICES, or a jp.budget.Device"
        )
    if not (table is None or isinstance(table, LatencyTable)):
        raise TypeError(f"table is {table!r}; write table=jp.budget.LatencyTable(path)")
    whole = isinstance(round_to, (int, np.integer)) and not isinstance(round_to, bool)
    if round_to is not None and not (whole and round_to >= 1):
        raise ValueError(f"round_to is {round_to!r}; wanted a whole number of units such as 8")
    structure.check_params(params)


def check_runtime(runtime: Any, device: Any, table: LatencyTable | None) -> Any:
    """The runtime whose times count, None for XLA.

    Raises:
      TypeError: for what is no runtime.
      ValueError: for a device, whose times are estimates for XLA, or a table of another runtime.
    """
    if runtime is not None and not hasattr(runtime, "engine"):
        raise TypeError(f"runtime is {runtime!r}; write runtime=jp.runtimes.onnx()")
    found = runtime if runtime is not None and runtime.engine is not None else None
    if found is not None and device is not None:
        raise ValueError(
            f"device={device!r} estimates the times of XLA, and runtime is {runtime}, whose times "
            "are measured: leave one out"
        )
    theirs = None if table is None else table.identity.get("runtime")
    if table is not None and theirs != (found and found.key):
        raise ValueError(
            f"the table's times were taken in {theirs or 'XLA'}, and the search is for "
            f"{found.key if found else 'XLA'}: jp.budget.LatencyTable(path, runtime=runtime)"
        )
    return found


def check_masked(structure: Structure, names: Sequence[str], what: str) -> None:
    """Raises where masked params are no small model: what is masked may still be chosen by value.

    Raises:
      ValueError: for such a dimension among ``names``.
    """
    chosen = [name for name in names if structure.dims[name].least]
    if chosen:
        raise ValueError(
            f"{what} sees masked params, in which masked units of {chosen[0]!r} are still chosen; "
            "leave that out by dims=, or judge and tune small.fn(small.params, ...) of "
            'small = jp.compact(fn, params, plan.masks, *args, semantics="kept")'
        )


def _check_order(name: str, low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"minimum of {name} is {low}, above its maximum {high}")
