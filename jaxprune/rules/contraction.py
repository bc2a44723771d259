"""Contractions: dot_general, ragged_dot_general and convolutions with groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxprune.ir import axes, compat
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.registry import Mix, View, couple_opaque, register
from jaxprune.rules.zeros import Zeros

# ------------------------------------------------------------------------------- dot_general


def free_axes(v: Any, contract: Any, batch: Any) -> list[int]:
    """The axes of an operand that are neither contracted nor batched, in order."""
    return [k for k in range(len(v.shape)) if k not in contract and k not in batch]


def couple_dot(step: Step) -> list[list[Axis]]:
    (lc, rc), (lb, rb) = step.params["dimension_numbers"]
    lhs, rhs = step.ins
    for i, j in [*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)]:
        step.unify(lhs.axes[i], rhs.axes[j])
    return [
        [lhs.axes[i] for i in lb]
        + [lhs.axes[i] for i in free_axes(lhs, lc, lb)]
        + [rhs.axes[j] for j in free_axes(rhs, rc, rb)]
    ]


def _contracted(step: Step, known: list[Zeros], lc: Any, rc: Any) -> list[Mix]:
    return [
        Mix(step.ins[0].axes[i], known[0].along(i) | known[1].along(j), "sum", ((0, i), (1, j)))
        for i, j in zip(lc, rc, strict=True)
    ]


def mixes_dot(step: Step, known: list[Zeros]) -> list[Mix]:
    (lc, rc), _ = step.params["dimension_numbers"]
    return _contracted(step, known, lc, rc)


def zeros_dot(step: Step, known: list[Zeros]) -> list[Zeros]:
    (lc, rc), (lb, rb) = step.params["dimension_numbers"]
    (lhs, rhs), (lz, rz) = step.ins, known
    vectors = [lz.along(i) | rz.along(j) for i, j in zip(lb, rb, strict=True)]
    vectors += [lz.along(i) for i in free_axes(lhs, lc, lb)]
    vectors += [rz.along(j) for j in free_axes(rhs, rc, rb)]
    if any(mix.zero.all() for mix in mixes_dot(step, known)):
        return [zeros.everywhere(step.eqn.outvars[0].aval.shape)]
    return [Zeros(lz.all or rz.all, tuple(vectors))]


register("dot_general", couple=couple_dot, zeros=zeros_dot, mixes=mixes_dot)

# ------------------------------------------------------------------------------- ragged dot


def _ragged(step: Step) -> tuple[Any, Any, list[int], list[int]]:
    """The dot's dimension numbers, and the free axes of both sides."""
    numbers = step.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    lhs, rhs = free_axes(step.ins[0], lc, lb), free_axes(step.ins[1], rc, rb)
    return numbers, (lc, rc, lb, rb), lhs, [j for j in rhs if j not in numbers.rhs_group_dimensions]


def couple_ragged(step: Step) -> Any:
    """As a dot; rows of the ragged axis belong to groups by position, so both are frozen."""
    numbers, (lc, rc, lb, rb), free_l, free_r = _ragged(step)
    lhs, rhs, counts = step.ins[:3]
    if len(counts.shape) != 1:
        return couple_opaque(step)
    for i, j in [*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)]:
        step.unify(lhs.axes[i], rhs.axes[j])
    ragged = [lhs.axes[i] for i in numbers.lhs_ragged_dimensions]
    for axis in [*ragged, *(rhs.axes[j] for j in numbers.rhs_group_dimensions), *counts.axes]:
        step.freeze(axis, "groups of rows")
    result = [lhs.axes[i] for i in lb]
    result += [lhs.axes[i] for i in free_l] + [rhs.axes[j] for j in free_r]
    contracted = any(i in lc for i in numbers.lhs_ragged_dimensions)
    return [[counts.axes[0], *result] if contracted else result]


def mixes_ragged(step: Step, known: list[Zeros]) -> list[Mix]:
    _, (lc, rc, _, _), _, _ = _ragged(step)
    return _contracted(step, known, lc, rc)


def zeros_ragged(step: Step, known: list[Zeros]) -> list[Zeros]:
    numbers, (lc, _, lb, rb), free_l, free_r = _ragged(step)
    shape, (lz, rz) = step.eqn.outvars[0].aval.shape, known[:2]
    if lz.all or rz.all or any(mix.zero.all() for mix in mixes_ragged(step, known)):
        return [zeros.everywhere(shape)]
    vectors = [lz.along(i) | rz.along(j) for i, j in zip(lb, rb, strict=True)]
    vectors += [lz.along(i) for i in free_l] + [rz.along(j) for j in free_r]
    if any(i in lc for i in numbers.lhs_ragged_dimensions):
        vectors.insert(0, np.zeros(shape[0], bool))
    return [zeros.of_axes(vectors)]


register("ragged_dot_general", couple=couple_ragged, zeros=zeros_ragged, mixes=mixes_ragged)

# ----------------------------------------------------------------------------- convolution


def _groups(step: Step) -> int:
    return step.params["feature_group_count"]


def couple_conv(step: Step) -> list[list[Axis]]:
    """Feature axes as in a dot; groups G make them ``Prod(G, .)``; spatial axes are frozen.

    Batch groups, which the gradient of a grouped convolution has, cut the batch of the left side
    in place of its features.
    """
    numbers, (lhs, rhs) = step.params["dimension_numbers"], step.ins
    lspec, rspec, ospec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    out = [axes.leaf(n) for n in step.eqn.outvars[0].aval.shape]
    out[ospec[1]] = rhs.axes[rspec[0]]
    _couple_groups(step, _groups(step), lhs.axes[lspec[1]], rhs.axes[rspec[1]])
    _couple_groups(step, step.params["batch_group_count"], lhs.axes[lspec[0]], out[ospec[0]])
    for v, spec in ((lhs, lspec), (rhs, rspec)):
        for k in spec[2:]:
            step.freeze(v.axes[k], "spatial axis")
    for k in ospec[2:]:
        step.freeze(out[k], "spatial axis")
    return [out]


def _couple_groups(step: Step, count: int, whole: Axis, each: Axis) -> None:
    """``whole`` is ``each`` in every group, and the results are cut into as many groups."""
    if count == 1:
        step.unify(whole, each)
        return
    group, made = axes.leaf(count), step.ins[1].axes[step.params["dimension_numbers"].rhs_spec[0]]
    step.unify(whole, axes.prod([group, each]))
    step.unify(made, axes.prod([group, axes.leaf(made.size // count)]))


def mixes_conv(step: Step, known: list[Zeros]) -> list[Mix]:
    numbers = step.params["dimension_numbers"]
    lhs_zero = known[0].along(numbers.lhs_spec[1]).reshape(_groups(step), -1).all(0)
    rhs_zero = known[1].along(numbers.rhs_spec[1])
    places = ((0, numbers.lhs_spec[1]), (1, numbers.rhs_spec[1])) if _groups(step) == 1 else ()
    return [Mix(step.ins[1].axes[numbers.rhs_spec[1]], lhs_zero | rhs_zero, "sum", places)]


def zeros_conv(step: Step, known: list[Zeros]) -> list[Zeros]:
    shape = step.eqn.outvars[0].aval.shape
    if any(z.all for z in known) or mixes_conv(step, known)[0].zero.all():
        return [zeros.everywhere(shape)]
    numbers, cuts = step.params["dimension_numbers"], step.params["batch_group_count"]
    vectors = [np.zeros(n, bool) for n in shape]
    rows = known[0].along(numbers.lhs_spec[0]).reshape(cuts, -1)
    features = known[0].along(numbers.lhs_spec[1]).reshape(_groups(step), -1)
    made = known[1].along(numbers.rhs_spec[0])
    groups = np.all(features if cuts == 1 else rows, axis=1, keepdims=True)[:, 0]
    vectors[numbers.out_spec[0]] = np.logical_and.reduce(rows)
    vectors[numbers.out_spec[1]] = made | np.repeat(groups, len(made) // len(groups))
    return [zeros.of_axes(vectors)]


def evaluate_conv(view: View, step: Step, xs: list[Any]) -> list[Any]:
    numbers, p = step.params["dimension_numbers"], step.params
    if p["batch_group_count"] != 1:
        rows = view.size(step.outs[0].axes[numbers.out_spec[0]])
        return compat.bind(step.eqn, xs, batch_group_count=xs[0].shape[numbers.lhs_spec[0]] // rows)
    if _groups(step) == 1:
        return compat.bind(step.eqn, xs)
    features, inner = xs[0].shape[numbers.lhs_spec[1]], xs[1].shape[numbers.rhs_spec[1]]
    return compat.bind(step.eqn, xs, feature_group_count=features // inner)


register(
    "conv_general_dilated",
    couple=couple_conv,
    zeros=zeros_conv,
    mixes=mixes_conv,
    evaluate=evaluate_conv,
)
