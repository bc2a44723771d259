"""Blocks: an array split by which dimensions are at their kept and which at their removed units.

A masked model's value over a dimension with kept units K and removed units R is put together from
its block at K and its block at R. Over two dimensions there are four blocks, and so on. Most are
known to be zero, or nobody asks for them; the others are evaluated by the very same equations, at
other positions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.numbering import Numbering
from jaxprune.ir.tape import Value
from jaxprune.rules.registry import KEPT, Block


class View:
    """Sizes and positions of axes when the leaves in ``chosen`` are restricted."""

    def __init__(self, chosen: Mapping[Axis, np.ndarray]):
        self._chosen, self._lengths = chosen, _Lengths(chosen)
        self._sizes: dict[Axis, int] = {}  # of every node that was asked for
        self._indices: dict[Axis, np.ndarray] = {}

    def size(self, axis: Axis) -> int:
        axis = axes.find(axis)
        if axis not in self._sizes:
            self._sizes[axis] = axes.size_of(axis, self._lengths, self._sizes)
        return self._sizes[axis]

    def shape(self, axs: Sequence[Axis]) -> tuple[int, ...]:
        return tuple(self.size(a) for a in axs)

    def index(self, axis: Axis) -> np.ndarray:
        """Positions, as int32 whether or not 64 bits are enabled: jax caches by the type."""
        return axes.index_of(axis, self._chosen, self._indices).astype(np.int32)


class _Lengths(Mapping[Axis, int]):
    """How many positions of each dimension are chosen."""

    def __init__(self, chosen: Mapping[Axis, np.ndarray]):
        self._chosen = chosen

    def __getitem__(self, dimension: Axis) -> int:
        return len(self._chosen[dimension])

    def __iter__(self) -> Iterator[Axis]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)


class _Blockwise(Mapping[Axis, np.ndarray]):
    """The positions of each pruned dimension in a block: of removed units in it, else of kept.

    A view of two tables: a copy for each block would be a table of all dimensions for each.
    """

    def __init__(self, split: Split, block: Block):
        self._split, self._block = split, block

    def __getitem__(self, dimension: Axis) -> np.ndarray:
        table = self._split.removed if dimension in self._block else self._split.kept
        return table[dimension]

    def __iter__(self) -> Iterator[Axis]:
        return iter(self._split.kept)

    def __len__(self) -> int:
        return len(self._split.kept)


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
        self._dims: dict[Value, Block] = {}
        self._branches: dict[Axis, tuple[set[Block], Block]] = {}
        self._positions: dict[tuple[Axis, Block, Block], tuple[np.ndarray, np.ndarray]] = {}

    def view(self, block: Block) -> View:
        if block not in self._views:
            self._views[block] = View(_Blockwise(self, block))
        return self._views[block]

    def pruned(self, axis: Axis) -> Block:
        """The pruned dimensions in an axis."""
        if axis not in self._pruned:
            axes.fold(axis, self._dimensions, self._pruned)
            self._pruned[axis] = self._pruned[axes.find(axis)]
        return self._pruned[axis]

    def _dimensions(self, node: Axis, of_kids: list[Block]) -> Block:
        return KEPT.union(*of_kids) if node.kids else frozenset({node} & self.kept.keys())

    def dims(self, value: Value) -> Block:
        if value not in self._dims:
            self._dims[value] = KEPT.union(*map(self.pruned, value.axes))
        return self._dims[value]

    def not_kept(self, axis: Axis, where: np.ndarray) -> Block:
        """The dimensions of which a unit that is not kept stands at one of these positions."""
        numbers, found = self.numbers, set[int]()
        for row in numbers.along(axis):
            there = row[where & (row >= 0)]
            found.update(numbers.owner[there[self._gone[there]]].tolist())
        return frozenset(numbers.dimensions[i] for i in found)

    @functools.cached_property
    def numbers(self) -> Numbering:
        """All pruned units."""
        return Numbering(self.kept)

    @functools.cached_property
    def _gone(self) -> np.ndarray:
        """Which of all pruned units are not kept."""
        gone = np.ones(self.numbers.total, bool)
        for dimension, index in self.kept.items():
            gone[self.numbers.of(dimension)][index] = False
        return gone

    def positions(self, axis: Axis, block: Block, own_by: Block) -> tuple[np.ndarray, np.ndarray]:
        """Positions along an axis in a block, and which of them pass all dimensions ``own_by``.

        In a concatenation of two dimensions the block of the first also shows the second, at its
        kept units: those positions are another block's.
        """
        key = axis, block & self.pruned(axis), own_by
        if key not in self._positions:
            index = self.view(block).index(axis)
            own = np.full(len(index), True)
            for dimension in own_by:
                units = self.numbers.units(axis, dimension)
                own &= np.logical_or.reduce([row[index] >= 0 for row in units])
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

    def branches(self, axis: Axis) -> tuple[set[Block], Block]:
        """The sets of dimensions that meet at some position, and those that meet themselves."""
        found: tuple[set[Block], Block] = axes.fold(axis, self._branches_of, self._branches)
        return found

    def _branches_of(
        self, node: Axis, of_kids: list[tuple[set[Block], Block]]
    ) -> tuple[set[Block], Block]:
        if node.kind is axes.LEAF:
            return {self.pruned(node)}, KEPT
        twice = KEPT.union(*(t for _, t in of_kids))
        if node.kind is not axes.PROD:
            return set().union(*(b for b, _ in of_kids)), twice
        found = set()
        for combination in itertools.product(*(b for b, _ in of_kids)):
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
