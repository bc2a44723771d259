"""Movement pruning: weights are kept for where they go, not for where they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import UNSTRUCTURED, threshold
from jaxprune.patterns.choose import is_kernel
from jaxprune.training.core import MaskState
from jaxprune.training.dense import Chosen, dense_method
from jaxprune.training.landing import where_kept
from jaxprune.training.renewal import scheduled
from jaxprune.training.straight_through import check_rate
from jaxprune.typing import Masks, Params, PatternFn, Schedule, Scores, Where


def movement(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    every: int = 1,
    pattern: PatternFn = UNSTRUCTURED,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with movement pruning, for fine-tuning of pretrained networks.

    A score grows where a step of gradient descent would move the weight away from 0,

    .. math:: S_{t+1} = S_t - w_t \, \partial L / \partial \tilde w_t, \quad
       \tilde w_t = m_t \odot w_t

    also for pruned weights, which keep their values, don't learn, and may come back. Let the
    schedule begin at 0: at first all scores tie.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule.
      every: steps between two renewals of the masks.
      pattern: ``(scores, sparsity) -> masks``.

    Returns:
      An optax transformation with :class:`jp.training.MaskState`, whose ``memory`` are the scores.
      The loss must be computed at ``jp.training.forward_params(params, state)``.

    Raises:
      ValueError: see :func:`jp.prune`.

    Example:
      >>> import jaxprune as jp, optax
      >>> schedule = jp.schedules.cubic(0.0, 0.9, begin=100, end=1000)
      >>> tx = jp.training.movement(optax.adamw(3e-5), schedule)

    References:
      Sanh et al., `Movement Pruning <https://arxiv.org/abs/2005.07683>`__, 2020, equations 2 to 5.
      There scores have a learning rate, which doesn't change their order.
    """

    def choose(params: Any, masks: Masks, memory: Any, now: Any, **evidence: Any) -> Chosen:
        return pattern(memory, now), memory

    return _by_movement(inner, sparsity, choose, pattern, every, 1.0, 0.0, "movement")


def soft_movement(
    inner: optax.GradientTransformation,
    strength: float | Schedule,
    *,
    tau: float = 0.0,
    rate: float = 1.0,
    every: int = 1,
    where: Where = is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with soft movement pruning: a threshold, and a pull on all scores.

    .. math:: S_{t+1} = S_t - \eta \, (w_t \, \partial L / \partial \tilde w_t
       + \lambda_t \, \sigma'(S_t)), \quad m_t = [S_t \ge \tau]

    Scores start at 0, with :math:`\sigma` the logistic function. The density follows from
    :math:`\lambda`; watch ``jp.density``.

    Args:
      inner: any optax transformation.
      strength: :math:`\lambda`, or a schedule.
      tau: the threshold.
      rate: :math:`\eta`.
      every: steps between two renewals of the masks.
      where: (path, leaf) -> whether the leaf is pruned.

    Returns:
      What :func:`movement` returns.

    Raises:
      ValueError: for a negative strength or rate.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.soft_movement(optax.adamw(3e-5), 0.1, rate=1e-2)

    References:
      Sanh et al., `Movement Pruning <https://arxiv.org/abs/2005.07683>`__, 2020, section 4, eq. 7.
      There the threshold acts on :math:`\sigma(S)`, which is the same for another tau, and the
      penalty is a mean over all entries; here the sum.
    """
    check_rate("strength", scheduled(strength, 0))
    check_rate("rate", rate)
    pattern = threshold(tau, where=where)

    def choose(params: Any, masks: Masks, memory: Any, now: Any, **evidence: Any) -> Chosen:
        return pattern(memory, None), memory

    return _by_movement(inner, 0.0, choose, pattern, every, rate, strength, "soft_movement")


def _by_movement(
    inner: Any,
    sparsity: Any,
    choose: Any,
    pattern: PatternFn,
    every: int,
    rate: float,
    strength: float | Schedule,
    name: str,
) -> optax.GradientTransformationExtraArgs:
    def zeros(params: Params, **evidence: Any) -> Scores:
        return jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), params)

    def remember(params: Params, grad: Any, state: MaskState) -> Scores:
        pull = jnp.asarray(scheduled(strength, state.count), jnp.float32)

        def leaf(score: Any, w: Any, g: Any, mask: Any) -> jax.Array:
            if mask.ndim == 0:
                return score
            slope = jax.nn.sigmoid(score) * jax.nn.sigmoid(-score)
            moved = w.astype(jnp.float32) * g.astype(jnp.float32)
            return score - jnp.float32(rate) * (moved + pull * slope)

        return jax.tree.map(leaf, state.memory, params, grad, state.masks)

    return dense_method(
        inner,
        sparsity,
        choose,
        pattern=pattern,
        start=zeros,
        every=every,
        memory=lambda params, masks: zeros(params),
        gradient=lambda params, grad, state: where_kept(state.masks, grad),
        remember=remember,
        trained=lambda masks, memory: masks,
        name=f"jp.training.{name}",
    )
