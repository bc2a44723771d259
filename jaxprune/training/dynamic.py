"""Dynamic sparse training: entries are dropped and others grown while the density stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._alike import map_alike
from jaxprune._leaf import is_float, widen
from jaxprune.distributions import Rule, uniform
from jaxprune.patterns import UNSTRUCTURED, unstructured
from jaxprune.patterns.choose import is_kernel
from jaxprune.scores.weights import magnitude, random
from jaxprune.selection import count, keep_largest, kept_total, known
from jaxprune.sharding import freely, over
from jaxprune.training._static import or_random
from jaxprune.training.core import NOTHING, Moments, Renew, check_renewed, method
from jaxprune.training.landing import hold
from jaxprune.training.renewal import final, scheduled
from jaxprune.typing import Distribution, Masks, PatternFn, Schedule, ScoreFn, Scores, Where

# ---- the two parts of every such method -----------------------------------------------------


def drop(scores: Scores, masks: Masks, sparsity: Any, fraction: Any, pattern: PatternFn) -> Masks:
    r"""Returns ``masks`` without the ``fraction`` of their entries that scores lowest.

    Each leaf keeps what the pattern keeps of it at the density :math:`(1-f)(1-s)`. Where that is
    everything, because the pattern can't express that density (N:M) or the leaf's density is a
    fixed number, the lowest entries of the leaf go one by one.

    Args:
      scores: never negative, larger = keep.
      masks: what is kept now.
      sparsity: the one that masks are to have after :func:`grow`.
      fraction: the share of kept entries, in [0, 1].
      pattern: that of the masks.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> w, masks = {"w": jnp.array([[1.0, 4.0, 3.0, 0.0]])}, {"w": jnp.array([[1, 1, 1, 0]]) > 0}
      >>> jp.training.drop(w, masks, 0.25, 0.33, jp.unstructured())["w"].astype(int)
      Array([[0, 1, 1, 0]], dtype=int32)
    """
    held = hold(scores, masks)
    fraction = jnp.asarray(fraction, jnp.float32)
    fewer = pattern(held, 1 - (1 - fraction) * (1 - jnp.asarray(sparsity, jnp.float32)))

    check_renewed(fewer, masks)

    def leaf(score: jax.Array, mask: jax.Array, kept: jax.Array) -> jax.Array:
        # Not under a condition, which would have to be given the scores: they'd be stored.
        dropped = jnp.any(mask & ~kept)
        return kept & _drop_entries(jnp.where(dropped, 0, fraction), score, mask)

    return freely(partial(_map_masks, leaf), held, masks, fewer, as_in=masks)


def _map_masks(fn: Callable[..., jax.Array], scores: Scores, masks: Masks, *rest: Masks) -> Masks:
    """Maps the masks of leaves that are pruned, those of one shape together."""
    leaves, treedef = jax.tree.flatten(masks)
    columns = [jax.tree.leaves(scores), leaves, *map(jax.tree.leaves, rest)]
    rows = [row for row in zip(*columns, strict=True) if row[1].ndim]
    found = iter(map_alike(fn, *zip(*rows)) if rows else ())
    return jax.tree.unflatten(treedef, [next(found) if m.ndim else m for m in leaves])


def _drop_entries(fraction: Any, score: jax.Array, mask: jax.Array) -> jax.Array:
    """The mask without that fraction of its entries of lowest score; one always stays."""
    axes = tuple(i for i, n in enumerate(mask.shape) if n == 1 != score.shape[i])
    score = jnp.mean(score, axes, keepdims=True) if axes else score  # of the mask's own entries
    kept = count(mask)
    gone = jnp.round(fraction * kept.astype(jnp.float32)).astype(jnp.int32)
    return keep_largest(jnp.where(mask, score, -jnp.inf), jnp.maximum(kept - gone, 1)) & mask


def grow(scores: Scores, masks: Masks, sparsity: Any, pattern: PatternFn) -> Masks:
    """Returns ``masks`` and besides the entries of highest score, up to the given sparsity.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> masks = {"w": jnp.array([[True, False, False, False]])}
      >>> grads = {"w": jnp.array([[0.0, -1.0, 3.0, 2.0]])}
      >>> jp.training.grow(jp.magnitude(grads), masks, 0.5, jp.unstructured())["w"].astype(int)
      Array([[1, 0, 1, 0]], dtype=int32)
    """

    def leaf(score: Any, mask: jax.Array) -> Any:
        if not is_float(score):
            return score
        return jnp.where(over(mask, score), jnp.inf, score).astype(score.dtype)

    return pattern(jax.tree.map(leaf, scores, masks), sparsity)


def check_drop_fraction(drop_fraction: Any) -> None:
    """Raises ValueError unless it begins and ends in [0, 1], as far as it is known."""
    for value in (scheduled(drop_fraction, 0), final(drop_fraction)):
        if known(value) and not (np.shape(value) == () and 0 <= float(value) <= 1):
            raise ValueError(
                f"drop_fraction is {value}; wanted the fraction of kept entries to replace, in "
                "[0, 1], or a schedule of it such as optax.cosine_decay_schedule(0.3, 75_000)"
            )


# ---- methods --------------------------------------------------------------------------------


def set(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.3,
    every: int = 100,
    pattern: PatternFn = UNSTRUCTURED,
    score: ScoreFn | None = None,
    key: jax.Array | None = None,
    moments: Moments = "reset",
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with SET: drop the smallest weights, grow others at random.

    Every ``every`` steps each leaf of :math:`n` kept entries drops the :math:`\zeta n` of least
    :math:`|w|` and grows as many, drawn uniformly among all that aren't kept. They start from 0.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule.
      drop_fraction: :math:`\zeta`, or a schedule ``step -> fraction``.
      every: steps between two renewals; the first is at step ``every``.
      pattern: ``(scores, sparsity) -> masks``; the paper's is ``jp.unstructured(jp.erk)``.
        It must have a density: ``jp.threshold`` has none to keep.
      score: the score of the masks that ``init`` makes, as in :func:`static`; None is random.
      key: the random key of what is grown; a ``key=`` among the extra arguments of ``update`` wins,
        for the members of an ensemble under ``jax.vmap``.
      moments: the moments of entries that come back, "reset" or "inherit", see :func:`method`.

    Returns:
      An optax transformation whose ``update`` needs ``params``, with
      :class:`jp.training.MaskState`.

    Raises:
      ValueError: for a drop_fraction outside [0, 1]; see also :func:`static`.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.set(optax.adam(1e-3), 0.9, pattern=jp.unstructured(jp.erk))

    References:
      Mocanu et al., `SET <https://arxiv.org/abs/1707.04780>`__, 2018, algorithm 1. There the
      smallest positive and the largest negative weights go, a fraction of each, once an epoch; here
      the smallest of both together, as in the comparison of RigL, and a step of the optimizer is
      taken at renewals too.
    """
    check_drop_fraction(drop_fraction)
    key = jax.random.key(0) if key is None else key

    def renew(
        params: Any, masks: Masks, now: Any, *, step: Any, key: Any = key, **evidence: Any
    ) -> Masks:
        fraction = scheduled(drop_fraction, step)
        kept = drop(magnitude(params), masks, now, fraction, pattern)
        drawn = jax.random.fold_in(key, 1)  # not what drew the first masks
        return grow(random(params, key=drawn, step=step), kept, now, pattern)

    return _dynamic(inner, sparsity, renew, every, pattern, score, moments, "set")


def rigl(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.3,
    every: int = 100,
    pattern: PatternFn = UNSTRUCTURED,
    score: ScoreFn | None = None,
    moments: Moments = "reset",
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with RigL: drop the smallest weights, grow where the gradient is largest.

    Every ``every`` steps each leaf of :math:`n` kept entries drops the :math:`\alpha_t n` of least
    :math:`|w|` and grows as many of largest :math:`|\partial L / \partial w|` among all that aren't
    kept. They start from 0.

    The gradient must be that of all entries: take it at the stored params, with no masks inside the
    loss, and put no other transformation before this one. In JAX it is dense anyway; the masks save
    no time in training.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule.
      drop_fraction: :math:`\alpha`, or a schedule ``step -> fraction``. The paper's is
        ``optax.cosine_decay_schedule(0.3, end)``, with ``end`` at 75 % of training; from there on
        masks stay.
      every: :math:`\Delta T`, steps between two renewals; the first is at step ``every``.
      pattern: ``(scores, sparsity) -> masks``; the paper's best is ``jp.unstructured(jp.erk)``.
        It must have a density: ``jp.threshold`` has none to keep.
      score: the score of the masks that ``init`` makes, as in :func:`static`; None is random.
      moments: the moments of entries that come back, "reset" or "inherit", see :func:`method`.

    Returns:
      An optax transformation whose ``update`` needs ``params``, with
      :class:`jp.training.MaskState`.

    Raises:
      ValueError: for a drop_fraction outside [0, 1]; see also :func:`static`.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.rigl(
      ...     optax.adamw(1e-3), 0.9, drop_fraction=optax.cosine_decay_schedule(0.3, 7500)
      ... )

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`__, 2020, algorithm 1, equations 1 and
      2. There a renewal replaces the optimizer's step; here the step is taken as well, on the new
      masks.
    """
    check_drop_fraction(drop_fraction)

    def renew(
        params: Any, masks: Masks, now: Any, *, grad: Any, step: Any, **evidence: Any
    ) -> Masks:
        fraction = scheduled(drop_fraction, step)
        kept = drop(magnitude(params), masks, now, fraction, pattern)
        return grow(magnitude(grad), kept, now, pattern)

    return _dynamic(inner, sparsity, renew, every, pattern, score, moments, "rigl")


def snfs(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.5,
    every: int = 100,
    distribution: Distribution | Mapping[str, Rule] = uniform,
    where: Where = is_kernel,
    score: ScoreFn | None = None,
    decay: float = 0.9,
    moments: Moments = "reset",
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with sparse momentum (SNFS), which moves density between leaves.

    It remembers :math:`v`, the exponential mean of dense gradients. Every ``every`` steps each leaf
    drops a fraction of its kept entries of least :math:`|w|`. All that was dropped is given out
    again in proportion to the leaves' mean :math:`|v|` over what they still keep,

    .. math:: r_l = R \, \bar v_l / \textstyle\sum_j \bar v_j

    and grown where :math:`|v|` is largest among what is not kept. What exceeds a leaf's room goes
    to the others. The total over leaves is the scheduled one.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule.
      drop_fraction: the share of kept entries, or a schedule; the paper's falls by a cosine from
        0.5.
      every: steps between two renewals; the first is at step ``every``.
      distribution: the distribution of the first masks over leaves.
      where: (path, leaf) -> whether the leaf is pruned.
      score: the score of the masks that ``init`` makes, as in :func:`static`; None is random.
      decay: the decay of the mean of gradients.
      moments: the moments of entries that come back, "reset" or "inherit", see :func:`method`.

    Returns:
      An optax transformation whose ``update`` needs ``params``, with
      :class:`jp.training.MaskState`, whose ``memory`` holds :math:`v`.

    Raises:
      ValueError: for a drop_fraction outside [0, 1]; see also :func:`static`.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.snfs(optax.sgd(0.1, momentum=0.9), 0.9)

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`__,
      2019, algorithm 1. There :math:`v` is the optimizer's own momentum; here it doesn't depend on
      the optimizer.
    """
    check_drop_fraction(drop_fraction)

    def renew(
        params: Any, masks: Masks, now: Any, *, step: Any, memory: Any, **evidence: Any
    ) -> Masks:
        fraction = scheduled(drop_fraction, step)
        kept = _map_masks(partial(_drop_entries, fraction), magnitude(params), masks)
        return freely(_grow_where_momentum_is, magnitude(memory), kept, now, as_in=masks)

    pattern = unstructured(distribution, where=where)
    mean = optax.ema(decay, debias=False)
    return _dynamic(inner, sparsity, renew, every, pattern, score, moments, "snfs", mean)


def _grow_where_momentum_is(momentum: Scores, masks: Masks, sparsity: Any) -> Masks:
    """Counts per leaf from the mean momentum of what is kept, entries from the momentum itself."""
    pruned = [mask.ndim > 0 for mask in jax.tree.leaves(masks)]
    leaves, treedef = jax.tree.flatten(masks)
    pairs = [(m, v) for m, v, p in zip(leaves, jax.tree.leaves(momentum), pruned) if p]
    kept = jnp.stack([count(m) for m, _ in pairs])
    sizes = np.array([m.size for m, _ in pairs], np.int32)
    total = kept_total([int(n) for n in sizes], sparsity)
    means = [jnp.nan_to_num(jnp.mean(widen(v), where=m)) for m, v in pairs]
    more = shares(total - jnp.sum(kept), jnp.stack(means), sizes - kept)
    held = [jnp.where(m, jnp.inf, v) for m, v in pairs]
    grown = iter(map_alike(keep_largest, held, kept + more))
    return jax.tree.unflatten(treedef, [next(grown) if p else m for m, p in zip(leaves, pruned)])


def shares(total: Any, weights: jax.Array, room: Any) -> jax.Array:
    """Integers that sum to ``total``, in proportion to ``weights``, none above its ``room``."""
    weights, room = jnp.maximum(weights, 1e-30), room.astype(jnp.float32)
    total = jnp.asarray(total, jnp.float32)

    def spread(_: Any, given: jax.Array) -> jax.Array:
        free = jnp.where(given < room, weights, 0)
        rest = jnp.maximum(total - jnp.sum(given), 0)
        return jnp.minimum(given + rest * free / jnp.maximum(jnp.sum(free), 1e-30), room)

    given = jax.lax.fori_loop(0, len(weights), spread, jnp.zeros_like(room))
    upto = jnp.round(jnp.cumsum(given)).astype(jnp.int32)  # rounded so that the sum stays
    return jnp.diff(upto, prepend=0)


def _dynamic(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    renew: Renew,
    every: int,
    pattern: PatternFn,
    score: ScoreFn | None,
    moments: Moments,
    name: str,
    memory: optax.GradientTransformation = NOTHING,
) -> optax.GradientTransformationExtraArgs:
    return method(
        inner,
        sparsity,
        renew,
        pattern=pattern,
        start=or_random(score),
        every=every,
        moments=moments,
        memory=memory,
        name=f"jp.training.{name}",
    )
