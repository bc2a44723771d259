"""The operations of a program, with the dimensions that the cost of each depends on.

A step of the tape knows its operands' axes, and an axis knows its size for any counts of its
dimensions: so every cost is a small table over the counts of the dimensions in one operation.
``jp.cost`` is the sum of all operations at full size. What runs at all is decided once, by
``jaxprune.ir.tape``: a tape holds no dead steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxprune.costs import flops
from jaxprune.ir import axes, compat, primitives, tape, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import CONTROL, Kind
from jaxprune.ir.tape import Step, Tape, Value

Sizes = dict[Axis, Any]  # a dimension -> its count, or an array of counts
Repeats = tuple[Axis | int, ...]  # lengths of the loops around a step


@dataclass(frozen=True, eq=False)
class Operation:
    """One equation at one place of the program.

    Attributes:
      step: the equation and its operands.
      repeats: how often it runs: the lengths of the loops around it, as axes or numbers.
      sources: for each operand the value that merged operations alone make it of, itself where
        there are several; None for constants.
      dims: the free dimensions in its shapes and repeats, in a fixed order.
    """

    step: Step
    repeats: Repeats
    sources: tuple[Value | None, ...]
    dims: tuple[Axis, ...] = ()

    @property
    def anchor(self) -> bool:
        """Whether it reads and writes memory; other operations are merged into their neighbours."""
        return not primitives.of(self.step).fused

    def times(self, sizes: Sizes) -> Any:
        return product(self.repeats, sizes)

    def flops(self, sizes: Sizes) -> Any:
        shapes = [_shapes(values, sizes) for values in (self.step.ins, self.step.outs)]
        return flops.flops(self.step, *shapes) * self.times(sizes)

    def bytes(self, sizes: Sizes) -> Any:
        """Operands read and results written once, as ``jp.cost`` counts; 0 for what is merged."""
        if not self.anchor:
            return 0
        written = sum(nbytes(v, sizes) for v in self.step.outs)
        read = [self._read(*pair, sizes) for pair in zip(self.step.ins, self.sources)]
        if primitives.kind(self.step) is Kind.GATHER:  # it reads what it takes
            read[0] = np.minimum(read[0], written)
        return (written + sum(read)) * self.times(sizes)

    def _read(self, value: Value, source: Value | None, sizes: Sizes) -> Any:
        """What is broadcast on its way is read before that."""
        whole = nbytes(value, sizes)
        return whole if source is None else np.minimum(whole, nbytes(source, sizes))

    def empty(self, sizes: Sizes) -> Any:
        """Whether nothing is left to compute: an operand or a result has no entries."""
        values = [*self.step.ins, *self.step.outs]
        shapes = [n for shape in _shapes(values, sizes) for n in shape]
        gone = [np.equal(n, 0) for n in [*shapes, self.times(sizes)]]
        return np.logical_or.reduce(np.broadcast_arrays(*gone))


class Program(NamedTuple):
    """All that a program runs.

    Attributes:
      operations: in their order, those of loops and calls among them; of branches the dearest.
      alone: inputs and outputs that no operation moves; each of them moves once.
      notes: what is counted and not known, a line each.
    """

    operations: list[Operation]
    alone: list[Value]
    notes: tuple[str, ...]


def read(program: Tape, free: Sequence[Axis] = ()) -> Program:
    """Reads a whole function.

    Args:
      program: its tape, coupled or of :func:`separate` steps.
      free: the dimensions whose counts may change.
    """
    reader, order = _Reader(), {axis: i for i, axis in enumerate(free)}
    found = [replace(op, dims=dims_of(op, order)) for op in reader.steps(program, ())]
    return Program(found, reader.alone(program), tuple(reader.notes))


def inside(steps: Sequence[Step], repeats: Repeats) -> list[Operation]:
    """The operations of some steps of a program, loops and calls entered."""
    every = Tape([], [*steps], [v for step in steps for v in step.outs])
    return _Reader().steps(every, repeats)


def separate(step: Step) -> list[list[Axis]]:
    """Couples nothing: results share no axis with operands, for costs that only read shapes."""
    step.subs = _separate_programs(step)
    return [[axes.leaf(n) for n in v.aval.shape] for v in step.eqn.outvars]


def _separate_programs(step: Step) -> list[Tape]:
    return [
        tape.build(part.jaxpr, _inputs(part), separate, step.where)
        for part in views.entered(step.eqn, step.ins)
    ]


def _inputs(part: views.Entered) -> list[Value]:
    variables = compat.open_jaxpr(part.jaxpr)[0].invars
    pairs = zip(variables, part.fixed, strict=True)
    return [Value(var.aval, const=None if v is None else v.const) for var, v in pairs]


@dataclass
class _Reader:
    """What one walk knows of a program's values."""

    made_of: dict[Value, Value | None] = field(default_factory=dict)  # results of merged steps
    moving: set[Value] = field(default_factory=set)  # sources that operations read
    moved: set[Value] = field(default_factory=set)  # values that depend on what operations write
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set

    def source(self, value: Value) -> Value | None:
        """The one value that merged steps make it of, itself for several; None for constants."""
        return self.made_of.get(value, value if value.const is None else None)

    def alone(self, program: Tape) -> list[Value]:
        """The inputs and outputs of a program that its operations don't move."""
        live = {v for step in program.steps for v in step.ins} | set(program.outputs)
        ins = [v for v in program.inputs if v in live and v not in self.moving]
        outs = dict.fromkeys(v for v in program.outputs if v not in self.moved)
        return [*ins, *(v for v in outs if v not in ins)]

    def steps(self, program: Tape, repeats: Repeats) -> list[Operation]:
        """The operations of a program, with the lengths of the loops around it."""
        return [op for step in program.steps for op in self._step(step, repeats)]

    def _step(self, step: Step, repeats: Repeats) -> list[Operation]:
        """A step's own operation, or those of the programs that it runs."""
        if any(v in self.moved for v in step.ins):
            self.moved.update(step.outs)
        parts = views.entered(step.eqn, step.ins)
        if not parts:
            return [self._own(step, repeats)]
        subs = step.subs or _separate_programs(step)
        runs = [self._enter(*pair, (*repeats, *loop(step))) for pair in zip(parts, subs)]
        if primitives.kind(step) in CONTROL:
            return self._controlled(step, runs)
        self._follow(step.outs, subs[0].outputs)
        return runs[0]

    def _own(self, step: Step, repeats: Repeats) -> Operation:
        found = Operation(step, repeats, tuple(map(self.source, step.ins)))
        sources = {s for s in found.sources if s is not None}
        if not found.anchor:
            one = next(iter(sources), None)
            self.made_of |= {out: one if len(sources) < 2 else out for out in step.outs}
            return found
        self.moving |= sources
        self.moved.update(step.outs if found.bytes({}) else ())
        if not flops.is_known(step):
            self._note(step, "counted as 0 FLOPs, there is no rule for it")
        return found

    def _enter(self, part: views.Entered, sub: Tape, repeats: Repeats) -> list[Operation]:
        """The operations of a program inside a step.

        What it reads of a loop's carry is in the first iteration the value passed in.
        """
        held = [(x, v) for x, v in zip(sub.inputs, part.fixed, strict=True) if v is not None]
        self._follow([x for x, _ in held], [v for _, v in held])
        found = self.steps(sub, repeats)
        first = zip(sub.inputs, part.operands, strict=True)
        self.moving |= {s for x, v in first if x in self.moving and (s := self.source(v))}
        return found

    def _follow(self, values: Sequence[Value], same: Sequence[Value]) -> None:
        """Takes values for others of the same content."""
        for value, other in zip(values, same, strict=True):
            self.made_of[value] = self.source(other)
            self.moved.update([value] if other in self.moved else ())

    def _controlled(self, step: Step, runs: list[list[Operation]]) -> list[Operation]:
        """The operations of a loop, or of the dearest branch."""
        kind = primitives.kind(step)
        if kind is Kind.WHILE:
            self._note(step, "counted as one iteration, their number isn't known")
        if kind is Kind.BRANCH:
            if len({_cost_of(run)[0] for run in runs}) > 1:
                self._note(step, "counted as its dearest branch")
            runs = [max(runs, key=_cost_of)]
        found = [op for run in runs for op in run]
        self.moved.update(step.outs if any(op.bytes({}) for op in found) else ())
        return found

    def _note(self, step: Step, what: str) -> None:
        self.notes[f"{step.name}{' at ' + step.where if step.where else ''}: {what}"] = None


def _cost_of(run: Sequence[Operation]) -> tuple[int, int]:
    """FLOPs and bytes of some operations at full size."""
    return sum(int(op.flops({})) for op in run), sum(int(op.bytes({})) for op in run)


def dims_of(op: Operation, order: Mapping[Axis, int]) -> tuple[Axis, ...]:
    """The dimensions of ``order`` in an operation's shapes and repeats, in order."""
    inside = [a for v in [*op.step.ins, *op.step.outs] for a in v.axes]
    inside += [r for r in op.repeats if not isinstance(r, int)]
    found = {leaf for axis in inside for leaf in axes.leaves(axis) if leaf in order}
    return tuple(sorted(found, key=order.__getitem__))


def product(repeats: Repeats, sizes: Sizes) -> Any:
    """How often a step runs."""
    each: list[Any] = [r if isinstance(r, int) else axes.size_of(r, sizes) for r in repeats]
    return math.prod(each)


def programs(step: Step) -> Sequence[Tape]:
    """The programs of a step that run: the dearest branch; a loop's body and its test."""
    kind = primitives.kind(step)
    if kind is Kind.BRANCH:
        return [max(step.subs, key=lambda sub: _cost_of(inside(sub.steps, ())))]
    return step.subs if kind is Kind.WHILE else step.subs[:1]


def loop(step: Step) -> Repeats:
    """How often a step's programs run."""
    if primitives.kind(step) is Kind.SHARDS:
        return (views.devices(step),)
    if primitives.kind(step) is not Kind.LOOP:
        return ()
    scanned = compat.scanned(step.eqn, step.ins)
    return (scanned[0].axes[0],) if scanned else (int(compat.scan_parts(step.eqn).length),)


def _shapes(values: Sequence[Value], sizes: Sizes) -> list[tuple[Any, ...]]:
    return [tuple(axes.size_of(a, sizes) for a in v.axes) for v in values]


def nbytes(value: Value, sizes: Sizes) -> Any:
    """The bytes that a value takes."""
    return value.aval.dtype.itemsize * math.prod(axes.size_of(a, sizes) for a in value.axes)


def grid(dims: Sequence[Axis], counts: Mapping[Axis, np.ndarray]) -> dict[Axis, np.ndarray]:
    """Counts of several dimensions as arrays that broadcast against each other."""
    n = len(dims)
    return {
        d: np.asarray(counts[d]).reshape([-1 if i == k else 1 for k in range(n)])
        for i, d in enumerate(dims)
    }


def bypassed(tape: Tape, dimension: Axis, sources: Sequence[Value]) -> bool:
    """Whether ``sources`` reach the program's outputs without passing through a dimension.

    Only then may all of its units go: the rest of the network still computes something.
    """
    reached = _reach(tape, dimension, set(sources))
    return any(v in reached for v in tape.outputs)


def _reach(tape: Tape, dimension: Axis, reached: set[Value]) -> set[Value]:
    """``reached`` itself, with what is reached from it."""
    for step in tape.steps:
        if not any(v in reached for v in step.ins):
            continue
        if step.subs:
            sub = step.subs[-1] if primitives.kind(step) in CONTROL else step.subs[0]
            pairs = zip(reversed(step.ins), reversed(sub.inputs))  # predicates come first
            inside = _reach(sub, dimension, {inner for outer, inner in pairs if outer in reached})
            outs = [o for o, inner in zip(step.outs, sub.outputs) if inner in inside]
        else:
            outs = step.outs
        reached.update(v for v in outs if not _holds(v, dimension))
    return reached


def _holds(value: Value, dimension: Axis) -> bool:
    return any(leaf is dimension for axis in value.axes for leaf in axes.leaves(axis))
