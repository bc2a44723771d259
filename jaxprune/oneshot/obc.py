"""Optimal brain compression: one weight at a time, each removal repaired by all that are kept."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.calibration import Stats
from jaxprune.oneshot.layers import (
    SINGLE_ENTRIES,
    Layer,
    chosen,
    damped,
    density,
    layers,
    map_layers,
    without_dead,
)
from jaxprune.types import Masks, Params, Pattern

LARGEST = 1024  # inputs: each output has an inverse of its own


def obc(
    params: Params,
    stats: Stats,
    sparsity: Any,
    *,
    pattern: Pattern = SINGLE_ENTRIES,
    damping: float = 0.01,
) -> tuple[Params, Masks]:
    r"""Returns pruned params and their masks, by OBC (ExactOBS), for small layers.

    Each output removes its entry p of least :math:`w_p^2 / [H^{-1}]_{pp}`, and repairs

    .. math:: w \leftarrow w - \frac{w_p}{[H^{-1}]_{pp}} H^{-1}_{:,p}, \quad
              H^{-1} \leftarrow H^{-1} - \frac{H^{-1}_{:,p} H^{-1}_{p,:}}{[H^{-1}]_{pp}}

    until it keeps as many inputs as the pattern's density says: every output the same number.
    With N:M each group keeps n.

    Args:
      params, stats, sparsity, pattern, damping: as in :func:`sparsegpt`. Only ``jp.unstructured``
        and ``jp.n_m`` are followed; O(out in^3) time, O(in^2) memory per output at work.

    Raises:
      ValueError: for a leaf of more than 1024 inputs, or without Gram matrix, naming it.
      TypeError, FloatingPointError: as :func:`sparsegpt`.

    References:
      Frantar, Singh and Alistarh, [Optimal Brain Compression](https://arxiv.org/abs/2208.11580),
      2022, section 4; the paper's global choice over outputs by their traces is not built.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> x = jax.random.normal(jax.random.key(0), (64, 8))
      >>> params = {"w": jax.random.normal(jax.random.key(1), (8, 4))}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> pruned, masks = jp.oneshot.obc(params, stats, 0.5)
      >>> jnp.sum(masks["w"], 0)
      Array([4, 4, 4, 4], dtype=int32)
    """
    masks = chosen("obc", params, stats, pattern, sparsity)
    group = getattr(pattern, "group", None)

    def solve(layer: Layer, mask: Any) -> tuple[jax.Array, jax.Array]:
        _check_size(layer)
        n = layer.gram.shape[-1]
        size = group or n
        kept = max(1, round(density(mask) * size))
        weights = layer.matrices(layer.leaf).astype(layer.gram.dtype)
        return _stack(weights, layer.gram, damping, group=size, kept=kept)

    return map_layers(layers("obc", params, stats, masks), params, masks, solve)


def _check_size(layer: Layer) -> None:
    n = layer.gram.shape[-1]
    if n > LARGEST:
        raise ValueError(
            f"obc: {layer.path}, shape {layer.leaf.shape}, has {n} inputs, wanted at most "
            f"{LARGEST}: each of its outputs inverts a matrix of its own; write "
            "jp.oneshot.alps(params, stats, sparsity)"
        )


@functools.partial(jax.jit, static_argnames=("group", "kept"))
def _stack(
    weights: jax.Array, grams: jax.Array, damping: Any, group: int, kept: int
) -> tuple[jax.Array, jax.Array]:
    def matrix(args: Any) -> tuple[jax.Array, jax.Array]:
        w, gram = args
        inverse = jnp.linalg.inv(damped(gram, damping))
        one = functools.partial(_output, inverse, group=group, kept=kept)
        w, mask = jax.lax.map(one, without_dead(w, gram).T, batch_size=8)
        return w.T, mask.T

    return jax.lax.map(matrix, (weights, grams))


def _output(inverse: jax.Array, w: jax.Array, group: int, kept: int) -> tuple[jax.Array, jax.Array]:
    n = len(w)
    owner = jnp.arange(n) // group

    def remove(_: Any, state: Any) -> Any:
        w, h, mask = state
        left = jnp.zeros(-(-n // group), jnp.int32).at[owner].add(mask.astype(jnp.int32))
        free = mask & (left[owner] > kept)
        pivots = jnp.diagonal(h)
        p = jnp.argmin(jnp.where(free, jnp.square(w) / jnp.where(mask, pivots, 1), jnp.inf))
        column = h[:, p]
        w = w - w[p] / h[p, p] * column
        mask = mask.at[p].set(False)
        h = h - jnp.outer(column, column) / h[p, p]
        inside = mask[:, None] & mask[None, :]  # rounding must not revive what is gone
        return jnp.where(mask, w, 0), jnp.where(inside, h, 0), mask

    steps = (n // group) * (group - kept)
    w, _, mask = jax.lax.fori_loop(0, steps, remove, (w, inverse, jnp.ones(n, bool)))
    return w, mask
