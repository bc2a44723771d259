"""Blocks: an array split by which dimensions are at their kept and which at their removed units.

A masked model's value over a dimension with kept units K and removed units R is put together from
its block at K and its block at R. Over two dimensions there are four blocks, and so on. Most are
known to be zero, or nobody asks for them; the others are evaluated by the very same equations, at
other positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Value
from jaxprune.rules.registry import KEPT, Block


class View:
    """Sizes and positions of axes when the leaves in ``chosen`` are restricted."""

    def __init__(self, chosen: Mapping[Axis, np.ndarray]):
        self.chosen = dict(chosen)
        self._sizes = {leaf: len(index) for leaf, index in chosen.items()}

    def size(self, axis: Axis) -> int:
        return axes.size_of(axis, self._sizes)

    def shape(self, axs: Sequence[Axis]) -> tuple[int, ...]:
        return tuple(axes.size_of(a, self._sizes) for a in axs)

    def index(self, axis: Axis) -> np.ndarray:
        """Positions, as int32 whether or not 64 bits are enabled: jax caches by the type."""
        return axes.index_of(axis, self.chosen).astype(np.int32)


class Split:
    """Which units of each pruned dimension are kept, and which removed ones are carried.

    Attributes:
      kept: dimension -> positions of its kept units.
      removed: dimension -> positions of the removed units whose values may matter.
    """

    def __init__(self, kept: Mapping[Axis, np.ndarray], removed: Mapping[Axis, np.ndarray]):
        self.kept, self.removed = dict(kept), dict(removed)
        self._views: dict[Block, View] = {}
        self._pruned: dict[Axis, Block] = {}
        self._positions: dict[tuple[Axis, Block, Block], tuple[np.ndarray, np.ndarray]] = {}

    def view(self, block: Block) -> View:
        if block not in self._views:
            chosen = {d: self.removed[d] if d in block else k for d, k in self.kept.items()}
            self._views[block] = View(chosen)
        return self._views[block]

    def pruned(self, axis: Axis) -> Block:
        """The pruned dimensions in an axis."""
        if axis not in self._pruned:
            self._pruned[axis] = frozenset(d for d in axes.leaves(axis) if d in self.kept)
        return self._pruned[axis]

    def dims(self, value: Value) -> Block:
        found = KEPT
        for axis in value.axes:
            found |= self.pruned(axis)
        return found

    def positions(self, axis: Axis, block: Block, own_by: Block) -> tuple[np.ndarray, np.ndarray]:
        """Positions along an axis in a block, and which of them pass all dimensions ``own_by``.

        In a concatenation of two dimensions the block of the first also shows the second, at its
        kept units: those positions are another block's.
        """
        key = axis, block & self.pruned(axis), own_by
        if key not in self._positions:
            index = self.view(block).index(axis)
            own = np.full(len(index), True)
            if own_by:
                order = {d: 1 << i for i, d in enumerate(sorted(own_by, key=lambda d: d.order))}
                own = self._marks(axis, order, self.view(block)) == (1 << len(order)) - 1
            self._positions[key] = index, own
        return self._positions[key]

    def own(self, value: Value, block: Block) -> np.ndarray | None:
        """Which entries of a block are no other block's; broadcasts to it. None: all."""
        mine = np.ones((1,) * len(value.axes), bool)
        for dimension in block:
            passes = np.zeros((1,) * len(value.axes), bool)
            for k, axis in enumerate(value.axes):
                if dimension in self.pruned(axis):
                    here = self.positions(axis, block, frozenset([dimension]))[1]
                    line = here[:1] if here.all() else here  # a size may be a name elsewhere
                    passes = passes | line.reshape([-1 if j == k else 1 for j in range(mine.ndim)])
            mine = mine & passes
        return None if mine.all() else mine

    def _marks(self, axis: Axis, bits: dict[Axis, int], view: View) -> np.ndarray:
        """Per position the set of dimensions that lead to it, as bits."""
        axis = axes.find(axis)
        if axis.kind == axes.LEAF:
            return np.full(view.size(axis), bits.get(axis, 0))
        kids = [self._marks(kid, bits, view) for kid in axis.kids]
        if axis.kind == axes.SUM:
            return np.concatenate(kids)
        if axis.kind == axes.PERM:
            whole = np.zeros(axis.size, int)
            whole[view.index(axis.kids[0])] = kids[0]
            return whole[axis.index][view.index(axis)]
        flat = np.zeros(1, int)
        for kid in kids:
            flat = (flat[:, None] | kid).reshape(-1)
        return flat

    def branches(self, axis: Axis) -> tuple[set[Block], Block]:
        """The sets of dimensions that meet at some position, and those that meet themselves."""
        axis = axes.find(axis)
        if axis.kind == axes.LEAF:
            return {frozenset([axis]) & frozenset(self.kept)}, KEPT
        kids = [self.branches(kid) for kid in axis.kids]
        twice = frozenset().union(*(t for _, t in kids))
        if axis.kind in (axes.SUM, axes.PERM):
            return set().union(*(b for b, _ in kids)), twice
        found = set()
        for combination in itertools.product(*(b for b, _ in kids)):
            met = frozenset().union(*combination)
            found.add(met)
            twice |= {d for d in met if sum(d in part for part in combination) > 1}
        return found, twice


def subsets(dimensions: Block) -> list[Block]:
    """All subsets, the empty one first."""
    ordered = sorted(dimensions, key=lambda d: d.order)
    return [
        frozenset(chosen)
        for n in range(len(ordered) + 1)
        for chosen in itertools.combinations(ordered, n)
    ]
