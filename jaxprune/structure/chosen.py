"""Units that are chosen by value, in another order: what a program may do with their positions.

Units are put in an order of their own under each unit of a parent so that those to go come last,
and those that stay keep their order among themselves. A choice then finds the same units, entries
that tie included, but their positions are other numbers. That makes no difference as long as they
are only looked up, compared with each other, or sorted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxprune.ir import axes, positions, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.content import counted
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Tape, Value


def looks_up(step: Step, dimension: Axis) -> bool:
    """Whether a step chooses among units of a dimension, or takes or counts those chosen."""
    kind = primitives.kind(step)
    along = positions.choice(step)
    if along is not None:
        return axes.holds([along], dimension)
    if kind in (Kind.GATHER, Kind.SCATTER):
        inside = [step.ins[0].axes[k] for k in views.indexed(step)]
        elsewhere = [a for v in step.ins[1:] for a in v.axes]
        alone = axes.holds(inside, dimension) and not axes.holds(elsewhere, dimension)
        return alone and _points_into(step.ins[1], inside)
    if kind is Kind.RAGGED:
        counts, rows = step.ins[2], step.ins[0]
        return axes.holds(counts.axes, dimension) and not axes.holds(rows.axes, dimension)
    return kind is Kind.FRESH  # positions of units are numbers, too: see below


def _points_into(indices: Value, inside: Sequence[Axis]) -> bool:
    along = positions.chosen_along(indices)
    return along is not None and all(axes.find(a) is along for a in inside)


def numbers_told(tape: Tape, dimension: Axis) -> str | None:
    """Where a program makes something of the positions of units that depends on their order."""
    return next(_Numbers(dimension).run(tape, whole=True), None)


class _Numbers:
    """Follows numbers of units, and what is made of them other than by looking up."""

    def __init__(self, dimension: Axis):
        self.dimension = dimension
        self.told: dict[Value, str] = {}

    def run(self, tape: Tape, whole: bool = False) -> Iterator[str]:
        for step in tape.steps:
            if step.subs:
                yield from self._enter(step)
            elif any(v in self.told or self._is_number(v) for v in step.ins):
                self._note(step)
                if step.eqn.effects:
                    yield from self._texts(step.outs or step.ins)
        if whole:
            yield from self._texts(tape.outputs)

    def _texts(self, values: Sequence[Value]) -> Iterator[str]:
        for v in values:
            if v in self.told or self._is_number(v):
                yield self.told.get(v, "a result holds the numbers of chosen units")

    def _is_number(self, value: Value) -> bool:
        found = positions.pointing(value)
        if found is not None:
            return axes.holds([found.axis], self.dimension)
        k = counted(value) if value.maker is not None and value.shape else None
        return k is not None and axes.holds([value.axes[k]], self.dimension)

    def _note(self, step: Step) -> None:
        told = {v for v in step.ins if v in self.told}
        handed = all(self._is_number(v) for v in step.outs) and not told
        if handed or self._is_same(step) or told and self._never_reads(step, told):
            return
        where = next((self.told[v] for v in step.ins if v in self.told), "")
        at = f" at {step.where}" if step.where else ""
        text = where or f"{step.name}{at} reads the numbers of chosen units"
        self.told |= dict.fromkeys(step.outs, text)

    def _never_reads(self, step: Step, told: set[Value]) -> bool:
        """``where(i < 0, i + n, i)``: the first two are never of consequence."""
        taken = positions.selected(step)
        return len(taken) == 1 and taken[0] not in told and self._is_number(taken[0])

    def _is_same(self, step: Step) -> bool:
        """Whether a step gives the same whatever the numbers are, as long as their order stays."""
        if any(v in self.told for v in step.ins):
            return False
        kind, numbers = primitives.kind(step), [self._is_number(v) for v in step.ins]
        if kind in (Kind.GATHER, Kind.SCATTER):
            inside = [step.ins[0].axes[k] for k in views.indexed(step)]
            alone = not any(n for i, n in enumerate(numbers) if i != 1)
            return alone and _points_into(step.ins[1], inside)
        if kind is Kind.SORT:  # by numbers, whose order is what it was
            return numbers[0] and positions.choice(step) is None
        return positions.compared(step) is not None

    def _enter(self, step: Step) -> Iterator[str]:
        """The programs that a step holds; what they don't know as a number tells it."""
        for part, sub in zip(views.entered(step.eqn, step.ins), step.subs):
            for outer, inner in zip(part.operands, sub.inputs):
                if outer in self.told or (self._is_number(outer) and not self._is_number(inner)):
                    self.told[inner] = self.told.get(outer, f"{step.name} at {step.where}")
        inside = {v for part in views.entered(step.eqn, step.ins) for v in part.operands}
        told = [
            self.told.get(v, f"{step.name} at {step.where} is steered by numbers of chosen units")
            for v in step.ins
            if v not in inside and (v in self.told or self._is_number(v))
        ]
        for sub in step.subs:
            yield from self.run(sub)
            told += [self.told[v] for v in sub.outputs if v in self.told]
        for out, inner in zip(step.outs, step.subs[0].outputs):
            if self._is_number(inner) and not self._is_number(out):
                told.append(f"{step.name} at {step.where} hands numbers of chosen units on")
        if told:
            self.told |= dict.fromkeys(step.outs, told[0])
