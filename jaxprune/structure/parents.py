"""Dimensions that may keep other units under each unit of a parent: per scanned layer, per head.

Where every use of a dimension is under one unit of a parent at a time, the units under each of
them may be put in an order of their own without changing the function. So other units may go
under each, as long as equally many do: they are put last, and the rest is ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.jaxpr import compat
from jaxprune.jaxpr.tape import Step, Tape, Value
from jaxprune.rules.pointwise import POINTWISE, RESHARDING

# Primitives that treat all positions of an axis that they only pass on, or sum over, alike.
ALIKE = {
    *POINTWISE, *RESHARDING, "broadcast_in_dim", "concatenate", "cond", "custom_jvp_call",
    "custom_vjp_call", "checkpoint", "dot_general", "expand_dims", "pad", "ragged_dot",
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "remat",
    "remat2", "reshape", "scan", "slice", "split", "squeeze", "transpose", "while",
    "optimization_barrier",
}  # fmt: skip


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


def holds(axs: Sequence[Axis], dimension: Axis) -> bool:
    return any(dimension is leaf for axis in axs for leaf in axes.leaves(axis))


def possible(param_axes: Sequence[Sequence[Axis]], dimension: Axis, parent: Axis) -> bool:
    """Whether all parameters that hold the dimension hold the parent, too."""
    owners = [axs for axs in param_axes if holds(axs, dimension)]
    different = axes.find(dimension) is not axes.find(parent)
    return different and all(pair(axs, dimension, parent) is not None for axs in owners)


def independent(tape: Tape, dimension: Axis, parent: Axis) -> bool:
    """Whether the units under each unit of the parent may be in an order of their own."""
    return not any(_reasons(tape, axes.find(dimension), axes.find(parent), under=False))


def _reasons(tape: Tape, dimension: Axis, parent: Axis, under: bool) -> Iterator[Step | Value]:
    """What speaks against it. ``under``: the program runs for one unit of the parent."""

    def has(value: Value) -> bool:
        return holds(value.axes, dimension)

    for value in tape.inputs:
        if has(value) and not under and pair(value.axes, dimension, parent) is None:
            yield value
    for step in tape.steps:
        mine = [v for v in [*step.ins, *step.outs] if has(v)]
        if mine and step.name not in ALIKE or _runs_along(step, dimension):
            yield step
        alone = [v for v in mine if not under and pair(v.axes, dimension, parent) is None]
        fixed = [v for v in step.ins if v.const is not None and has(v)]
        yield from [*alone, *fixed]
        for sub in step.subs:
            yield from _reasons(sub, dimension, parent, under or _runs_along(step, parent))


def _runs_along(step: Step, dimension: Axis) -> bool:
    """A scan over a dimension: what its body is given has that axis cut off."""
    if step.name != "scan":
        return False
    rows = compat.scanned(step.eqn, step.ins)
    return bool(rows) and axes.find(rows[0].axes[0]) is dimension


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
    """The order for a matrix of what each unit of the parent keeps; None when all keep the same.

    A unit of the parent that is masked itself keeps nothing; it goes with any order.
    """
    there: Any = kept.any(axis=1)
    if not there.any() or (kept[there] == kept[there][0]).all():
        return None
    kept = np.where(there[:, None], kept, kept[there][0])
    return Order(dimension, parent, np.argsort(~kept, axis=1, kind="stable"))


def kept_under(
    masks: Sequence[np.ndarray],
    shapes: Sequence[tuple[int, ...]],
    param_axes: Sequence[Sequence[Axis]],
    dimension: Axis,
    parent: Axis,
) -> np.ndarray:
    """(units of the parent, units): what all slots keep at least in part."""
    kept = np.ones((parent.size, dimension.size), bool)
    for mask, shape, axs in zip(masks, shapes, param_axes, strict=True):
        found = pair(axs, dimension, parent)
        if found is None:
            continue
        alive = np.zeros_like(kept)
        full = np.broadcast_to(mask, shape)
        rest = tuple(k for k in range(len(shape)) if k not in (found.axis, found.parent_axis))
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
