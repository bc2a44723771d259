"""Reductions, cumulative sums, positions, sorting and choosing by value.

What is chosen by value may lose units when they count as not there: then the choice is among the
kept ones, and the positions that it gives are those of the whole program.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxprune.ir import axes, compat, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.indexing import in_the_whole
from jaxprune.rules.registry import Mix, View, register
from jaxprune.rules.zeros import Zeros

# Operations for which a zero adds nothing; None: of no operation that joins two blocks (xor).
ZERO_IS_NEUTRAL = {"sum", "or", None}


def couple_reduce(step: Step) -> list[list[Axis]]:
    gone = views.reduction(step).axes
    return [[a for k, a in enumerate(step.ins[0].axes) if k not in gone]]


def mixes_reduce(step: Step, known: list[Zeros]) -> list[Mix]:
    gone, combine = views.reduction(step)
    zero_is_neutral = combine in ZERO_IS_NEUTRAL
    return [
        Mix(
            a,
            known[0].along(k) if zero_is_neutral else np.zeros(a.size, bool),
            combine or "none",
            ((0, k),),
        )
        for k, a in enumerate(step.ins[0].axes)
        if k in gone
    ]


def zeros_reduce(step: Step, known: list[Zeros]) -> list[Zeros]:
    """A reduction of zeros is zero, a max or min, too; of nothing it may be infinite, or one."""
    gone, combine = views.reduction(step)
    if combine not in ZERO_IS_NEUTRAL and any(step.ins[0].shape[k] == 0 for k in gone):
        return [zeros.unknown(step.eqn.outvars[0].aval.shape)]
    vectors = [v for k, v in enumerate(known[0].axes) if k not in gone]
    return [Zeros(known[0].all, tuple(vectors))]


register(
    *primitives.names(Kind.REDUCTION),
    couple=couple_reduce, zeros=zeros_reduce, mixes=mixes_reduce,
)  # fmt: skip


def couple_position(step: Step) -> list[list[Axis]]:
    for k in views.reduction(step).axes:
        step.choose(step.ins[0].axes[k], 1)
    return couple_reduce(step)


def evaluate_position(view: View, step: Step, xs: list[Any]) -> list[Any]:
    (found,) = compat.bind(step.eqn, xs)
    return [in_the_whole(view, step.ins[0].axes[views.reduction(step).axes[0]], found)]


register(*primitives.names(Kind.POSITION), couple=couple_position, evaluate=evaluate_position)


def couple_generic(step: Step) -> list[list[Axis]]:
    """``lax.reduce`` with a function of the user's: only the axes that stay pass."""
    operands, gone = step.ins[: len(step.ins) // 2], step.params["dimensions"]
    for v in operands:
        for k, (a, b) in enumerate(zip(operands[0].axes, v.axes, strict=True)):
            if k in gone:
                step.freeze(b, "reduced by a function")
            else:
                step.unify(a, b)
    stay = [a for k, a in enumerate(operands[0].axes) if k not in gone]
    return [stay] * len(step.eqn.outvars)


register("reduce", couple=couple_generic)


def couple_same(step: Step) -> list[list[Axis]]:
    return [list(step.ins[0].axes)] * len(step.eqn.outvars)


def mixes_cumulative(step: Step, known: list[Zeros]) -> list[Mix]:
    axis = step.params["axis"]
    sums = primitives.of(step).combine == "sum"
    neutral = known[0].along(axis) if sums else np.zeros(step.ins[0].shape[axis], bool)
    return [Mix(step.ins[0].axes[axis], neutral, "none")]


def zeros_cumulative(step: Step, known: list[Zeros]) -> list[Zeros]:
    """Along its axis a sum, max or min is zero until the first entry that may not be."""
    axis, vectors = step.params["axis"], list(known[0].axes)
    back = slice(None, None, -1 if step.params["reverse"] else 1)
    carry = np.logical_or if step.name == "cumprod" else np.logical_and
    vectors[axis] = carry.accumulate(vectors[axis][back])[back]
    return [Zeros(known[0].all, tuple(vectors))]


register(
    "cumsum", "cumprod", "cummax", "cummin",
    couple=couple_same, zeros=zeros_cumulative, mixes=mixes_cumulative,
)  # fmt: skip
register("cumlogsumexp", couple=couple_same, mixes=mixes_cumulative)


def couple_chosen(step: Step) -> list[list[Axis]]:
    """``top_k``: which entries it gives depends on their values; how many doesn't."""
    operand, axis = step.ins[0].axes, views.sorted_axis(step, len(step.ins[0].shape))
    count = step.eqn.outvars[0].aval.shape[axis]
    if count == operand[axis].size:
        step.freeze(operand[axis], "all of them are chosen")
    step.choose(operand[axis], count)
    found = axes.leaf(count)
    step.freeze(found, "sorted by value")
    return [[*operand[:axis], found, *operand[axis + 1 :]]] * 2


def evaluate_chosen(view: View, step: Step, xs: list[Any]) -> list[Any]:
    k = views.sorted_axis(step, len(step.ins[0].shape))
    along, count = step.ins[0].axes[k], step.outs[0].shape[k]
    left = view.size(along)
    if left < count:
        raise ValueError(
            f"{step.name} at {step.where} chooses {count} of {along.size} units, and the masks "
            f"leave {left}: keep at least {count}"
        )
    values, found = compat.bind(step.eqn, xs)
    return [values, in_the_whole(view, along, found)]


def couple_sorted(step: Step) -> list[list[Axis]]:
    """Sorting moves entries along one axis by their values: that axis is frozen."""
    axis = views.sorted_axis(step, len(step.ins[0].shape))
    for v in step.ins:
        step.freeze(v.axes[axis], "sorted by value")
        for k, a in enumerate(v.axes):
            if k != axis:
                step.unify(step.ins[0].axes[k], a)
    results = []
    for var in step.eqn.outvars:
        axs = list(step.ins[0].axes)
        if var.aval.shape[axis] != step.ins[0].shape[axis]:  # top_k
            axs[axis] = axes.leaf(var.aval.shape[axis])
            step.freeze(axs[axis], "sorted by value")
        results.append(axs)
    return results


def zeros_sorted(step: Step, known: list[Zeros]) -> list[Zeros]:
    """Entries move along one axis only; the positions that top_k gives are unknown."""
    results, axis = [], views.sorted_axis(step, len(step.ins[0].shape))
    for k, var in enumerate(step.eqn.outvars):
        if k >= len(known):
            results.append(zeros.unknown(var.aval.shape))
            continue
        vectors = list(known[k].axes)
        vectors[axis] = np.full(var.aval.shape[axis], known[k].all)
        results.append(Zeros(known[k].all, tuple(vectors)))
    return results


register("sort", "approx_top_k", couple=couple_sorted, zeros=zeros_sorted)
register("top_k", couple=couple_chosen, zeros=zeros_sorted, evaluate=evaluate_chosen)
