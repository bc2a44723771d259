"""Functions with derivatives of their own: their gradient rule is compacted with them."""

from __future__ import annotations

from typing import Any

import jax

from jaxprune.axes import Axis
from jaxprune.jaxpr import compat, tape
from jaxprune.jaxpr.tape import Step, Tape, Value
from jaxprune.rules import registry, zeros
from jaxprune.rules.registry import Mix, View, register
from jaxprune.rules.zeros import Zeros

# A rule mostly calls the function that it belongs to (relu does). Inside a rule the function is
# plain, so that building ends; derivatives of second order are then those of its body.
_inside_rule: list[bool] = []


def couple_custom_jvp(step: Step) -> list[tuple[Axis, ...]]:
    """Couples through the function and through its jvp rule, which may refine or freeze more."""
    function = tape.build(step.params["call_jaxpr"], step.ins, registry.couple, step.where)
    step.subs = [function]
    if _inside_rule:
        return [v.axes for v in function.outputs]
    tangents = [Value(_tangent(v.aval), v.axes) for v in step.ins]
    jaxpr, consts, _ = compat.custom_jvp_jaxpr(step.eqn, len(step.ins))
    _inside_rule.append(True)
    try:
        rule = tape.build(
            jaxpr, [*step.ins, *tangents], registry.couple, step.where, consts=tuple(consts)
        )
    finally:
        _inside_rule.pop()
    for value, image in zip(function.outputs * 2, rule.outputs):
        for a, b in zip(value.axes, image.axes):
            step.unify(a, b)
    step.subs = [function, rule]
    return [v.axes for v in function.outputs]


def _tangent(aval: Any) -> Any:
    return aval.to_tangent_aval() if hasattr(aval, "to_tangent_aval") else aval


def run_zeros(program: Tape, known: list[Zeros]) -> tuple[list[Zeros], list[tuple[Step, Mix]]]:
    """What is zero in a program's results, and all the mixing on the way, with its step."""
    facts = dict(zip(program.inputs, known, strict=True))
    mixes: list[tuple[Step, Mix]] = []
    for step in program.steps:
        args = [known_zeros(facts, v) for v in step.ins]
        rule = registry.rule_of(step)
        mixes += [(step, mix) for mix in rule.mixes(step, args)]
        facts.update(zip(step.outs, rule.zeros(step, args), strict=True))
    return [known_zeros(facts, v) for v in program.outputs], mixes


def known_zeros(facts: dict[Value, Zeros], value: Value) -> Zeros:
    """The facts of a value; literals and closed-over arrays are read."""
    if value not in facts:
        array = tape.concrete(value.const)
        facts[value] = zeros.unknown(value.shape) if array is None else zeros.of_array(array != 0)
    return facts[value]


def run(program: Tape, view: View, xs: list[Any]) -> list[Any]:
    """Evaluates a program at the view's sizes, checking every shape on the way."""
    env: dict[Value, Any] = dict(zip(program.inputs, xs, strict=True))

    def read(value: Value) -> Any:
        return env[value] if value in env else restrict_const(view, value)

    for step in program.steps:
        results = registry.rule_of(step).evaluate(view, step, [read(v) for v in step.ins])
        for value, result in zip(step.outs, results, strict=True):
            expected = view.shape(value.axes)
            if tuple(result.shape) != expected:
                raise AssertionError(
                    f"{step.name} at {step.where} gave shape {result.shape}, its axes say "
                    f"{expected}; please report this program: the rule for {step.name} is wrong"
                )
            env[value] = result
    return [read(v) for v in program.outputs]


def restrict_const(view: View, value: Value) -> Any:
    """A closed-over array at the kept positions of its axes."""
    array = value.const
    for k, axis in enumerate(value.axes):
        if view.size(axis) != axis.size:
            array = array.take(view.index(axis), axis=k)
    return array


def _touched(view: View, step: Step) -> bool:
    return any(view.size(a) != a.size for v in [*step.ins, *step.outs] for a in v.axes)


def evaluate_custom_jvp(view: View, step: Step, xs: list[Any]) -> list[Any]:
    """The original equation when nothing changes, else the same function at the new sizes."""
    if not _touched(view, step):
        return compat.bind(step.eqn, xs)
    function = step.subs[0]
    if len(step.subs) == 1:
        return run(function, view, xs)
    rule = step.subs[1]
    small = jax.custom_jvp(lambda *args: tuple(run(function, view, list(args))))

    def jvp(primals: Any, tangents: Any) -> Any:
        out = run(rule, view, [*primals, *tangents])
        results, moved = out[: len(step.outs)], iter(out[len(step.outs) :])
        still = compat.custom_jvp_jaxpr(step.eqn, len(step.ins))[2]
        zero = [jax.numpy.zeros_like(r) if z else next(moved) for r, z in zip(results, still)]
        return tuple(results), tuple(zero)

    small.defjvp(jvp)
    return list(small(*xs))


register(
    "custom_jvp_call",
    couple=couple_custom_jvp,
    zeros=lambda step, known: run_zeros(step.subs[0], known)[0],
    mixes=lambda step, known: [mix for _, mix in run_zeros(step.subs[0], known)[1]],
    evaluate=evaluate_custom_jvp,
)
