"""Other functions of a program's parameters, for ``small.cut``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Fn = Callable[..., Any]


def of_params(change: Callable[[Any], Any]) -> Callable[[Fn], Fn]:
    """The program at parameters of which each leaf of floats is changed."""

    def other(fn: Fn) -> Fn:
        def changed(leaf: Any) -> Any:
            floats = jnp.issubdtype(leaf.dtype, jnp.floating)
            return change(leaf).astype(leaf.dtype) if floats else leaf

        return lambda params, *args: fn(jax.tree.map(changed, params), *args)

    return other


def of_results(fn: Fn) -> Fn:
    """One number made of all results, as a loss is."""

    def number(params: Any, *args: Any) -> Any:
        leaves = jax.tree.leaves(fn(params, *args))
        return sum((jnp.sum(jnp.cos(jnp.abs(y).astype(float))) for y in leaves), jnp.zeros(()))

    return number


def of_sums(fn: Fn) -> Fn:
    """The sum of each parameter along its last axis, beside the program's results."""

    def both(params: Any, *args: Any) -> Any:
        sums = [jnp.sum(w, -1) if w.ndim == 1 else jnp.sum(w) for w in jax.tree.leaves(params)]
        return fn(params, *args), sums

    return both


FUNCTIONS = {
    "a loss": of_results,
    "the program at squares": of_params(lambda w: w * w),
    "the program at cosines": of_params(jnp.cos),
    "the program at moved parameters": of_params(lambda w: w + 0.5),
    "the program and sums of parameters": of_sums,
    "the program at centred parameters": of_params(lambda w: w - jnp.mean(w)),
}
