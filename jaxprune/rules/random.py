"""Random numbers: a key is one piece, axes of an array of keys pass.

What is drawn at a position depends on the whole shape, so the compact program draws as many
numbers as the original and takes those at its positions: the same dropout mask, the same noise.
"""

from __future__ import annotations

from typing import Any

from jaxprune.ir import axes, compat
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step
from jaxprune.rules.pointwise import couple_pointwise
from jaxprune.rules.registry import View, register


def _fresh(shape: tuple[int, ...]) -> list[Axis]:
    return [axes.leaf(n) for n in shape]


def couple_drawn(step: Step) -> list[list[Axis]]:
    keys = step.ins[0].axes
    return [[*keys, *_fresh(step.eqn.outvars[0].aval.shape[len(keys) :])]]


def evaluate_drawn(view: View, step: Step, xs: list[Any]) -> list[Any]:
    """Draws at the original shape, then takes the positions that are wanted."""
    (drawn,) = compat.bind(step.eqn, xs)
    for k, axis in enumerate(step.outs[0].axes):
        if drawn.shape[k] != view.size(axis):
            drawn = drawn.take(view.index(axis), axis=k)
    return [drawn]


register("random_bits", couple=couple_drawn, evaluate=evaluate_drawn)


def couple_gamma(step: Step) -> list[list[Axis]]:
    """Each entry has a key of its own, split off by position: only the keys' axes pass."""
    keys, concentration = step.ins
    rank = len(keys.shape)
    for a, b in zip(keys.axes, concentration.axes):
        step.unify(a, b)
    for axis in concentration.axes[rank:]:
        step.freeze(axis, "a key per position")
    return [list(concentration.axes)]


register("random_gamma", couple=couple_gamma)


def couple_keys(step: Step) -> list[list[Axis]]:
    """Axes of the array of keys pass; the words of a key and its new keys are frozen."""
    source, shape = step.ins[0].axes, step.eqn.outvars[0].aval.shape
    for axis in source[len(shape) :]:
        step.freeze(axis, "words of a random key")
    more = _fresh(shape[len(source) :])
    for axis in more:
        step.freeze(axis, "random keys")
    return [[*source[: len(shape)], *more]]


register(
    "random_seed", "random_wrap", "random_unwrap", "random_split", "random_clone",
    couple=couple_keys,
)  # fmt: skip


register("random_fold_in", couple=couple_pointwise)


def couple_generator(step: Step) -> list[list[Axis]]:
    for axis in step.ins[0].axes:
        step.freeze(axis, "words of a random key")
    state = _fresh(step.eqn.outvars[0].aval.shape)
    for axis in state:
        step.freeze(axis, "words of a random key")
    return [state, _fresh(step.eqn.outvars[1].aval.shape)]


def evaluate_generator(view: View, step: Step, xs: list[Any]) -> list[Any]:
    state, drawn = compat.bind(step.eqn, xs)
    for k, axis in enumerate(step.outs[1].axes):
        if drawn.shape[k] != view.size(axis):
            drawn = drawn.take(view.index(axis), axis=k)
    return [state, drawn]


register("rng_bit_generator", couple=couple_generator, evaluate=evaluate_generator)
