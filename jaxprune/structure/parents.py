"""Dimensions that may keep other units under each unit of a parent: per scanned layer, per head.

Where every use of a dimension is under one unit of a parent at a time, the units under each of
them may be put in an order of their own without changing the function. So other units may go
under each, as long as equally many do: they are put last, and the rest is ordinary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np

from jaxprune.ir import axes, primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import CALLS, CONTROL, Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules.control import step_length
from jaxprune.structure.chosen import looks_up, numbers_told
from jaxprune.structure.landing import Way, flat, landed, landings
from jaxprune.structure.rows import EQUAL, Rows, handed, looked_up, meets

NESTED = CALLS | CONTROL  # The programs that these hold are checked in their turn.


class Pair(NamedTuple):
    """Where a leaf holds a dimension and its parent: axes, and the unit at each position."""

    axis: int
    units: np.ndarray
    parent_axis: int
    parent_units: np.ndarray

    def spread(self, matrix: Any, rank: int, blank: Any) -> Any:
        """``matrix[parent unit, unit]`` at the leaf's rank; ``blank`` where there is no unit."""
        if self.axis == self.parent_axis:
            line = matrix[self.parent_units, self.units]
            there = (self.units >= 0) & (self.parent_units >= 0)
            shape = [len(line) if k == self.axis else 1 for k in range(rank)]
            return np.where(there, line, blank).reshape(shape)
        block = matrix[self.parent_units[:, None], self.units[None, :]]
        block = np.where(self.units[None, :] >= 0, block, blank)
        block = block if self.parent_axis < self.axis else block.T
        sizes = {self.parent_axis: len(self.parent_units), self.axis: len(self.units)}
        return block.reshape([sizes.get(k, 1) for k in range(rank)])


def pair(axs: Sequence[Axis], dimension: Axis, parent: Axis) -> Pair | None:
    """The pair of a leaf that holds the dimension once and its parent once; else None."""
    found = [
        [(k, u) for k, axis in enumerate(axs) for u in axes.units_along(axis, leaf)]
        for leaf in (dimension, parent)
    ]
    if any(len(places) != 1 for places in found):
        return None
    (k, units), (j, above) = found[0][0], found[1][0]
    inside = above[units >= 0] if j == k else above
    return Pair(k, units, j, above) if (inside >= 0).all() else None


def possible(param_axes: Sequence[Sequence[Axis]], dimension: Axis, parent: Axis) -> bool:
    """Whether all parameters that hold the dimension hold the parent, too."""
    owners = [axs for axs in param_axes if axes.holds(axs, dimension)]
    different = axes.find(dimension) is not axes.find(parent)
    return different and all(pair(axs, dimension, parent) is not None for axs in owners)


def covering(axis: Axis, known: dict[Axis, Any]) -> set[Axis]:
    """The leaves of which a unit stands at every position of an axis; ``known`` is axes.fold's."""

    def of(node: Axis, of_kids: list[set[Axis]]) -> set[Axis]:
        if node.kind is axes.LEAF:
            return {node}
        return set.intersection(*of_kids) if node.kind is axes.SUM else set().union(*of_kids)

    found: set[Axis] = axes.fold(axis, of, known)
    return found


def crossed(axis: Axis, covered: dict[Axis, Any], known: dict[Axis, Any]) -> set[Axis]:
    """The leaves that cover a factor of a product within an axis: others may stand under them."""

    def of(node: Axis, of_kids: list[set[Axis]]) -> set[Axis]:
        factors = node.kids if node.kind is axes.PROD else ()
        return set().union(*of_kids, *(covering(factor, covered) for factor in factors))

    found: set[Axis] = axes.fold(axis, of, known)
    return found


class Obstacles:
    """Why the units of a dimension can't have an order of their own under each of a parent.

    The argument stands in docs/parent_orders.md: the function stays as it is if each equation
    gives reordered results for reordered operands. What is asked of one program looks its equations
    up: those that hold no dimension but others are no obstacle.
    """

    def __init__(self, tape: Tape):
        self._tape = tape
        self._holding: dict[Tape, _Holding] = {}

    def between(self, dimension: Axis, parent: Axis) -> str | None:
        """The first obstacle; None: they can."""
        dimension = axes.find(dimension)
        proof = _Proof(dimension, axes.find(parent), self, {})
        found = next(proof.obstacles(self._tape), None)
        return found or (numbers_told(self._tape, dimension) if dimension.chosen else None)

    def holding(self, tape: Tape) -> _Holding:
        """Where a program's dimensions are."""
        if tape not in self._holding:
            self._holding[tape] = _Holding.of(tape)
        return self._holding[tape]


class _Holding(NamedTuple):
    """Where a program's dimensions are: inputs, positions of equations that hold no programs."""

    tape: Tape
    inputs: dict[Axis, list[Value]]
    nested: list[int]
    flat: dict[Axis, list[int]]

    @classmethod
    def of(cls, tape: Tape) -> _Holding:
        found = cls(tape, {}, [], {})
        for value in tape.inputs:
            for leaf in axes.distinct_leaves(value.axes):
                found.inputs.setdefault(leaf, []).append(value)
        for i, step in enumerate(tape.steps):
            if step.subs or primitives.kind(step) is Kind.LOOP:
                found.nested.append(i)
                continue
            for leaf in axes.distinct_leaves(a for v in [*step.ins, *step.outs] for a in v.axes):
                found.flat.setdefault(leaf, []).append(i)
        return found

    def steps(self, dimension: Axis) -> list[Step]:
        """The equations that hold a dimension or programs, in order."""
        return [self.tape.steps[i] for i in sorted([*self.nested, *self.flat.get(dimension, ())])]


class _Proof(NamedTuple):
    """The proof that a program passes an order for each unit of a parent on.

    ``one_by_one``: the program runs for one unit of the parent at a time, as a scan's body does.
    """

    dimension: Axis
    parent: Axis
    program: Obstacles
    rows: dict[Value, Rows]  # what holds the dimension and was looked up along the parent
    one_by_one: bool = False

    @property
    def leaves(self) -> tuple[Axis, ...]:
        return (self.dimension,) if self.one_by_one else (self.dimension, self.parent)

    def obstacles(self, tape: Tape) -> Iterator[str]:
        """Where a program may tell the units of one parent's unit from those of another."""
        holding = self.program.holding(tape)
        inputs = holding.inputs.get(self.dimension, ())
        if not all(v in self.rows or self._in_place(v) for v in inputs):
            yield "an input of a program holds them elsewhere"
        for step in holding.steps(self.dimension):
            if not (self._passes(step) or self._passes_rows(step)):
                at = f" at {step.where}" if step.where else ""
                yield f"{step.name}{at} tells them apart"
            inside = self._replace(one_by_one=True) if self._scans_parent(step) else self
            for sub in step.subs:
                self._tell_tangents(step, sub)
                yield from inside.obstacles(sub)
            self.rows.update(
                (out, self.rows[inner])
                for out, inner in zip(step.outs, step.subs[0].outputs if step.subs else ())
                if inner in self.rows
            )
            if not self._tangents_alike(step):
                yield f"{step.name} at {step.where} has a derivative that tells them apart"

    def _in_place(self, value: Value) -> bool:
        """Whether a value that holds the dimension has it under one unit of the parent."""
        if not axes.holds(value.axes, self.dimension):
            return True
        if self.one_by_one:  # the program's own unit of the parent must not meet the others
            return bool(_line(value, self.dimension)) and not axes.holds(value.axes, self.parent)
        return pair(value.axes, self.dimension, self.parent) is not None

    def _passes(self, step: Step) -> bool:
        """Whether a step gives reordered results for reordered operands."""
        mine = [v for v in [*step.ins, *step.outs] if axes.holds(v.axes, self.dimension)]
        length = _length(step)
        if length and (axes.holds(length, self.dimension) or mine and self._scans_a_part(length)):
            return False
        fixed = any(v.const is not None for v in mine)  # it has one order for all
        if fixed or not all(map(self._in_place, mine)):
            return False
        if step.subs:
            nested = primitives.kind(step) in NESTED
            return not mine or nested and all(starmap(self._alike, step.ties))
        choosing = bool(self.dimension.chosen) and looks_up(step, self.dimension)
        return not mine or choosing or self._lands(step)

    def _passes_rows(self, step: Step) -> bool:
        """The same of what was looked up along the parent; notes the rows of its results."""
        if self.one_by_one or self.dimension.chosen:
            return False
        mine = [v for v in step.ins if axes.holds(v.axes, self.dimension)]
        if step.subs:  # results are known once the programs are, see obstacles
            once = primitives.kind(step) in (Kind.REMAT, Kind.CUSTOM_JVP)
            return once and all(v in self.rows for v in mine)
        rows = [self.rows[v] for v in mine if v in self.rows]
        if not mine and primitives.kind(step) is not Kind.BROADCAST:
            return False
        if not mine:  # a number is spread over all units
            results: list[Rows | None] | None = handed(step, self.rows, self.dimension)
        elif not rows:
            found = looked_up(step, self.dimension, self.parent)
            placed = found is not None and len(mine) == 1 and self._in_place(mine[0])
            results = [found] if placed else None
        elif primitives.kind(step) is Kind.RAGGED:
            fits = len(mine) == 2 and meets(step, rows[0], self.dimension, self.parent)
            results = [None] if fits and self._in_place(step.ins[1]) else None
        else:
            results = handed(step, self.rows, self.dimension)
        if results is None:
            return False
        self.rows.update((v, found) for v, found in zip(step.outs, results) if found is not None)
        return True

    def _tell_tangents(self, step: Step, sub: Tape) -> None:
        """A rule's tangents are under the same units as the operands that they stand beside."""
        count = len(step.ins)
        if primitives.kind(step) is Kind.CUSTOM_JVP and len(sub.inputs) == 2 * count:
            pairs = zip(step.ins, sub.inputs[count:])
            self.rows.update((moving, self.rows[v]) for v, moving in pairs if v in self.rows)

    def _tangents_alike(self, step: Step) -> bool:
        """Whether what a rule gives is under the same units as the results."""
        mine = {self.rows[v] for v in step.outs if v in self.rows}
        rules = [
            v for sub in step.subs[1:] for v in sub.outputs if axes.holds(v.axes, self.dimension)
        ]
        return not mine or all(self.rows.get(v) in {*mine, EQUAL} for v in rules)

    def _scans_parent(self, step: Step) -> bool:
        return any(axes.find(axis) is self.parent for axis in _length(step))

    def _scans_a_part(self, length: Sequence[Axis]) -> bool:
        return axes.holds(length, self.parent) and axes.find(length[0]) is not self.parent

    def _alike(self, a: Value, b: Value) -> bool:
        """Whether two names of one array show the same units at the same positions."""
        if not (axes.holds(a.axes, self.dimension) or axes.holds(b.axes, self.dimension)):
            return True
        lines = [(_line(a, leaf), _line(b, leaf)) for leaf in (self.dimension, self.parent)]
        return all(
            (x is None and y is None)
            or (x is not None and y is not None and x[0] == y[0] and np.array_equal(x[1], y[1]))
            for x, y in lines
        )

    def _lands(self, step: Step) -> bool:
        """Whether all operands bring the dimension and its parent to one place of the frame."""
        found = landings(step)
        if found is None:
            return False
        summed: list[list[_Place]] = []
        for landing in found:
            operand, result = step.ins[landing.operand], step.outs[landing.result]
            if not axes.holds(operand.axes, self.dimension):
                continue
            found_places = [_place(operand, leaf, landing.ways) for leaf in self.leaves]
            places = [place for place in found_places if place is not None]
            if len(places) < len(self.leaves):
                return False
            if min(places[0].frame) >= len(result.shape):
                summed.append(places)
            elif (places[0].units >= 0).any() and not all(
                place.is_in(result, leaf) for place, leaf in zip(places, self.leaves)
            ):
                return False
        return all(a.same(b) for one in summed for a, b in zip(summed[0], one, strict=True))


class _Place(NamedTuple):
    """The units of a leaf dimension, at positions of a group of a frame's axes."""

    frame: tuple[int, ...]
    at: np.ndarray | None  # positions along the group, flattened; None: all
    units: np.ndarray

    def same(self, other: _Place) -> bool:
        return self.frame == other.frame and np.array_equal(self.units, other.units)

    def is_in(self, result: Value, leaf: Axis) -> bool:
        """Whether the result has these units at these positions."""
        found = _line(result, leaf)
        if found is None or found[0] not in self.frame:
            return False
        line = flat(result.shape, self.frame, *found)
        return np.array_equal(line if self.at is None else line[self.at], self.units)


def _place(operand: Value, leaf: Axis, ways: Sequence[Way]) -> _Place | None:
    found = _line(operand, leaf)
    way = next((w for w in ways if found and found[0] in w.axes), None)
    if found is None or way is None:
        return None
    return _Place(way.frame, way.target, landed(way, operand.shape, *found))


def _line(value: Value, leaf: Axis) -> tuple[int, np.ndarray] | None:
    """The axis that holds a leaf, and its unit at each position; None unless there is just one."""
    found = [(k, u) for k, axis in enumerate(value.axes) for u in axes.units_along(axis, leaf)]
    return found[0] if len(found) == 1 else None


def _length(step: Step) -> list[Axis]:
    """The axis that a scan runs along."""
    length = step_length(step) if primitives.kind(step) is Kind.LOOP else None
    return [] if length is None else [length]


class Order(NamedTuple):
    """The order of a dimension's units under each unit of its parent, those to keep first."""

    dimension: Axis
    parent: Axis
    order: np.ndarray  # (units of the parent, units): what comes first, second, ...

    def apply(self, leaf: Any, axs: Sequence[Axis], back: bool = False) -> Any:
        """Puts a leaf's entries in this order, or back."""
        found = pair(axs, self.dimension, self.parent)
        if found is None:
            return leaf
        order = np.argsort(self.order, axis=1) if back else self.order
        axis = axs[found.axis]
        rows = np.stack([axes.index_of(axis, {axes.find(self.dimension): o}) for o in order])
        rows = rows.astype(np.int32)
        if found.axis == found.parent_axis:
            lines = rows[np.maximum(found.parent_units, 0), np.arange(len(found.units))]
            return leaf.take(
                np.where(found.units >= 0, lines, np.arange(len(lines), dtype=np.int32)), found.axis
            )
        block = rows[found.parent_units]
        block = block if found.parent_axis < found.axis else block.T
        sizes = {found.parent_axis: len(found.parent_units), found.axis: len(found.units)}
        index = block.reshape([sizes.get(k, 1) for k in range(leaf.ndim)])
        return _take_along(leaf)(leaf, index, axis=found.axis)


def _take_along(leaf: Any) -> Callable[..., Any]:
    if isinstance(leaf, np.ndarray):
        return np.take_along_axis
    import jax.numpy as jnp

    return jnp.take_along_axis


def order_of(kept: np.ndarray, dimension: Axis, parent: Axis) -> Order | None:
    """The order for a matrix of what each unit of the parent keeps; None when it brings nothing.

    It brings what all units of the parent have masked beyond the units that are masked under each.
    Those go last, to be cut first. A unit of the parent that is masked itself keeps nothing and
    goes with any order.
    """
    there: Any = kept.any(axis=1)
    if not there.any():
        return None
    whole: Any = ~kept[there].any(axis=0)
    if (~kept[there]).sum(axis=1).min() <= whole.sum():
        return None
    kept = np.where(there[:, None], kept, kept[there][0])
    return Order(dimension, parent, np.argsort(~kept + 1 * whole, axis=1, kind="stable"))


class OwnedMask(NamedTuple):
    """The mask of a leaf that holds a dimension, with the leaf's shape and axes."""

    mask: np.ndarray
    shape: tuple[int, ...]
    axs: Sequence[Axis]


def kept_under(
    masks: Sequence[OwnedMask], dimension: Axis, parent: Axis, entries: int = 1
) -> np.ndarray:
    """(units of the parent, units): what all slots of so many entries keep at least in part."""
    kept = np.ones((parent.size, dimension.size), bool)
    for mask, shape, axs in masks:
        found = pair(axs, dimension, parent)
        if found is None:
            continue
        rest = tuple(k for k in range(len(shape)) if k not in (found.axis, found.parent_axis))
        if math.prod(shape[k] for k in rest) < entries:
            continue
        alive = np.zeros_like(kept)
        full = np.broadcast_to(mask, shape)
        seen = np.any(full, axis=rest)
        if found.axis == found.parent_axis:
            there = (found.units >= 0) & seen
            alive[found.parent_units[there], found.units[there]] = True
        else:
            seen = seen if found.parent_axis < found.axis else seen.T
            above, along = np.nonzero(np.logical_and(seen, found.units >= 0))
            alive[found.parent_units[above], found.units[along]] = True
        kept &= alive
    return kept
