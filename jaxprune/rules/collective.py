"""Collectives, as they stand in a program that is traced inside ``shard_map`` or a named vmap."""

from __future__ import annotations

import numpy as np

from jaxprune.ir import axes, primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step
from jaxprune.rules.registry import Mix, couple_opaque, register
from jaxprune.rules.zeros import Zeros


def _positional(step: Step) -> list[int]:
    """Axes of the operands that are reduced: a vmap turns a named axis into one of them."""
    return [int(k) for k in step.params["axes"] if isinstance(k, (int, np.integer))]


def _without(step: Step, items: tuple[Axis, ...]) -> list[Axis]:
    return [item for k, item in enumerate(items) if k not in _positional(step)]


def couple_all_reduce(step: Step) -> list[list[Axis]]:
    """Each device holds a block of the same shape: the operands' axes pass one by one."""
    return [_without(step, v.axes) for v in step.ins]


def zeros_all_reduce(step: Step, known: list[Zeros]) -> list[Zeros]:
    gone = _positional(step)
    return [Zeros(z.all, tuple(v for k, v in enumerate(z.axes) if k not in gone)) for z in known]


def mixes_all_reduce(step: Step, known: list[Zeros]) -> list[Mix]:
    combine = primitives.of(step).combine or "none"
    return [
        Mix(
            v.axes[k],
            z.along(k) if combine == "sum" else np.zeros(v.shape[k], bool),
            combine,
            ((i, k),),
        )
        for i, (v, z) in enumerate(zip(step.ins, known, strict=True))
        for k in _positional(step)
    ]


register(
    "psum", "psum_invariant", "pmax", "pmin",
    couple=couple_all_reduce, zeros=zeros_all_reduce, mixes=mixes_all_reduce,
)  # fmt: skip


def couple_permute(step: Step) -> list[list[Axis]]:
    return [list(v.axes) for v in step.ins]


# Blocks travel as they are; a device that receives none gets zeros.
register("ppermute", "pbroadcast", couple=couple_permute, zeros=lambda step, known: known)


def couple_axis_index(step: Step) -> list[list[Axis]]:
    return [[]]


register("axis_index", couple=couple_axis_index)


def _spread(step: Step) -> tuple[int, bool]:
    """The axis that devices share, and whether it replaces one of the operand's."""
    p = step.params
    if "all_gather_dimension" in p:
        return p["all_gather_dimension"], p["tiled"]
    return p["scatter_dimension"], True


def couple_gathered(step: Step) -> list[list[Axis]]:
    """The axis along which blocks are put together, or cut, is frozen; the others pass."""
    results = []
    for v, var in zip(step.ins, step.eqn.outvars, strict=True):
        at, replaces = _spread(step)
        rest = list(v.axes)
        if replaces:
            step.freeze(rest.pop(at), "spread over devices")
        if len(var.aval.shape) > len(rest):
            rest.insert(at, axes.leaf(var.aval.shape[at]))
            step.freeze(rest[at], "spread over devices")
        results.append(rest)
    return results


def zeros_gathered(step: Step, known: list[Zeros]) -> list[Zeros]:
    found = []
    for z, var in zip(known, step.eqn.outvars, strict=True):
        at, replaces = _spread(step)
        rest = list(z.axes)
        if replaces:
            rest.pop(at)
        if len(var.aval.shape) > len(rest):
            rest.insert(at, np.full(var.aval.shape[at], z.all))
        found.append(Zeros(z.all, tuple(rest)))
    return found


register(
    "all_gather", "all_gather_invariant", "reduce_scatter",
    couple=couple_gathered, zeros=zeros_gathered,
)  # fmt: skip


def couple_all_to_all(step: Step) -> list[list[Axis]]:
    """Tiled: the two axes change their sizes and the others pass."""
    p = step.params
    if not p["tiled"]:
        return couple_opaque(step)
    moved, result = {p["split_axis"], p["concat_axis"]}, list(step.ins[0].axes)
    for k in moved:
        step.freeze(result[k], "spread over devices")
        result[k] = axes.leaf(step.eqn.outvars[0].aval.shape[k])
        step.freeze(result[k], "spread over devices")
    return [result]


register("all_to_all", couple=couple_all_to_all)
