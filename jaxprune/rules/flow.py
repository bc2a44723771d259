"""The forward walk that finds what is zero in every value, whatever the inputs are."""

from __future__ import annotations

from collections.abc import Sequence

from jaxprune.jaxpr.tape import Step, Tape, Value, concrete, is_empty
from jaxprune.rules import registry, zeros
from jaxprune.rules.registry import Nested
from jaxprune.rules.zeros import Zeros

# primitive -> the operand that passes unchanged when all others are zero; None = any of them
NEUTRAL = {"add": None, "add_any": None, "or": None, "sub": 0, "copy": 0, "copy_p": 0}

# primitive -> the operand whose zeros give infinities or NaN
INFINITE = {"div": 1, "rem": 1, "rsqrt": 0, "reciprocal": 0, "log": 0, "log2": 0}

CALLED_ONCE = {"remat2", "checkpoint", "remat", "custom_jvp_call", "custom_vjp_call"}


class ZeroFlow:
    """Facts about the values of a program and of the programs inside it."""

    def __init__(self, doubted: frozenset[Step] = frozenset()) -> None:
        self.doubted = doubted
        self.facts: dict[Value, Zeros] = {}
        self.hazards: dict[str, None] = {}  # where zeros make infinities; in order, each once
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
        self.facts.update(zip(tape.inputs, known, strict=True))
        for step in tape.steps:
            args = [self.of(v) for v in step.ins]
            rule = registry.rule_of(step)
            if isinstance(rule, Nested):
                results = rule.zeros(self, step, args)
            else:
                results = rule.zeros(step, args)
                self._look_for_infinities(step, args)
                self.mixes[step] = rule.mixes(step, args)
            self.facts.update(zip(step.outs, results, strict=True))
        return [self.of(v) for v in tape.outputs]

    def _look_for_infinities(self, step: Step, args: list[Zeros]) -> None:
        """Notes divisions by what is zero whatever the inputs are: 0 x infinity is not zero."""
        k = INFINITE.get(step.name)
        if k is not None and (args[k].all or any(z.any() for z in args[k].axes)):
            self.hazards[f"{step.name} at {step.where}"] = None

    def aliases(self, tape: Tape) -> dict[Value, Value]:
        """Values that are another value unchanged: ``x + 0``, and programs that return an input."""
        same: dict[Value, Value] = {}
        for step in tape.steps:
            for value, source in self.passed(step):
                same[value] = same.get(source, source)
        return same

    def passed(self, step: Step) -> list[tuple[Value, Value]]:
        """(result, operand) pairs that are one array, given what is zero."""
        if step.name in NEUTRAL:
            return [(step.outs[0], v) for v in self._neutral(step)]
        if step.name in CALLED_ONCE:
            inner = self.aliases(step.subs[0])
            outer = dict(zip(step.subs[0].inputs, step.ins, strict=True))
            ends = zip(step.outs, step.subs[0].outputs, strict=True)
            found = [(out, inner.get(end, end)) for out, end in ends]
            return [(out, outer[end]) for out, end in found if end in outer]
        return []

    def _neutral(self, step: Step) -> list[Value]:
        result, only = step.outs[0], NEUTRAL[step.name]
        for i, v in enumerate(step.ins):
            others = [u for j, u in enumerate(step.ins) if j != i]
            fits = v.aval.shape == result.aval.shape and v.aval.dtype == result.aval.dtype
            may_pass = fits and only in (None, i) and v.const is None
            if may_pass and all(self.of(u).all for u in others):
                return [v]
        return []


def is_identity(tape: Tape, known: Sequence[Zeros], pairs: Sequence[tuple[Value, Value]]) -> bool:
    """Whether in each (input, output) pair both are one array when inputs are zero as stated."""
    flow = ZeroFlow()
    flow.run(tape, known)
    same = flow.aliases(tape)
    return all(same.get(output, output) is value for value, output in pairs)
