"""Fused attention kernels: batch and heads pass, positions and the width of a head are frozen.

The kernel reads the width for its scale and its tiling, and the mask's form by position. Grouped
queries make the query heads a product, ``Prod(key heads, queries per key head)``.
"""

from __future__ import annotations

import numpy as np

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step, Value
from jaxprune.rules import zeros
from jaxprune.rules.registry import register
from jaxprune.rules.zeros import Zeros

BNTH = 1  # Layout 0 is (batch, positions, heads, width), 1 swaps the middle two.


def _heads_at(step: Step) -> int:
    return 1 if step.params["layout"] == BNTH else 2


def _freeze_rest(step: Step, v: Value, passing: tuple[int, ...]) -> None:
    for k, axis in enumerate(v.axes):
        if k not in passing:
            step.freeze(axis, "fused attention")


def couple_attention(step: Step) -> list[list[Axis]]:
    at, (query, key, value), others = _heads_at(step), step.ins[:3], step.ins[3:]
    batch, heads, few = query.axes[0], query.axes[at], key.axes[at]
    for v in (key, value):
        step.unify(batch, v.axes[0])
        step.unify(few, v.axes[at])
    if heads.size == few.size:
        step.unify(heads, few)
    else:
        step.unify(heads, axes.prod([few, axes.leaf(heads.size // few.size)]))
    for v in (query, key, value):
        _freeze_rest(step, v, (0, at))
    for v in others:
        _couple_bias(step, v, batch, heads)
    return [_result_axes(step, v.aval.shape, batch, heads) for v in step.eqn.outvars]


def _couple_bias(step: Step, v: Value, batch: Axis, heads: Axis) -> None:
    """A bias is (batch or 1, heads or 1, positions, positions); others are lengths."""
    passing: tuple[int, ...] = ()
    if len(v.shape) == 4 and v.shape[1] in (1, heads.size):
        passing = (0, 1)
        for axis, whole in zip(v.axes, (batch, heads)):
            if axis.size == whole.size:
                step.unify(axis, whole)
            else:
                step.freeze(axis, "fused attention")
    elif v.shape[:1] == (batch.size,):
        passing = (0,)
        step.unify(v.axes[0], batch)
    _freeze_rest(step, v, passing)


def _result_axes(step: Step, shape: tuple[int, ...], batch: Axis, heads: Axis) -> list[Axis]:
    """The output has the query's layout; the softmax statistics are (batch, heads, positions)."""
    at, result = _heads_at(step) if len(shape) == 4 else 1, [axes.leaf(n) for n in shape]
    for k, axis in enumerate(result):
        whole = batch if k == 0 else heads if k == at else None
        if whole is not None and whole.size == axis.size:
            result[k] = whole
        else:
            step.freeze(axis, "fused attention")
    return result


def zeros_attention(step: Step, known: list[Zeros]) -> list[Zeros]:
    """Where values are zero, the output is: it averages them. The statistics are not."""
    results = [zeros.unknown(v.aval.shape) for v in step.eqn.outvars]
    at, value = _heads_at(step), known[2]
    if value.all:
        return [zeros.everywhere(step.eqn.outvars[0].aval.shape), *results[1:]]
    vectors = list(results[0].axes)
    vectors[0] = value.axes[0]
    vectors[at] = np.repeat(value.axes[at], len(vectors[at]) // len(value.axes[at]))
    return [Zeros(False, tuple(vectors)), *results[1:]]


register(
    "dot_product_attention_fwd", "dot_product_attention_fwd_wrapper",
    couple=couple_attention, zeros=zeros_attention,
)  # fmt: skip


def couple_attention_gradient(step: Step) -> list[list[Axis]]:
    """Gradients have the axes of query, key, value and, where there is one, the bias."""
    couple_attention(step)
    at, query = _heads_at(step), step.ins[0]
    activation, *outputs = step.ins[-3:]
    for v, heads in [(activation, 1), *((v, at) for v in outputs)]:
        step.unify(v.axes[heads], query.axes[at])
        if v.shape[0] == query.shape[0]:
            step.unify(v.axes[0], query.axes[0])
    return [list(v.axes) for v in step.ins[: len(step.eqn.outvars)]]


register(
    "dot_product_attention_bwd", "dot_product_attention_bwd_wrapper",
    couple=couple_attention_gradient,
)  # fmt: skip
