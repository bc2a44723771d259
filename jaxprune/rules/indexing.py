"""Gathers, scatters and dynamic slices: whole windows pass, indexed axes are frozen."""

from __future__ import annotations

from typing import Any

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.jaxpr import compat
from jaxprune.jaxpr.tape import Step
from jaxprune.rules.registry import View, register


def couple_dynamic_slice(step: Step) -> list[list[Axis]]:
    result = []
    for axis, size in zip(step.ins[0].axes, step.params["slice_sizes"], strict=True):
        if size != axis.size:
            step.freeze(axis, "sliced at a computed place")
            axis = axes.leaf(size)
            step.freeze(axis, "sliced at a computed place")
        result.append(axis)
    return [result]


def evaluate_dynamic_slice(view: View, step: Step, xs: list[Any]) -> list[Any]:
    return compat.bind(step.eqn, xs, slice_sizes=view.shape(step.outs[0].axes))


register("dynamic_slice", couple=couple_dynamic_slice, evaluate=evaluate_dynamic_slice)


def couple_dynamic_update(step: Step) -> list[list[Axis]]:
    operand, update = step.ins[:2]
    for a, b in zip(operand.axes, update.axes, strict=True):
        if a.size == b.size:
            step.unify(a, b)
        else:
            step.freeze(a, "updated at a computed place")
            step.freeze(b, "updated at a computed place")
    return [list(operand.axes)]


register("dynamic_update_slice", couple=couple_dynamic_update)


def couple_gather(step: Step) -> list[list[Axis]]:
    """Full windows pass; what is indexed is frozen; batch axes of the indices pass."""
    numbers, (operand, indices) = step.params["dimension_numbers"], step.ins
    result: list[Any] = [None] * len(step.eqn.outvars[0].aval.shape)
    batch = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    for k, j in batch.items():
        step.unify(operand.axes[k], indices.axes[j])
    windows = [
        k
        for k in range(len(operand.shape))
        if k not in numbers.collapsed_slice_dims and k not in batch
    ]
    whole = [n == s for n, s in zip(operand.shape, step.params["slice_sizes"], strict=True)]
    for k, axis in enumerate(operand.axes):
        if k not in batch and not (k in windows and whole[k]):
            step.freeze(axis, "indexed")
    for position, k in zip(numbers.offset_dims, windows, strict=True):
        result[position] = operand.axes[k] if whole[k] else axes.leaf(step.params["slice_sizes"][k])
        if not whole[k]:
            step.freeze(result[position], "indexed")
    rest = iter(indices.axes[:-1])
    step.freeze(indices.axes[-1], "index vector")
    return [[next(rest) if axis is None else axis for axis in result]]


def evaluate_gather(view: View, step: Step, xs: list[Any]) -> list[Any]:
    sizes = tuple(
        view.size(axis) if size == axis.size else size
        for axis, size in zip(step.ins[0].axes, step.params["slice_sizes"], strict=True)
    )
    return compat.bind(step.eqn, xs, slice_sizes=sizes)


register("gather", couple=couple_gather, evaluate=evaluate_gather)


def couple_scatter(step: Step) -> list[list[Axis]]:
    """The mirror of gather: windows of the update that span the operand pass."""
    numbers, (operand, indices, update) = step.params["dimension_numbers"], step.ins
    batch = dict(
        zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    )
    for k, j in batch.items():
        step.unify(operand.axes[k], indices.axes[j])
    windows = [
        k for k in range(len(operand.shape)) if k not in numbers.inserted_window_dims + tuple(batch)
    ]
    paired = dict(zip(windows, numbers.update_window_dims, strict=True))
    for k, axis in enumerate(operand.axes):
        if k in paired and update.shape[paired[k]] == axis.size:
            step.unify(axis, update.axes[paired[k]])
        elif k not in batch:
            step.freeze(axis, "indexed")
            if k in paired:
                step.freeze(update.axes[paired[k]], "indexed")
    rest = [j for j in range(len(update.shape)) if j not in numbers.update_window_dims]
    for j, axis in zip(rest, indices.axes[:-1], strict=True):
        step.unify(update.axes[j], axis)
    step.freeze(indices.axes[-1], "index vector")
    return [list(operand.axes)]


register(
    "scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max",
    "scatter-mul", "scatter-min", "scatter-max", "scatter-sub", "scatter_sub",
    couple=couple_scatter,
)  # fmt: skip
