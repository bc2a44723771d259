"""Masks that are chosen once: before training, or at one step of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import UNSTRUCTURED
from jaxprune.schedules import one_shot as at_step
from jaxprune.scores.weights import magnitude, random
from jaxprune.training._prune import prune
from jaxprune.training.core import check_score, method
from jaxprune.training.renewal import check_number
from jaxprune.typing import Masks, PatternFn, ScoreFn


def or_random(score: ScoreFn | None) -> ScoreFn:
    """A score, or random ones where there is none."""
    if score is None:
        return functools.partial(random, key=jax.random.key(0))
    check_score(score)
    return score


def static(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    score: ScoreFn | None = None,
    pattern: PatternFn = UNSTRUCTURED,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it trains a sparse network on masks fixed before training.

    ``init`` makes the masks, at random unless told otherwise; the first update lands params on
    them. Write ``params = jp.training.forward_params(params, state)`` after ``init`` to have them
    sparse in the first forward pass already.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1].
      score: ``(params, **evidence) -> scores``. ``init`` knows only params, so bind what else it
        needs: ``functools.partial(jp.saliency, grad=jax.grad(loss)(params))`` is SNIP. None is
        ``jp.random`` with key 0.
      pattern: ``(scores, sparsity) -> masks``, such as ``jp.unstructured(jp.erk)``.

    Returns:
      An optax transformation whose ``update`` needs ``params``, with
      :class:`jp.training.MaskState`.

    Raises:
      TypeError: by ``init``, for a score that needs more evidence.
      ValueError: for a schedule in place of a number; see also :func:`jp.prune`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> tx = jp.training.static(optax.sgd(0.1), 0.75)
      >>> state = tx.init(params)
      >>> int(optax.tree_utils.tree_get(state, "masks")["kernel"].sum())
      4

    References:
      The baseline "static" of Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`__, 2020,
      section 4; with SNIP's score Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`__, 2019.
    """

    check_number("jp.training.static", sparsity)

    def renew(params: Any, masks: Masks, now: jax.Array, **evidence: Any) -> Masks:
        return masks

    return method(
        inner,
        sparsity,
        renew,
        pattern=pattern,
        start=or_random(score),
        due=lambda step, now, last: jnp.zeros((), bool),
        name="jp.training.static",
    )


def one_shot(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    at: int = 0,
    score: ScoreFn = magnitude,
    pattern: PatternFn = UNSTRUCTURED,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it prunes once, at step ``at``, and trains on what is left.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1].
      at: the step, from 0; masks hold for this step already.
      score: sees the gradient of that step as ``grad``, unlike that of :func:`static`.
      pattern: ``(scores, sparsity) -> masks``.

    Returns:
      What ``jp.prune`` returns, for ``jp.schedules.one_shot``.

    Raises:
      ValueError: for a schedule in place of a number; see also :func:`jp.prune`.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.one_shot(optax.adam(1e-3), 0.9, at=1000)

    References:
      Han et al., `Learning both Weights and Connections <https://arxiv.org/abs/1506.02626>`__,
      2015, one round of it.
    """
    # One renewal every 2**30 steps, and one where the schedule comes to rest.
    return prune(inner, score, at_step(sparsity, at=at), pattern=pattern, every=2**30)
