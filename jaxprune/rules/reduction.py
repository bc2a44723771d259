"""Reductions, cumulative sums, positions and sorting."""

from __future__ import annotations

import numpy as np

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.registry import Mix, register
from jaxprune.rules.zeros import Zeros

# primitive -> how two blocks of the reduced axis are put together again
REDUCTIONS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_prod": "prod",
    "reduce_or": "or",
    "reduce_and": "and",
    "reduce_xor": "none",
}

NOTHING_IS_ZERO = {"reduce_sum", "reduce_or", "reduce_xor"}


def couple_reduce(step: Step) -> list[list[Axis]]:
    gone = step.params["axes"]
    return [[a for k, a in enumerate(step.ins[0].axes) if k not in gone]]


def mixes_reduce(step: Step, known: list[Zeros]) -> list[Mix]:
    combine = REDUCTIONS[step.name]
    zero_is_neutral = step.name in NOTHING_IS_ZERO
    return [
        Mix(
            a,
            known[0].along(k) if zero_is_neutral else np.zeros(a.size, bool),
            combine,
            ((0, k),),
        )
        for k, a in enumerate(step.ins[0].axes)
        if k in step.params["axes"]
    ]


def zeros_reduce(step: Step, known: list[Zeros]) -> list[Zeros]:
    """A reduction of zeros is zero, a max or min, too; of nothing it may be infinite, or one."""
    gone = step.params["axes"]
    if step.name not in NOTHING_IS_ZERO and any(step.ins[0].shape[k] == 0 for k in gone):
        return [zeros.unknown(step.eqn.outvars[0].aval.shape)]
    vectors = [v for k, v in enumerate(known[0].axes) if k not in gone]
    return [Zeros(known[0].all, tuple(vectors))]


register(*REDUCTIONS, couple=couple_reduce, zeros=zeros_reduce, mixes=mixes_reduce)


def couple_position(step: Step) -> list[list[Axis]]:
    for k in step.params["axes"]:
        step.freeze(step.ins[0].axes[k], "the result is a position along it")
    return couple_reduce(step)


register("argmax", "argmin", couple=couple_position)


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
    neutral = known[0].along(axis) if step.name == "cumsum" else np.zeros(step.ins[0].shape[axis])
    return [Mix(step.ins[0].axes[axis], neutral.astype(bool), "none")]


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


def _sorted_axis(step: Step) -> int:
    p, last = step.params, len(step.ins[0].shape) - 1
    names = [n for n in ("dimension", "axis", "reduction_dimension") if n in p]
    return (p[names[0]] if names else last) % (last + 1)


def couple_sorted(step: Step) -> list[list[Axis]]:
    """Sorting moves entries along one axis by their values: that axis is frozen."""
    axis = _sorted_axis(step)
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
    results, axis = [], _sorted_axis(step)
    for k, var in enumerate(step.eqn.outvars):
        if k >= len(known):
            results.append(zeros.unknown(var.aval.shape))
            continue
        vectors = list(known[k].axes)
        vectors[axis] = np.full(var.aval.shape[axis], known[k].all)
        results.append(Zeros(known[k].all, tuple(vectors)))
    return results


register("sort", "top_k", "approx_top_k", couple=couple_sorted, zeros=zeros_sorted)
