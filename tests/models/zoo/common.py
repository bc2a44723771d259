"""The zoo's table, and what its models share: random parameters that hide nothing by a zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.typing import path_str

Model = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # (fn, params, args)


@dataclass(frozen=True, eq=False)
class Entry:
    """One small model of a row of the acceptance list.

    Attributes:
      row: the row that it stands for.
      name: the name of the function that builds it.
      build: makes ``(fn, params, args)``.
      prunable: "leaf:axis" -> sizes of the prunable dimensions along this axis, in order.
      refused: None for a model whose half is removed exactly; else a regex that a reason in the
        table of dimensions or in the certificate matches.
      differentiable: whether reverse-mode derivatives exist.
    """

    row: int
    name: str
    build: Callable[[], Model]
    prunable: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    refused: str | None = None
    differentiable: bool = True

    def __str__(self) -> str:
        return f"{self.row:02d}-{self.name}"


ENTRIES: list[Entry] = []


def entry(row: int, **expected: Any) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Puts the decorated builder into the table."""

    def register(build: Callable[[], Model]) -> Callable[[], Model]:
        ENTRIES.append(Entry(row, build.__name__, build, **expected))
        return build

    return register


def filled(shapes: Any, seed: int = 0) -> Any:
    """Random values for a tree of arrays or shapes: no bias, scale or statistic is 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(lambda path, a: _fill(rng, path_str(path), a), shapes)


def _fill(rng: np.random.Generator, path: str, a: Any) -> Any:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), a.shape) if a.shape else jax.random.key(0)
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.zeros(a.shape, a.dtype)
    noise = rng.normal(size=a.shape)
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        noise = noise + 1j * rng.normal(size=a.shape)
    last = path.lower().rsplit("/", 1)[-1]
    if len(a.shape) > 1:
        noise = noise / math.sqrt(max(math.prod(a.shape[:-1]), 1))
    elif "var" in last:
        noise = 0.5 + abs(noise)
    elif "scale" in last or "norm" in last:
        noise = 1 + 0.3 * noise
    else:
        noise = 0.5 * noise
    return jnp.asarray(noise.astype(a.dtype))


def drawn(dtype: Any = jnp.float32, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """A dict of random parameters."""
    return filled({name: jax.ShapeDtypeStruct(s, dtype) for name, s in shapes.items()})


def floats(*shape: int, seed: int = 1) -> jax.Array:
    """A random input."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def tokens(*shape: int, vocabulary: int = 7) -> jax.Array:
    """Random token numbers."""
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.integers(vocabulary, size=shape).astype(np.int32))


def linen(module: Any, *args: Any) -> Model:
    """A Flax Linen module; its parameters are never initialised, only their shapes are."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return module.apply, filled(shapes), args


def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def heads(x: jax.Array, count: int) -> jax.Array:
    """(..., heads * size) -> (..., heads, size)."""
    return x.reshape(*x.shape[:-1], count, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any = 0.0) -> jax.Array:
    """Attention of (batch, time, heads, size); the result has heads and size as one axis."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]) + bias
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, -1), v)
    return mixed.reshape(*mixed.shape[:2], -1)
