"""What a search is given besides scores and a target: which counts are allowed, and by what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.budget.latency import LatencyTable
from jaxprune.budget.roofline import Device
from jaxprune.structure.select import chosen_dims
from jaxprune.structure.structure import Structure

FLOOR = 1 / 8  # of each dimension stays by default: what is nearly emptied doesn't train back

Limits = Mapping[str, float]


def limits_of(
    structure: Structure, names: Sequence[str], minimum: Limits | None, maximum: Limits | None
) -> dict[str, tuple[int, int]]:
    """The least and the largest count of each dimension."""
    sizes = {name: structure.dims[name].size for name in names}
    limits = {name: (math.ceil(FLOOR * size), size) for name, size in sizes.items()}
    for which, given in (("maximum", maximum or {}), ("minimum", minimum or {})):
        if not isinstance(given, Mapping):
            raise TypeError(f'{which} is {given!r}; write {which}={{"*": 64}} for all dimensions')
        for pattern, value in given.items():
            inside = [n for n in chosen_dims(structure, pattern, which) if n in limits]
            if not inside:
                raise ValueError(
                    f"{which}={{{pattern!r}: {value}}} names none of the dimensions that may "
                    "change; correct it, or choose more of them by dims="
                )
            for name in inside:
                size = structure.dims[name].size
                count = _count(value, size)
                if count is None or (which == "maximum" and count < 1):
                    raise ValueError(
                        f"{which}={{{pattern!r}: {value!r}}}: {name} has {size} units; wanted a "
                        "number of units, or a fraction as a float of 1.0 at most"
                    )
                low, high = limits[name]
                limits[name] = (count, high) if which == "minimum" else (min(low, count), count)
                _check_order(name, *limits[name])
    return limits


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
        raise TypeError(f"device is {device!r}; wanted a name among jp.DEVICES, or a jp.Device")
    if not (table is None or isinstance(table, LatencyTable)):
        raise TypeError(f"table is {table!r}; write table=jp.LatencyTable(path)")
    whole = isinstance(round_to, (int, np.integer)) and not isinstance(round_to, bool)
    if round_to is not None and not (whole and round_to >= 1):
        raise ValueError(f"round_to is {round_to!r}; wanted a whole number of units such as 8")
    structure.check_params(params)


def _check_order(name: str, low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"minimum of {name} is {low}, above its maximum {high}")
