"""Exact selection by counting: no sort, no concatenation, no gather of sharded leaves.

Floats are mapped to unsigned integers of the same order; the k-th largest is then found bit by
bit, each bit by counting how many entries are at least a trial value. A count is a reduction, so
that sharded leaves exchange one integer a pass, and several leaves are ranked together by adding
their counts. NaN ranks below everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_UINT = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of ``x``; -0.0 equals 0.0, NaN is 0."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    uint = _UINT[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), uint)
    top = uint(1 << (8 * x.dtype.itemsize - 1))
    ordered = jnp.where(bits & top != 0, ~bits, bits | top)
    return jnp.where(jnp.isnan(x), uint(0), ordered)


def _count(hits: jax.Array) -> jax.Array:
    return jnp.sum(hits, dtype=jnp.int32)


def kth_largest(ordered: Sequence[jax.Array], k: jax.Array) -> jax.Array:
    """The k-th largest (k >= 1) of several arrays of ordered bits together.

    Returns:
      The largest value v such that at least k entries are >= v; the type's maximum for k = 0.
    """
    dtype = ordered[0].dtype
    width = 8 * dtype.itemsize

    def body(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.ones((), dtype) << (width - 1 - i).astype(dtype))
        return jnp.where(sum(_count(x >= trial) for x in ordered) >= k, trial, found)

    return jax.lax.fori_loop(0, width, body, jnp.zeros((), dtype))


def keep_largest(scores: jax.Array, k: jax.Array) -> jax.Array:
    """The mask of exactly ``k`` entries of largest score; the earlier of equals.

    Args:
      scores: any shape, any float type.
      k: integer in [0, size], may be traced.

    Example:
      >>> keep_largest(jnp.array([1.0, 3.0, 3.0, 3.0]), 2).astype(int)
      Array([0, 1, 1, 0], dtype=int32)
    """
    ordered = ordered_bits(scores)
    cut = kth_largest([ordered], k)
    above, equal = ordered > cut, ordered == cut
    wanted = jnp.asarray(k, jnp.int32) - _count(above)
    ties = equal & (_running_count(equal) <= wanted)
    return jnp.where(jnp.asarray(k) > 0, above | ties, False)


def _running_count(hits: jax.Array) -> jax.Array:
    """Inclusive running count in memory order, in two levels: a flat cumsum is slow on CPU."""
    flat, row = hits.reshape(-1), 1024
    padded = jnp.pad(flat, (0, -flat.size % row)).reshape(-1, row)
    per_row = jnp.sum(padded, axis=1, dtype=jnp.int32)
    before = jnp.cumsum(per_row) - per_row
    inside = jnp.cumsum(padded.astype(jnp.int32), axis=1)
    return (before[:, None] + inside).reshape(-1)[: flat.size].reshape(hits.shape)


def keep_n_of_m(scores: jax.Array, n: int, axis: int) -> jax.Array:
    """Within each group along ``axis``, the ``n`` entries of largest score, by pairwise ranks."""
    ordered = jnp.moveaxis(ordered_bits(scores), axis, 0)
    m = ordered.shape[0]
    ranks = []
    for i in range(m):
        beats = [ordered[j] >= ordered[i] if j < i else ordered[j] > ordered[i]
                 for j in range(m) if j != i]  # fmt: skip
        ranks.append(sum((b.astype(jnp.int32) for b in beats), jnp.zeros(ordered[i].shape, int)))
    return jnp.moveaxis(jnp.stack([r < n for r in ranks]), 0, axis)
