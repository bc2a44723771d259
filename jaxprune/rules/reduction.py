"""Reductions, cumulative sums, positions and windows."""

from __future__ import annotations

import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.jaxpr.tape import Step
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
}


def couple_reduce(step: Step) -> list[list[Axis]]:
    gone = step.params["axes"]
    return [[a for k, a in enumerate(step.ins[0].axes) if k not in gone]]


def mixes_reduce(step: Step, known: list[Zeros]) -> list[Mix]:
    combine = REDUCTIONS[step.name]
    zero_is_neutral = combine in ("sum", "or")
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
    """A reduction of zeros is zero: for max and min of an all-zero slice, too."""
    gone = step.params["axes"]
    vectors = [v for k, v in enumerate(known[0].axes) if k not in gone]
    return [Zeros(known[0].all, tuple(vectors))]


register(*REDUCTIONS, couple=couple_reduce, zeros=zeros_reduce, mixes=mixes_reduce)


def couple_position(step: Step) -> list[list[Axis]]:
    for k in step.params["axes"]:
        step.freeze(step.ins[0].axes[k], "the result is a position along it")
    return couple_reduce(step)


register("argmax", "argmin", couple=couple_position)


def couple_same(step: Step) -> list[list[Axis]]:
    return [list(step.ins[0].axes)] * len(step.eqn.outvars)


def mixes_cumulative(step: Step, known: list[Zeros]) -> list[Mix]:
    axis = step.params["axis"]
    neutral = known[0].along(axis) if step.name == "cumsum" else np.zeros(step.ins[0].shape[axis])
    return [Mix(step.ins[0].axes[axis], neutral.astype(bool), "none")]


register(
    "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp",
    couple=couple_same, mixes=mixes_cumulative,
)  # fmt: skip


def couple_sorted(step: Step) -> list[list[Axis]]:
    """Sorting moves entries along one axis by their values: that axis is frozen."""
    last = len(step.ins[0].shape) - 1
    axis = step.params.get("dimension", step.params.get("axis", last))
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


register("sort", "top_k", couple=couple_sorted)


def couple_window(step: Step) -> list[list[Axis]]:
    """Pooling: axes with window 1, stride 1 and no padding pass, the others are frozen."""
    p, result = step.params, []
    for k, size in enumerate(step.eqn.outvars[0].aval.shape):
        passes = (
            p["window_dimensions"][k] == p["window_strides"][k] == 1
            and tuple(p["padding"][k]) == (0, 0)
            and p.get("base_dilation", (1,) * 99)[k] == 1
        )
        axis = step.ins[0].axes[k] if passes else axes.leaf(size)
        if not passes:
            step.freeze(step.ins[0].axes[k], "pooled over")
            step.freeze(axis, "pooled over")
        result.append(axis)
    return [result]


def zeros_window(step: Step, known: list[Zeros]) -> list[Zeros]:
    """A channel of zeros pools to zeros; a padded max sees -inf beside them, never a value."""
    shape = step.eqn.outvars[0].aval.shape
    if known[0].all:
        return [zeros.everywhere(shape)]
    vectors = [
        v if len(v) == n else np.zeros(n, bool) for v, n in zip(known[0].axes, shape, strict=True)
    ]
    pooled = [w != 1 for w in step.params["window_dimensions"]]
    return [zeros.of_axes([np.zeros_like(v) if p else v for v, p in zip(vectors, pooled)])]


register(
    "reduce_window_sum", "reduce_window_max", "reduce_window_min",
    couple=couple_window, zeros=zeros_window,
)  # fmt: skip
