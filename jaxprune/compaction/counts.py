"""Counts that a program holds as literals: the 768.0 by which a mean divides.

The masked model divides by the full count. A module written at the small size divides by what is
left; ``semantics="kept"`` does the same, and these are the literals that it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jaxprune.compaction.blocks import Split, View
from jaxprune.ir import axes, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind, Passes
from jaxprune.ir.tape import Step, Tape, Value, concrete

# How a program divides by a count -> (the count's operand, that of the sum) as they may stand.
_SIDES = {"quotient": [(1, 0)], "prod": [(0, 1), (1, 0)]}


class Count(NamedTuple):
    """An operand that is the number of summed entries, less ``ddof``, or one over it."""

    operand: int
    summed: tuple[Axis, ...]
    ddof: int

    def put(self, xs: Sequence[Any], view: View) -> list[Any]:
        left = prod(view.size(axis) for axis in self.summed) - self.ddof
        old = np.asarray(xs[self.operand])
        with np.errstate(divide="ignore"):  # n - 1 of a single unit is 0, as in a small module
            number = np.asarray(left if old > 1 else np.divide(1.0, left), old.dtype)
        return [number if i == self.operand else x for i, x in enumerate(xs)]


Counts = dict[Step, Count]


def find(tape: Tape, split: Split) -> Counts:
    """Divisions of a sum over pruned axes by the number of its entries."""
    found: Counts = {}
    summed: dict[Value, tuple[Axis, ...]] = {}
    made_by: dict[Value, Step] = {}
    for step in tape.steps:
        for sub in step.subs:
            found |= find(sub, split)
        made_by |= dict.fromkeys(step.outs, step)
        before = summed.get(step.ins[0], ()) if step.ins else ()
        row = primitives.of(step)
        if row.kind is Kind.REDUCTION and row.combine == "sum":
            over = tuple(step.ins[0].axes[k] for k in views.reduction(step).axes)
            summed[step.outs[0]] = (*before, *over)
        elif Passes.SUM in row.passes and before:
            summed[step.outs[0]] = before
        elif row.kind is Kind.ELEMENTWISE:
            for i, other in _SIDES.get(row.combine or "", ()):
                over = summed.get(step.ins[other], ())
                if any(split.pruned(axis) for axis in over):
                    found |= _count(step, i, over, made_by)
    return found


def _count(step: Step, i: int, over: tuple[Axis, ...], made_by: dict[Value, Step]) -> Counts:
    """Whether operand ``i`` of a step is the count; ``n - ddof`` may be computed from it."""
    number, full = concrete(step.ins[i].const), prod(axes.find(axis).size for axis in over)
    maker, factor = made_by.get(step.ins[i]), primitives.of(step).combine == "prod"
    if number is None and maker is not None and primitives.of(maker).combine == "difference":
        return _count(maker, 0, over, {})
    for ddof in (0, 1):
        wanted = 1 / max(full - ddof, 1) if factor else full - ddof
        if number is not None and number.size == 1 and np.isclose(number.item(), wanted, 1e-6):
            return {step: Count(i, over, ddof)}
    return {}
