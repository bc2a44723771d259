"""The tape: a function's equations in order, one :class:`Step` per call instance.

A jaxpr object may be shared by many call sites (``_where``, ``silu``); their axes differ, so
sub-programs are instantiated anew for each call. ``jit`` and its relatives are inlined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxprune.ir import axes, compat, primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind


class Value:
    """One array of the program: its type, what each of its axes is made of, maybe its content."""

    __slots__ = ("aval", "axes", "const", "known", "made", "maker", "outer", "points")

    def __init__(self, aval: Any, axs: Sequence[Axis] | None = None, const: Any = None):
        self.aval = aval
        self.axes = tuple(map(axes.leaf, aval.shape)) if axs is None else tuple(axs)
        self.const = const  # a literal or a closed-over array; None for computed values
        self.maker: Step | None = None  # if it depends on nothing: the equation
        self.known: Any = None  # what jaxprune.ir.content has found out about it
        self.made: Step | None = None  # of whole numbers and truths: the equation
        self.outer: Value | None = None  # in a program inside: what it always is outside
        self.points: Any = None  # what jaxprune.ir.positions has found

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape


@dataclass(eq=False)
class Step:
    """One equation at one call site."""

    eqn: Any
    ins: list[Value]
    outs: list[Value] = field(default_factory=list)
    around: str = ""  # the nearest enclosing source line
    subs: list[Tape] = field(default_factory=list)  # instantiated sub-programs
    ties: list[tuple[Value, Value]] = field(default_factory=list)  # one array under two names
    chosen: list[tuple[Axis, Axis]] = field(default_factory=list)  # one, if choices are of the kept

    @functools.cached_property
    def where(self) -> str:
        """The user's source line, or the nearest enclosing one; read when someone asks."""
        return compat.source_line(self.eqn) or self.around

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    def freeze(self, axis: Axis, why: str = "") -> None:
        """Forbids ``axis`` to change, naming this equation."""
        at = f" at {self.where}" if self.where else ""
        axes.freeze(axis, f"{self.name}{at}{': ' + why if why else ''}")

    def choose(self, axis: Axis, least: int) -> None:
        """Says that so many units of ``axis`` are chosen by value, or indexed by what was chosen.

        It may lose units only if they count as not there: masked ones would still be chosen.
        """
        at = f" at {self.where}" if self.where else ""
        axes.choose(axis, f"{self.name}{at}", least)

    def chosen_from(self, axis: Axis, along: Axis) -> None:
        """Says that positions which were chosen along one axis are looked up in another."""
        self.choose(axis, 1)
        self.chosen.append((along, axis))

    def unify(self, a: Axis, b: Axis) -> None:
        axes.unify(a, b, self._conflict)

    def _conflict(self) -> str:
        at = f" at {self.where}" if self.where else ""
        return f"layouts that do not nest in {self.name}{at}"


@dataclass(eq=False)
class Tape:
    """A program: inputs, steps, outputs."""

    inputs: list[Value]
    steps: list[Step]
    outputs: list[Value]


Couple = Callable[[Step], Sequence[Sequence[Axis]]]


def build(
    jaxpr: Any,
    inputs: Sequence[Value],
    couple: Couple,
    where: str = "",
    consts: Sequence[Any] = (),
) -> Tape:
    """Instantiates a jaxpr on ``inputs``; ``couple`` gives the axes of each step's results."""
    steps: list[Step] = []
    outputs = _walk(jaxpr, consts, list(inputs), steps, couple, where)
    return Tape(list(inputs), steps, outputs)


def _walk(
    closed: Any,
    consts: Sequence[Any],
    ins: list[Value],
    steps: list[Step],
    couple: Couple,
    at: str,
    live: _Live | None = None,
) -> list[Value]:
    jaxpr, own_consts = compat.open_jaxpr(closed)
    variables = [*jaxpr.constvars, *jaxpr.invars]  # 0.12 makes closed-over arrays the first inputs
    known = [Value(v.aval, const=c) for v, c in zip(variables, own_consts or consts)]
    env: dict[Any, Value] = dict(zip(variables, [*known, *ins], strict=True))

    def read(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            return Value(atom.aval, const=atom.val)
        return env[atom] if atom in env else Value(atom.aval)  # has no entries, or is not read

    live = live or _live(jaxpr, [True] * len(jaxpr.outvars))
    for eqn, inner in live.eqns:
        args = [read(v) for v in eqn.invars]
        if inner is not None:
            where = compat.source_line(eqn) or at
            outs = _walk(compat.sub_jaxprs(eqn)[0], (), args, steps, couple, where, inner)
        else:
            step = Step(eqn, args, around=at)
            results = couple(step)
            step.outs = [Value(v.aval, a) for v, a in zip(eqn.outvars, results, strict=True)]
            steps.append(step)
            outs = step.outs
            for out in outs:
                if getattr(out.aval, "dtype", None) in _WHOLE:
                    out.made = step
            if len(outs) == 1 and all(map(_is_fixed, args)):
                outs[0].maker = step
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


# The types of positions, and of what compares them.
_WHOLE = {np.dtype(t) for t in ("bool", "int8", "int16", "int32", "int64",
                                "uint8", "uint16", "uint32", "uint64")}  # fmt: skip


def _is_fixed(value: Value) -> bool:
    return value.const is not None or value.maker is not None or bool(value.known)


class _Live(NamedTuple):
    """What a program has to run, each call with the same of the program that it calls."""

    eqns: list[tuple[Any, _Live | None]]
    inputs: list[bool]  # which of its inputs are read


def _live(jaxpr: Any, wanted: Sequence[bool]) -> _Live:
    """The equations that an output or an effect needs; dead ones would add false constraints.

    What has no entries needs nothing: a slice that is only padded with zero times would cut an
    axis for no data.
    """
    needed = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and _holds_data(v)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        asked = [v in needed for v in eqn.outvars]
        if not (eqn.effects or any(asked)):
            continue
        inner = None
        if primitives.kind(eqn) is Kind.INLINED:
            inner = _live(compat.open_jaxpr(compat.sub_jaxprs(eqn)[0])[0], asked)
        kept.append((eqn, inner))
        read = inner.inputs if inner else [True] * len(eqn.invars)
        needed.update(v for v, r in zip(eqn.invars, read, strict=True) if r and _holds_data(v))
    return _Live(kept[::-1], [v in needed for v in jaxpr.invars])


def _holds_data(atom: Any) -> bool:
    return not isinstance(atom, core.Literal) and not is_empty(atom.aval.shape)


def is_empty(shape: Sequence[Any]) -> bool:
    """Whether an array of this shape has no entries; a size may be a name, which is not zero."""
    return 0 in shape


def concrete(x: Any) -> np.ndarray | None:
    """The content of an array that is known while tracing, else None."""
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    array_type = getattr(x, "dtype", np.dtype(float))
    if jax.dtypes.issubdtype(array_type, jax.dtypes.extended) or array_type == jax.dtypes.float0:
        return None  # a random key, or the tangent of an integer, has no numbers to read
    return np.asarray(x)
