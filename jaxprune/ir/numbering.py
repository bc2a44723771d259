"""The units of several dimensions in one row of numbers, so that an axis of many is one vector."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import numpy as np

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis


class Numbering:
    """Numbers the units of some leaf dimensions through, one dimension after the other.

    Attributes:
      dimensions: in their order.
      first: dimension -> the number of its first unit.
      total: how many units there are.

    Example:
      >>> a, b = axes.leaf(2), axes.leaf(3)
      >>> numbers = Numbering([a, b])
      >>> [row.tolist() for row in numbers.along(axes.sum_([b, a, axes.leaf(1)]))]
      [[2, 3, 4, 0, 1, -1]]
    """

    def __init__(self, dimensions: Iterable[Axis]):
        self.dimensions = list(dict.fromkeys(map(axes.find, dimensions)))
        starts = [*itertools.accumulate((d.size for d in self.dimensions), initial=0)]
        self.first, self.total = dict(zip(self.dimensions, starts)), starts[-1]
        self._known: dict[Axis, list[np.ndarray]] = {}

    def along(self, axis: Axis) -> list[np.ndarray]:
        """For each position along an axis its unit, -1 for another's: a vector for each factor.

        They are those of :func:`jaxprune.ir.axes.units_along`, of all dimensions at once.
        """
        return axes.rows_along(axis, self.first, self._known)

    def units(self, axis: Axis, dimension: Axis) -> list[np.ndarray]:
        """For each position along an axis its unit of one dimension, counted from 0; else -1."""
        start, stop = (own := self.of(dimension)).start, own.stop
        rows = [np.where((r >= start) & (r < stop), r - start, -1) for r in self.along(axis)]
        return [row for row in rows if (row >= 0).any()]

    def of(self, dimension: Axis) -> slice:
        """Where the units of a dimension stand in a vector of all units."""
        start = self.first[axes.find(dimension)]
        return slice(start, start + dimension.size)

    @functools.cached_property
    def owner(self) -> np.ndarray:
        """For each unit the position of its dimension."""
        sizes = [d.size for d in self.dimensions]
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
