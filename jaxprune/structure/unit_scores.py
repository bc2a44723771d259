"""The scores of units: what their entries in all slots come to."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.ir.axes import Axis
from jaxprune.ir.numbering import Numbering
from jaxprune.reduce import Reduction
from jaxprune.selection import known
from jaxprune.sharding import host


def unit_scores(
    dimensions: Collection[Axis],
    param_axes: Sequence[Sequence[Axis]],
    leaves: Sequence[Any],
    silent: Mapping[int, Collection[Axis]],
    reduce: Reduction,
) -> list[jax.Array]:
    """Reduces the entries of each dimension's units over the leaves that hold it.

    Scores at hand are summed along each axis of each leaf where they lie, and the sums are put
    together on the host, so that no program is compiled for a dimension.

    Args:
      dimensions: what is scored.
      param_axes: the axes of each leaf.
      leaves: the scores of its entries.
      silent: position of a leaf -> the dimensions on which it has no vote.
      reduce: sums and counts -> scores.
    """
    numbers = Numbering(dimensions)
    places = list(_places(numbers, param_axes, silent))
    total: Any = np.zeros(numbers.total, jnp.result_type(float))
    lines = _sums(places, leaves, total.dtype)
    if all(map(known, lines.values())):
        lines = {place: host(line) for place, line in lines.items()}
    else:
        total = jnp.asarray(total)
    count = np.zeros(numbers.total)
    for i, k, units in places:
        inside = units >= 0
        total = _added(total, units[inside], lines[i, k][inside])
        others = [axis.size for j, axis in enumerate(param_axes[i]) if j != k]
        np.add.at(count, units[inside], np.prod(others, initial=1))
    found = [numbers.of(dimension) for dimension in dimensions]
    return [reduce(jnp.asarray(total[units]), count[units]) for units in found]


class _Place(NamedTuple):
    """An axis of a leaf, and the unit at each of its positions; -1 where there is none."""

    leaf: int
    axis: int
    units: np.ndarray


def _places(
    numbers: Numbering,
    param_axes: Sequence[Sequence[Axis]],
    silent: Mapping[int, Collection[Axis]],
) -> Iterator[_Place]:
    for i, axs in enumerate(param_axes):
        mute = [j for d in silent.get(i, ()) for j in numbers.owner[numbers.of(d)][:1]]
        for k, axis in enumerate(axs):
            for units in numbers.along(axis):
                units = np.where(np.isin(numbers.owner[units], mute), -1, units) if mute else units
                if (units >= 0).any():
                    yield _Place(i, k, units)


def _sums(
    places: Sequence[_Place], leaves: Sequence[Any], dtype: Any
) -> dict[tuple[int, int], Any]:
    """(leaf, axis) -> the sums of the leaf's slices, where the axis has a place."""
    wanted: dict[int, dict[int, None]] = {}
    for i, k, _ in places:
        wanted.setdefault(i, {})[k] = None
    each = {i: _lines(leaves[i], tuple(ks), dtype) for i, ks in wanted.items()}
    return {(i, k): line for i, ks in wanted.items() for k, line in zip(ks, each[i])}


@functools.partial(jax.jit, static_argnames=("ks", "dtype"))
def _lines(leaf: Any, ks: tuple[int, ...], dtype: Any) -> list[jax.Array]:
    """The sums of a leaf's slices along some axes."""
    wide = jnp.asarray(leaf, dtype)
    return [jnp.sum(wide, [j for j in range(wide.ndim) if j != k]) for k in ks]


def _added(total: Any, units: np.ndarray, line: Any) -> Any:
    if isinstance(total, np.ndarray):
        np.add.at(total, units, line)
        return total
    return total.at[units].add(line)
