"""Sizes that are names: a batch of ``b`` examples, for ``jax.export``.

A function is traced at symbolic sizes. The same equations at sizes that are numbers tell what is
zero and which blocks are needed; then the symbolic ones take their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxprune.ir import axes, compat, primitives, views
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Tape, Value, is_empty

_STEP = 8  # Names stand for 8, 16, 24, ...: sizes that can be halved.
_CALLED = {*primitives.CALLS, Kind.INLINED}


def has_names(leaves: Sequence[Any]) -> bool:
    return any(map(jax.export.is_symbolic_dim, (n for x in leaves for n in jax.typeof(x).shape)))


class Numbers:
    """A symbolic program with numbers for its names.

    Calls are inlined, gradient rules left out: exported programs are evaluated, not trained.

    Attributes:
      closed: the program at numbers, as a closed jaxpr.
      args: its arguments' types.
    """

    def __init__(self, symbolic: Any, args: Any):
        names = sorted(set().union(*map(compat.names_in, _names(jax.tree.leaves(args)))))
        self._numbers = {name: _STEP * (i + 1) for i, name in enumerate(names)}
        self._source: dict[int, Any] = {}  # id of an equation at numbers -> the symbolic one
        self._sizes: dict[Any, Any] = {}  # variable with a scalar made of sizes -> its equation
        self._symbolic = symbolic
        self.closed = self._at_numbers(symbolic)
        self.args = jax.tree.map(lambda x: self._type(jax.typeof(x)), args)

    def give_names(self, tape: Tape) -> None:
        """Gives the tape of ``closed`` the symbolic equations and sizes."""
        self._rename(tape, self._symbolic)

    # -------------------------------------------------------------------------- to numbers

    def _at_numbers(self, jaxpr: Any) -> Any:
        inner, _ = compat.open_jaxpr(jaxpr)
        bound: list[Any] = []
        closed = jax.make_jaxpr(lambda *xs: self._evaluate(jaxpr, xs, bound))(
            *(self._type(var.aval) for var in inner.invars)
        )
        pairs = zip(closed.jaxpr.eqns, bound, strict=True)
        self._source |= {id(eqn): source for eqn, source in pairs}
        return closed

    def _evaluate(self, jaxpr: Any, xs: Sequence[Any], bound: list[Any]) -> list[Any]:
        inner, consts = compat.open_jaxpr(jaxpr)
        env = dict(zip(inner.constvars, consts)) | dict(zip(inner.invars, xs, strict=True))
        for eqn in inner.eqns:
            args = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            if primitives.kind(eqn) in _CALLED:
                outs = self._evaluate(compat.sub_jaxprs(eqn)[0], args, bound)
            elif self._is_size(eqn, args):
                self._sizes[eqn.outvars[0]] = eqn
                outs = [self._size(eqn, args)]
            elif compat.casts_to_itself(eqn, args):  # JAX leaves it out of the program
                outs = args
            else:
                bound.append(eqn)
                outs = self._bind(eqn, args)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [v.val if isinstance(v, core.Literal) else env[v] for v in inner.outvars]

    def _is_size(self, eqn: Any, args: Sequence[Any]) -> bool:
        """A scalar that depends on nothing but sizes; JAX folds such numbers while tracing."""
        if primitives.kind(eqn) is Kind.SIZE:
            return True
        computed = any(v in self._sizes for v in eqn.invars if not isinstance(v, core.Literal))
        known = not any(isinstance(x, jax.core.Tracer) for x in args)
        return computed and known and eqn.outvars[0].aval.shape == ()

    def _size(self, eqn: Any, args: Sequence[Any]) -> Any:
        if primitives.kind(eqn) is Kind.SIZE:
            return np.asarray(self._number(views.size(eqn)), eqn.outvars[0].aval.dtype)
        with jax.ensure_compile_time_eval():
            return np.asarray(self._bind(eqn, args)[0])

    def _bind(self, eqn: Any, args: Sequence[Any]) -> list[Any]:
        return compat.bind_plain(eqn, args, self._number)

    def _symbol(self, atom: Any) -> Any:
        """A scalar made of sizes, computed in the program that is being traced."""
        if isinstance(atom, core.Literal):
            return atom.val
        eqn = self._sizes[atom]
        return compat.bind(eqn, [self._symbol(v) for v in eqn.invars])[0]

    def _number(self, x: Any) -> Any:
        """A parameter of an equation: sizes in it, and programs."""
        if jax.export.is_symbolic_dim(x):
            return compat.size_at(x, self._numbers)
        if isinstance(x, (core.Jaxpr, core.ClosedJaxpr)):
            closed = self._at_numbers(x)
            return closed if isinstance(x, core.ClosedJaxpr) else closed.jaxpr
        if isinstance(x, tuple):
            parts = [self._number(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return x

    def _type(self, aval: Any) -> jax.ShapeDtypeStruct:
        weak = getattr(aval, "weak_type", False)
        return jax.ShapeDtypeStruct(self._number(tuple(aval.shape)), aval.dtype, weak_type=weak)

    # ---------------------------------------------------------------------------- and back

    def _rename(self, tape: Tape, jaxpr: Any) -> None:
        for value, var in zip(tape.inputs, compat.open_jaxpr(jaxpr)[0].invars):
            _resize(value, var.aval)
        for step in tape.steps:
            step.eqn = self._source[id(step.eqn)]
            for value, atom in zip(step.ins, step.eqn.invars, strict=True):
                if not isinstance(atom, core.Literal) and atom in self._sizes:
                    value.const = self._symbol(atom)
                if is_empty(value.shape):  # no equation may have made it
                    _resize(value, atom.aval)
            for sub, inner in zip(step.subs, compat.sub_jaxprs(step.eqn), strict=True):
                self._rename(sub, inner)
            for value, var in zip(step.outs, step.eqn.outvars, strict=True):
                _resize(value, var.aval)


def _names(leaves: Sequence[Any]) -> set[Any]:
    return {n for x in leaves for n in jax.typeof(x).shape if jax.export.is_symbolic_dim(n)}


def _resize(value: Value, aval: Any) -> None:
    value.aval = aval
    for axis, size in zip(value.axes, aval.shape, strict=True):
        if jax.export.is_symbolic_dim(size):
            axis.size = axes.find(axis).size = size  # type: ignore[assignment]
