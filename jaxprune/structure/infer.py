"""Reading a function's coupling off its jaxpr, at full size and without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import jaxprune.rules  # noqa: F401  (fills the table)
from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.jaxpr import tape
from jaxprune.jaxpr.tape import Tape, Value
from jaxprune.rules import registry
from jaxprune.types import path_str


@dataclass(eq=False)
class Program:
    """One trace of ``fn(params, *args)`` with the axes of everything in it."""

    tape: Tape
    num_params: int
    out_tree: Any

    @property
    def param_values(self) -> list[Value]:
        return self.tape.inputs[: self.num_params]


def infer(
    fn: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    param_axes: Sequence[Sequence[Axis]] | None = None,
) -> Program:
    """Traces and couples; ``param_axes`` continues from what an earlier trace found."""
    if not callable(fn):
        raise TypeError(
            f"infer_structure wants a function of (params, *args), got {type(fn).__name__}; "
            "for a Flax module pass model.apply, or lambda variables, x: model.apply(variables, x)"
        )
    if not jax.tree.leaves(params):
        raise ValueError("params has no array leaf; pass the variables that fn takes first")
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    values = [Value(v.aval) for v in closed.jaxpr.invars]
    if param_axes is not None:
        for value, axs in zip(values, param_axes):
            value.axes = tuple(axs)
    program = tape.build(closed, values, registry.couple)
    count = len(jax.tree.leaves(params))
    result = Program(program, count, jax.tree.structure(out_shape))
    _freeze_ends(result, params, args, out_shape)
    return result


def _freeze_ends(program: Program, params: Any, args: Any, out_shape: Any) -> None:
    """Inputs and outputs keep their sizes; results that are parameters follow the parameters."""
    arg_paths = [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tuple(args))]
    for path, value in zip(arg_paths, program.tape.inputs[program.num_params :], strict=True):
        for axis in value.axes:
            axes.freeze(axis, f"input {path} of the function")
    flat = [(path_str(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(params)]
    by_path = {p: v for (p, _), v in zip(flat, program.param_values, strict=True) if p}
    outs = jax.tree_util.tree_leaves_with_path(out_shape)
    for (key, _), value in zip(outs, program.tape.outputs, strict=True):
        source = state_of(path_str(key), value.shape, by_path)
        for k, axis in enumerate(value.axes):
            if source is None:
                axes.freeze(axis, f"output {path_str(key) or 'of the function'}".strip())
            else:
                axes.unify(source.axes[k], axis)


def state_of(path: str, shape: tuple[int, ...], by_path: dict[str, Value]) -> Value | None:
    """The parameter that an output updates: its path ends with the parameter's, shapes agree."""
    keys = path.split("/")
    for start in range(len(keys)):
        value = by_path.get("/".join(keys[start:]))
        if value is not None and value.shape == shape:
            return value
    return None


def used_leaves(program: Tape) -> set[Axis]:
    """Dimensions that something reads; the cut-off rest of a position table is not among them."""
    used: set[Axis] = set()
    for step in program.steps:
        if step.name not in ("slice", "split"):
            used.update(leaf for v in step.ins for a in v.axes for leaf in axes.leaves(a))
    for value in program.outputs:
        used.update(leaf for a in value.axes for leaf in axes.leaves(a))
    return used


def copy_axes(param_axes: Sequence[Sequence[Axis]]) -> tuple[list[list[Axis]], dict[Axis, Axis]]:
    """Fresh nodes of the same trees: a later trace must not change what an earlier one named."""
    fresh: dict[Axis, Axis] = {}

    def copy(axis: Axis) -> Axis:
        axis = axes.find(axis)
        if axis.kind == axes.LEAF:
            if axis not in fresh:
                fresh[axis] = axes.leaf(axis.size)
                fresh[axis].reasons = list(axis.reasons)
            return fresh[axis]
        return Axis(axis.kind, axis.size, tuple(copy(kid) for kid in axis.kids))

    for leaf in {leaf for axs in param_axes for a in axs for leaf in axes.leaves(a)}:
        copy(leaf)  # before any compound, so that leaves are the older nodes
    return [[copy(a) for a in axs] for axs in param_axes], fresh


def as_bool(keep: Any, size: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(keep, bool), (size,)).copy()
