"""Evaluating a tape block by block, at the sizes that the blocks have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.compaction.blocks import View
from jaxprune.compaction.constants import Folded, fold, now
from jaxprune.compaction.counts import Counts
from jaxprune.compaction.demand import Demand, Part, wires
from jaxprune.ir import compat, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import CALLS, Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules import registry
from jaxprune.rules.registry import KEPT, Block, Nested, Wire
from jaxprune.sharding import as_declared, bound, reshaped, typed

COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "prod": jnp.multiply,
    "or": jnp.bitwise_or,
    "and": jnp.bitwise_and,
}

CHOOSE: dict[str, Callable[..., Any]] = {"max": lax.reduce_max, "min": lax.reduce_min}


class Evaluator:
    """Runs what a :class:`Demand` asks for."""

    def __init__(
        self,
        demand: Demand,
        counts: Counts | None = None,
        leftovers: Mapping[tuple[Value, Block], Any] | None = None,
    ):
        self._demand, self._split, self._constants = demand, demand.split, demand.constants
        self._counts = counts or {}
        self._folded = {
            (value, block): Folded(now(lambda a, t: jnp.asarray(a, t), array, value.aval.dtype))
            for (value, block), array in (leftovers or {}).items()
        }

    def size(self, axis: Axis) -> int:
        return self._split.view(KEPT).size(axis)

    def own_only(self, value: Value, block: Block, x: Any) -> Any:
        """Zeros where the block shows entries of another block."""
        own = self._split.own(value, block)
        return x if own is None else jnp.where(own, x, jnp.zeros_like(x))

    def wires(self, values: Sequence[Value]) -> list[Wire]:
        return wires([self._demand.needed.get(v, set()) for v in values])

    def run(
        self, tape: Tape, ins: Sequence[Wire], xs: Sequence[Any], outs: Sequence[Wire]
    ) -> list[Any]:
        """Blocks of the outputs from blocks of the inputs."""
        env = {(tape.inputs[i], block): x for (i, block), x in zip(ins, xs, strict=True)}
        for step in tape.steps:
            with compat.at_source(step.eqn):
                if step in self._demand.wires:
                    self._nested(step, env)
                elif step in self._demand.parts:
                    self._flat(step, env)
        return [self._read(env, tape.outputs[i], block) for i, block in outs]

    def _read(self, env: dict[Any, Any], value: Value, block: Block) -> Any:
        found = self._raw(env, value, block)
        if isinstance(found, Folded):
            return typed(found.whole(self._split.view(block).shape(value.axes)), value.aval)
        return found

    def _raw(self, env: dict[Any, Any], value: Value, block: Block) -> Any:
        """A block as it is kept: constants folded."""
        if (value, block) in env:
            return env[value, block]
        if (value, block) in self._folded:
            return self._folded[value, block]
        view = self._split.view(block)
        if value.const is not None:
            return restrict_const(view, value)
        if not self._demand.is_zero(value, block):
            raise AssertionError(
                f"a block of {value.aval} was never evaluated; please report this program"
            )
        return typed(jnp.zeros(view.shape(value.axes), value.aval.dtype), value.aval)

    def _nested(self, step: Step, env: dict[Any, Any]) -> None:
        ins, outs = self._demand.wires[step]
        if primitives.kind(step) in CALLS and self._constants.known:
            ins, outs = self._fold_called(step, ins, outs)
        xs = [self._read(env, step.ins[i], block) for i, block in ins]
        rule = registry.rule_of(step)
        assert isinstance(rule, Nested)
        for (j, block), y in zip(outs, rule.run(self, step, ins, xs, outs), strict=True):
            self._store(step, env, j, block, y)

    def _fold_called(
        self, step: Step, ins: list[Wire], outs: list[Wire]
    ) -> tuple[list[Wire], list[Wire]]:
        """Evaluates the constant results of a function that is called once; gives the rest.

        Its program reads the constants among its operands where they are kept; their tangents and
        cotangents, if a rule asks for them, are zero.
        """
        if primitives.kind(step) is Kind.CUSTOM_JVP and len(step.subs) == 2:
            for i, block in ins:
                if (step.ins[i], block) in self._folded:
                    self._still(step.subs[1].inputs[len(step.ins) + i], block)
        for sub in step.subs[0].steps if self._any_constant(step, outs) else ():
            if sub in self._demand.wires:
                self._fold_called(sub, *self._demand.wires[sub])
            elif sub in self._demand.parts:
                self._flat_constant(sub)
        for j, block in outs:
            if (step.outs[j], block) in self._constants.known:
                self._folded[step.outs[j], block] = self._raw({}, step.subs[0].outputs[j], block)
                if primitives.kind(step) is Kind.CUSTOM_VJP and len(step.subs) == 3:
                    self._still(step.subs[2].inputs[j - len(step.outs)], block)
        return (
            [(i, b) for i, b in ins if (step.ins[i], b) not in self._folded],
            [(j, b) for j, b in outs if (step.outs[j], b) not in self._folded],
        )

    def _still(self, moving: Value, block: Block) -> None:
        """A tangent or cotangent of a constant, for the rules that ask for it."""
        nothing = np.zeros((1,) * len(moving.axes), moving.aval.dtype)
        self._folded[moving, block] = Folded(nothing)

    def _all_constant(self, step: Step, parts: list[Part]) -> bool:
        return all(self._constants.is_constant(step, part) for part in parts)

    def _any_constant(self, step: Step, outs: list[Wire]) -> bool:
        return any((step.outs[j], block) in self._constants.known for j, block in outs)

    def _flat_constant(self, step: Step) -> None:
        for block, parts in self._demand.parts[step].items():
            if self._all_constant(step, parts):
                self._store(step, {}, 0, block, self._sum(step, parts, {})[0])
        for block, source in self._passed(step):
            below = block & self._split.dims(source)
            if (source, below) in self._constants.known:
                self._folded[step.outs[0], block] = self._raw({}, source, below)

    def _sum(self, step: Step, parts: list[Part], env: dict[Any, Any]) -> list[Any]:
        """The results of a step, put together from its evaluations."""
        if len(parts) > 1 and _chooses(step) and not self._all_constant(step, parts):
            return [self._choose(step, parts, env)]
        ys = [self._part(step, part, env) for part in parts]
        if len(ys) == 1:
            return ys[0]
        combine = self._combine(step)
        plain = [[y.array if isinstance(y, Folded) else y for y in each] for each in ys]
        if all(isinstance(y, Folded) for each in ys for y in each):
            return [
                Folded(now(functools.partial(functools.reduce, combine), e)) for e in zip(*plain)
            ]
        return [functools.reduce(combine, each) for each in zip(*plain)]

    def _choose(self, step: Step, parts: list[Part], env: dict[Any, Any]) -> Any:
        """A maximum over all parts at once: entries that tie share its gradient evenly."""
        value, (gone, combine) = step.ins[0], views.reduction(step)
        stay = [k for k in range(len(value.axes)) if k not in gone]
        rows = []
        for part in parts:
            x = self._read(env, value, part.block & self._split.dims(value))
            for _, axis, positions in part.picks:
                x = _take(x, positions, axis)
            rows.append(x)

        def choose(*xs: Any) -> list[Any]:
            shapes = [[jnp.shape(x)[k] for k in (*stay, *gone)] for x in xs]
            flat = [
                x.transpose((*stay, *gone)).reshape(*s[: len(stay)], prod(s[len(stay) :]))
                for x, s in zip(xs, shapes)
            ]
            return [CHOOSE[combine or ""](jnp.concatenate(flat, -1), (len(stay),))]

        return bound(choose, rows, [step.outs[0].aval])[0]

    def _flat(self, step: Step, env: dict[Any, Any]) -> None:
        for block, parts in self._demand.parts[step].items():
            ys = self._sum(step, parts, env)
            for j, (value, y) in enumerate(zip(step.outs, ys)):
                if block <= self._split.dims(value):  # else another block of it, not to overwrite
                    self._store(step, env, j, block, y)
        for block, source in self._passed(step):
            found = self._raw(env, source, block & self._split.dims(source))
            if step in self._counts:  # a count less zero, as jnp.var writes it
                found = self._counts[step].put([found] * len(step.ins), self._split.view(KEPT))[0]
            kept = self._folded if isinstance(found, Folded) else env  # called programs see these
            kept[step.outs[0], block] = found

    def _passed(self, step: Step) -> list[tuple[Block, Value]]:
        blocks = self._demand.needed.get(step.outs[0], set()) if step.outs else ()
        passed = self._demand.passed.get(step, {})
        return [(block, passed[block]) for block in blocks if block in passed]

    def _combine(self, step: Step) -> Callable[[Any, Any], Any]:
        return COMBINE[self._demand.flow.mixes[step][0].combine]

    def _part(self, step: Step, part: Part, env: dict[Any, Any]) -> list[Any]:
        if self._constants.known and self._constants.is_constant(step, part):
            return [self._fold(step, part, env)]
        xs = [self._read(env, v, part.block & self._split.dims(v)) for v in step.ins]
        for operand, axis, positions in part.picks:
            xs[operand] = _take(xs[operand], positions, axis)
        if step in self._counts:
            xs = self._counts[step].put(xs, self._split.view(KEPT))
        rule = registry.rule_of(step)
        if isinstance(rule, Nested):  # untouched: the original equation, whole
            return compat.bind(step.eqn, xs)
        return self._evaluate(rule, self._split.view(part.block), step, xs)

    def _evaluate(self, rule: registry.Rule, view: View, step: Step, xs: list[Any]) -> list[Any]:
        """At other sizes other mesh axes fit, and what Explicit ones want need not be clear."""
        given = all(as_declared(x, v.aval) for x, v in zip(xs, step.ins))
        if given and all(view.shape(v.axes) == v.shape for v in step.outs):
            return rule.evaluate(view, step, xs)
        if primitives.kind(step) is Kind.RESHARDING:
            return rule.evaluate(view, step, xs)
        avals = [v.aval for v in step.outs]
        return bound(lambda *xs: rule.evaluate(view, step, list(xs)), xs, avals)

    def _fold(self, step: Step, part: Part, env: dict[Any, Any]) -> Folded:
        xs = []
        for v in step.ins:
            block = part.block & self._split.dims(v)
            zero = v.const is None and self._demand.is_zero(v, block)
            nothing = np.zeros((1,) * len(v.axes), v.aval.dtype)
            x = nothing if zero else self._raw(env, v, block)
            xs.append(x.array if isinstance(x, Folded) else x)
        for operand, axis, positions in part.picks:
            if xs[operand].shape[axis] > 1:
                xs[operand] = xs[operand].take(positions, axis=axis)
        return fold(step, self._split.view(part.block), part, xs)

    def _store(self, step: Step, env: dict[Any, Any], j: int, block: Block, y: Any) -> None:
        if isinstance(y, Folded):
            self._folded[step.outs[j], block] = y
            return
        expected = self._split.view(block).shape(step.outs[j].axes)
        if tuple(y.shape) != expected:
            raise AssertionError(
                f"{step.name} at {step.where} gave shape {y.shape}, its axes say "
                f"{expected}; please report this program: the rule for {step.name} is wrong"
            )
        env[step.outs[j], block] = y


def _chooses(step: Step) -> bool:
    """Whether a step takes the largest or smallest entry along axes."""
    row = primitives.of(step)
    return row.kind is Kind.REDUCTION and row.combine in CHOOSE


def _take(x: Any, positions: Any, axis: int) -> Any:
    return reshaped(lambda x: x.take(positions, axis=axis), x)


def restrict_const(view: View, value: Value) -> Any:
    """A closed-over array at the positions of its axes in this view; taken now, not when run."""

    def take(array: Any) -> Any:
        for k, axis in enumerate(value.axes):
            if view.size(axis) != axis.size:
                array = _take(array, view.index(axis), k)
        return array

    return now(take, value.const)
