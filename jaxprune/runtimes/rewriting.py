"""Programs rewritten for an engine: calls inlined, constants folded, operations by rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxprune.ir import compat, primitives
from jaxprune.ir.primitives import Kind

# (equation, its operands, how programs in it are rewritten) -> its results, by other operations.
Rule = Callable[[Any, list[Any], "Rules"], list[Any]]
Rules = Mapping[str, Rule]  # by the names of primitives

CALLED = {*primitives.CALLS, Kind.INLINED}
SMALL = 4096  # Constants of so many bytes are folded, however little they are made of.


def rewritten(closed: Any, rules: Rules) -> core.ClosedJaxpr:
    """The same program without calls, dead code and foldable constants, and as the rules say."""
    avals = [_type(v.aval) for v in compat.open_jaxpr(closed)[0].invars]
    return without_dead(jax.make_jaxpr(lambda *xs: run(closed, xs, rules))(*avals))


def run(closed: Any, xs: Sequence[Any], rules: Rules, around: Any = None) -> list[Any]:
    """The results of a program, while a new one is traced; each equation keeps its source line.

    ``around``: the call that the program is of, for equations without a line.
    """
    jaxpr, consts = compat.open_jaxpr(closed)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *xs], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        source = around if around and not compat.source_line(eqn) else eqn
        with compat.at_source(source):
            outs = _evaluate(eqn, [read(v) for v in eqn.invars], rules, source)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _evaluate(eqn: Any, ins: list[Any], rules: Rules, source: Any) -> list[Any]:
    if _is_foldable(eqn, ins):
        with jax.ensure_compile_time_eval():
            return compat.bind(eqn, ins)
    if primitives.kind(eqn) in CALLED:
        return run(compat.sub_jaxprs(eqn)[0], ins, rules, source)
    rule = primitives.entry(eqn, rules)
    if rule is not None:
        return rule(eqn, ins, rules)
    if primitives.kind(eqn) in primitives.CONTROL:
        return compat.bind_plain(eqn, ins, lambda param: inner(param, rules))
    return compat.bind(eqn, ins)


def known(x: Any) -> bool:
    """Whether a value is there while the program is traced."""
    return not isinstance(x, jax.core.Tracer)


def _is_foldable(eqn: Any, ins: Sequence[Any]) -> bool:
    """A constant that is about as small as what it is made of."""
    if eqn.effects or primitives.kind(eqn) is Kind.SIZE or not all(map(known, ins)):
        return False
    outs = [v.aval for v in eqn.outvars]
    if any(jax.export.is_symbolic_dim(n) for aval in outs for n in aval.shape):
        return False
    return sum(map(_bytes, outs)) <= max(SMALL, 2 * sum(_bytes(jax.typeof(x)) for x in ins))


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def inner(param: Any, rules: Rules) -> Any:
    """A parameter of an equation, with the programs in it rewritten."""
    if isinstance(param, tuple):
        return tuple(inner(x, rules) for x in param)
    return rewritten(param, rules) if isinstance(param, core.ClosedJaxpr) else param


def without_dead(closed: Any) -> core.ClosedJaxpr:
    """Without equations, keys among them, and constants that no result needs."""
    jaxpr, consts = compat.open_jaxpr(closed)
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or needed & set(eqn.outvars):
            eqns.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, core.Literal)}
    held = {v: c for v, c in zip(jaxpr.constvars, consts, strict=True) if v in needed}
    return compat.with_equations(jaxpr, eqns[::-1], {v: _array(c) for v, c in held.items()})


def _array(const: Any) -> Any:
    """Constants in this process's memory, but for random keys."""
    if jax.dtypes.issubdtype(jax.typeof(const).dtype, jax.dtypes.extended):
        return const
    return np.asarray(const)


def _type(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
