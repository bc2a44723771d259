"""The table of rules: one entry per primitive, its readings side by side.

A :class:`Rule` says how an equation couples axes, where it keeps zeros, which axes it mixes, and
how it is evaluated when axes have other sizes. A :class:`Nested` rule says the same of an equation
that holds programs (a loop, a branch, a function with its own gradient). A primitive without a
rule is *opaque*: every axis that it touches is frozen, with its name and the user's line. It is
never taken for elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxprune.ir import axes, compat, primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules import zeros
from jaxprune.rules.zeros import Zeros

# A block of a value: the dimensions that are at their removed units; the others are at the kept.
Block = frozenset[Axis]
KEPT: Block = frozenset()
Wire = tuple[int, Block]  # (position among operands or results, block)


class View(Protocol):
    """The sizes and positions of axes in the block that is being evaluated."""

    def size(self, axis: Axis) -> int: ...

    def shape(self, axs: Sequence[Axis]) -> tuple[int, ...]: ...

    def index(self, axis: Axis) -> np.ndarray: ...


class Mix(NamedTuple):
    """An axis that a step reduces away: what lands in one result comes from all its positions."""

    axis: Axis
    zero: np.ndarray  # per position: it contributes nothing
    combine: str  # "sum", "max", "min", "prod", "or", "and"; "none": can't be done in blocks
    places: tuple[tuple[int, int], ...] = ()  # (operand, axis) pairs that hold exactly this axis


@dataclass(frozen=True)
class Rule:
    """What one primitive does to axes.

    Attributes:
      couple: step -> the axes of each result; unifies and freezes on the way.
      zeros: (step, what is zero in each operand) -> what is zero in each result.
      mixes: (step, the same) -> the axes that are reduced away.
      evaluate: (view, step, operands) -> results at the view's sizes.
    """

    couple: Callable[[Step], Sequence[Sequence[Axis]]]
    zeros: Callable[[Step, list[Zeros]], list[Zeros]] = lambda step, known: nothing_known(
        step, known
    )
    mixes: Callable[[Step, list[Zeros]], list[Mix]] = lambda step, known: []
    evaluate: Callable[[View, Step, list[Any]], list[Any]] = lambda view, step, xs: compat.bind(
        step.eqn, xs
    )


class Flow(Protocol):
    """Forward: what is zero in a program's values."""

    doubted: frozenset[Step]  # results that don't count as zero, for their cotangents may count

    def run(self, tape: Tape, known: Sequence[Zeros]) -> list[Zeros]: ...


class Needs(Protocol):
    """Backward: which blocks of its inputs a program needs for blocks of its outputs."""

    def through(self, tape: Tape, wanted: Sequence[set[Block]]) -> list[set[Block]]: ...

    def want(self, value: Value, block: Block) -> None: ...

    def remember(self, step: Step, ins: list[set[Block]], outs: list[set[Block]]) -> None: ...

    def refuse(self, dimension: Axis, why: str, units: np.ndarray | None = None) -> None: ...

    def removed(self, dimension: Axis) -> np.ndarray: ...

    def known(self, value: Value) -> Zeros: ...

    def alive(self, value: Value) -> set[Block]: ...

    def read_only(self, value: Value, blocks: set[Block]) -> Zeros: ...

    def restart(self, tape: Tape, known: Sequence[Zeros]) -> None: ...

    def doubt(self, step: Step) -> None: ...


class Runner(Protocol):
    """Forward again, with arrays: evaluates the blocks that are needed."""

    def run(
        self, tape: Tape, ins: Sequence[Wire], xs: Sequence[Any], outs: Sequence[Wire]
    ) -> list[Any]: ...

    def size(self, axis: Axis) -> int: ...

    def own_only(self, value: Value, block: Block, x: Any) -> Any: ...

    def wires(self, values: Sequence[Value]) -> list[Wire]: ...


@dataclass(frozen=True)
class Nested:
    """An equation that holds programs; they stand in ``step.subs``.

    Attributes:
      couple: as in :class:`Rule`; builds the programs.
      zeros: (flow, step, what is zero in each operand) -> what is zero in each result.
      demand: (needs, step, blocks wanted of each result) -> blocks needed of each operand.
      run: (runner, step, operand wires, operands, result wires) -> results.
    """

    couple: Callable[[Step], Sequence[Sequence[Axis]]]
    zeros: Callable[[Flow, Step, list[Zeros]], list[Zeros]]
    demand: Callable[[Needs, Step, list[set[Block]]], list[set[Block]]]
    run: Callable[[Runner, Step, list[Wire], list[Any], list[Wire]], list[Any]]


def nothing_known(step: Step, known: list[Zeros]) -> list[Zeros]:
    return [zeros.unknown(v.aval.shape) for v in step.eqn.outvars]


NO_RULE = "no rule for this primitive"


def couple_opaque(step: Step, why: str = "") -> list[list[Axis]]:
    """Freezes all that the step touches."""
    kernel = compat.kernel_name(step.eqn)
    why = why or (f"{NO_RULE} (kernel {kernel!r})" if kernel else NO_RULE)
    results = [[axes.leaf(n) for n in v.aval.shape] for v in step.eqn.outvars]
    for axs in [*(v.axes for v in step.ins), *results]:
        for axis in axs:
            step.freeze(axis, why)
    return results


OPAQUE = Rule(couple_opaque, nothing_known)
RULES: dict[str, Rule | Nested] = {}


def register(*names: str, **parts: Any) -> None:
    """Enters a rule for primitives of these names."""
    rule = Rule(**parts)
    for name in names:
        RULES[name] = rule


def register_nested(*names: str, **parts: Any) -> None:
    """Enters a rule for primitives of these names, which hold programs."""
    for name in names:
        RULES[name] = Nested(**parts)


def kernel_key(name: str, kernel: str) -> str:
    """Where the rule of a kernel stands that a primitive for any kernel runs."""
    return f"{name} of {kernel}"


def rule_of(step: Step) -> Rule | Nested:
    name = step.name
    if primitives.kind(step) is Kind.KERNEL:
        name = kernel_key(name, compat.kernel_name(step.eqn))
    rule = RULES.get(name, OPAQUE)
    unread = isinstance(rule, Nested) and step.outs and not step.subs
    return OPAQUE if unread else rule


def couple(step: Step) -> Sequence[Sequence[Axis]]:
    return rule_of(step).couple(step)
