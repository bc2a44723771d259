"""Optimal brain compression: one weight at a time, each removal repaired by all that are kept."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._progress import Progress
from jaxprune.calibration.api import Stats
from jaxprune.oneshot._leaves import Layer
from jaxprune.oneshot._linalg import factor, without_dead
from jaxprune.oneshot._run import Pruned, in_matrix, per_matrix
from jaxprune.patterns import UNSTRUCTURED
from jaxprune.selection import keep_largest, kept_count
from jaxprune.typing import ChooseInMatrix, Params, PatternFn

LARGEST = 1024  # A layer of more inputs is refused, for each output has an inverse of its own.


def obc(
    params: Params,
    stats: Stats,
    sparsity: Any,
    *,
    pattern: PatternFn = UNSTRUCTURED,
    damping: float = 0.01,
    progress: Progress = None,
) -> Pruned:
    r"""Returns pruned params and their masks, by OBC (ExactOBS), for small layers.

    Each output removes its entry p of least :math:`w_p^2 / [H^{-1}]_{pp}`, and repairs

    .. math:: w \leftarrow w - \frac{w_p}{[H^{-1}]_{pp}} H^{-1}_{:,p}, \quad
              H^{-1} \leftarrow H^{-1} - \frac{H^{-1}_{:,p} H^{-1}_{p,:}}{[H^{-1}]_{pp}}

    until outputs keep as many inputs as the pattern's density says, each the same number. Where
    that doesn't divide, those keep one more whose next removal would cost most. With N:M each group
    keeps n.

    Args:
      params, stats, sparsity, pattern, damping, progress: as in :func:`sparsegpt`. Only
        ``jp.unstructured`` and ``jp.n_m`` are followed; O(out in^3) time, O(in^2) memory per output
        at work.

    Raises:
      ValueError: for a leaf of more than 1024 inputs, or without Gram matrix, naming it.
      TypeError: for other patterns, ``jp.block`` too.
      FloatingPointError: as :func:`sparsegpt`.

    References:
      Frantar, Singh and Alistarh, `Optimal Brain Compression <https://arxiv.org/abs/2208.11580>`__,
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
    how = in_matrix("obc", pattern)
    if how.rows is not None:
        raise TypeError(
            "obc: it removes single entries, and can't follow jp.block(); write "
            "jp.oneshot.sparsegpt(params, stats, sparsity, pattern=pattern)"
        )
    return per_matrix(
        "obc", _matrix, params, stats, sparsity,
        pattern=how, damping=damping, check=_check_inputs, group=how.group,
        progress=progress,
    )  # fmt: skip


def _check_inputs(layer: Layer) -> None:
    n = layer.gram.shape[-1]
    if n > LARGEST:
        raise ValueError(
            f"obc: {layer.path}, shape {layer.leaf.shape}, has {n} inputs, wanted at most "
            f"{LARGEST}: each of its outputs inverts a matrix of its own; write "
            "jp.oneshot.alps(params, stats, sparsity)"
        )


def _matrix(
    w: jax.Array,
    gram: jax.Array,
    sparsity: Any,
    damping: Any,
    *,
    within: ChooseInMatrix,
    group: int | None,
) -> tuple[jax.Array, jax.Array]:
    """A matrix (in, out) that keeps equally many entries in each group of each output."""
    lower = factor(gram, damping)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(len(w), dtype=w.dtype))
    kept = kept_count(w.size, sparsity)
    return _in_groups(inverse, without_dead(w, gram), kept, group or len(w))


def _in_groups(
    inverse: jax.Array, w: jax.Array, kept: jax.Array, group: int
) -> tuple[jax.Array, jax.Array]:
    """A matrix (in, out) that keeps ``kept`` entries, equally many in each group of each output.

    Where they don't divide, the first round keeps one more in all groups, and finds what it would
    cost to remove that; the second round keeps it where it costs most.
    """
    groups = (w.shape[1], len(w) // group)
    each, more = jnp.divmod(kept, groups[0] * groups[1])

    def go(k: Any, state: Any) -> Any:
        *_, costs = state
        one_more = jnp.where(k == 0, more > 0, keep_largest(costs, more))
        quota = each + one_more.astype(jnp.int32)
        one = functools.partial(_output, inverse, group=group)
        return jax.lax.map(lambda args: one(*args), (w.T, quota), batch_size=8)

    begin = (w.T, jnp.ones(w.T.shape, bool), jnp.zeros(groups, w.dtype))
    v, mask, _ = jax.lax.fori_loop(0, jnp.where(more > 0, 2, 1), go, begin)
    return v.T, mask.T


def _output(
    inverse: jax.Array, w: jax.Array, quota: jax.Array, group: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One output with ``quota`` entries left in each group, and the cost of one removal more."""
    n = len(w)
    owner = jnp.arange(n) // group

    def costs(w: jax.Array, h: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, jnp.square(w) / jnp.where(mask, jnp.diagonal(h), 1), jnp.inf)

    def remove(_: Any, state: Any) -> Any:
        w, h, mask = state
        left = jnp.zeros(quota.shape, jnp.int32).at[owner].add(mask.astype(jnp.int32))
        p = jnp.argmin(jnp.where((left > quota)[owner], costs(w, h, mask), jnp.inf))
        column = h[:, p]
        w = w - w[p] / h[p, p] * column
        mask = mask.at[p].set(False)
        h = h - jnp.outer(column, column) / h[p, p]
        inside = mask[:, None] & mask[None, :]  # rounding must not revive what is gone
        return jnp.where(mask, w, 0), jnp.where(inside, h, 0), mask

    begin = (w, inverse, jnp.ones(n, bool))
    w, h, mask = jax.lax.fori_loop(0, n - jnp.sum(quota), remove, begin)
    return w, mask, jnp.min(costs(w, h, mask).reshape(-1, group), 1)
