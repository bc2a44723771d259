"""Which parameters one token uses: in a mixture of experts, those of the experts that it chose.

Nobody says which axis counts experts, the program shows it. ``top_k`` over n entries (or
``argmax``) gives the positions of k of them; these are followed through integers to where they

* are compared with 0 .. n - 1 (a one-hot vector),
* are the places at which an array is read or written (gathered weights, a count of each),
* are the sizes of the groups of a ``ragged_dot``.

The axis of n that is met there counts experts. Matrices along it count k / n of their entries;
those that the choice itself is made of, the router, count whole, and so do all others, embeddings
among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.ir import axes, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.content import counted
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Tape, Value

MATRIX = 3  # Experts' weights have so many axes: an embedding's rows are no experts.

Key = tuple[Axis, ...]  # the leaves of an axis: of groups of experts, two
Held = tuple[Value, Key]  # a value, and an axis that it holds, maybe as several


def key_of(axis: Axis) -> Key:
    """What tells an axis from others."""
    return tuple(axes.leaves(axis))


def held(value: Value, key: Key) -> bool:
    """Whether a value holds all that an axis is made of."""
    inside = set(axes.distinct_leaves(value.axes))
    return inside.issuperset(key)


class Choice(NamedTuple):
    """So many of so many entries, along an axis of what is chosen by."""

    chosen: int
    of: int
    axis: Axis


class Routing(NamedTuple):
    """What a program chooses.

    Attributes:
      chosen: experts' axis -> how many of them.
      routers: the parameters that choose.
      choices: experts' axis -> the axis of the router that they are chosen along.
      along: the parameters that choose, with that axis.
      logits: the products of routers, with that axis.
    """

    chosen: Mapping[Key, int]
    routers: frozenset[Value]
    choices: Mapping[Key, Key] = {}
    along: frozenset[Held] = frozenset()
    logits: frozenset[Held] = frozenset()

    def active(self, value: Value, sizes: Mapping[Axis, Any]) -> Any:
        """The entries of a parameter that one token uses, at some counts of dimensions."""
        within = value not in self.routers and len(value.shape) >= MATRIX
        used = {
            (leaf,): np.minimum(self.chosen[(leaf,)], sizes.get(leaf, leaf.size))
            for leaf in axes.distinct_leaves(value.axes)
            if within and (leaf,) in self.chosen
        }
        now = {**sizes, **{key[0]: count for key, count in used.items()}}
        whole = [(key_of(a), axes.size_of(a, now)) for a in value.axes]
        return math.prod(
            np.minimum(self.chosen[key], size) if within and key in self.chosen else size
            for key, size in whole
        )


def chooses(tape: Tape) -> bool:
    """Whether a program takes positions by their values, so that it may have experts."""
    kinds = {primitives.kind(step) for step in tape.steps}
    inside = (chooses(sub) for step in tape.steps for sub in step.subs)
    return bool(kinds & {Kind.SORT, Kind.POSITION}) or any(inside)


def routing(tape: Tape) -> Routing:
    """Reads a coupled program."""
    found: list[tuple[Axis, Choice]] = []
    _follow(tape, {}, found)
    chosen: dict[Key, int] = {}
    choices: dict[Key, Key] = {}
    for axis, choice in found:
        key = key_of(axis)
        chosen[key] = min(choice.chosen, chosen.get(key, choice.chosen))
        choices[key] = key_of(choice.axis)
    logits: set[Held] = set()
    along = frozenset(_routers(tape, set(), logits))
    return Routing(chosen, frozenset(v for v, _ in along), choices, along, frozenset(logits))


# ------------------------------------------------------------------------ from choice to experts


def _follow(tape: Tape, known: dict[Value, Choice], found: list[tuple[Axis, Choice]]) -> None:
    """Follows chosen positions through a program; notes the axes that they point into."""
    for step in tape.steps:
        made = choice_of(step)
        if made is not None:
            known[made[0]] = made[1]
            continue
        inside = [known[v] for v in step.ins if v in known]
        if step.subs:
            _enter(step, known, found)
        elif inside:
            choice = inside[-1]
            found += [(a, choice) for a in _met(step, known) if a.size == choice.of]
            known |= {v: choice for v in step.outs if _counts(v)}


def choice_of(step: Step) -> tuple[Value, Choice] | None:
    """The positions that a step chooses by value, if it does."""
    operand = step.ins[0] if step.ins else None
    if primitives.kind(step) is Kind.POSITION and operand is not None:
        (axis,) = views.reduction(step).axes
        return step.outs[0], Choice(1, operand.shape[axis], operand.axes[axis])
    if primitives.kind(step) is Kind.SORT and len(step.outs) > len(step.ins):  # top_k
        assert operand is not None
        axis = views.sorted_axis(step, len(operand.shape))
        count = step.outs[1].shape[axis]
        return step.outs[1], Choice(count, operand.shape[axis], operand.axes[axis])
    return None


def _counts(value: Value) -> bool:
    return bool(np.issubdtype(value.aval.dtype, np.integer))


def _met(step: Step, known: Mapping[Value, Choice]) -> Iterator[Axis]:
    """The axes into which a step's operand of chosen positions points."""
    kind = primitives.kind(step)
    if kind in (Kind.GATHER, Kind.SCATTER) and step.ins[1] in known:
        yield from (step.ins[0].axes[k] for k in views.indexed(step))
    elif kind is Kind.RAGGED and step.ins[2] in known:
        yield from (step.ins[1].axes[k] for k in views.ragged(step).rhs_group)
    elif kind is Kind.ELEMENTWISE:
        for value in step.ins:
            k = counted(value)
            if k is not None:
                yield step.outs[0].axes[k]


def _enter(step: Step, known: dict[Value, Choice], found: list[tuple[Axis, Choice]]) -> None:
    parts = zip(views.entered(step.eqn, step.ins), step.subs)
    for part, sub in parts:
        inner = {x: known[v] for x, v in zip(sub.inputs, part.operands) if v in known}
        _follow(sub, inner, found)
        if primitives.kind(step) is not Kind.WHILE or sub is step.subs[-1]:
            known |= {out: inner[v] for out, v in zip(step.outs, sub.outputs) if v in inner}


# ------------------------------------------------------------------------------- what chooses


def _routers(tape: Tape, wanted: set[Held], logits: set[Held]) -> set[Held]:
    """The inputs that choices are made of: back from each, along the axis that it chooses from.

    ``wanted``: results of the program that a choice outside is made of; ``logits`` are added to.
    """
    wanted = set(wanted)
    for step in reversed(tape.steps):
        made = choice_of(step)
        if made is not None:
            wanted.add((step.ins[0], key_of(made[1].axis)))
        elif step.subs:
            wanted |= {*_inside(step, wanted, logits)}
        else:
            if primitives.kind(step) is Kind.CONTRACTION:
                logits |= {(v, a) for v, a in wanted if v in step.outs}
            along = {key for v, key in wanted if v in step.outs}
            wanted |= {(v, key) for key in along for v in step.ins if held(v, key)}
    return {(v, a) for v, a in wanted if v in tape.inputs}


def _inside(step: Step, wanted: set[Held], logits: set[Held]) -> Iterator[Held]:
    """The operands that choices in the programs of a step are made of."""
    for part, sub in zip(views.entered(step.eqn, step.ins), step.subs):
        results = {(o, a) for v, o in zip(step.outs, sub.outputs) for w, a in wanted if w is v}
        chosen = _routers(sub, results, logits)
        for inner, outer in zip(sub.inputs, part.operands):
            yield from ((outer, a) for v, a in chosen if v is inner and held(outer, a))
