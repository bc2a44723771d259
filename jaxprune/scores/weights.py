"""Scores that need the parameters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_float, widen
from jaxprune.scores.required import required
from jaxprune.typing import Params, Scores


def magnitude(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`|w|` for every entry: summed over the entries of a unit, its L1 norm.

    Leaves that hold no floats are passed through, by this and all scores: no pattern prunes them.

    References:
      Han et al., `Learning both Weights and Connections <https://arxiv.org/abs/1506.02626>`__,
      2015.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.magnitude({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([2., 1.], dtype=float32)}
    """
    return map_floats(absolute, params)


def absolute(x: Any) -> jax.Array:
    """As ``jnp.abs``, which XLA on a CPU computes in float32 for bfloat16, and stores rounded."""
    return _without_sign(x) if x.dtype == jnp.bfloat16 else jnp.abs(x)


@jax.custom_jvp
def _without_sign(x: Any) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, np.uint16)
    return jax.lax.bitcast_convert_type(bits & np.uint16(0x7FFF), jnp.bfloat16)


_without_sign.defjvp(lambda x, dx: (_without_sign(*x), jax.jvp(jnp.abs, x, dx)[1]))


def l2(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`w^2`: summed over the entries of a unit, its squared L2 norm.

    Made for ``jp.structured(structure, reduce=jp.reduce.sum)``. For single entries it ranks as
    :func:`magnitude` does. Half precision is squared in float32, where it can't overflow.

    References:
      Li et al., `Pruning Filters <https://arxiv.org/abs/1608.08710>`__, 2017, section 3.1 names the
      norm of a filter; here of all slots of a unit, in the form of He et al.,
      `Soft Filter Pruning <https://arxiv.org/abs/1808.06866>`__, 2018, eq. 2 with p = 2.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.l2({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([4., 1.], dtype=float32)}
    """
    return map_floats(lambda w: jnp.square(jnp.abs(widen(w))), params)


def rms_normalized(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`|w| / \sqrt{\mathrm{mean}(w^2)}`, the mean over the leaf.

    Makes leaves of different scale comparable under one threshold, whatever their sizes: a leaf
    multiplied by a number keeps its scores. :func:`jaxprune.global_threshold` does it by itself;
    this is for patterns that compare scores as they are, such as ``jp.threshold``.

    References:
      A leaf divided by its L2 norm is known from global magnitude pruning; that norm grows with
      the leaf's size, the root mean square does not.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.rms_normalized({"w": jnp.array([-7.0, 1.0])})["w"].round(1).astype("float16")
      Array([1.4, 0.2], dtype=float16)
    """

    def score(w: Any) -> jax.Array:
        size = jnp.abs(widen(w))
        return size / root_mean_square(size)

    return map_floats(score, params)


def lamp(params: Params, **evidence: Any) -> Scores:
    r"""Returns what an entry adds to the squares of all entries of its leaf that are as large.

    .. math:: w_u^2 / \sum_{v \ge u} w_v^2

    with the entries of the leaf in ascending order of their absolute values; among equals the
    earlier entry counts as the larger, as it does where entries are kept. Within a leaf it ranks
    as :func:`magnitude` does; its largest entry scores 1. Infinite entries count as 0.
    Made for one threshold over all leaves, which is what :func:`jaxprune.distributions.lamp` does.
    Each leaf is sorted, which stores it several times over and gathers it where it is sharded;
    :func:`jaxprune.global_threshold` on magnitudes does neither.

    References:
      Lee et al., `Layer-adaptive sparsity <https://arxiv.org/abs/2010.07611>`__, 2021. Here each
      leaf is divided by its largest entry before it is squared, which changes no score.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.lamp({"w": jnp.array([-1.0, 2.0, 2.0])})["w"]  # 1/9, 4/4, 4/8
      Array([0.11111111, 1.        , 0.5       ], dtype=float32)
    """
    return map_floats(lambda w: _lamp(jnp.abs(widen(w))), params)


def _lamp(sizes: jax.Array) -> jax.Array:
    x = jnp.where(jnp.isfinite(sizes), sizes, 0).ravel()
    order = jnp.argsort(x, descending=True, stable=True)
    score = jnp.zeros_like(x).at[order].set(lamp_of_sorted(x[order])).reshape(sizes.shape)
    return jnp.where(jnp.isnan(sizes), sizes, score)


def lamp_of_sorted(sizes: jax.Array) -> jax.Array:
    """The LAMP scores of one leaf whose entries, finite and not negative, come largest first."""
    largest = jnp.max(sizes, initial=0)
    square = jnp.square(sizes / jnp.where(largest > 0, largest, 1))
    # A parallel sum may fall by a rounding; scores must fall as entries do.
    total = jax.lax.cummax(jnp.cumsum(square))
    return square / jnp.where(total > 0, total, 1)


def map_floats(score: Callable[[Any], Any], params: Params) -> Scores:
    """Scores each leaf of floats; the others pass through."""
    return jax.tree.map(lambda w: score(w) if is_float(w) else w, params)


def root_mean_square(x: jax.Array) -> jax.Array:
    """Over finite entries, the others as zeros; scaled so that no square over- or underflows.

    In reductions whose two results are both used: XLA stores ``x`` anew for one of a single result.
    """
    finite = -jnp.where(jnp.isfinite(x), x, 0)  # once more unary, see selection._places
    ends = jax.lax.reduce([finite, finite], [_zero(x)] * 2, _widest, range(x.ndim))
    largest = jnp.maximum(ends[0], -ends[1])
    square = jnp.square(finite / jnp.where(largest > 0, largest, 1))
    # Rows first: a sum of 1e8 entries one by one would stop growing.
    row = jax.lax.reduce([square, square], [_zero(x)] * 2, _add_and_max, range(x.ndim)[-1:])
    rms = largest * jnp.sqrt(jnp.sum(row[0]) / max(x.size, 1))
    return jnp.where((jnp.max(row[1], initial=0) > 0) & (rms > 0), rms, 1)


def _zero(x: jax.Array) -> Any:
    return np.zeros((), x.dtype)


def _widest(a: Any, b: Any) -> list[jax.Array]:
    return [jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])]


def _add_and_max(a: Any, b: Any) -> list[jax.Array]:
    return [a[0] + b[0], jnp.maximum(a[1], b[1])]


def random(params: Params, *, key: Any = None, step: Any = None, **evidence: Any) -> Scores:
    """Returns uniform scores in [0, 1): the control that every comparison needs.

    Args:
      params: any pytree of arrays.
      key: a ``jax.random.key``.
      step: folded into the key where given, so that each renewal of the masks draws anew.

    Raises:
      TypeError: without ``key``.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, jaxprune as jp
      >>> jp.random({"w": jnp.ones((2, 3))}, key=jax.random.key(0))["w"].shape
      (2, 3)
      >>> score = functools.partial(jp.random, key=jax.random.key(0))
      >>> tx = jp.prune(optax.sgd(0.1), score, 0.5)
    """
    required("random", "key", key, "functools.partial(jp.random, key=jax.random.key(0))")
    if step is not None:
        key = jax.random.fold_in(key, step)
    leaves, treedef = jax.tree.flatten(params)
    drawn = [
        jax.random.uniform(jax.random.fold_in(key, i), np.shape(w)) if is_float(w) else w
        for i, w in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, drawn)
