"""Leaves as stacks of matrices (in, out) beside their Gram matrices, and back again.

Methods are written for one matrix; here they run over the leaves of a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration import Stats
from jaxprune.jaxpr.origins import Layout
from jaxprune.patterns import unstructured
from jaxprune.scores.activations import wanda
from jaxprune.types import Masks, Params, Pattern, path_str

SINGLE_ENTRIES = unstructured()  # what methods choose by default


class Layer(NamedTuple):
    """One leaf that a method prunes."""

    path: str
    leaf: jax.Array
    layout: Layout
    gram: jax.Array  # (layers, in, in)

    def matrices(self, x: Any) -> jax.Array:
        """What has the leaf's shape, as (layers, in, out)."""
        x = jnp.broadcast_to(jnp.asarray(x), np.shape(self.leaf)).transpose(self._order)
        b, i, _ = self.layout
        return x.reshape(prod(x.shape[: len(b)]), prod(x.shape[len(b) : len(b) + len(i)]), -1)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of :meth:`matrices`."""
        shape = np.shape(self.leaf)
        x = x.reshape([shape[k] for k in self._order])
        return x.transpose([self._order.index(k) for k in range(len(shape))])

    @property
    def _order(self) -> list[int]:
        return [*self.layout.batch, *self.layout.ins, *self.layout.outs]


def layers(method: str, params: Params, stats: Stats, masks: Masks) -> list[Layer | None]:
    """The leaves whose mask is not a scalar, with their Gram matrices.

    None for dense ones, and for vectors: a bias has no inputs, its mask alone says what it is.

    Raises:
      ValueError: where such a leaf has no Gram matrix, or one that is not finite.
    """
    flat, treedef = _flatten(params)
    grams = treedef.flatten_up_to(stats.grams)
    pairs = zip(flat, grams, treedef.flatten_up_to(masks), strict=True)
    return [
        layer_of(method, path_str(p), leaf, gram, stats)
        if np.ndim(mask) and np.ndim(leaf) > 1
        else None
        for (p, leaf), gram, mask in pairs
    ]


def _flatten(params: Params) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten_with_path(params)


def layer_of(method: str, path: str, leaf: Any, gram: Any, stats: Stats) -> Layer:
    if gram is None:
        why = stats.reasons.get(path) or (
            "it was calibrated without grams"
            if path in stats.layouts
            else "it was left out of the calibration"
        )
        raise ValueError(
            f"{method}: {path}, shape {np.shape(leaf)}, has no Gram matrix of its inputs: {why}; "
            "leave it out with pattern=jp.unstructured(where=lambda path, leaf: ...), or calibrate "
            "with jp.calibrate(fn, params, batches, grams=True)"
        )
    return Layer(path, leaf, stats.layouts[path], gram.reshape(-1, *gram.shape[-2:]))


def chosen(method: str, params: Params, stats: Stats, pattern: Pattern, sparsity: Any) -> Masks:
    """The pattern's masks for Wanda's scores: which leaves, and how much of each.

    Raises:
      TypeError: for a pattern that can't choose within one matrix.
    """
    if not hasattr(pattern, "within"):
        raise TypeError(
            f"{method}: pattern={pattern!r} can't choose within one matrix while it changes; pass "
            "jp.unstructured(), jp.n_m() or jp.block(), or choose first and repair after: "
            "masks = pattern(scores, sparsity); jp.oneshot.refit(params, masks, stats)"
        )
    return pattern(wanda(params, input_norms=stats.norms), sparsity)


def map_layers(
    found: list[Layer | None],
    params: Params,
    masks: Masks,
    solve: Callable[..., tuple[jax.Array, jax.Array]],
) -> tuple[Params, Masks]:
    """``solve(layer, mask) -> (weights, mask)`` in matrices, for each layer; dense leaves stay.

    Raises:
      FloatingPointError: where a solution is not finite, naming the leaf.
    """
    flat, treedef = _flatten(params)
    given = treedef.flatten_up_to(masks)
    results = [
        (_masked(leaf, mask), mask) if layer is None else _solved(layer, mask, solve)
        for layer, (_, leaf), mask in zip(found, flat, given, strict=True)
    ]
    new, kept = zip(*results, strict=True)
    return jax.tree.unflatten(treedef, new), jax.tree.unflatten(treedef, kept)


def _masked(leaf: Any, mask: Any) -> Any:
    return jnp.where(mask, leaf, jnp.zeros_like(leaf)) if np.ndim(mask) else leaf


def _solved(layer: Layer, mask: Any, solve: Any) -> tuple[jax.Array, jax.Array]:
    weights, kept = solve(layer, mask)
    if not isinstance(weights, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(weights))):
        raise FloatingPointError(
            f"{layer.path}, shape {np.shape(layer.leaf)}: the Gram matrix of its inputs is not "
            "positive definite even with damping, or holds NaN; pass a larger damping=, such as "
            "0.1, more calibration data, or grams in float64: with jax.enable_x64(True): "
            "jp.calibrate(..., dtype=jnp.float64)"
        )
    return layer.restore(weights).astype(layer.leaf.dtype), layer.restore(kept)


def density(mask: Any) -> float:
    return float(jnp.mean(mask, dtype=jnp.float32))


def without_dead(w: jax.Array, gram: jax.Array) -> jax.Array:
    """Weights (in, out) with zeros where an input is never anything but zero."""
    return jnp.where(jnp.diagonal(gram)[:, None] > 0, w, 0)


def damped(gram: jax.Array, damping: float) -> jax.Array:
    """The Gram matrix with ``damping`` times the mean of its diagonal added to the diagonal.

    Dead inputs (zero on the diagonal) count neither for the mean nor for the output: their
    diagonal becomes that mean.
    """
    diagonal = jnp.diagonal(gram)
    live = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(live), 1)
    mean = jnp.where(mean > 0, mean, 1)
    return gram + jnp.diag(jnp.where(live, damping * mean, mean))


def factor(gram: jax.Array, damping: float, attempts: int = 4) -> tuple[jax.Array, jax.Array]:
    """The damped Gram matrix and its Cholesky factor; ten times the damping where it fails."""

    def failed(state: Any) -> jax.Array:
        k, _, lower = state
        return (k < attempts) & ~jnp.all(jnp.isfinite(lower))

    def more(state: Any) -> Any:
        k = state[0] + 1
        h = damped(gram, damping * 10.0**k + jnp.where(k > 0, 1e-6, 0))
        return k, h, jnp.linalg.cholesky(h)

    h = damped(gram, damping)
    state = (jnp.zeros((), gram.dtype), h, jnp.linalg.cholesky(h))
    _, h, lower = jax.lax.while_loop(failed, more, state)
    return h, lower
