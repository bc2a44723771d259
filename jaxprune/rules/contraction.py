"""Contractions: dot_general and convolutions with feature groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.jaxpr import compat
from jaxprune.jaxpr.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.registry import Mix, View, couple_opaque, nothing_known, register
from jaxprune.rules.zeros import Zeros

# ------------------------------------------------------------------------------- dot_general


def _free(v: Any, contract: Any, batch: Any) -> list[int]:
    return [k for k in range(len(v.shape)) if k not in contract and k not in batch]


def couple_dot(step: Step) -> list[list[Axis]]:
    (lc, rc), (lb, rb) = step.params["dimension_numbers"]
    lhs, rhs = step.ins
    for i, j in [*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)]:
        step.unify(lhs.axes[i], rhs.axes[j])
    return [
        [lhs.axes[i] for i in lb]
        + [lhs.axes[i] for i in _free(lhs, lc, lb)]
        + [rhs.axes[j] for j in _free(rhs, rc, rb)]
    ]


def mixes_dot(step: Step, known: list[Zeros]) -> list[Mix]:
    (lc, rc), _ = step.params["dimension_numbers"]
    lz, rz = known
    return [
        Mix(step.ins[0].axes[i], lz.along(i) | rz.along(j), "sum", ((0, i), (1, j)))
        for i, j in zip(lc, rc, strict=True)
    ]


def zeros_dot(step: Step, known: list[Zeros]) -> list[Zeros]:
    (lc, rc), (lb, rb) = step.params["dimension_numbers"]
    (lhs, rhs), (lz, rz) = step.ins, known
    vectors = [lz.along(i) | rz.along(j) for i, j in zip(lb, rb, strict=True)]
    vectors += [lz.along(i) for i in _free(lhs, lc, lb)]
    vectors += [rz.along(j) for j in _free(rhs, rc, rb)]
    if any(mix.zero.all() for mix in mixes_dot(step, known)):
        return [zeros.everywhere(step.eqn.outvars[0].aval.shape)]
    return [Zeros(lz.all or rz.all, tuple(vectors))]


register("dot_general", couple=couple_dot, zeros=zeros_dot, mixes=mixes_dot)

# ----------------------------------------------------------------------------- convolution


def _groups(step: Step) -> int:
    return step.params["feature_group_count"]


def couple_conv(step: Step) -> Any:
    """Feature axes as in a dot; groups G make them ``Prod(G, .)``; spatial axes are frozen."""
    if step.params["batch_group_count"] != 1:
        return couple_opaque(step)
    numbers, (lhs, rhs) = step.params["dimension_numbers"], step.ins
    lspec, rspec, ospec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    out = [axes.leaf(n) for n in step.eqn.outvars[0].aval.shape]
    out[ospec[0]], out[ospec[1]] = lhs.axes[lspec[0]], rhs.axes[rspec[0]]
    if _groups(step) == 1:
        step.unify(lhs.axes[lspec[1]], rhs.axes[rspec[1]])
    else:
        group = axes.leaf(_groups(step))
        step.unify(lhs.axes[lspec[1]], axes.prod([group, rhs.axes[rspec[1]]]))
        per_group = axes.leaf(rhs.shape[rspec[0]] // _groups(step))
        step.unify(rhs.axes[rspec[0]], axes.prod([group, per_group]))
    for v, spec in ((lhs, lspec), (rhs, rspec)):
        for k in spec[2:]:
            step.freeze(v.axes[k], "spatial axis")
    for k in ospec[2:]:
        step.freeze(out[k], "spatial axis")
    return [out]


def mixes_conv(step: Step, known: list[Zeros]) -> list[Mix]:
    numbers = step.params["dimension_numbers"]
    lhs_zero = known[0].along(numbers.lhs_spec[1]).reshape(_groups(step), -1).all(0)
    rhs_zero = known[1].along(numbers.rhs_spec[1])
    places = ((0, numbers.lhs_spec[1]), (1, numbers.rhs_spec[1])) if _groups(step) == 1 else ()
    return [Mix(step.ins[1].axes[numbers.rhs_spec[1]], lhs_zero | rhs_zero, "sum", places)]


def zeros_conv(step: Step, known: list[Zeros]) -> list[Zeros]:
    shape = step.eqn.outvars[0].aval.shape
    if step.params["batch_group_count"] != 1:
        return nothing_known(step, known)
    if any(z.all for z in known) or mixes_conv(step, known)[0].zero.all():
        return [zeros.everywhere(shape)]
    numbers = step.params["dimension_numbers"]
    vectors = [np.zeros(n, bool) for n in shape]
    vectors[numbers.out_spec[0]] = known[0].along(numbers.lhs_spec[0])
    group = known[0].along(numbers.lhs_spec[1]).reshape(_groups(step), -1)
    out = known[1].along(numbers.rhs_spec[0])
    vectors[numbers.out_spec[1]] = out | np.repeat(group.all(1), len(out) // len(group))
    return [zeros.of_axes(vectors)]


def evaluate_conv(view: View, step: Step, xs: list[Any]) -> list[Any]:
    if _groups(step) == 1:
        return compat.bind(step.eqn, xs)
    numbers = step.params["dimension_numbers"]
    features, inner = (
        xs[0].shape[numbers.lhs_spec[1]],
        xs[1].shape[numbers.rhs_spec[1]],
    )
    return compat.bind(step.eqn, xs, feature_group_count=features // inner)


register(
    "conv_general_dilated",
    couple=couple_conv,
    zeros=zeros_conv,
    mixes=mixes_conv,
    evaluate=evaluate_conv,
)
