"""The forward walk that finds what is zero in every value, whatever the inputs are."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxprune.ir import primitives
from jaxprune.ir.primitives import ANY, CALLS, CUSTOM
from jaxprune.ir.tape import Step, Tape, Value, concrete, is_empty
from jaxprune.rules import infinite, registry, zeros
from jaxprune.rules.infinite import GRADIENT, VALUE
from jaxprune.rules.registry import Nested
from jaxprune.rules.zeros import Zeros

IN_GRADIENT = " (in the gradient)"


class ZeroFlow:
    """Facts about the values of a program and of the programs inside it."""

    def __init__(self, doubted: frozenset[Step] = frozenset()) -> None:
        self.doubted = doubted
        self.facts: dict[Value, Zeros] = {}
        self._infinite: dict[str, str] = {}  # where zeros make infinities -> in what
        self._reads = {VALUE, GRADIENT}  # what of the program at hand counts
        self._of_rules: dict[Tape, set[str]] = {}  # the same of programs with rules, and of rules
        self._moving: dict[Tape, set[Value]] = {}
        self.mixes: dict[Step, list[registry.Mix]] = {}

    def of(self, value: Value) -> Zeros:
        """The facts of a value; literals and closed-over arrays are read."""
        if value not in self.facts:
            array = concrete(value.const)
            if is_empty(value.shape):
                known = zeros.everywhere(value.shape)
            else:
                known = zeros.unknown(value.shape) if array is None else zeros.of_array(array != 0)
            self.facts[value] = known
        return self.facts[value]

    def run(self, tape: Tape, known: Sequence[Zeros]) -> list[Zeros]:
        reads = self._reads
        self._reads = self._of_rules.get(tape, reads)
        self.facts.update(zip(tape.inputs, known, strict=True))
        for step in tape.steps:
            args = [self.of(v) for v in step.ins]
            rule = registry.rule_of(step)
            if isinstance(rule, Nested):
                self._note_rules(step)
                results = rule.zeros(self, step, args)
            else:
                results = rule.zeros(step, args)
                self._look_for_infinities(tape, step, args)
                self.mixes[step] = rule.mixes(step, args)
            self.facts.update(zip(step.outs, results, strict=True))
        self._reads = reads
        return [self.of(v) for v in tape.outputs]

    def _note_rules(self, step: Step) -> None:
        """The derivative of a function with a rule is the rule's, not that of its equations."""
        if primitives.kind(step) not in CUSTOM or len(step.subs) < 2:
            return
        self._of_rules[step.subs[0]] = self._reads & {VALUE}
        self._of_rules |= dict.fromkeys(step.subs[1:], self._reads & {GRADIENT})

    def _look_for_infinities(self, tape: Tape, step: Step, args: list[Zeros]) -> None:
        """Notes what zeros make infinite whatever the inputs are: 0 x infinity is not zero."""
        kind = infinite.at_zero(step, args)
        if kind == VALUE and VALUE not in self._reads:
            kind = GRADIENT  # a rule's equation
        elif kind == GRADIENT and not self._is_differentiated(tape, step):
            return
        if kind is not None:
            place = f"{step.name} at {step.where}"
            self._infinite[place] = VALUE if VALUE in (kind, self._infinite.get(place)) else kind

    def _is_differentiated(self, tape: Tape, step: Step) -> bool:
        """Not in a function with a rule, nor in the rule; not where only a comparison reads it."""
        if tape not in self._moving:
            self._moving[tape] = moving(tape)
        read = any(v in self._moving[tape] for v in step.outs)
        return read and self._reads == {VALUE, GRADIENT}

    @property
    def hazards(self) -> list[str]:
        """Where zeros make infinities, in order; those of a derivative say so."""
        mark = {VALUE: "", GRADIENT: IN_GRADIENT}
        return [place + mark[kind] for place, kind in self._infinite.items()]

    def forget_hazards(self, other: ZeroFlow) -> None:
        """Forgets those that another walk found, too."""
        theirs = other._infinite.items()
        self._infinite = {p: kind for p, kind in self._infinite.items() if (p, kind) not in theirs}

    def aliases(self, tape: Tape) -> dict[Value, Value]:
        """Values that are another value unchanged: ``x + 0``, and programs that return an input."""
        same: dict[Value, Value] = {}
        for step in tape.steps:
            for value, source in self.passed(step):
                same[value] = same.get(source, source)
        return same

    def passed(self, step: Step) -> list[tuple[Value, Value]]:
        """(result, operand) pairs that are one array, given what is zero."""
        row = primitives.of(step)
        if row.neutral is not None:
            return [(step.outs[0], v) for v in self._neutral(step, row.neutral)]
        if row.kind in CALLS:
            inner = self.aliases(step.subs[0])
            outer = dict(zip(step.subs[0].inputs, step.ins, strict=True))
            ends = zip(step.outs, step.subs[0].outputs, strict=True)
            found = [(out, inner.get(end, end)) for out, end in ends]
            return [(out, outer[end]) for out, end in found if end in outer]
        return []

    def _neutral(self, step: Step, neutral: int) -> list[Value]:
        result = step.outs[0]
        for i, v in enumerate(step.ins):
            others = [u for j, u in enumerate(step.ins) if j != i]
            fits = v.aval.shape == result.aval.shape and v.aval.dtype == result.aval.dtype
            may_pass = fits and neutral in (ANY, i) and v.const is None
            if may_pass and all(self.of(u).all for u in others):
                return [v]
        return []


def moving(tape: Tape) -> set[Value]:
    """The values that a derivative of the program's outputs reaches."""
    found = {v for v in tape.outputs if _is_float(v)}
    for step in reversed(tape.steps):
        if step.name != "stop_gradient" and any(v in found for v in step.outs):
            found.update(v for v in step.ins if _is_float(v))
    return found


def _is_float(value: Value) -> bool:
    return bool(jnp.issubdtype(value.aval.dtype, jnp.inexact))


def is_identity(tape: Tape, known: Sequence[Zeros], pairs: Sequence[tuple[Value, Value]]) -> bool:
    """Whether in each (input, output) pair both are one array when inputs are zero as stated."""
    flow = ZeroFlow()
    flow.run(tape, known)
    same = flow.aliases(tape)
    return all(same.get(output, output) is value for value, output in pairs)
