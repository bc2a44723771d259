"""Contractions: dot_general, ragged_dot_general and convolutions with groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxprune.ir import axes, compat, positions, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step
from jaxprune.ir.views import Contraction
from jaxprune.rules import zeros
from jaxprune.rules.registry import Mix, View, couple_opaque, register
from jaxprune.rules.zeros import Zeros

# ------------------------------------------------------------------------------- dot_general


def _tie(step: Step, dims: Contraction) -> None:
    """Contracted and batch axes are those of both sides."""
    lhs, rhs = step.ins[:2]
    for left, right in (dims.contract, dims.batch):
        for i, j in zip(left, right, strict=True):
            step.unify(lhs.axes[i], rhs.axes[j])


def couple_dot(step: Step) -> list[list[Axis]]:
    dims, (lhs, rhs) = views.contraction(step), step.ins
    _tie(step, dims)
    return [
        [lhs.axes[i] for i in dims.lhs_batch]
        + [lhs.axes[i] for i in dims.free(0, len(lhs.shape))]
        + [rhs.axes[j] for j in dims.free(1, len(rhs.shape))]
    ]


def _contracted(step: Step, known: list[Zeros], dims: Contraction) -> list[Mix]:
    return [
        Mix(step.ins[0].axes[i], known[0].along(i) | known[1].along(j), "sum", ((0, i), (1, j)))
        for i, j in zip(*dims.contract, strict=True)
    ]


def mixes_dot(step: Step, known: list[Zeros]) -> list[Mix]:
    return _contracted(step, known, views.contraction(step))


def zeros_dot(step: Step, known: list[Zeros]) -> list[Zeros]:
    dims = views.contraction(step)
    (lhs, rhs), (lz, rz) = step.ins, known
    vectors = [lz.along(i) | rz.along(j) for i, j in zip(*dims.batch, strict=True)]
    vectors += [lz.along(i) for i in dims.free(0, len(lhs.shape))]
    vectors += [rz.along(j) for j in dims.free(1, len(rhs.shape))]
    if any(mix.zero.all() for mix in mixes_dot(step, known)):
        return [zeros.everywhere(step.eqn.outvars[0].aval.shape)]
    return [Zeros(lz.all or rz.all, tuple(vectors))]


register("dot_general", couple=couple_dot, zeros=zeros_dot, mixes=mixes_dot)

# ------------------------------------------------------------------------------- ragged dot


def _free(step: Step, numbers: views.Ragged) -> tuple[list[int], list[int]]:
    """The free axes of both sides, without that of the groups."""
    lhs, rhs = (numbers.dims.free(side, len(step.ins[side].shape)) for side in (0, 1))
    return lhs, [j for j in rhs if j not in numbers.rhs_group]


def couple_ragged(step: Step) -> Any:
    """As a dot; rows of the ragged axis belong to groups by position, so both are frozen.

    Groups that count what was chosen have no rows where they are not there to be chosen.
    """
    numbers, (lhs, rhs, counts) = views.ragged(step), step.ins[:3]
    if len(counts.shape) != 1:
        return couple_opaque(step)
    _tie(step, numbers.dims)
    groups = [*(rhs.axes[j] for j in numbers.rhs_group), *counts.axes]
    found = positions.counts_chosen(counts)
    counted = found is not None and axes.find(found) is axes.find(counts.axes[0])
    for axis in groups[1:]:
        step.unify(groups[0], axis)
    for axis in [lhs.axes[i] for i in numbers.lhs_ragged] + ([] if counted else groups):
        step.freeze(axis, "groups of rows")
    if counted:
        step.choose(groups[0], 1)
    free_l, free_r = _free(step, numbers)
    result = [lhs.axes[i] for i in (*numbers.dims.lhs_batch, *free_l)]
    result += [rhs.axes[j] for j in free_r]
    return [[counts.axes[0], *result] if _sums_groups(numbers) else result]


def _sums_groups(numbers: views.Ragged) -> bool:
    """Whether rows are contracted, so that each group has a result of its own."""
    return any(i in numbers.dims.lhs_contract for i in numbers.lhs_ragged)


def mixes_ragged(step: Step, known: list[Zeros]) -> list[Mix]:
    return _contracted(step, known, views.ragged(step).dims)


def zeros_ragged(step: Step, known: list[Zeros]) -> list[Zeros]:
    numbers, shape, (lz, rz) = views.ragged(step), step.eqn.outvars[0].aval.shape, known[:2]
    if lz.all or rz.all or any(mix.zero.all() for mix in mixes_ragged(step, known)):
        return [zeros.everywhere(shape)]
    free_l, free_r = _free(step, numbers)
    vectors = [lz.along(i) | rz.along(j) for i, j in zip(*numbers.dims.batch, strict=True)]
    vectors += [lz.along(i) for i in free_l] + [rz.along(j) for j in free_r]
    if _sums_groups(numbers):
        vectors.insert(0, np.zeros(shape[0], bool))
    return [zeros.of_axes(vectors)]


register("ragged_dot_general", couple=couple_ragged, zeros=zeros_ragged, mixes=mixes_ragged)

# ----------------------------------------------------------------------------- convolution


def couple_conv(step: Step) -> list[list[Axis]]:
    """Feature axes as in a dot; groups G make them ``Prod(G, .)``; spatial axes are frozen.

    Batch groups, which the gradient of a grouped convolution has, cut the batch of the left side
    in place of its features.
    """
    conv, (lhs, rhs) = views.convolution(step), step.ins
    out = [axes.leaf(n) for n in step.eqn.outvars[0].aval.shape]
    made = out[conv.out[1]] = rhs.axes[conv.rhs[0]]
    _couple_groups(step, conv.groups, lhs.axes[conv.lhs[1]], rhs.axes[conv.rhs[1]], made)
    _couple_groups(step, conv.batch_groups, lhs.axes[conv.lhs[0]], out[conv.out[0]], made)
    for v, spec in ((lhs, conv.lhs), (rhs, conv.rhs)):
        for k in spec[2:]:
            step.freeze(v.axes[k], "spatial axis")
    for k in conv.out[2:]:
        step.freeze(out[k], "spatial axis")
    return [out]


def _couple_groups(step: Step, count: int, whole: Axis, each: Axis, made: Axis) -> None:
    """``whole`` is ``each`` in every group, and the results are cut into as many groups."""
    if count == 1:
        step.unify(whole, each)
        return
    group = axes.leaf(count)
    step.unify(whole, axes.prod([group, each]))
    step.unify(made, axes.prod([group, axes.leaf(made.size // count)]))


def mixes_conv(step: Step, known: list[Zeros]) -> list[Mix]:
    conv = views.convolution(step)
    lhs_zero = known[0].along(conv.lhs[1]).reshape(conv.groups, -1).all(0)
    rhs_zero = known[1].along(conv.rhs[1])
    places = ((0, conv.lhs[1]), (1, conv.rhs[1])) if conv.groups == 1 else ()
    return [Mix(step.ins[1].axes[conv.rhs[1]], lhs_zero | rhs_zero, "sum", places)]


def zeros_conv(step: Step, known: list[Zeros]) -> list[Zeros]:
    shape = step.eqn.outvars[0].aval.shape
    if any(z.all for z in known) or mixes_conv(step, known)[0].zero.all():
        return [zeros.everywhere(shape)]
    conv = views.convolution(step)
    vectors = [np.zeros(n, bool) for n in shape]
    rows = known[0].along(conv.lhs[0]).reshape(conv.batch_groups, -1)
    features = known[0].along(conv.lhs[1]).reshape(conv.groups, -1)
    made = known[1].along(conv.rhs[0])
    groups = np.all(features if conv.batch_groups == 1 else rows, axis=1, keepdims=True)[:, 0]
    vectors[conv.out[0]] = np.logical_and.reduce(rows)
    vectors[conv.out[1]] = made | np.repeat(groups, len(made) // len(groups))
    return [zeros.of_axes(vectors)]


def evaluate_conv(view: View, step: Step, xs: list[Any]) -> list[Any]:
    conv = views.convolution(step)
    if conv.batch_groups != 1:
        rows = view.size(step.outs[0].axes[conv.out[0]])
        return compat.bind(step.eqn, xs, batch_group_count=xs[0].shape[conv.lhs[0]] // rows)
    if conv.groups == 1:
        return compat.bind(step.eqn, xs)
    features, inner = xs[0].shape[conv.lhs[1]], xs[1].shape[conv.rhs[1]]
    return compat.bind(step.eqn, xs, feature_group_count=features // inner)


register(
    "conv_general_dilated",
    couple=couple_conv,
    zeros=zeros_conv,
    mixes=mixes_conv,
    evaluate=evaluate_conv,
)
