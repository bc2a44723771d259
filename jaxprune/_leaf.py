"""What a leaf is: the questions that scores, patterns and statistics ask of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = (int, float, np.number, np.ndarray, jax.Array)


def is_float(leaf: Any) -> bool:
    """Does a leaf hold real or complex floats? Counters, keys and functions are no weights."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_number(x: Any) -> bool:
    """Is it one number, of Python, numpy or JAX, traced or not?"""
    return isinstance(x, _NUMBERS) and np.shape(x) == ()


def leaf_name(path: str) -> str:
    """Returns the last part of a path that says what a leaf is; NNX adds ``/value`` to its own."""
    return path.removesuffix("/value").rsplit("/", 1)[-1]


def widen(x: Any) -> jax.Array:
    """Returns x in float32 at least: products of half-precision numbers underflow, means tie."""
    return jnp.asarray(x, jnp.float32) if jnp.finfo(x.dtype).bits < 32 else jnp.asarray(x)
