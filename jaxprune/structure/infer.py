"""Reading a function's coupling off its jaxpr, at full size and without computing anything."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

import jaxprune.rules  # noqa: F401  (fills the table)
from jaxprune.ir import axes, compat, primitives, tape
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules import registry
from jaxprune.rules.indexing import constant_gather
from jaxprune.typing import ending_in, named_leaves, path_str

Shapes = Sequence[tuple[str, tuple[int, ...]]]  # (path, shape) of each leaf


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
    closed, out_shape = _trace(fn, params, args)
    return couple(closed, out_shape, params, args, param_axes)


def _trace(fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> tuple[Any, Any]:
    if not callable(fn):
        raise TypeError(
            f"infer_structure wants a function of (params, *args), got {type(fn).__name__}; "
            "for a Flax module pass model.apply, or lambda variables, x: model.apply(variables, x)"
        )
    if not jax.tree.leaves(params):
        raise ValueError("params has no array leaf; pass the variables that fn takes first")
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    return closed, out_shape


def infer_settled(fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> Program:
    """As :func:`infer`, such that coupling again from its axes finds nothing new.

    Which layouts nest may depend on how far an axis has been cut when they meet.
    """
    closed, out_shape = _trace(fn, params, args)
    program = couple(closed, out_shape, params, args)
    while True:
        param_axes, fresh = copy_axes([v.axes for v in program.param_values])
        free = [leaf for leaf in fresh.values() if leaf.size > 1 and not leaf.reasons]
        again = couple(closed, out_shape, params, args, param_axes)
        if not any(axes.find(leaf) is not leaf or leaf.reasons for leaf in free):
            return program
        program = again


def couple(
    closed: Any,
    out_shape: Any,
    params: Any,
    args: Sequence[Any],
    param_axes: Sequence[Sequence[Axis]] | None = None,
) -> Program:
    """As :func:`infer`, from a trace."""
    values = [Value(v.aval) for v in closed.jaxpr.invars]
    if param_axes is not None:
        for value, axs in zip(values, param_axes):
            value.axes = tuple(axs)
    with collecting_later():
        program = tape.build(closed, values, registry.couple)
    count = len(jax.tree.leaves(params))
    result = Program(program, count, jax.tree.structure(out_shape))
    _freeze_ends(result, params, args, out_shape)
    return result


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """A tape grows without garbage: searching it for some half-way would double the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _freeze_ends(program: Program, params: Any, args: Any, out_shape: Any) -> None:
    """Inputs and outputs keep their sizes; results that are parameters follow the parameters."""
    for path, value in zip(
        paths_of(tuple(args)), program.tape.inputs[program.num_params :], strict=True
    ):
        for axis in value.axes:
            axes.freeze(axis, f"input {path} of the function")
    named = named_leaves(params)
    by_path = {path: v for (path, _), v in zip(named, program.param_values, strict=True)}
    outs = list(zip(paths_of(out_shape), program.tape.outputs, strict=True))
    updated = followed(
        [(path, v.shape) for path, v in outs], [(path, v.shape) for path, v in by_path.items()]
    )
    for (path, value), name in zip(outs, updated, strict=True):
        for k, axis in enumerate(value.axes):
            if name is None:
                axes.freeze(axis, f"output {path or 'of the function'}".strip())
            else:
                axes.unify(by_path[name].axes[k], axis)


def paths_of(tree: Any) -> list[str]:
    """The paths of a tree's leaves, in order."""
    return [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def followed(outputs: Shapes, params: Shapes) -> list[str | None]:
    """For each output the parameter that it updates, or None.

    Its path ends with the parameter's and the shapes agree. A path of a single key is too little
    to go by, logits may share it: it counts only when all parameters are among the outputs.
    """
    shapes = dict(params)
    names = [ending_in(path, shapes) for path, _ in outputs]
    names = [n if n and shapes[n] == shape else None for n, (_, shape) in zip(names, outputs)]
    whole = shapes.keys() <= set(names)
    return [n if n and (whole or "/" in n) else None for n in names]


def used_leaves(program: Tape) -> set[Axis]:
    """Dimensions that something reads; the cut-off rest of a position table is not among them."""
    read: set[Axis] = {axis for value in program.outputs for axis in value.axes}
    _collect_read(program, read)
    return {leaf for axis in {axes.find(a) for a in read} for leaf in axes.leaves(axis)}


def _collect_read(program: Tape, read: set[Axis]) -> None:
    for step in program.steps:
        for sub in step.subs:  # what a loop is given counts when its body reads it
            _collect_read(sub, read)
        if not step.subs and not _selects(step):
            for value in step.ins:
                read.update(value.axes)
        if primitives.kind(step) is Kind.LOOP:  # it runs along the first axis of what it scans
            read.update(value.axes[0] for value in compat.scanned(step.eqn, step.ins))


def _selects(step: Step) -> bool:
    """Whether a step only takes a part of its operand, whose rest nothing may read."""
    kind = primitives.kind(step)
    if kind is Kind.GATHER:
        return constant_gather(step) is not None
    return kind in (Kind.SLICE, Kind.SPLIT)


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
        return Axis(axis.kind, axis.size, tuple(copy(kid) for kid in axis.kids), axis.index)

    for leaf in {leaf for axs in param_axes for a in axs for leaf in axes.leaves(a)}:
        copy(leaf)  # before any compound, so that leaves are the older nodes
    return [[copy(a) for a in axs] for axs in param_axes], fresh
