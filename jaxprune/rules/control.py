"""Programs inside programs: loops, branches and rematerialisation.

All blocks that are needed of a loop's carry run through one loop together; facts and needs go
round the loop until they no longer change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.ir import axes, compat, tape, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.content import content
from jaxprune.ir.tape import Step, Value
from jaxprune.rules import registry, zeros
from jaxprune.rules.registry import KEPT, Block, Flow, Needs, Runner, Wire, register_nested
from jaxprune.rules.zero_flow import is_identity
from jaxprune.rules.zeros import Zeros

Blocks = list[set[Block]]


def build(step: Step, jaxpr: Any, inputs: Sequence[Value], consts: Sequence[Any] = ()) -> tape.Tape:
    """A program inside a step."""
    return tape.build(jaxpr, inputs, registry.couple, step.where, consts=tuple(consts))


def _copies(values: Sequence[Value], fixed: int = 0) -> list[Value]:
    """The values as a program inside gets them; the first ``fixed`` are the same in each turn."""
    copies = [Value(v.aval, v.axes) for v in values]
    for copy, v in zip(copies[:fixed], values):
        copy.known, copy.outer = (content(v),), v
    return copies


def tie(step: Step, left: Sequence[Value], right: Sequence[Value]) -> None:
    """States that values in pairs have the same axes."""
    step.ties += zip(left, right, strict=True)
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a.axes, b.axes, strict=True):
            step.unify(x, y)


def _both(left: Sequence[Zeros], right: Sequence[Zeros]) -> list[Zeros]:
    return [zeros.both(a, b) for a, b in zip(left, right, strict=True)]


def _same(left: Sequence[Zeros], right: Sequence[Zeros]) -> bool:
    return all(
        a.all == b.all and all(map(np.array_equal, a.axes, b.axes))
        for a, b in zip(left, right, strict=True)
    )


def _union(*many: Blocks) -> Blocks:
    return [set().union(*groups) for groups in zip(*many, strict=True)]


def typed(xs: Sequence[Any], wires: Sequence[Wire], values: Sequence[Value]) -> list[Any]:
    """Literals as arrays of the type that the program declares for them."""
    return [
        x if hasattr(x, "aval") or hasattr(x, "sharding") else jnp.asarray(x, values[i].aval.dtype)
        for x, (i, _) in zip(xs, wires, strict=True)
    ]


# --------------------------------------------------------------------------- rematerialisation


def couple_remat(step: Step) -> list[tuple[Axis, ...]]:
    step.subs = [build(step, step.params["jaxpr"], step.ins)]
    return [v.axes for v in step.subs[0].outputs]


def zeros_called(flow: Flow, step: Step, known: list[Zeros]) -> list[Zeros]:
    return flow.run(step.subs[0], known)


def demand_called(needs: Needs, step: Step, outs: Blocks) -> Blocks:
    ins = needs.through(step.subs[0], outs)
    needs.remember(step, ins, outs)
    return ins


def run_remat(
    runner: Runner, step: Step, ins: list[Wire], xs: list[Any], outs: list[Wire]
) -> list[Any]:
    def body(*args: Any) -> list[Any]:
        return runner.run(step.subs[0], ins, args, outs)

    p = step.params
    return jax.checkpoint(body, policy=p["policy"], prevent_cse=p["prevent_cse"])(*xs)


register_nested(
    "remat2",
    couple=couple_remat, zeros=zeros_called, demand=demand_called, run=run_remat,
)  # fmt: skip

# ---------------------------------------------------------------------------------------- scan


def couple_scan(step: Step) -> list[tuple[Axis, ...]]:
    """Carry in is carry out; the leading axes of what is scanned are one dimension."""
    p = compat.scan_parts(step.eqn)
    held, scanned = step.ins[: p.num_consts + p.num_carry], step.ins[p.num_consts + p.num_carry :]
    length = axes.leaf(p.length)
    for v in scanned:
        step.unify(length, v.axes[0])
    body_jaxpr, _ = compat.open_jaxpr(p.jaxpr)
    rows = [var.aval for var in body_jaxpr.invars[len(held) :]]
    slices = [Value(aval, v.axes[1:]) for aval, v in zip(rows, scanned, strict=True)]
    for row, v in zip(slices, scanned):
        row.outer = v
    body = build(step, p.jaxpr, [*_copies(held, p.num_consts), *slices])
    step.subs = [body]
    carried = body.inputs[p.num_consts : p.num_consts + p.num_carry]
    tie(step, carried, body.outputs[: p.num_carry])
    if not _may_skip(step, p, body):
        step.freeze(length, "each step changes what the next one gets")
    stacked = [(length, *v.axes) for v in body.outputs[p.num_carry :]]
    return [*(v.axes for v in carried), *stacked]


def _may_skip(step: Step, p: compat.ScanParts, body: tape.Tape) -> bool:
    """Could a step whose scanned floats are zero leave the carry as it is?"""
    if not p.num_carry:
        return True
    held = p.num_consts + p.num_carry
    known = [zeros.unknown(v.shape) for v in body.inputs[:held]]
    known += [
        zeros.everywhere(v.shape)
        if jnp.issubdtype(v.aval.dtype, jnp.inexact)
        else zeros.unknown(v.shape)
        for v in body.inputs[held:]
    ]
    return is_identity(body, known, _carry_pairs(p, body))


def _carry_pairs(p: compat.ScanParts, body: tape.Tape) -> list[tuple[Value, Value]]:
    carried = body.inputs[p.num_consts : p.num_consts + p.num_carry]
    return list(zip(carried, body.outputs[: p.num_carry], strict=True))


def zeros_scan(flow: Flow, step: Step, known: list[Zeros]) -> list[Zeros]:
    p, body = compat.scan_parts(step.eqn), step.subs[0]
    consts, rest = known[: p.num_consts], known[p.num_consts :]
    carry, rows = rest[: p.num_carry], [z._replace(axes=z.axes[1:]) for z in rest[p.num_carry :]]
    while True:
        results = flow.run(body, [*consts, *carry, *rows])
        next_carry = _both(carry, results[: p.num_carry])
        if _same(carry, next_carry):
            break
        carry = next_carry
    none = np.zeros(p.length, bool)
    stacked = [z._replace(axes=(none | z.all, *z.axes)) for z in results[p.num_carry :]]
    return [*carry, *stacked]


def demand_scan(needs: Needs, step: Step, outs: Blocks) -> Blocks:
    p, body = compat.scan_parts(step.eqn), step.subs[0]
    _check_length(needs, step, outs)
    along = _dimensions_along(step)
    carry, stacked = [set(b) for b in outs[: p.num_carry]], outs[p.num_carry :]
    stacked = [{b for b in blocks if not along & b} for blocks in stacked]
    while True:
        ins = needs.through(body, [*carry, *stacked])
        grown = _union(carry, ins[p.num_consts : p.num_consts + p.num_carry])
        if grown == carry:
            break
        carry = grown
    ins = [*ins[: p.num_consts], *carry, *ins[p.num_consts + p.num_carry :]]
    needs.remember(step, ins, [*carry, *stacked])
    return ins


def step_length(step: Step) -> Axis | None:
    """The axis that a scan runs along, if anything is scanned or stacked."""
    p = compat.scan_parts(step.eqn)
    scanned = [*step.ins[p.num_consts + p.num_carry :], *step.outs[p.num_carry :]]
    return axes.find(scanned[0].axes[0]) if scanned else None


def _dimensions_along(step: Step) -> Block:
    """The dimensions that the axis of a scan is made of."""
    length = step_length(step)
    return KEPT if length is None else frozenset(axes.leaves(length))


def _check_length(needs: Needs, step: Step, outs: Blocks) -> None:
    """Removed steps must leave the carry as it is, and nobody may need what they stack."""
    at = f"{step.name} at {step.where}"
    for dimension in sorted(_dimensions_along(step), key=lambda d: d.order):
        removed = needs.removed(dimension)
        if len(removed) and any(dimension in block for blocks in outs for block in blocks):
            needs.refuse(dimension, f"what the removed steps of {at} give is used")
        units = [u for u in removed if not _skips(needs, step, dimension, int(u))]
        if units:
            needs.refuse(
                dimension, f"a removed step of {at} would change the carry", np.array(units)
            )


def _skips(needs: Needs, step: Step, dimension: Axis, unit: int) -> bool:
    """Whether a scan's steps at one unit are the identity, given the zeros in what it scans."""
    length = step_length(step)
    assert length is not None
    lines = [np.flatnonzero(units == unit) for units in axes.units_along(length, dimension)]
    return all(_is_skipped(needs, step, int(at)) for at in np.concatenate(lines))


def _is_skipped(needs: Needs, step: Step, position: int) -> bool:
    p, body = compat.scan_parts(step.eqn), step.subs[0]
    held = p.num_consts + p.num_carry
    known = [needs.known(v) for v in body.inputs[:held]]
    for v, row in zip(step.ins[held:], body.inputs[held:], strict=True):
        gone = needs.known(v).along(0)[position]
        known.append(zeros.everywhere(row.shape) if gone else needs.known(row))
    return is_identity(body, known, _carry_pairs(p, body))


def run_scan(
    runner: Runner, step: Step, ins: list[Wire], xs: list[Any], outs: list[Wire]
) -> list[Any]:
    p, body = compat.scan_parts(step.eqn), step.subs[0]
    held = p.num_consts + p.num_carry
    xs = typed(xs, ins, step.ins)
    kinds = [0 if i < p.num_consts else 1 if i < held else 2 for i, _ in ins]
    consts, carry, rows = ([x for x, k in zip(xs, kinds) if k == kind] for kind in range(3))
    along = step_length(step)
    # What is scanned says how often, if it is there: a length may be a name, see jax.export.
    length = None if rows else p.length if along is None else runner.size(along)

    def one(carry: Any, rows: Any) -> Any:
        results = runner.run(body, ins, [*consts, *carry, *rows], outs)
        return results[: len(carry)], results[len(carry) :]

    last, stacked = lax.scan(one, carry, rows, length, reverse=p.reverse, unroll=p.unroll)
    return [*last, *stacked]


register_nested("scan", couple=couple_scan, zeros=zeros_scan, demand=demand_scan, run=run_scan)

# --------------------------------------------------------------------------------------- while


def _while_parts(step: Step) -> tuple[list[Value], list[Value], list[Value]]:
    p = views.while_loop(step)
    a, b = p.test_consts, p.test_consts + p.body_consts
    return step.ins[:a], step.ins[a:b], step.ins[b:]


def couple_while(step: Step) -> list[tuple[Axis, ...]]:
    p, (tests, consts, carry) = views.while_loop(step), _while_parts(step)
    test = build(step, p.test, _copies([*tests, *carry], len(tests)))
    body = build(step, p.body, _copies([*consts, *carry], len(consts)))
    step.subs = [test, body]
    tie(step, carry, body.outputs)
    for k, axis in enumerate(test.outputs[0].axes):  # jax.vmap: one loop for each entry of the test
        for value in carry:
            step.unify(axis, value.axes[k])
        step.freeze(axis, "each has its own number of rounds")
    return [v.axes for v in carry]


def zeros_while(flow: Flow, step: Step, known: list[Zeros]) -> list[Zeros]:
    test, body = step.subs
    a, b = (len(part) for part in _while_parts(step)[:2])
    carry = known[a + b :]
    while True:
        next_carry = _both(carry, flow.run(body, [*known[a : a + b], *carry]))
        if _same(carry, next_carry):
            break
        carry = next_carry
    flow.run(test, [*known[:a], *carry])
    return carry


def demand_while(needs: Needs, step: Step, outs: Blocks) -> Blocks:
    test, body = step.subs
    a, b = (len(part) for part in _while_parts(step)[:2])
    tested = needs.through(test, [{KEPT}])
    carry = _union(outs, tested[a:])
    while True:
        ins = needs.through(body, carry)
        grown = _union(carry, ins[b:])
        if grown == carry:
            break
        carry = grown
    blocks = [*tested[:a], *ins[:b], *carry]
    needs.remember(step, blocks, carry)
    return blocks


def run_while(
    runner: Runner, step: Step, ins: list[Wire], xs: list[Any], outs: list[Wire]
) -> list[Any]:
    test, body = step.subs
    a, b = (len(part) for part in _while_parts(step)[:2])
    xs = typed(xs, ins, step.ins)
    tests = [(w, x) for w, x in zip(ins, xs) if w[0] < a]
    consts = [((w[0] - a, w[1]), x) for w, x in zip(ins, xs) if a <= w[0] < a + b]
    carry = [(w, x) for w, x in zip(ins, xs) if w[0] >= a + b]

    def go(program: tape.Tape, held: list[Any], shift: int, values: Any, wanted: list[Wire]) -> Any:
        wires = [w for w, _ in held] + [(i - shift, block) for (i, block), _ in carry]
        return runner.run(program, wires, [*(x for _, x in held), *values], wanted)

    def goes_on(values: Any) -> Any:
        return go(test, tests, b, values, [(0, KEPT)])[0]

    def once(values: Any) -> Any:
        return go(body, consts, a, values, outs)

    def once_each(values: Any) -> Any:
        running = goes_on(values)
        return [_where_rows(running, new, old) for new, old in zip(once(values), values)]

    begin = [x for _, x in carry]
    if test.outputs[0].shape:
        return lax.while_loop(lambda values: goes_on(values).any(), once_each, begin)
    return lax.while_loop(goes_on, once, begin)


def _where_rows(running: Any, new: Any, old: Any) -> Any:
    """What a loop of many does: an entry that is done stays as it is."""
    rows = lax.broadcast_in_dim(running, new.shape, range(running.ndim))
    return lax.select(rows, new, old)


register_nested(
    "while", couple=couple_while, zeros=zeros_while, demand=demand_while, run=run_while
)  # fmt: skip

# ---------------------------------------------------------------------------------------- cond


def couple_cond(step: Step) -> list[tuple[Axis, ...]]:
    for axis in step.ins[0].axes:
        step.freeze(axis, "chooses the branch")
    step.subs = [
        build(step, b, _copies(step.ins[1:], len(step.ins) - 1)) for b in views.branches(step)
    ]
    for branch in step.subs[1:]:
        tie(step, step.subs[0].outputs, branch.outputs)
    return [v.axes for v in step.subs[0].outputs]


def zeros_cond(flow: Flow, step: Step, known: list[Zeros]) -> list[Zeros]:
    results = [flow.run(branch, known[1:]) for branch in step.subs]
    common = results[0]
    for other in results[1:]:
        common = _both(common, other)
    return common


def demand_cond(needs: Needs, step: Step, outs: Blocks) -> Blocks:
    operands = _union(*(needs.through(branch, outs) for branch in step.subs))
    ins = [{KEPT}, *operands]
    needs.remember(step, ins, outs)
    return ins


def run_cond(
    runner: Runner, step: Step, ins: list[Wire], xs: list[Any], outs: list[Wire]
) -> list[Any]:
    index, operands = xs[0], typed(xs[1:], ins[1:], step.ins)
    wires = [(i - 1, block) for i, block in ins[1:]]

    def branch(program: tape.Tape) -> Any:
        return lambda *args: runner.run(program, wires, args, outs)

    return lax.switch(index, [branch(program) for program in step.subs], *operands)


register_nested("cond", couple=couple_cond, zeros=zeros_cond, demand=demand_cond, run=run_cond)
