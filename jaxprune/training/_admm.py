"""ADMM: training towards the nearest sparse network, with a price that grows until it is there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import UNSTRUCTURED
from jaxprune.scores.weights import magnitude
from jaxprune.training.core import MaskState, scored
from jaxprune.training.dense import Chosen, dense_method
from jaxprune.training.landing import is_placeholder, where_kept
from jaxprune.training.renewal import scheduled
from jaxprune.training.straight_through import check_rate
from jaxprune.typing import Masks, Params, PatternFn, Schedule, ScoreFn


def admm(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    rho: float | Schedule = 1e-3,
    every: int = 32,
    score: ScoreFn = magnitude,
    pattern: PatternFn = UNSTRUCTURED,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with ADMM: params stay dense and are drawn to a sparse copy of them.

    The optimizer minimises :math:`L(w) + \frac{\rho}{2} \|w - z + u\|^2`; every ``every`` steps

    .. math:: z \leftarrow \Pi_s(w + u), \quad u \leftarrow u + w - z

    where :math:`\Pi_s` keeps the entries that score best, under any pattern. Compute the loss at
    the stored params. When they have come close, ``jp.training.forward_params(params, state)``
    prunes them for good; ``jp.keep_params_sparse`` then holds them there.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule.
      rho: the penalty, or a schedule of it. It has to grow until params and the sparse network
        meet: compare them by ``jp.training.forward_params``.
      every: steps between two projections.
      score: the score of w + u; sees the gradient as ``grad``.
      pattern: ``(scores, sparsity) -> masks``.

    Returns:
      An optax transformation with :class:`jp.training.MaskState`: ``masks`` are those of z,
      ``memory`` is the float32 tree :math:`z + u`, which is z where masks are True and u elsewhere.

    Raises:
      ValueError: for a negative rho.

    Example:
      >>> import jaxprune as jp, optax
      >>> rho = optax.linear_schedule(0.0, 1.0, 10_000)
      >>> tx = jp.training.admm(optax.adam(1e-3), 0.9, rho=rho, every=100)

    References:
      Boyd et al., Distributed Optimization and Statistical Learning via ADMM, 2011, section 9.1;
      for networks Zhang et al., [A Systematic DNN Weight Pruning Framework](
      https://arxiv.org/abs/1804.03294), 2018, equations 5 to 9, there with a fixed number of
      epochs between projections.
    """
    check_rate("rho", scheduled(rho, 0))

    # After a projection u is 0 where z isn't: one tree and the masks hold both.
    def memory(params: Params, masks: Masks) -> Params:
        if is_placeholder(params):
            return params
        return where_kept(masks, jax.tree.map(lambda w: w.astype(jnp.float32), params))

    def gradient(params: Params, grad: Any, state: MaskState) -> Any:
        price = jnp.asarray(scheduled(rho, state.count), jnp.float32)

        def leaf(g: Any, w: Any, total: Any, mask: Any) -> jax.Array:
            pull = price * (w.astype(jnp.float32) - jnp.where(mask, total, -total))  # z - u
            return g if mask.ndim == 0 else g + pull.astype(g.dtype)

        return jax.tree.map(leaf, grad, params, state.memory, state.masks)

    def choose(params: Any, masks: Masks, memory: Any, now: Any, **evidence: Any) -> Chosen:
        dual = where_kept(jax.tree.map(jnp.logical_not, masks), memory)
        total = jax.tree.map(lambda w, u: w.astype(jnp.float32) + u, params, dual)
        return pattern(scored(score, total, evidence), now), total

    return dense_method(
        inner,
        sparsity,
        choose,
        pattern=pattern,
        start=score,
        every=every,
        memory=memory,
        gradient=gradient,
        name="jp.training.admm",
    )
