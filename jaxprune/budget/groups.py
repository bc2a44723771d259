"""What is timed at once: a contraction, a pass over memory, or a whole loop of few dimensions.

A compiler merges elementwise steps and reductions into passes. Here a *pass* is what hangs together
between two steps that it doesn't merge: a norm, a softmax, an activation with its bias.
A loop whose body depends on few dimensions is one group: within it, operations find their operands
in the cache or not, and start one after the other, as they do nowhere else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxprune.compaction.blocks import View
from jaxprune.compaction.evaluate import restrict_const
from jaxprune.costs import operations
from jaxprune.costs.operations import Repeats, Sizes
from jaxprune.ir import axes, compat, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import CALLS, Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules import registry
from jaxprune.rules.registry import KEPT, Rule, Wire

WHOLE = 2  # A loop of at most so many dimensions is timed whole.


@dataclass(frozen=True, eq=False)
class Group:
    """Steps that are timed in one program.

    Attributes:
      steps: in their order.
      ins, outs: what they read from elsewhere, and what is read elsewhere.
      repeats: the lengths of the loops around them, as axes or numbers.
      dims: the free dimensions in their shapes and repeats, in a fixed order.
      weights: those of ``ins`` that are made of parameters alone.
    """

    steps: tuple[Step, ...]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    repeats: Repeats
    dims: tuple[Axis, ...]
    weights: frozenset[Value] = frozenset()

    @property
    def runs(self) -> bool:
        """Whether there is something to time."""
        return bool(self.ins and self.outs) and any(primitives.of(s).runs for s in self.steps)

    def times(self, sizes: Sizes) -> Any:
        return operations.product(self.repeats, sizes)

    def work(self, sizes: Sizes) -> Any:
        """FLOPs, which time mostly follows."""
        return sum(op.flops(sizes) for op in operations.inside(self.steps, self.repeats))

    def empty(self, sizes: Sizes) -> Any:
        """Whether nothing is left to compute: an operand or a result has no entries."""
        shapes = [axes.size_of(a, sizes) for v in [*self.ins, *self.outs] for a in v.axes]
        gone = [np.equal(n, 0) for n in [*shapes, self.times(sizes)]]
        return np.logical_or.reduce(np.broadcast_arrays(*gone))


def groups(tape: Tape, free: Sequence[Axis], params: Sequence[Value] = ()) -> list[Group]:
    """All that a program runs, loops entered.

    Args:
      tape: a coupled program.
      free: the dimensions whose counts may change.
      params: the parameters among its inputs.
    """
    fixed = made_of(tape, params)
    found = _of_tape(tape, (), {axis: i for i, axis in enumerate(free)})
    return [replace(g, weights=frozenset(v for v in g.ins if v in fixed)) for g in found]


def made_of(tape: Tape, params: Iterable[Value]) -> set[Value]:
    """The values of a program, and of those in it, that are made of parameters alone."""
    fixed = set(params)
    for step in tape.steps:
        inside = [v in fixed or v.const is not None for v in step.ins]
        if step.ins and all(inside):
            fixed |= {*step.outs}
        for sub in step.subs:
            if len(sub.inputs) == len(inside):
                stay = [known and _stays(step, i) for i, known in enumerate(inside)]
                fixed |= made_of(sub, [v for v, known in zip(sub.inputs, stay) if known])
    return fixed


def _stays(step: Step, i: int) -> bool:
    """Whether an operand of a step is the same each time its program runs."""
    if primitives.kind(step) is Kind.LOOP:
        return i < compat.scan_parts(step.eqn).num_consts
    return primitives.kind(step) is not Kind.WHILE


def _of_tape(tape: Tape, repeats: Repeats, order: Mapping[Axis, int]) -> Iterator[Group]:
    steps = tape.steps
    whole = {step for step in steps if not step.subs or _few(step, order) or _merges(step)}
    for members in _passes(steps, whole):
        yield _group(members, tape, steps, repeats, order)
    for step in steps:
        if step not in whole:
            for sub in operations.programs(step):
                yield from _of_tape(sub, (*repeats, *operations.loop(step)), order)


def _few(step: Step, order: Mapping[Axis, int]) -> bool:
    return primitives.kind(step) is Kind.LOOP and len(_dims_of([step], (), order)) <= WHOLE


def _merges(step: Step) -> bool:
    """Whether a compiler merges it with its neighbours: a call does if all inside do."""
    if step.subs:
        return primitives.kind(step) in CALLS and all(map(_merges, step.subs[0].steps))
    return primitives.of(step).fused


def _group(
    members: list[Step],
    tape: Tape,
    steps: Sequence[Step],
    repeats: Repeats,
    order: Mapping[Axis, int],
) -> Group:
    made = {v for step in members for v in step.outs}
    read = {v for step in steps if step not in set(members) for v in step.ins} | {*tape.outputs}
    ins = dict.fromkeys(
        v for step in members for v in step.ins if v not in made and v.const is None
    )
    outs = tuple(v for step in members for v in step.outs if v in read)
    return Group(tuple(members), tuple(ins), outs, repeats, _dims_of(members, repeats, order))


def _dims_of(
    steps: Sequence[Step], repeats: Repeats, order: Mapping[Axis, int]
) -> tuple[Axis, ...]:
    found = {d for op in operations.inside(steps, repeats) for d in operations.dims_of(op, order)}
    return tuple(sorted(found, key=order.__getitem__))


# -------------------------------------------------------------------------------------- passes


def _passes(steps: Sequence[Step], whole: set[Step]) -> list[list[Step]]:
    """Groups of steps; what isn't merged is a group of its own.

    Merged steps get the latest stage in which something reads them; a stage ends with steps that
    aren't merged. Those of one stage that read each other are a pass: no path leads out and back.
    """
    merged = {step for step in steps if step in whole and _merges(step)}
    stage = _stages(steps, merged)
    maker = {v: step for step in steps for v in step.outs}
    root = {step: step for step in merged}

    def find(step: Step) -> Step:
        while root[step] is not step:
            step = root[step]
        return step

    for step in merged:
        for v in step.ins:
            if (before := maker.get(v)) in merged and stage[before] == stage[step]:
                root[find(before)] = find(step)
    found: dict[Step, list[Step]] = {}
    for step in steps:
        if step in whole:
            found.setdefault(find(step) if step in merged else step, []).append(step)
    return list(found.values())


def _stages(steps: Sequence[Step], merged: set[Step]) -> dict[Step, int]:
    """For each step the latest stage, counted in unmerged steps on the longest path before it."""
    after: dict[Value, int] = {}
    stage = {}
    for step in steps:
        stage[step] = max((after.get(v, 0) for v in step.ins), default=0)
        after |= dict.fromkeys(step.outs, stage[step] + (step not in merged))
    wanted: dict[Value, int] = {}
    for step in reversed(steps):
        readers = [wanted[v] for v in step.outs if v in wanted]
        if step in merged and readers:
            stage[step] = min(readers)
        for v in step.ins:
            wanted[v] = min(wanted.get(v, stage[step]), stage[step])
    return stage


# ---------------------------------------------------------------------------------- evaluation


class Runner:
    """Evaluates steps at the sizes of a view; nothing is in blocks."""

    def __init__(self, view: View):
        self.view = view

    def size(self, axis: Axis) -> int:
        return self.view.size(axis)

    def wires(self, values: Sequence[Value]) -> list[Wire]:
        return [(i, KEPT) for i in range(len(values))]

    def own_only(self, value: Value, block: Any, x: Any) -> Any:
        return x

    def run(
        self, tape: Tape, ins: Sequence[Wire], xs: Sequence[Any], outs: Sequence[Wire]
    ) -> list[Any]:
        env = {tape.inputs[i]: x for (i, _), x in zip(ins, xs, strict=True)}
        self.steps(tape.steps, env)
        return [self.read(env, tape.outputs[i]) for i, _ in outs]

    def steps(self, steps: Sequence[Step], env: dict[Value, Any]) -> None:
        for step in steps:
            xs = [self.read(env, v) for v in step.ins]
            rule = registry.rule_of(step)
            if isinstance(rule, Rule):
                ys = rule.evaluate(self.view, step, xs)
            else:
                ys = rule.run(self, step, self.wires(step.ins), xs, self.wires(step.outs))
            env.update(zip(step.outs, ys, strict=True))

    def read(self, env: Mapping[Value, Any], value: Value) -> Any:
        return restrict_const(self.view, value) if value.const is not None else env[value]


def evaluate(group: Group, view: View, xs: Sequence[Any]) -> list[Any]:
    """The results of a group from what it reads, at the sizes of a view."""
    env = dict(zip(group.ins, xs, strict=True))
    Runner(view).steps(group.steps, env)
    return [env[v] for v in group.outs]


# ---------------------------------------------------------------------------------------- names


def name_of(group: Group, counts: Mapping[Axis, int]) -> str:
    """What a time is kept under: equal for equal work, wherever it stands in a network."""
    view = View({d: np.arange(n) for d, n in counts.items()})
    ins, outs = (" ".join(_type(v, view) for v in vs) for vs in (group.ins, group.outs))
    names = " ".join(step.name for step in group.steps[:3])
    more = f" + {len(group.steps) - 3}" if len(group.steps) > 3 else ""
    text = _described(group.steps, {v: i for i, v in enumerate(group.ins)}, view)
    return f"{names}{more} {ins} -> {outs} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _described(steps: Sequence[Step], index: dict[Value, int], view: View) -> str:
    """The steps with their parameters, shapes and wiring."""
    lines = []
    for step in steps:
        ins = [f"{index.get(v, v.const is not None)} {_type(v, view)}" for v in step.ins]
        index |= {v: len(index) + k for k, v in enumerate(step.outs)}
        lines += [step.name, *ins, "->", *(_type(v, view) for v in step.outs), _inner(step, view)]
    return "\n".join(lines)


def _inner(step: Step, view: View) -> str:
    if step.subs:
        programs = operations.programs(step)
        texts = [
            _described(p.steps, {v: i for i, v in enumerate(p.inputs)}, view) for p in programs
        ]
        loop = operations.loop(step)
        lengths = [str(n if isinstance(n, int) else view.size(n)) for n in loop]
        return "\n".join([*lengths, "{", *texts, "}"])
    params = [f"{k}={v}" for k, v in views.every(step) if v is not None]
    return re.sub(r"0x[0-9a-f]+", "", ", ".join(params))


def _type(value: Value, view: View) -> str:
    return f"{value.aval.dtype}[{','.join(map(str, view.shape(value.axes)))}]"
