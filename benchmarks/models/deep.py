"""Networks that grow by a number: what finding, cutting and tracing them costs is to grow with it.

Each maker gives ``(fn, params, x)``, in NumPy arrays; sizes of layers are tiny, for what counts is
how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Network = tuple[Callable[..., Any], Any, np.ndarray]

WIDTH, HEADS, HEAD, HIDDEN, GROWTH, CLASSES = 8, 2, 4, 16, 4, 3
X = np.ones((2, 3, WIDTH), np.float32)


def _draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.asarray(rng.normal(size=shape) * 0.3, np.float32)


def _block(p: Any, x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    h = centered * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"]
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
    x = x + jnp.einsum("bhqk,bkhe,hed->bqd", weights, v, p["out"])
    return x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]


def transformer(layers: int) -> Network:
    """An unrolled transformer."""
    rng = np.random.default_rng(0)
    shapes = {"scale": (WIDTH,), **dict.fromkeys("qkv", (WIDTH, HEADS, HEAD)),
              "out": (HEADS, HEAD, WIDTH), "up": (WIDTH, HIDDEN), "bias": (HIDDEN,),
              "down": (HIDDEN, WIDTH)}  # fmt: skip
    blocks = [{name: _draw(rng, *shape) for name, shape in shapes.items()} for _ in range(layers)]

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return functools.reduce(lambda x, block: _block(block, x), p["blocks"], x) @ p["head"]

    return fn, {"blocks": blocks, "head": _draw(rng, WIDTH, CLASSES)}, X


def dense_net(layers: int) -> Network:
    """Each layer reads what all before it have made: its axis has a piece for each."""
    rng = np.random.default_rng(0)
    kernels = [_draw(rng, WIDTH + GROWTH * i, GROWTH) for i in range(layers)]
    head = _draw(rng, WIDTH + GROWTH * layers, CLASSES)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        for w in p["layers"]:
            x = jnp.concatenate([x, jnp.tanh(x @ w)], -1)
        return x @ p["head"]

    return fn, {"layers": kernels, "head": head}, X


def branches(count: int) -> Network:
    """Parallel branches, summed."""
    rng = np.random.default_rng(0)
    params = [{"up": _draw(rng, WIDTH, HIDDEN), "down": _draw(rng, HIDDEN, WIDTH)}
              for _ in range(count)]  # fmt: skip

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return sum(jnp.tanh(x @ branch["up"]) @ branch["down"] for branch in p)

    return fn, params, X


def tree(leaves: int) -> Network:
    """A small network in a large tree."""
    rng = np.random.default_rng(0)
    params = {f"leaf_{i}": _draw(rng, WIDTH, WIDTH) for i in range(leaves)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["leaf_0"]) @ p["leaf_1"]

    return fn, params, X


NETWORKS: dict[str, Callable[[int], Network]] = {
    "transformer": transformer,
    "dense_net": dense_net,
    "branches": branches,
    "tree": tree,
}
