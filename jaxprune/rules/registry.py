"""The table of rules: one entry per primitive, four readings side by side.

A rule says how an equation couples axes, where it keeps zeros, which axes it mixes, and how it is
evaluated when axes have other sizes. A primitive without a rule is *opaque*: every axis that it
touches is frozen, with its name and the user's line. It is never taken for elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.jaxpr import compat
from jaxprune.jaxpr.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.zeros import Zeros


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
    zeros: Callable[[Step, list[Zeros]], list[Zeros]]
    mixes: Callable[[Step, list[Zeros]], list[Mix]] = lambda step, known: []
    evaluate: Callable[[View, Step, list[Any]], list[Any]] = lambda view, step, xs: compat.bind(
        step.eqn, xs
    )


def nothing_known(step: Step, known: list[Zeros]) -> list[Zeros]:
    return [zeros.unknown(v.aval.shape) for v in step.eqn.outvars]


def couple_opaque(step: Step) -> list[list[Axis]]:
    """Freezes all that the step touches."""
    results = [[axes.leaf(n) for n in v.aval.shape] for v in step.eqn.outvars]
    for axs in [*(v.axes for v in step.ins), *results]:
        for axis in axs:
            step.freeze(axis, "no rule for this primitive")
    return results


OPAQUE = Rule(couple_opaque, nothing_known)
RULES: dict[str, Rule] = {}


def register(*names: str, **parts: Any) -> None:
    """Enters a rule for primitives of these names."""
    rule = Rule(**{"zeros": nothing_known, **parts})
    for name in names:
        RULES[name] = rule


def rule_of(step: Step) -> Rule:
    return RULES.get(step.name, OPAQUE)


def couple(step: Step) -> Sequence[Sequence[Axis]]:
    return rule_of(step).couple(step)
