"""Pooling and its gradients: axes that the window does not span pass, the others are frozen."""

from __future__ import annotations

import numpy as np

from jaxprune.ir import axes, primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.registry import register
from jaxprune.rules.zeros import Zeros


def _passes(step: Step, k: int) -> bool:
    p = step.params
    dilated = any(p[name][k] != 1 for name in ("base_dilation", "window_dilation") if name in p)
    one = p["window_dimensions"][k] == p["window_strides"][k] == 1
    return one and tuple(p["padding"][k]) == (0, 0) and not dilated


def couple_window(step: Step) -> list[list[Axis]]:
    """Operands of one shape are tied where they pass; initial values have rank 0."""
    operands = [v for v in step.ins if v.shape]
    result = []
    for k, size in enumerate(step.eqn.outvars[0].aval.shape):
        axis = operands[0].axes[k] if _passes(step, k) else axes.leaf(size)
        for v in operands:
            if _passes(step, k):
                step.unify(axis, v.axes[k])
            else:
                step.freeze(v.axes[k], "pooled over")
                step.freeze(axis, "pooled over")
        result.append(axis)
    return [result] * len(step.eqn.outvars)


def _passed_on(step: Step, known: Zeros) -> Zeros:
    """Zeros along the axes that pass."""
    shape = step.eqn.outvars[0].aval.shape
    vectors = [
        known.axes[k] if _passes(step, k) else np.full(size, known.all)
        for k, size in enumerate(shape)
    ]
    return Zeros(known.all, tuple(vectors))


def _sees_padding_only(step: Step) -> bool:
    """Whether some window may hold no entry, so that a max is -inf there."""
    p = step.params
    gaps = any(d != 1 for d in p["base_dilation"])
    spans = [(w - 1) * d + 1 for w, d in zip(p["window_dimensions"], p["window_dilation"])]
    wide = any(max(pads) >= span for pads, span in zip(p["padding"], spans, strict=True))
    sparse = any(d != 1 and max(pads) > 0 for d, pads in zip(p["window_dilation"], p["padding"]))
    return gaps or wide or sparse


def zeros_window(step: Step, known: list[Zeros]) -> list[Zeros]:
    """A channel of zeros pools to zeros, where each window of a max or min holds an entry."""
    if primitives.of(step).combine != "sum" and _sees_padding_only(step):
        return [zeros.unknown(step.eqn.outvars[0].aval.shape)]
    return [_passed_on(step, known[0])]


register(*primitives.names(Kind.POOL), couple=couple_window, zeros=zeros_window)
register(*primitives.names(Kind.WINDOW_FOLD), couple=couple_window)

# The gradients of max pooling: what is moved comes first, what the places are read off second.
register(
    *primitives.names(Kind.POOL_GRADIENT),
    couple=couple_window, zeros=lambda step, known: [_passed_on(step, known[0])],
)  # fmt: skip
