"""How much memory a call takes at its peak: which arrays of a program are there at once.

The model of a compiled program:

* Arguments and closed-over arrays are there all the time, results from where they are made.
* Any other array is there from the equation that makes it to the last one that reads it.
* What merged equations make of a single array is made anew where it is read, unless it is smaller
  than that array: a cast, an activation, a bias that is broadcast. What they make of several takes
  the place of those that nothing reads later: the sum of two streams.
* A loop holds its operands and results, and what its body holds at one turn; of branches the
  dearest counts. A ``shard_map`` and a kernel hold what they read and write.

Compilers reorder, merge more, and pad: it is an estimate, one that follows widths.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxprune.costs.operations import nbytes
from jaxprune.ir import compat, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import CALLS, CONTROL, Kind
from jaxprune.ir.tape import Step, Tape, Value

Size = Callable[[Value], float]


class Moment(NamedTuple):
    """The arrays that are there at once, and their bytes."""

    total: float
    arrays: frozenset[Value]


class Event(NamedTuple):
    """What one equation does to memory; ``inside``: the moments of the programs that it runs."""

    reads: Sequence[Value]
    writes: Sequence[Value]
    merged: bool = False
    inside: Sequence[Moment] = ()


def peak(tape: Tape) -> int:
    """The most bytes that are there at once, at full size."""
    return int(moments(tape, {})[0].total)


def moments(tape: Tape, sizes: Mapping[Axis, int], most: int = 1) -> list[Moment]:
    """The moments of most memory, largest first, of those that no neighbor exceeds.

    Args:
      tape: a program.
      sizes: the counts of dimensions that aren't whole.
      most: at most so many moments.
    """
    known: dict[Value, float] = {}

    def size(value: Value) -> float:
        if value not in known:
            known[value] = float(nbytes(value, dict(sizes)))
        return known[value]

    fixed = {*tape.inputs, *_constants(tape)}
    always = sum(map(size, fixed))
    found = _Line(tape, size, fixed).moments(most)
    return [Moment(always + m.total, m.arrays | fixed) for m in found]


def _constants(tape: Tape) -> Iterator[Value]:
    """The closed-over arrays that a program reads, each once."""
    found: dict[int, Value] = {}
    _collect(tape, found)
    return iter(found.values())


def _collect(tape: Tape, found: dict[int, Value]) -> None:
    for step in tape.steps:
        found |= {id(v.const): v for v in step.ins if v.const is not None and v.shape}
        for sub in step.subs:
            _collect(sub, found)


@dataclass
class _Line:
    """The events of a program, in order.

    Attributes:
      tape: the program.
      size: the bytes of a value.
      fixed: what neither comes nor goes.
      rows: the inputs that come with each turn of a loop.
      held: a value -> the array that it is read from, None for one that is made of nothing.
    """

    tape: Tape
    size: Size
    fixed: set[Value]
    rows: Sequence[Value] = ()
    held: dict[Value, Value | None] = field(default_factory=dict)

    def moments(self, most: int) -> list[Moment]:
        """As :func:`moments`, without what is fixed."""
        events = [Event((), self.rows), *self._events(self.tape, most), *self._results()]
        points = [
            (total + inner.total, i, inner.arrays)
            for i, (total, event, _) in enumerate(self._walk(events))
            for inner in event.inside or (Moment(0.0, frozenset()),)
        ]
        totals = [-1.0, *(total for total, _, _ in points), -1.0]
        tops = [p for k, p in enumerate(points, 1) if totals[k - 1] < totals[k] >= totals[k + 1]]
        chosen = heapq.nlargest(most, tops, key=lambda p: p[0])
        wanted = {i for _, i, _ in chosen}
        live = {i: x for i, (_, _, now) in enumerate(self._walk(events)) for x in now(i in wanted)}
        return [Moment(total, live[i] | inner) for total, i, inner in chosen]

    def _walk(self, events: Sequence[Event]) -> Iterator[tuple[float, Event, Any]]:
        """Each event's bytes, itself, and a function that lists the arrays if they are wanted."""
        ends = {*self.tape.outputs}
        last = {v: i for i, event in enumerate(events) for v in event.reads}
        live: set[Value] = set()
        total = 0.0

        def gone(values: Iterable[Value]) -> float:
            going = [v for v in values if v in live and v not in ends]
            live.difference_update(going)
            return sum(map(self.size, going))

        for i, event in enumerate(events):
            dying = [v for v in event.reads if last[v] == i]
            total -= gone(dying) if event.merged else 0.0
            coming = [v for v in event.writes if v not in live and v not in self.fixed]
            live.update(coming)
            total += sum(map(self.size, coming))
            yield total, event, lambda wanted: [frozenset(live)] if wanted else []
            total -= gone(dying) + gone(v for v in event.writes if v not in last)

    def _root(self, value: Value) -> Value | None:
        return self.held.get(value, value if value.const is None else None)

    def _events(self, tape: Tape, most: int) -> Iterator[Event]:
        for step in tape.steps:
            roots = (self._root(v) for v in step.ins)
            reads = list(dict.fromkeys(v for v in roots if v is not None))
            merged = primitives.of(step).fused
            if primitives.kind(step) in CALLS:
                yield from self._called(step, most)
            elif merged and len(reads) < 2 and not self._shrinks(reads, step.outs):
                self.held |= dict.fromkeys(step.outs, reads[0] if reads else None)
            else:
                yield Event(reads, step.outs, merged, self._inside(step, most))

    def _called(self, step: Step, most: int) -> Iterator[Event]:
        """What a call runs is part of the program around it."""
        sub, (part, *_) = step.subs[0], views.entered(step.eqn, step.ins)
        self.held |= {v: self._root(o) for v, o in zip(sub.inputs, part.operands, strict=True)}
        yield from self._events(sub, most)
        self.held |= {v: self._root(o) for v, o in zip(step.outs, sub.outputs, strict=True)}

    @staticmethod
    def _shrinks(reads: Sequence[Value], outs: Sequence[Value]) -> bool:
        return any(nbytes(out, {}) < nbytes(v, {}) for v in reads for out in outs)

    def _inside(self, step: Step, most: int) -> list[Moment]:
        """The moments of a loop's turn, or of each branch; operands are counted outside."""
        if primitives.kind(step) not in CONTROL:
            return []
        loop = primitives.kind(step) is Kind.LOOP
        found = []
        for sub in step.subs:
            rows = compat.scanned(step.eqn, sub.inputs) if loop else ()
            fixed = {v for v in sub.inputs if v not in set(rows)}
            found += _Line(sub, self.size, fixed, rows).moments(most)
        return found

    def _results(self) -> Iterator[Event]:
        """Results that were not stored yet; those that are inputs are handed on."""
        for value in self.tape.outputs:
            root = self._root(value)
            if root is not value and value not in self.tape.inputs:
                yield Event([root] if root is not None else [], [value], merged=True)
