"""Evaluating a tape block by block, at the sizes that the blocks have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune.axes import Axis
from jaxprune.compact.blocks import View
from jaxprune.compact.counts import Counts
from jaxprune.compact.demand import Demand, Part, wires
from jaxprune.jaxpr import compat
from jaxprune.jaxpr.tape import Step, Tape, Value
from jaxprune.rules import registry
from jaxprune.rules.registry import KEPT, Block, Nested, Wire

COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "prod": jnp.multiply,
    "or": jnp.bitwise_or,
    "and": jnp.bitwise_and,
}


class Evaluator:
    """Runs what a :class:`Demand` asks for."""

    def __init__(self, demand: Demand, counts: Counts | None = None):
        self._demand, self._split = demand, demand.split
        self._counts = counts or {}

    def size(self, axis: Axis) -> int:
        return self._split.view(KEPT).size(axis)

    def wires(self, values: Sequence[Value]) -> list[Wire]:
        return wires([self._demand.needed.get(v, set()) for v in values])

    def run(
        self, tape: Tape, ins: Sequence[Wire], xs: Sequence[Any], outs: Sequence[Wire]
    ) -> list[Any]:
        """Blocks of the outputs from blocks of the inputs."""
        env = {(tape.inputs[i], block): x for (i, block), x in zip(ins, xs, strict=True)}
        for step in tape.steps:
            if step in self._demand.wires:
                self._nested(step, env)
            elif step in self._demand.parts:
                self._flat(step, env)
        return [self._read(env, tape.outputs[i], block) for i, block in outs]

    def _read(self, env: dict[Any, Any], value: Value, block: Block) -> Any:
        if (value, block) in env:
            return env[value, block]
        view = self._split.view(block)
        if value.const is not None:
            return restrict_const(view, value)
        if not self._demand.is_zero(value, block):
            raise AssertionError(
                f"a block of {value.aval} was never evaluated; please report this program"
            )
        return jnp.zeros(view.shape(value.axes), value.aval.dtype)

    def _nested(self, step: Step, env: dict[Any, Any]) -> None:
        ins, outs = self._demand.wires[step]
        xs = [self._read(env, step.ins[i], block) for i, block in ins]
        rule = registry.rule_of(step)
        assert isinstance(rule, Nested)
        for (j, block), y in zip(outs, rule.run(self, step, ins, xs, outs), strict=True):
            self._store(step, env, j, block, y)

    def _flat(self, step: Step, env: dict[Any, Any]) -> None:
        for block, parts in self._demand.parts[step].items():
            ys = [self._part(step, part, env) for part in parts]
            combine = self._combine(step) if len(ys) > 1 else None
            for j, value in enumerate(step.outs):
                y = ys[0][j]
                for other in ys[1:]:
                    y = combine(y, other[j])  # type: ignore[misc]
                if block <= self._split.dims(value):  # else another block of it, not to overwrite
                    self._store(step, env, j, block, y)
        for (_, block), source in self._passed(step):
            env[step.outs[0], block] = self._read(env, source, block)

    def _passed(self, step: Step) -> list[Any]:
        blocks = self._demand.needed.get(step.outs[0], set()) if step.outs else ()
        keys = [(step, block) for block in blocks if (step, block) in self._demand.passed]
        return [(key, self._demand.passed[key]) for key in keys]

    def _combine(self, step: Step) -> Callable[[Any, Any], Any]:
        return COMBINE[self._demand.flow.mixes[step][0].combine]

    def _part(self, step: Step, part: Part, env: dict[Any, Any]) -> list[Any]:
        xs = [self._read(env, v, part.block & self._split.dims(v)) for v in step.ins]
        for operand, axis, positions in part.picks:
            xs[operand] = xs[operand].take(positions, axis=axis)
        if step in self._counts:
            xs = self._counts[step].put(xs, self._split.view(KEPT))
        rule = registry.rule_of(step)
        if isinstance(rule, Nested):  # untouched: the original equation, whole
            return compat.bind(step.eqn, xs)
        return rule.evaluate(self._split.view(part.block), step, xs)

    def _store(self, step: Step, env: dict[Any, Any], j: int, block: Block, y: Any) -> None:
        expected = self._split.view(block).shape(step.outs[j].axes)
        if tuple(y.shape) != expected:
            raise AssertionError(
                f"{step.name} at {step.where} gave shape {y.shape}, its axes say "
                f"{expected}; please report this program: the rule for {step.name} is wrong"
            )
        env[step.outs[j], block] = y


def restrict_const(view: View, value: Value) -> Any:
    """A closed-over array at the positions of its axes in this view."""
    array = value.const
    for k, axis in enumerate(value.axes):
        if view.size(axis) != axis.size:
            array = array.take(view.index(axis), axis=k)
    return array
