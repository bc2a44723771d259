"""Rows under units of a parent: what a token sees of the experts that it has chosen.

Behind a look-up the parent's axis is gone, and each row of the result, one for each token, is under
the unit that it was looked up at. Two arrays whose rows were looked up at the same places meet
row by row, so that units under the parent may be in an order of their own there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune.ir import axes, positions, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Value
from jaxprune.structure.landing import Landing, landings


class Rows(NamedTuple):
    """Where the units of a dimension are, and which axes' positions are under units of a parent.

    ``key`` says which unit each row is under: the positions looked up, or the sizes of groups.
    """

    axis: int
    along: tuple[int, ...]
    key: Value | None


EQUAL = Rows(-1, (), None)  # All units are alike: a number that was spread over them.


def place(value: Value, dimension: Axis) -> int | None:
    """The axis of a value that is the dimension, if it holds it just once and as a whole."""
    found = [k for k, a in enumerate(value.axes) for leaf in axes.leaves(a) if leaf is dimension]
    alone = len(found) == 1 and axes.find(value.axes[found[0]]) is dimension
    return found[0] if alone else None


def looked_up(step: Step, dimension: Axis, parent: Axis) -> Rows | None:
    """The rows that a step looks up along the parent; None where it does something else."""
    how = {Kind.GATHER: _gathered, Kind.RAGGED: _grouped}.get(primitives.kind(step))
    return None if how is None else how(step, dimension, parent)


def _gathered(step: Step, dimension: Axis, parent: Axis) -> Rows | None:
    table, indices = step.ins[:2]
    indexed, axis = views.indexed(step), place(step.outs[0], dimension)
    if not _is_along([table.axes[k] for k in indexed], parent) or axis is None:
        return None
    windows = views.windows(step)
    along = tuple(k for k in range(len(step.outs[0].shape)) if k not in windows)
    key = positions.origin(indices)
    whole = key is not None and key.shape == indices.shape[:-1]
    return Rows(axis, along, key) if whole and key is not None else None


def _grouped(step: Step, dimension: Axis, parent: Axis) -> Rows | None:
    """Rows of a ``ragged_dot`` that makes the dimension."""
    numbers, kernel = views.ragged(step), step.ins[1]
    axis, groups = place(step.outs[0], dimension), numbers.rhs_group
    plain = not numbers.dims.lhs_batch and len(numbers.dims.lhs_contract) == 1
    if axis is None or not plain or not _is_along([kernel.axes[k] for k in groups], parent):
        return None
    return Rows(axis, numbers.lhs_ragged, positions.origin(step.ins[2]) or step.ins[2])


def meets(step: Step, rows: Rows, dimension: Axis, parent: Axis) -> bool:
    """Whether a ``ragged_dot`` sums rows with the kernels of the groups that they are under."""
    numbers, kernel = views.ragged(step), step.ins[1]
    summed = zip(numbers.dims.lhs_contract, numbers.dims.rhs_contract)
    return (
        _is_along([kernel.axes[k] for k in numbers.rhs_group], parent)
        and (rows.axis, place(kernel, dimension)) in [*summed]
        and rows.along == numbers.lhs_ragged
        and rows.key is (positions.origin(step.ins[2]) or step.ins[2])
    )


def handed(step: Step, rows: dict[Value, Rows], dimension: Axis) -> list[Rows | None] | None:
    """What a step's results are under; None where it tells rows apart, or mixes them."""
    found, results = landings(step), list[Rows | None]()
    for j, out in enumerate(step.outs):
        ways = [x for x in found or () if x.result == j]
        mine = [x for x in ways if axes.holds(step.ins[x.operand].axes, dimension)]
        varying = [x for x in mine if rows.get(step.ins[x.operand]) is not EQUAL]
        if found is not None and not varying:
            results.append(EQUAL if axes.holds(out.axes, dimension) else None)
            continue
        frames = {_frame(step, x, rows) for x in varying}
        if len(frames) != 1 or None in frames:
            return None
        (frame,) = frames
        assert frame is not None
        if frame.axis >= len(out.shape):
            results.append(None)
            continue
        if place(out, dimension) != frame.axis or max(frame.along) >= len(out.shape):
            return None
        results.append(frame)
    return results


def _is_along(looked_up: Sequence[Axis], parent: Axis) -> bool:
    """Whether places along an axis, the only one, say which unit of the parent is meant."""
    return len(looked_up) == 1 and parent in axes.leaves(looked_up[0])


def _frame(step: Step, landing: Landing, rows: dict[Value, Rows]) -> Rows | None:
    """The rows of an operand in the frame of a step."""
    own = rows.get(step.ins[landing.operand])
    straight: dict[int, Any] = {
        way.axes[0]: way.frame[0]
        for way in landing.ways
        if len(way.axes) == len(way.frame) == 1 and way.source is None and way.target is None
    }
    if own is None or not {own.axis, *own.along} <= straight.keys():
        return None
    return Rows(straight[own.axis], tuple(straight[k] for k in own.along), own.key)
