"""Which numbers of a program are positions that it has chosen by value: experts, codes.

``top_k`` and ``argmax`` give positions of entries along an axis. As long as such numbers are only
moved, copied and looked up, they point at what was chosen; then the axis that is indexed by them
is the axis that was chosen along, and both may lose the same units: what is not there is not
chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxprune.ir import axes, compat, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.content import content, counted
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Value

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_LONGEST = 64  # A chain of more equations is not followed.


class Pointing(NamedTuple):
    """What whole numbers point at: positions along an axis, or what a table has at them."""

    axis: Axis
    table: tuple[int, ...] | None = None

    def read_by(self, table: np.ndarray) -> Pointing:
        """What a table has at these numbers."""
        known = range(self.axis.size) if self.table is None else self.table
        if max(known) >= len(table):
            return Pointing(self.axis, ())
        found = tuple(int(table[i]) for i in known)
        return Pointing(self.axis, None if found == (*range(len(found)),) else found)


def chosen_along(value: Value) -> Axis | None:
    """The axis along which all entries of a value are chosen positions, if there is one."""
    found = pointing(value)
    return found.axis if found is not None and found.table is None else None


def compared(step: Step) -> tuple[Axis, int] | None:
    """Where chosen positions are compared with each position there is: that axis, and which.

    The second is the axis of the comparison that counts them.
    """
    for value, other in (step.ins, step.ins[::-1]) if step.name in COMPARISONS else ():
        found = pointing(value)
        if found is not None:
            k = counted(other, found.table)
            if k is not None and other.shape[k] == found.axis.size:
                return found.axis, k
    return None


def counts_chosen(value: Value, depth: int = _LONGEST) -> Axis | None:
    """The axis along which a value is zero wherever nothing was chosen: it counts what was."""
    step = value.made
    if step is None or not depth:
        return None
    if step.name == "scatter-add":
        start, indexed = content(step.ins[0]), views.indexed(step)
        plain = start is not None and not start.any() and len(indexed) == 1
        found = chosen_along(step.ins[1]) if plain else None
        return None if found is None else step.ins[0].axes[indexed[0]]
    if step.name == "eq":
        pair = compared(step)
        return None if pair is None else value.axes[pair[1]]
    kinds = (Kind.REDUCTION, Kind.SQUEEZE, Kind.TRANSPOSE)
    if step.name in ("convert_element_type", "copy") or primitives.kind(step) in kinds:
        return counts_chosen(step.ins[0], depth - 1)
    return None


def component(indices: Value, k: int) -> Axis | None:
    """As :func:`chosen_along`, of one component of index vectors, which lie on the last axis."""
    step = indices.made
    joined = step is not None and primitives.kind(step) is Kind.CONCATENATE
    if step is None or not joined or views.concatenated(step) != len(indices.shape) - 1:
        return chosen_along(indices)
    for part in step.ins:
        if k < part.shape[-1]:
            return component(part, k)
        k -= part.shape[-1]
    return None


def origin(value: Value, depth: int = _LONGEST) -> Value | None:
    """The value whose numbers these are, entry by entry: unchanged, maybe with axes of size 1."""
    step = value.made
    if step is None or not depth:
        return value
    if primitives.kind(step) in (Kind.BROADCAST, Kind.RESHAPE, Kind.SQUEEZE):
        same = [n for n in value.shape if n != 1] == [n for n in step.ins[0].shape if n != 1]
        return origin(step.ins[0], depth - 1) if same else value
    handed = _HANDED.get(step.name)
    found = handed(step, step.outs.index(value)) if handed else []
    return origin(found[0], depth - 1) if len(found) == 1 else value


def choice(step: Step) -> Axis | None:
    """The axis along which a step chooses positions by value; its last result holds them."""
    kind = primitives.kind(step)
    if kind is Kind.POSITION:
        return step.ins[0].axes[views.reduction(step).axes[0]]
    if kind is Kind.SORT and len(step.eqn.outvars) > len(step.ins):
        return step.ins[0].axes[views.sorted_axis(step, len(step.ins[0].shape))]
    return None


def pointing(value: Value, depth: int = _LONGEST) -> Pointing | None:
    """What a value's numbers point at, if all of them are chosen by value."""
    if value.points is None:
        value.points = (_found(value, depth),)
    (found,) = value.points
    return None if found is None else found._replace(axis=axes.find(found.axis))


def _found(value: Value, depth: int) -> Pointing | None:
    if not depth:
        return None
    if value.outer is not None:
        return pointing(value.outer, depth - 1)
    step = value.made
    if step is None:
        return None
    j = step.outs.index(value)
    axis = choice(step)
    if axis is not None:
        return Pointing(axis) if j == len(step.outs) - 1 else None
    if primitives.kind(step) is Kind.GATHER:
        return _read(step, depth - 1)
    handed = _HANDED.get(step.name) or _HANDED_BY.get(primitives.kind(step))
    found = {pointing(v, depth - 1) for v in (handed(step, j) if handed else [])}
    return found.pop() if len(found) == 1 else None


def _read(step: Step, depth: int) -> Pointing | None:
    """What is looked up in positions, or at positions in a table of numbers.

    Unless a place out of bounds gives a number that counts.
    """
    fill, (numbers, indices) = step.params["fill_value"], step.ins[:2]
    if fill is not None and fill >= 0:
        return None
    found = pointing(indices, depth)
    table = content(numbers) if found is not None and len(numbers.shape) == 1 else None
    if found is None or table is None:
        return pointing(numbers, depth)
    return found.read_by(table)


Handed = Callable[[Step, int], list[Value]]  # (step, position of a result) -> what is in it


def _first(step: Step, j: int) -> list[Value]:
    return step.ins[:1]


def _own(step: Step, j: int) -> list[Value]:
    return [step.ins[j]]


def _all(step: Step, j: int) -> list[Value]:
    return list(step.ins)


def _inside(step: Step, j: int) -> list[Value]:
    """The results of the programs that a step runs once."""
    subs = step.subs[:1] if primitives.kind(step) in primitives.CALLS else step.subs
    return [sub.outputs[j] for sub in subs]


def _stacked(step: Step, j: int) -> list[Value]:
    """What each turn of a scan gives; what is carried may be anything at the start."""
    carried = compat.scan_parts(step.eqn).num_carry
    return [step.subs[0].outputs[j]] if j >= carried else []


def selected(step: Step, j: int = 0) -> list[Value]:
    """The cases that a selection may take.

    ``where(i < 0, i + n, i)`` never takes the first, for positions are not negative.
    """
    if step.name != "select_n":
        return []
    which, *cases = step.ins
    test = which.made
    if test is not None and test.name == "lt" and pointing(test.ins[0]) is not None:
        bound = content(test.ins[1])
        if bound is not None and (bound <= 0).all():
            return cases[:1]
    return cases


def _bounded(step: Step, j: int) -> list[Value]:
    """A maximum or minimum with a number that no position passes."""
    is_low = step.name == "max"
    for value, bound in (step.ins, step.ins[::-1]):
        if _is_idle(value, bound if is_low else None, None if is_low else bound):
            return [value]
    return []


def _clamped(step: Step, j: int) -> list[Value]:
    low, value, high = step.ins
    return [value] if _is_idle(value, low, high) else []


def _is_idle(value: Value, low: Value | None, high: Value | None) -> bool:
    """Whether positions are within bounds, where they are known."""
    found = pointing(value)
    ends = [None if end is None else content(end) for end in (low, high)]
    if found is None or any(x is None and end is not None for x, end in zip(ends, (low, high))):
        return False
    largest = max(found.table or (found.axis.size - 1,))
    below = ends[0] is None or (ends[0] <= 0).all()
    return bool(below and (ends[1] is None or (ends[1] >= largest).all()))


_HANDED: dict[str, Handed] = {
    "convert_element_type": _first,
    "copy": _first,
    "name": _first,
    "stop_gradient": _first,
    "select_n": selected,
    "max": _bounded,
    "min": _bounded,
    "clamp": _clamped,
}

_HANDED_BY: dict[Kind, Handed] = {
    **dict.fromkeys(
        [
            Kind.TYPE, Kind.RESHARDING, Kind.TRANSPOSE, Kind.SQUEEZE, Kind.BROADCAST, Kind.RESHAPE,
            Kind.SPLIT, Kind.SLICE, Kind.UNSTACK, Kind.TILE, Kind.REVERSE,
            Kind.DYNAMIC_SLICE,
        ],
        _first,
    ),
    Kind.EACH: _own,
    Kind.SORT: _own,
    Kind.CONCATENATE: _all,
    Kind.STACK: _all,
    **dict.fromkeys([*primitives.CALLS, Kind.BRANCH], _inside),
    Kind.LOOP: _stacked,
}  # fmt: skip
