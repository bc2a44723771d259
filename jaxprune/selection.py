"""Exact selection by counting: no sort, no concatenation of leaves, and no memory.

Floats have the order of unsigned integers, see :func:`ordered_bits`, and the k-th largest is found
two bits at a time from the top: one pass over the scores counts how many are at least each of three
trial values. The last of equal scores to be kept is found in the same way among their places.

Each pass is one fused reduction: XLA computes the scores anew in each and keeps nothing but counts,
so that a mask takes its own byte per entry. The scores of a leaf of fewer than 2**18 entries are
stored, which is little, and compiles faster. A reduction also shards: devices exchange a few
integers. Several leaves are ranked together by adding their counts. Counts are
integers, and so stay exact beyond the 2**24 that a float32 can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_INTEGERS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}
_DIGIT = 2  # One pass settles so many bits.
_PARTS = 1 << 24  # Whole numbers up to here are exact in float32.
_LARGE = 1 << 18  # From so many entries on, memory is worth compiling each pass on its own.


def known(x: Any) -> bool:
    """Is the value at hand (not traced), so that it can be checked and computed with?"""
    return not isinstance(x, jax.core.Tracer)


def kept_count(size: int, sparsity: Any) -> Any:
    """How many of ``size`` entries to keep: size - round(sparsity * size), rounded half to even.

    At least one is kept while sparsity < 1, where there is one: an emptied leaf cuts the network in
    two.

    Example:
      >>> kept_count(10, 0.7), kept_count(10, 0.99), kept_count(10, 1.0), kept_count(0, 0.5)
      (3, 1, 0, 0)
    """
    return kept_total([size], sparsity)


def kept_total(sizes: Sequence[int], sparsity: Any) -> Any:
    """How many entries of several leaves to keep together: n - round(sparsity * n) of all n.

    At least one for each leaf that has entries while sparsity < 1, as in :func:`kept_count`.

    Example:
      >>> kept_total([3, 3, 3, 0], 0.5), kept_total([3, 3, 3, 0], 0.99)
      (5, 3)
    """
    size, least = sum(sizes), sum(n > 0 for n in sizes)
    if known(sparsity):
        value = float(sparsity)
        return max(size - round(value * size), least * int(value < 1))
    removed = _rounded_product(size, sparsity)
    return jnp.maximum(size - removed, (sparsity < 1).astype(removed.dtype) * least)


def _rounded_product(size: int, fraction: jax.Array) -> jax.Array:
    """round(fraction * size) for a traced fraction in [0, 1].

    A float32 product is off by several entries once size exceeds 2**24. So the fraction is cut into
    its upper 11 bits, multiplied in integers, and the rest, whose product is small.
    """
    dtype = count_dtype(size)
    if fraction.dtype == jnp.float64:
        return jnp.round(fraction * size).astype(dtype)
    fraction = fraction.astype(jnp.float32)
    upper = jnp.floor(fraction * 2048)
    lower = fraction - upper / 2048
    whole, rest = divmod(size, 4096)  # whole * 4096 * upper / 2048 is even: rounding is unmoved
    remainder = upper * rest / 2048 + lower * np.float32(size)
    return 2 * whole * upper.astype(dtype) + jnp.round(remainder).astype(dtype)


@partial(jax.jit, static_argnames="sizes")
def apportion(total: Any, sizes: tuple[int, ...]) -> jax.Array:
    """Integers that sum to ``total``, in proportion to ``sizes``; where there are any, at least 1.

    A total that is less by one makes one of them less by one and no other more: thresholds that
    spare each leaf its share then give nested masks.

    Args:
      total: 0, or from the number of sizes above 0 to their sum; may be traced.
      sizes: none negative.

    References:
      Balinski and Young, Fair Representation, 1982: a divisor method, with Webster's rounding.

    Example:
      >>> apportion(6, (2, 0, 9))
      Array([1, 0, 5], dtype=int32)
    """
    dtype = count_dtype(sum(sizes))
    size = np.array(sizes, dtype)

    def seats(part: jax.Array) -> jax.Array:
        """The integers at a divisor, a part of ``_PARTS``; never fewer for a larger part."""
        near = jnp.round(part.astype(jnp.float32) / _PARTS * size.astype(np.float32))
        near = jnp.clip(near.astype(dtype), np.minimum(size, 1), size)
        return jnp.where(part == _PARTS, size, near)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) // 2
        fits = jnp.sum(seats(middle), dtype=dtype) <= total
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    ends = jnp.int32(0), jnp.int32(_PARTS + 1)
    low, _ = jax.lax.fori_loop(0, _PARTS.bit_length(), halve, ends)
    some, more = seats(low), seats(jnp.minimum(low + 1, _PARTS))
    room = more - some
    before = jnp.cumsum(room, dtype=dtype) - room
    spare = total - jnp.sum(some, dtype=dtype)
    return jnp.where(total > 0, some + jnp.clip(spare - before, 0, room), 0).astype(dtype)


class _Word(NamedTuple):
    """The integers behind a type of floats."""

    width: int  # bits
    int: Any  # the types
    uint: Any
    sign: Any  # the sign bit
    infinity: Any


def _word(dtype: Any) -> _Word:
    """That of the floats which ``_words`` reads."""
    dtype = np.dtype(np.float32) if dtype.itemsize == 1 else dtype
    signed, uint = _INTEGERS[dtype.itemsize]
    width = 8 * dtype.itemsize
    infinity = np.asarray(np.inf, dtype).view(uint)[()]
    return _Word(width, signed, uint, uint(1 << (width - 1)), infinity)


def _words(x: jax.Array) -> tuple[jax.Array, _Word]:
    """The bits of floats; those of 8 bits are widened first."""
    x = jax.lax.stop_gradient(x)
    x = x.astype(jnp.float32) if x.dtype.itemsize == 1 else x
    word = _word(x.dtype)
    return jax.lax.bitcast_convert_type(x, word.uint), word


def ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats ``x``: -0.0 equals 0.0, NaN ranks lowest.

    Works on the bits, so that no denormal is flushed to zero on the way.
    """
    bits, word = _words(x)
    size = bits & ~word.sign
    ordered = jnp.where((bits & word.sign != 0) & (size != 0), ~bits, size | word.sign)
    return jnp.where(size > word.infinity, word.uint(0), ordered)


def _places(x: jax.Array) -> jax.Array:
    """Unsigned integers that as signed ones have the order of the floats, up to -0.0 and NaN.

    Negative floats are mirrored; -0.0 lies one below 0.0, and NaN beyond both infinities. So the
    floats between two bounds are one interval. XLA computes the last operation anew for each user
    if it has one operand, which is why that is the cast.
    """
    bits, word = _words(x)
    signed = jax.lax.bitcast_convert_type(bits, word.int)
    mirrored = signed ^ ((signed >> (word.width - 1)) & word.int(~word.sign))
    return jax.lax.bitcast_convert_type(mirrored, word.uint)


def _start(bits: jax.Array, word: _Word) -> jax.Array:
    """The first of the places, for whose floats ``ordered_bits`` is at least ``bits`` >= 1."""
    lowest, highest = ~(word.infinity | word.sign), word.infinity | word.sign
    start = jnp.clip(bits, lowest, highest + word.uint(1)) ^ word.sign
    return jnp.where(start == 0, ~word.uint(0), start)


def _at_least(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Where ``ordered_bits(x) >= bits``, for ``bits`` >= 1, in fewer operations."""
    word = _word(x.dtype)
    start = _start(bits, word)
    return _places(x) - start < word.infinity + word.uint(1) - start


def _equal(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Where ``ordered_bits(x) == bits``."""
    word = _word(x.dtype)
    is_nan = bits == 0  # all but the interval of numbers
    start = _start(bits, word)
    end = jnp.where(is_nan, word.infinity + word.uint(1), _start(bits + word.uint(1), word))
    return (_places(x) - start < end - start) ^ is_nan


def kth_largest(
    scores: Sequence[jax.Array],
    k: Any,
    least: Any = 0,
    entries: int | None = None,
) -> Any:
    """The ordered bits of the k-th largest of several arrays together.

    Args:
      scores: float arrays of one type.
      k: an integer from 1 to the number of all entries, may be traced.
      least: per array, a number that its count is raised to; or one for all.
      entries: under vmap, how many there are in all.

    Returns:
      The largest value v for which the counts of entries >= v sum to k or more.
    """
    size = sum(x.size for x in scores)
    dtype = count_dtype(size)

    def enough(trials: list[jax.Array]) -> list[jax.Array]:
        each = [_counts([_at_least(x, t) for t in trials]) for x in scores]
        return [_total(counts, least, dtype) >= k for counts in zip(*each, strict=True)]

    word = _word(scores[0].dtype)
    highest = _highest(
        enough, word.width, word.uint, entries or size
    )  # all ones where ``least`` suffices
    return jnp.minimum(highest, word.infinity | word.sign)


def _highest(
    holds: Callable[[list[jax.Array]], list[jax.Array]], width: int, dtype: Any, entries: int
) -> jax.Array:
    """The highest number of ``width`` bits for which a property holds, as for all below it.

    The passes are written out, which lets XLA fuse the scores into each. In a loop they would be
    stored before it; that compiles faster, and a small leaf takes little memory anyway.
    """
    passes = -(-width // _DIGIT)

    def settle(i: Any, found: jax.Array) -> jax.Array:
        shift = jnp.asarray(_DIGIT * (passes - 1 - i)).astype(dtype)
        trials = [found | (dtype(digit) << shift) for digit in range(1, 1 << _DIGIT)]
        digit = jnp.sum(jnp.stack(holds(trials)), dtype=dtype)
        return found | (digit << shift)

    found = jnp.zeros((), dtype)
    if entries < _LARGE:
        return jax.lax.fori_loop(0, passes, settle, found)
    for i in range(passes):
        found = settle(i, found)
    return found


def _counts(hits: Sequence[jax.Array]) -> list[jax.Array]:
    """How many hits each of two arrays or more has, in one pass over all.

    All of the counts have to be used: for a single one XLA on a CPU stores the hits before it sums.
    """
    ones = [h.astype(jnp.int32) for h in hits]
    zeros = [np.int32(0)] * len(ones)
    return jax.lax.reduce(ones, zeros, _sums, range(ones[0].ndim))


def _sums(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    """One function for all calls: a reduction by a new one is compiled anew, and kept."""
    return [x + y for x, y in zip(a, b, strict=True)]


def count(mask: jax.Array) -> jax.Array:
    """How many entries of a mask are True, of type int32, counted without storing ones."""
    kept, gone = _counts([mask, ~mask])
    return jnp.maximum(kept, mask.size - gone)  # both are the same, and both are used


def _total(counts: Sequence[jax.Array], least: Any, dtype: Any) -> jax.Array:
    return jnp.sum(_raised(counts, least, dtype), dtype=dtype)


def _raised(counts: Sequence[jax.Array], least: Any, dtype: Any) -> jax.Array:
    """One vector: operations of single numbers for each array take long to compile."""
    return jnp.maximum(jnp.stack(counts).astype(dtype), jnp.asarray(least, dtype))


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


@partial(jax.jit, static_argnames="entries")
def keep_largest(scores: jax.Array, k: Any, *, entries: int | None = None) -> jax.Array:
    """The mask of exactly ``k`` entries of largest score; among equals the earlier ones.

    Args:
      scores: floats of any shape; NaN ranks lowest.
      k: an integer, clipped to [0, size]; may be traced.
      entries: under vmap, how many there are in all, which decides how to save memory.

    Example:
      >>> keep_largest(jnp.array([1.0, 3.0, 3.0, 3.0]), 2).astype(int)
      Array([0, 1, 1, 0], dtype=int32)
    """
    if scores.size == 0:
        return jnp.ones(scores.shape, bool)
    k = jnp.clip(k, 0, scores.size).astype(jnp.int32)
    entries = entries or scores.size
    cut = kth_largest([scores], jnp.maximum(k, 1), entries=entries)
    above, tied = _at_least(scores, cut + cut.dtype.type(1)), _equal(scores, cut)
    index = jax.lax.iota(np.uint32, scores.size).reshape(scores.shape)  # in memory order
    back = ~index  # the last operation is unary, see _places
    over, ties = _counts([above, tied])
    wanted = jnp.minimum(k - over, ties)  # always k - over

    def too_few(trials: list[jax.Array]) -> list[jax.Array]:
        return [n < wanted for n in _counts([tied & (back > ~t) for t in trials])]

    last = _highest(too_few, (scores.size - 1).bit_length(), np.uint32, entries)
    return (above | (tied & (back >= ~last))) & (k > 0)


def keep_largest_at_hand(scores: np.ndarray, k: int) -> np.ndarray:
    """As :func:`keep_largest` for a vector on this host, by sorting: compiles nothing.

    Example:
      >>> keep_largest_at_hand(np.array([1.0, np.nan, 3.0, 3.0, 3.0]), 2).astype(int)
      array([0, 0, 1, 1, 0])
    """
    wide = scores.astype(np.float64)  # exact for all types of floats
    order = np.lexsort((np.where(np.isnan(wide), 0, -wide), np.isnan(wide)))
    kept = np.zeros(len(wide), bool)
    kept[order[: max(k, 0)]] = True
    return kept


@jax.jit
def keep_counts(scores: Sequence[jax.Array], shares: Any, least: Any) -> list[jax.Array]:
    """How many entries each array keeps when the largest of all arrays are kept.

    Args:
      scores: float arrays of one type.
      shares: a vector; as many are kept as these sum to, may be traced.
      least: a vector: per array, the least number that it keeps, at most its share.

    Returns:
      One int32 per array, of the same sum as ``shares``. Of equals the earlier array keeps more.
    """
    dtype = count_dtype(sum(x.size for x in scores))
    least = jnp.asarray(least, dtype)
    wanted = jnp.sum(jnp.asarray(shares, dtype), dtype=dtype)
    cut = kth_largest(scores, jnp.maximum(wanted, 1), least)
    over_cut = cut + cut.dtype.type(1)
    found = [_counts([_at_least(x, over_cut), _equal(x, cut)]) for x in scores]
    over = jnp.stack([n for n, _ in found]).astype(dtype)
    ties = jnp.stack([m for _, m in found]).astype(dtype)
    low, high = jnp.maximum(over, least), jnp.maximum(over + ties, least)
    room = high - low
    before = jnp.cumsum(room, dtype=dtype) - room
    spare = wanted - jnp.sum(low, dtype=dtype)
    kept = low + jnp.clip(spare - before, 0, room)
    return list(kept.astype(jnp.int32))


@partial(jax.jit, static_argnames=("n", "axis"))
def keep_n_of_m(scores: jax.Array, n: int, axis: int) -> jax.Array:
    """Of the m entries along ``axis`` the ``n`` of largest score, by pairwise comparison.

    Example:
      >>> keep_n_of_m(jnp.array([[1.0, 3.0, 2.0, 3.0]]), 2, axis=1).astype(int)
      Array([[0, 1, 0, 1]], dtype=int32)
    """
    down = ~ordered_bits(scores)  # the last operation is unary, see _places
    place = jax.lax.broadcasted_iota(jnp.int32, down.shape, axis)
    rank = jnp.zeros(down.shape, jnp.int32)
    for j in range(down.shape[axis]):
        other = jax.lax.index_in_dim(down, j, axis)
        rank += jnp.where(j < place, other <= down, other < down).astype(jnp.int32)
    return rank < n
