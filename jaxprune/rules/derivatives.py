"""Functions with derivatives of their own: their gradient rules are compacted with them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.ir import compat
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules import zeros
from jaxprune.rules.control import Blocks, build, demand_called, tie, typed, zeros_called
from jaxprune.rules.registry import Flow, Needs, Runner, Wire, register_nested
from jaxprune.rules.zeros import Zeros
from jaxprune.sharding import abstract

# A rule mostly calls the function that it belongs to (relu does). Inside a rule the function is
# plain, so that building ends; derivatives of second order are then those of its body.
_inside_rule: list[bool] = []


@contextlib.contextmanager
def _rule() -> Iterator[None]:
    _inside_rule.append(True)
    try:
        yield
    finally:
        _inside_rule.pop()


def _tangents(values: Sequence[Value]) -> list[Value]:
    return [Value(compat.tangent(v.aval), v.axes) for v in values]


# --------------------------------------------------------------------------------- custom_jvp


def couple_custom_jvp(step: Step) -> list[tuple[Axis, ...]]:
    """Couples through the function and through its jvp rule, which may refine or freeze more."""
    function = build(step, step.params["call_jaxpr"], step.ins)
    step.subs = [function]
    if not _inside_rule:
        jaxpr, consts, still = compat.custom_jvp_jaxpr(step.eqn)
        with _rule():
            own = compat.rule_operands(step.eqn, step.ins)
            moving = _tangents(step.ins)
            rule = build(step, jaxpr, [*own, *compat.rule_operands(step.eqn, moving)], consts)
        rule.inputs = [*step.ins, *moving]  # it reads no tangents of what is closed over
        moved = [v for v, s in zip(function.outputs, still, strict=True) if not s]
        tie(step, [*function.outputs, *moved], rule.outputs)
        step.subs = [function, rule]
    return [v.axes for v in function.outputs]


def zeros_custom_jvp(flow: Flow, step: Step, known: list[Zeros]) -> list[Zeros]:
    """A result counts as zero when its tangent, by the rule, is zero there, too."""
    results = zeros_called(flow, step, known)
    for rule in step.subs[1:]:  # what is zero whatever the inputs are has a tangent of zero
        tangents = iter(flow.run(rule, [*known, *known])[len(results) :])
        still = compat.custom_jvp_jaxpr(step.eqn)[2]
        results = [z if s else zeros.both(z, next(tangents)) for z, s in zip(results, still)]
    return results


def demand_custom_jvp(needs: Needs, step: Step, outs: Blocks) -> Blocks:
    ins = demand_called(needs, step, outs)
    for rule in step.subs[1:]:
        moving = compat.custom_jvp_jaxpr(step.eqn)[2]
        tangents = [blocks for blocks, still in zip(outs, moving, strict=True) if not still]
        both = needs.through(rule, [*outs, *tangents])
        ins = [a | b | c for a, b, c in zip(ins, both, both[len(ins) :])]
        needs.remember(step, ins, outs)
    return ins


def run_custom_jvp(
    runner: Runner, step: Step, ins: list[Wire], xs: list[Any], outs: list[Wire]
) -> list[Any]:
    def function(*args: Any) -> tuple[Any, ...]:
        return tuple(runner.run(step.subs[0], ins, args, outs))

    if len(step.subs) == 1:
        return list(function(*xs))
    small = jax.custom_jvp(function)
    still = compat.custom_jvp_jaxpr(step.eqn)[2]
    places = np.cumsum([not s for s in still]) - 1 + len(step.outs)
    moved = [(int(places[j]), block) for j, block in outs if not still[j]]
    wires = [*ins, *((i + len(step.ins), block) for i, block in ins)]

    def jvp(primals: Any, tangents: Any) -> Any:
        results = runner.run(step.subs[1], wires, [*primals, *tangents], [*outs, *moved])
        values, tail = results[: len(outs)], iter(results[len(outs) :])
        zero = [jnp.zeros_like(v) if still[j] else next(tail) for v, (j, _) in zip(values, outs)]
        return tuple(values), tuple(zero)

    small.defjvp(jvp)
    return list(small(*typed(xs, ins, step.ins)))


register_nested(
    "custom_jvp_call",
    couple=couple_custom_jvp,
    zeros=zeros_custom_jvp,
    demand=demand_custom_jvp,
    run=run_custom_jvp,
)

# --------------------------------------------------------------------------------- custom_vjp


def couple_custom_vjp(step: Step) -> list[tuple[Axis, ...]]:
    """Couples through the function, its forward rule and its backward rule."""
    function = build(step, step.params["call_jaxpr"], step.ins)
    step.subs = [function]
    if not _inside_rule:
        with _rule():
            step.subs += _build_vjp(step, function)
    return [v.axes for v in function.outputs]


def _build_vjp(step: Step, function: Tape) -> list[Tape]:
    """Forward: operands -> outputs..., residuals...; backward: residuals..., cotangents..."""
    try:
        parts = compat.custom_vjp_parts(step.eqn)
        own = compat.rule_operands(step.eqn, step.ins)
        forward = build(step, parts.fwd, own, parts.fwd_consts)
        forward.inputs = list(step.ins)
        count = len(forward.outputs) - len(step.eqn.outvars)
        saved = iter(forward.outputs[:count])
        residuals = [next(saved) if i is None else step.ins[i] for i in parts.forwarded]
        results = forward.outputs[count:]
        forward.outputs = [*results, *residuals]
        moving = _tangents(results)
        avals = [abstract(v.aval) for v in [*residuals, *moving]]
        closed = jax.make_jaxpr(lambda *a: parts.bwd(*a))(*avals)
    except Exception as error:  # what JAX keeps private has moved: the value is still right
        warnings.warn(
            f"the gradient rule of {step.name} at {step.where} could not be read ({error}); "
            "gradients of the compact function are those of its body there",
            stacklevel=2,
        )
        return []
    backward = build(step, closed, [*(Value(v.aval, v.axes) for v in residuals), *moving])
    tie(step, function.outputs, results)
    tie(step, own, backward.outputs)
    return [forward, backward]


def zeros_custom_vjp(flow: Flow, step: Step, known: list[Zeros]) -> list[Zeros]:
    results = zeros_called(flow, step, known)
    unknown = [zeros.unknown(v.aval.shape) for v in step.eqn.outvars]
    if len(step.subs) == 3:
        forward, backward = step.subs[1:]
        residuals = flow.run(forward, known)[len(results) :]
        flow.run(backward, [*residuals, *unknown])
    return unknown if step in flow.doubted else results


def demand_custom_vjp(needs: Needs, step: Step, outs: Blocks) -> Blocks:
    """The forward rule gives the residual blocks that the backward rule will ask for.

    What nobody reads has a cotangent of zero, unless it is unread for being zero: a rule need not
    be the derivative. If the backward rule asks for such a cotangent, the result is in doubt.
    """
    ins = demand_called(needs, step, outs)
    if len(step.subs) == 1:
        return ins
    forward, backward = step.subs[1:]
    count = len(forward.outputs) - len(step.outs)
    residuals = [needs.known(v) for v in forward.outputs[len(step.outs) :]]
    moving = [needs.read_only(v, blocks) for v, blocks in zip(step.outs, outs, strict=True)]
    needs.restart(backward, [*residuals, *moving])
    ins = [a | b for a, b in zip(ins, _moved(needs, step, backward), strict=True)]
    while True:
        asked = needs.through(backward, compat.rule_operands(step.eqn, ins))
        if any(not more <= has for more, has in zip(asked[count:], outs, strict=True)):
            needs.doubt(step)
        more = needs.through(forward, [*outs, *asked[:count]])
        grown = [a | b for a, b in zip(ins, more, strict=True)]
        if grown == ins:
            break
        ins = grown
    needs.remember(step, ins, outs)
    return ins


def _moved(needs: Needs, step: Step, backward: Tape) -> Blocks:
    """Blocks of the operands that the function may not read and that still get a cotangent."""
    blocks: Blocks = [set() for _ in step.ins]
    pairs = compat.rule_operands(step.eqn, list(zip(blocks, step.ins, strict=True)))
    for (group, v), grad in zip(pairs, backward.outputs, strict=True):
        group |= needs.alive(v) & needs.alive(grad) if _inexact(v) else set()
    return blocks


def _inexact(value: Value) -> bool:
    return jnp.issubdtype(value.aval.dtype, jnp.inexact)


def run_custom_vjp(
    runner: Runner, step: Step, ins: list[Wire], xs: list[Any], outs: list[Wire]
) -> list[Any]:
    def function(*args: Any) -> tuple[Any, ...]:
        return tuple(runner.run(step.subs[0], ins, args, outs))

    if len(step.subs) == 1:
        return list(function(*xs))
    forward, backward = step.subs[1:]
    count, shift = len(forward.outputs) - len(step.outs), len(step.outs)
    asked = runner.wires(backward.inputs)
    residuals = [(i, block) for i, block in asked if i < count]

    def fwd(*args: Any) -> Any:
        wanted = [*outs, *((i + shift, block) for i, block in residuals)]
        results = runner.run(forward, ins, args, wanted)
        return tuple(results[: len(outs)]), results[len(outs) :]

    def bwd(saved: Any, cotangents: Any) -> Any:
        wires = [*residuals, *((j + count, block) for j, block in outs)]
        closed = len(step.ins) - len(backward.outputs)  # over arrays, which get no gradient
        moves = [i >= closed and _inexact(step.ins[i]) for i, _ in ins]
        wanted = [(i - closed, block) for (i, block), moving in zip(ins, moves) if moving]
        found = runner.run(backward, wires, [*saved, *cotangents], wanted)
        # An entry that two blocks show has one cotangent.
        whose = [(backward.outputs[i], block) for i, block in wanted]
        results = iter([runner.own_only(*key, x) for key, x in zip(whose, found)])
        return tuple(next(results) if moving else None for moving in moves)

    small = jax.custom_vjp(function)
    small.defvjp(fwd, bwd)
    return list(small(*typed(xs, ins, step.ins)))


register_nested(
    "custom_vjp_call",
    couple=couple_custom_vjp, zeros=zeros_custom_vjp,
    demand=demand_custom_vjp, run=run_custom_vjp,
)  # fmt: skip
