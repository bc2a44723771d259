"""Reading a function's coupling off its jaxpr, at full size and without computing anything."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

import jaxprune.rules  # noqa: F401  (fills the table)
from jaxprune._calls import tracing
from jaxprune.ir import axes, compat, primitives, tape
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules import registry
from jaxprune.rules.contraction import couple_dot
from jaxprune.rules.indexing import constant_gather
from jaxprune.rules.layout import (
    couple_broadcast,
    couple_fresh,
    couple_squeeze,
    couple_transpose,
)
from jaxprune.rules.pointwise import couple_pointwise
from jaxprune.rules.reduction import couple_reduce
from jaxprune.structure import state
from jaxprune.typing import ending_in, named_leaves, path_str

MASKED, KEPT_ONLY = "masked", "kept"  # What removed units are: zeros, or not there at all.

Shapes = Sequence[tuple[str, tuple[int, ...]]]  # (path, shape) of each leaf
Seen = dict[Step, Sequence[Axis] | None]  # The leaves that a rule met when it was asked last.


@dataclass(eq=False)
class Program:
    """One trace of ``fn(params, *args)`` with the axes of everything in it."""

    tape: Tape
    num_params: int
    out_tree: Any
    seen: Seen = field(default_factory=dict)
    semantics: str = MASKED

    @property
    def param_values(self) -> list[Value]:
        return self.tape.inputs[: self.num_params]


def infer(
    uses: Sequence[tuple[Callable[..., Any], Sequence[Any]]], params: Any, semantics: str = MASKED
) -> list[Program]:
    """Traces and couples all uses ``(fn, args)`` of the same params until nothing new is found."""
    programs: list[Program] = []
    for fn, args in uses:
        known = [value.axes for value in programs[0].param_values] if programs else None
        programs.append(couple(*_trace(fn, params, args), params, args, known, semantics))
    with collecting_later():
        settle(programs)
    return programs


def check_semantics(semantics: str) -> None:
    """Raises for what is no semantics."""
    if semantics not in (MASKED, KEPT_ONLY):
        raise ValueError(f'semantics is {semantics!r}; wanted "masked" or "kept"')


def _trace(fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> tuple[Any, Any]:
    if not callable(fn):
        raise TypeError(
            f"infer_structure wants a function of (params, *args), got {type(fn).__name__}; "
            "for a Flax module pass model.apply, or lambda variables, x: model.apply(variables, x)"
        )
    if not jax.tree.leaves(params):
        raise ValueError("params has no array leaf; pass the variables that fn takes first")
    with tracing(fn, params, args):
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    return closed, out_shape


def couple(
    closed: Any,
    out_shape: Any,
    params: Any,
    args: Sequence[Any],
    param_axes: Sequence[Sequence[Axis]] | None = None,
    semantics: str = MASKED,
) -> Program:
    """Couples a trace once; ``param_axes`` continues from what an earlier trace found.

    With the semantics "kept" the axes into which chosen positions point are those that they are
    chosen along.
    """
    values = [Value(v.aval) for v in closed.jaxpr.invars]
    if param_axes is not None:
        for value, axs in zip(values, param_axes):
            value.axes = tuple(axs)
    seen: Seen = {}

    def couple_and_note(step: Step) -> Sequence[Sequence[Axis]]:
        rule = registry.rule_of(step).couple
        results = rule(step)
        if step.subs:
            seen[step] = None
        elif rule not in LASTING:
            seen[step] = _leaves(step, results)
        return results

    with collecting_later():
        program = tape.build(closed, values, couple_and_note)
    count = len(jax.tree.leaves(params))
    result = Program(program, count, jax.tree.structure(out_shape), seen, semantics)
    _freeze_ends(result, params, args, out_shape)
    if semantics == KEPT_ONLY:
        _tie_chosen(program.steps)
    return result


def _tie_chosen(steps: Sequence[Step]) -> None:
    for step in steps:
        for a, b in step.chosen:
            step.unify(a, b)
        for sub in step.subs:
            _tie_chosen(sub.steps)


def blocked(leaf: Axis, semantics: str) -> str | None:
    """Why a dimension may not lose units; None: it may."""
    if leaf.reasons:
        return "; ".join(map(str, leaf.reasons)) + (f"; {BY_EXPERTS}" if leaf.chosen else "")
    if leaf.chosen and semantics == MASKED:
        return f"{leaf.chosen[0][0]}: {CHOSEN}"
    return None


BY_EXPERTS = "whole experts also go by jp.experts.find(fn, params, *args).remove"
CHOSEN = (
    "masked units could still be chosen there, so call jp.infer_structure and jp.compact with "
    'semantics="kept", for which they are not there, or jp.experts.find(fn, params, *args).compact'
)


# ------------------------------------------------------------------------------------- settling

# These rules tie whole axes, whatever they are made of: what they have tied once is tied for good.
LASTING = (
    couple_pointwise, couple_dot, couple_transpose, couple_reduce, couple_broadcast, couple_squeeze,
    couple_fresh,
)  # fmt: skip


def settle(programs: Sequence[Program]) -> None:
    """Asks rules again until none meets another layout than when it was asked last.

    Splitting an axis in one place can make two layouts compatible in another, which has been
    coupled already. A step that holds programs is asked at least twice: its inside is coupled in
    order, too.
    """
    noted = [(step, p) for p in programs for step in p.seen if not _lasts(step)]
    while moved := [(step, p) for step, p in noted if _has_moved(p.seen[step])]:
        for step, program in moved:
            before = _leaves(step, [v.axes for v in step.outs])
            _couple_again(step)
            if program.semantics == KEPT_ONLY:
                _tie_chosen([step])
            after = [v.axes for v in step.outs]
            program.seen[step] = None if _has_moved(before) else _leaves(step, after)


def _has_moved(leaves: Sequence[Axis] | None) -> bool:
    """Whether one of these leaves has become another axis; None: nobody has looked yet."""
    if leaves is None:
        return True
    for leaf in leaves:  # noqa: SIM110  A generator would cost a call for each leaf.
        if leaf.link is not None:
            return True
    return False


def _couple_again(step: Step) -> None:
    step.ties.clear()
    step.chosen.clear()
    for value, axs in zip(step.outs, registry.couple(step), strict=True):
        for known, found in zip(value.axes, axs, strict=True):
            step.unify(known, found)


def _leaves(step: Step, outs: Sequence[Sequence[Axis]]) -> list[Axis]:
    """The leaves that the axes of a step are made of now, also inside of it."""
    inside = [value.axes for sub in step.subs for value in _values(sub)]
    rows = [*[value.axes for value in step.ins], *outs, *inside]
    return axes.distinct_leaves(axis for row in rows for axis in row)


def _values(program: Tape) -> Iterator[Value]:
    yield from program.inputs
    for step in program.steps:
        yield from step.outs
        for sub in step.subs:
            yield from _values(sub)


def _lasts(step: Step) -> bool:
    """Whether a step, and what it holds, ties whole axes only."""
    if step.subs:
        once = primitives.of(step).kind in primitives.CALLS
        return once and all(_lasts(s) for sub in step.subs for s in sub.steps)
    return registry.rule_of(step).couple in LASTING


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Stops garbage collection, of the whole process, while a tape is built.

    A tape has no cycles that are garbage; collecting half-way would double the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _freeze_ends(program: Program, params: Any, args: Any, out_shape: Any) -> None:
    """Inputs and outputs keep their sizes; results that are parameters follow the parameters."""
    named = named_leaves(params)
    modules = state.modules_of(path for path, _ in named)
    vectors = state.vectors_of(program.param_values)
    inputs = program.tape.inputs[program.num_params :]
    for path, value in zip(paths_of(tuple(args)), inputs, strict=True):
        why = state.reason(path, value, modules, vectors)
        for axis in value.axes:
            axes.freeze(axis, why)
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
    return set(axes.distinct_leaves(read))


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

    def copy(node: Axis, kids: list[Axis]) -> Axis:
        new = Axis(node.kind, node.size, tuple(kids), node.index)
        new.reasons, new.chosen = list(node.reasons), list(node.chosen)
        return new

    rows = [list(axs) for axs in param_axes]
    leaves = axes.distinct_leaves(itertools.chain(*rows))
    for leaf in leaves:
        axes.fold(leaf, copy, fresh)  # before any compound, so that leaves are the older nodes
    copies = [[axes.fold(a, copy, fresh) for a in axs] for axs in rows]
    return copies, {leaf: fresh[leaf] for leaf in leaves}
