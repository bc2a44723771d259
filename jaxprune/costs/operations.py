"""The operations of a program, with the dimensions that the cost of each depends on.

A step of the tape knows its operands' axes, and an axis knows its size for any counts of its
dimensions: so every cost is a small table over the counts of the dimensions in one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxprune.costs import flops
from jaxprune.ir import axes, compat, primitives, views
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
      dims: the free dimensions in its shapes and repeats, in a fixed order.
      made_of: what merged operations make of one value alone -> that value.
    """

    step: Step
    repeats: Repeats
    dims: tuple[Axis, ...] = ()
    made_of: Mapping[Value, Value] = field(default_factory=dict, repr=False)

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
        written = sum(_nbytes(v, sizes) for v in self.step.outs)
        read = [self._read(v, sizes) for v in self.step.ins]
        if primitives.kind(self.step) is Kind.GATHER:  # it reads what it takes
            read[0] = np.minimum(read[0], written)
        return (written + sum(read)) * self.times(sizes)

    def _read(self, value: Value, sizes: Sizes) -> Any:
        """What is broadcast on its way is read before that."""
        source = self.made_of.get(value, value)
        return np.minimum(_nbytes(value, sizes), _nbytes(source, sizes))

    def empty(self, sizes: Sizes) -> Any:
        """Whether nothing is left to compute: an operand or a result has no entries."""
        values = [*self.step.ins, *self.step.outs]
        shapes = [n for shape in _shapes(values, sizes) for n in shape]
        gone = [np.equal(n, 0) for n in [*shapes, self.times(sizes)]]
        return np.logical_or.reduce(np.broadcast_arrays(*gone))


def operations(tape: Tape, free: Sequence[Axis]) -> list[Operation]:
    """All operations that a program runs, loops and calls entered.

    Args:
      tape: a coupled program.
      free: the dimensions whose counts may change.
    """
    order = {axis: i for i, axis in enumerate(free)}
    every = [Operation(step, repeats) for step, repeats in walk(tape, ())]
    made_of = _sources(op.step for op in every)
    return [Operation(op.step, op.repeats, dims_of(op, order), made_of) for op in every]


def _sources(steps: Iterable[Step]) -> dict[Value, Value]:
    """Results of merged steps that are made of one value alone -> that value."""
    found: dict[Value, Value] = {}
    for step in steps:
        if primitives.of(step).fused:
            sources = {found.get(v, v) for v in step.ins if v.const is None}
            if len(sources) == 1:
                found.update(dict.fromkeys(step.outs, sources.pop()))
    return found


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


def walk(tape: Tape, repeats: Repeats) -> Iterator[tuple[Step, Repeats]]:
    """Steps that hold no program, with the lengths of the loops around them."""
    for step in needed(tape):
        if not step.subs:
            yield step, repeats
            continue
        for sub in programs(step):
            yield from walk(sub, (*repeats, *loop(step)))


def needed(tape: Tape) -> list[Step]:
    """The steps that an output or an effect needs."""
    needed, kept = set(tape.outputs), []
    for step in reversed(tape.steps):
        if step.eqn.effects or not needed.isdisjoint(step.outs):
            kept.append(step)
            needed.update(step.ins)
    return kept[::-1]


def _dearest(step: Step) -> Sequence[Tape]:
    """Of the branches of a ``cond`` the one with most FLOPs, as ``jp.cost`` counts."""
    return [max(step.subs, key=lambda t: sum(op.flops({}) for op in operations(t, ())))]


_PROGRAMS: dict[Kind, Callable[[Step], Sequence[Tape]]] = {
    Kind.BRANCH: _dearest,
    Kind.WHILE: lambda step: step.subs,  # its condition and its body, one iteration
}


def programs(step: Step) -> Sequence[Tape]:
    """Those of a step that run."""
    return _PROGRAMS.get(primitives.kind(step), lambda step: step.subs[:1])(step)


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


def _nbytes(value: Value, sizes: Sizes) -> Any:
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
