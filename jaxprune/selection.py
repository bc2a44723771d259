"""Exact selection by counting: no sort, and no concatenation of leaves.

Floats are mapped to unsigned integers of the same order, and the k-th largest is found digit by
digit from the top, by counting how many entries are at least a trial value. A count is a
reduction: sharded leaves exchange a few integers, and several leaves are ranked together by adding
their counts. Counts are integers, so they stay exact beyond the 2**24 that a float32 can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UINT = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_DIGIT = 16  # bits that one histogram settles: its 65536 counters fit in a core's own cache
_LARGE = 1 << 18  # entries from which a histogram is worth its counters


def known(x: Any) -> bool:
    """Is the value at hand (not traced), so that it can be checked and computed with?"""
    return not isinstance(x, jax.core.Tracer)


def kept_count(size: int, sparsity: Any) -> Any:
    """How many of ``size`` entries to keep: size - round(sparsity * size), rounded half to even.

    At least one is kept while sparsity < 1: an emptied leaf cuts the network in two.

    Example:
      >>> kept_count(10, 0.7), kept_count(10, 0.99), kept_count(10, 1.0)
      (3, 1, 0)
    """
    if known(sparsity):
        value = float(sparsity)
        return max(size - round(value * size), int(value < 1))
    least = (sparsity < 1).astype(jnp.int32)
    return jnp.maximum(size - _rounded_product(size, sparsity), least)


def _rounded_product(size: int, fraction: jax.Array) -> jax.Array:
    """round(fraction * size) for a traced fraction in [0, 1].

    A float32 product is off by several entries once size exceeds 2**24. So the fraction is cut into
    its upper 11 bits, multiplied in integers, and the rest, whose product is small.
    """
    if fraction.dtype == jnp.float64:
        return jnp.round(fraction * size).astype(jnp.int32)
    fraction = fraction.astype(jnp.float32)
    upper = jnp.floor(fraction * 2048)
    lower = fraction - upper / 2048
    whole, rest = divmod(size, 4096)  # whole * 4096 * upper / 2048 is even: rounding is unmoved
    remainder = upper * rest / 2048 + lower * np.float32(size)
    return 2 * whole * upper.astype(jnp.int32) + jnp.round(remainder).astype(jnp.int32)


def ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats ``x``: -0.0 equals 0.0, NaN ranks lowest.

    Works on the bits, so that no denormal is flushed to zero on the way.
    """
    x = jax.lax.stop_gradient(x)
    if x.dtype.itemsize == 1:
        x = x.astype(jnp.float32)
    uint: Any = _UINT[x.dtype.itemsize]
    sign = uint(1 << (8 * x.dtype.itemsize - 1))
    infinity = np.asarray(np.inf, x.dtype).view(uint)
    bits = jax.lax.bitcast_convert_type(x, uint)
    size = bits & ~sign
    ordered = jnp.where((bits & sign != 0) & (size != 0), ~bits, size | sign)
    return jnp.where(size > infinity, uint(0), ordered)


def kth_largest(ordered: Sequence[jax.Array], k: Any, least: Sequence[Any] | None = None) -> Any:
    """The k-th largest of several arrays of ordered bits together.

    Args:
      ordered: arrays of one unsigned type.
      k: an integer from 1 to the number of all entries, may be traced.
      least: per array, a number that its count is raised to.

    Returns:
      The largest value v for which the counts of entries >= v sum to k or more.
    """
    total = sum(x.size for x in ordered)
    least = [0] * len(ordered) if least is None else least
    args = list(ordered), jnp.asarray(k, count_dtype(total)), list(least)
    if total < _LARGE:
        return _by_bits(*args)
    # benchmarks/selection.py measures both: a scatter is the fastest on a CPU, the slowest on a GPU
    return jax.lax.platform_dependent(*args, cpu=_by_histograms, default=_by_bits)


def _by_bits(ordered: list[jax.Array], k: jax.Array, least: list[Any]) -> jax.Array:
    """One bit a pass."""
    dtype = ordered[0].dtype
    width = 8 * dtype.itemsize

    def body(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.ones((), dtype) << (width - 1 - i).astype(dtype))
        total = _total([_count(x >= trial) for x in ordered], least, k.dtype)
        return jnp.where(total >= k, trial, found)

    return jax.lax.fori_loop(0, width, body, jnp.zeros((), dtype))


def _by_histograms(ordered: list[jax.Array], k: jax.Array, least: list[Any]) -> jax.Array:
    """Sixteen bits a pass."""
    dtype = ordered[0].dtype
    found = jnp.zeros((), dtype)
    for shift in reversed(range(0, 8 * dtype.itemsize, _DIGIT)):
        total = _total([_at_least(x, found, shift) for x in ordered], least, k.dtype)
        digit = jnp.sum(total >= k, dtype=jnp.int32) - 1
        found |= digit.astype(dtype) << np.asarray(shift, dtype)
    return found


def _at_least(x: jax.Array, found: jax.Array, shift: int) -> jax.Array:
    """For each value t of the next digit, how many entries are >= found | (t << shift)."""
    wide = x.dtype if x.dtype.itemsize > 2 else np.dtype(np.uint32)
    high, base = (v.astype(wide) >> np.asarray(shift, wide) for v in (x, found))
    size = np.asarray(1 << _DIGIT, wide)
    # The first bin takes what lies below the digits found so far, the last one what lies above.
    bins = jnp.where(high < base, 0, jnp.minimum(high - base, size) + 1).astype(jnp.int32)
    counts = jnp.zeros((1 << _DIGIT) + 2, jnp.int32)
    counts = counts.at[bins].add(1, mode="promise_in_bounds")
    return jnp.cumsum(counts[::-1])[::-1][1:-1]


def _count(hits: jax.Array) -> jax.Array:
    return jnp.sum(hits, dtype=jnp.int32)


def _total(counts: Sequence[jax.Array], least: Sequence[Any], dtype: Any) -> jax.Array:
    return sum(
        (jnp.maximum(c, b).astype(dtype) for c, b in zip(counts, least, strict=True)),
        jnp.zeros((), dtype),
    )


def count_dtype(total: int) -> Any:
    """The integer type that can count ``total`` entries.

    Raises:
      ValueError: for 2**31 entries or more without 64-bit types.
    """
    if total < 2**31:
        return jnp.int32
    if jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
        raise ValueError(
            f"ranking {total} entries together needs 64-bit counts; write `with "
            "jax.enable_x64(True): ...`, or give each leaf its own sparsity (jp.uniform, jp.erk)"
        )
    return jnp.int64


@jax.jit
def keep_largest(scores: jax.Array, k: Any) -> jax.Array:
    """The mask of exactly ``k`` entries of largest score; among equals the earlier ones.

    Args:
      scores: floats of any shape; NaN ranks lowest.
      k: an integer, clipped to [0, size]; may be traced.

    Example:
      >>> keep_largest(jnp.array([1.0, 3.0, 3.0, 3.0]), 2).astype(int)
      Array([0, 1, 1, 0], dtype=int32)
    """
    if scores.size == 0:
        return jnp.ones(scores.shape, bool)
    k = jnp.clip(k, 0, scores.size).astype(jnp.int32)
    ordered = ordered_bits(scores)
    cut = kth_largest([ordered], jnp.maximum(k, 1))
    above = ordered > cut
    return (above | _first(ordered == cut, k - _count(above))) & (k > 0)


def _first(hits: jax.Array, wanted: jax.Array) -> jax.Array:
    """The first ``wanted`` (>= 1) hits in memory order.

    Walks down the axes: counts per slice say in which slice the last one lies. A running count over
    all entries would be slow on a CPU, and would gather a sharded leaf.
    """
    index, last = jnp.zeros(hits.shape, jnp.int32), jnp.int32(0)
    rows, stride = hits, hits.size
    for axis, size in enumerate(hits.shape):
        stride //= size
        counts = jnp.sum(rows, axis=tuple(range(1, rows.ndim)), dtype=jnp.int32)
        before = jnp.cumsum(counts) - counts
        i = jnp.maximum(_count(before < wanted) - 1, 0)
        here = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == i
        rows = jnp.any(rows & here, axis=0)  # rows[i], which would gather a sharded axis
        wanted, last = wanted - before[i], last + i * stride
        index += jax.lax.broadcasted_iota(jnp.int32, hits.shape, axis) * stride
    return hits & (index <= last)


@jax.jit
def keep_counts(
    scores: Sequence[jax.Array], shares: Sequence[Any], least: Sequence[Any]
) -> list[jax.Array]:
    """How many entries each array keeps when the largest of all arrays are kept.

    Args:
      scores: float arrays of one type.
      shares: as many are kept as these sum to, may be traced.
      least: per array, the least number that it keeps, at most its share.

    Returns:
      One int32 per array, of the same sum as ``shares``. Of equals the earlier array keeps more.
    """
    none = [0] * len(scores)
    dtype = count_dtype(sum(x.size for x in scores))
    ordered = [ordered_bits(x) for x in scores]
    wanted = _total([jnp.asarray(n) for n in shares], none, dtype)
    cut = kth_largest(ordered, jnp.maximum(wanted, 1), least)
    over = [jnp.maximum(_count(x > cut), b) for x, b in zip(ordered, least, strict=True)]
    upto = [jnp.maximum(_count(x >= cut), b) for x, b in zip(ordered, least, strict=True)]
    spare = wanted - _total(over, none, dtype)
    kept = []
    for low, high in zip(over, upto, strict=True):
        more = jnp.clip(spare, 0, (high - low).astype(dtype))
        spare -= more
        kept.append(low + more.astype(jnp.int32))
    return kept


@partial(jax.jit, static_argnames=("n", "axis"))
def keep_n_of_m(scores: jax.Array, n: int, axis: int) -> jax.Array:
    """Of the m entries along ``axis`` the ``n`` of largest score, by pairwise comparison.

    Example:
      >>> keep_n_of_m(jnp.array([[1.0, 3.0, 2.0, 3.0]]), 2, axis=1).astype(int)
      Array([[0, 1, 0, 1]], dtype=int32)
    """
    ordered = ordered_bits(scores)
    place = jax.lax.broadcasted_iota(jnp.int32, ordered.shape, axis)
    rank = jnp.zeros(ordered.shape, jnp.int32)
    for j in range(ordered.shape[axis]):
        other = jax.lax.index_in_dim(ordered, j, axis)
        rank += jnp.where(j < place, other >= ordered, other > ordered).astype(jnp.int32)
    return rank < n
