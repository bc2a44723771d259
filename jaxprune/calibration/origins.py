"""Where an array of a program comes from: which axes of which parameter its own axes are.

An axis of a derived array is a tuple of factors, row-major. Reshapes split and merge factors,
transposes move them; an operation that does anything else ends the trail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

from jaxprune.ir import primitives, views
from jaxprune.ir.primitives import Kind, Passes


class Factor(NamedTuple):
    """A part of one axis of a leaf: positions ``start + stride * (0, 1, ..., size - 1)``."""

    axis: int
    stride: int
    size: int
    start: int = 0


class Origin(NamedTuple):
    """An array that holds a leaf's entries, in another layout."""

    leaf: int  # its number among the leaves
    axes: tuple[tuple[Factor, ...], ...]  # of the array; () for an axis that the leaf lacks
    scanned: tuple[int, ...] = ()  # the leaf's axes that loops around this place run along
    picked: tuple[tuple[int, int], ...] = ()  # (axis of the leaf, position) taken by indexing


def of_leaf(leaf: int, shape: Sequence[int]) -> Origin:
    return Origin(leaf, tuple((Factor(k, 1, n),) for k, n in enumerate(shape)))


def scan_row(origin: Origin) -> Origin | None:
    """What one turn of a loop sees of an array that the loop runs along."""
    first = origin.axes[0]
    if len(first) != 1 or first[0].stride != 1 or first[0].start != 0:
        return None
    return origin._replace(axes=origin.axes[1:], scanned=(*origin.scanned, first[0].axis))


def _transpose(origin: Origin, eqn: Any) -> Origin:
    return origin._replace(axes=tuple(origin.axes[k] for k in views.permutation(eqn)))


def _squeeze(origin: Origin, eqn: Any) -> Origin:
    stay = views.squeezed(eqn, len(origin.axes))
    return origin._replace(axes=tuple(origin.axes[k] for k in stay))


def _broadcast(origin: Origin, eqn: Any) -> Origin | None:
    places, shape = views.broadcast(eqn)
    axes: list[tuple[Factor, ...]] = [()] * len(shape)
    for source, target in enumerate(places):
        if eqn.invars[0].aval.shape[source] == shape[target]:
            axes[target] = origin.axes[source]
    return origin._replace(axes=tuple(axes))


def _reshape(origin: Origin, eqn: Any) -> Origin | None:
    """Deals the factors, in order, to the new axes."""
    if views.reshape_order(eqn) is not None:
        return None
    if is_broadcast(origin, eqn.invars[0].aval.shape):
        return None
    left = [f for axis in origin.axes for f in axis]
    axes = []
    for size in eqn.outvars[0].aval.shape:
        taken = _take(left, size)
        if taken is None:
            return None
        axes.append(taken)
    return origin._replace(axes=tuple(axes))


def _take(left: list[Factor], size: int) -> tuple[Factor, ...] | None:
    """Takes factors of ``size`` together from the front, splitting the last one if need be."""
    if size == 1:
        return (left.pop(0),) if left and left[0].size == 1 else ()
    taken: list[Factor] = []
    while size > 1:
        f = left.pop(0)
        if size % f.size == 0:
            taken.append(f)
            size //= f.size
        elif f.size % size == 0 and f.start == 0:
            inner = f.size // size
            taken.append(Factor(f.axis, f.stride * inner, size))
            left.insert(0, Factor(f.axis, f.stride, inner))
            size = 1
        else:
            return None
    return tuple(taken)


def _slice(origin: Origin, eqn: Any) -> Origin | None:
    cut = views.slices(eqn)
    if any(stride != 1 for stride in cut.strides):
        return None
    axes, picked = [], list(origin.picked)
    shape = eqn.invars[0].aval.shape
    for axis, start, stop, size in zip(origin.axes, cut.starts, cut.stops, shape):
        if (start, stop) == (0, size):
            axes.append(axis)
        elif len(axis) != 1 or axis[0].stride != 1:
            return None
        elif stop - start == 1:
            picked.append((axis[0].axis, axis[0].start + start))
            axes.append(())
        else:
            axes.append((axis[0]._replace(start=axis[0].start + start, size=stop - start),))
    return origin._replace(axes=tuple(axes), picked=tuple(picked))


# How a primitive lays out what it reads: the origin of its result, None where the trail ends.
_LAYOUTS: dict[Kind, Callable[[Origin, Any], Origin | None]] = {
    Kind.RESHAPE: _reshape,
    Kind.TRANSPOSE: _transpose,
    Kind.SQUEEZE: _squeeze,
    Kind.BROADCAST: _broadcast,
    Kind.SLICE: _slice,
}


def is_transparent(eqn: Any) -> bool:
    """Whether an array that comes from a weight may come out of an equation."""
    row = primitives.of(eqn)
    return Passes.WEIGHT in row.passes or row.kind in _LAYOUTS


def passed(origin: Origin, eqn: Any) -> Origin | None:
    """The origin of a transparent equation's result, None where the trail ends."""
    layout = _LAYOUTS.get(primitives.kind(eqn))
    return origin if layout is None else layout(origin, eqn)


def is_broadcast(origin: Origin, shape: Sequence[int]) -> bool:
    """Has an array of this shape an axis along which the leaf's entries repeat?"""
    return any(prod(f.size for f in axis) == 1 < n for axis, n in zip(origin.axes, shape))


class Layout(NamedTuple):
    """Which axes of a leaf a contraction multiplies with what; in the order of the leaf."""

    batch: tuple[int, ...]  # one matrix each: scanned layers, experts
    ins: tuple[int, ...]
    outs: tuple[int, ...]


def layout(
    origin: Origin, shape: Sequence[int], contracted: Sequence[int], batch: Sequence[int]
) -> Layout | None:
    """The layout of a leaf of ``shape`` whose derived array is contracted; None: not whole axes."""
    factors = [f for k in contracted for f in origin.axes[k]]
    batched = [f for k in batch for f in origin.axes[k]]
    for axis in {f.axis for f in factors + batched}:
        if prod(f.size for f in factors + batched if f.axis == axis) != shape[axis]:
            return None
    ins = {f.axis for f in factors}
    every = {f.axis for f in batched} | set(origin.scanned) | {k for k, _ in origin.picked}
    if every & ins:
        return None
    outs = tuple(k for k in range(len(shape)) if k not in every | ins)
    return Layout(tuple(sorted(every)), tuple(sorted(ins)), outs)
