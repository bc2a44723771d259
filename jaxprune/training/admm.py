"""ADMM: training towards the nearest sparse network, with a price that grows until it is there."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import unstructured
from jaxprune.scores.weights import magnitude
from jaxprune.training.core import MaskState, scored
from jaxprune.training.dense import Chosen, dense_method
from jaxprune.training.landing import is_placeholder, where_kept
from jaxprune.training.renewal import scheduled
from jaxprune.training.straight_through import check_rate
from jaxprune.types import Masks, Params, Pattern, Schedule, ScoreFn

_UNSTRUCTURED = unstructured()


class AdmmMemory(NamedTuple):
    """The memory of :func:`admm`; both float32 and shaped like params."""

    sparse: Params  # Z, the sparse network that params are drawn to
    dual: Params  # U, the sum of what has been missing so far


def admm(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    rho: float | Schedule = 1e-3,
    every: int = 32,
    score: ScoreFn = magnitude,
    pattern: Pattern = _UNSTRUCTURED,
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
      score: of w + u; sees the gradient as ``grad``.
      pattern: ``(scores, sparsity) -> masks``.

    Returns:
      An optax transformation with :class:`jp.training.MaskState`: ``masks`` are those of z,
      ``memory`` is :class:`AdmmMemory`.

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

    def memory(params: Params, masks: Masks) -> AdmmMemory:
        if is_placeholder(params):
            return AdmmMemory(params, params)
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        return AdmmMemory(where_kept(masks, wide), jax.tree.map(jnp.zeros_like, wide))

    def gradient(params: Params, grad: Any, state: MaskState) -> Any:
        price = jnp.asarray(scheduled(rho, state.count), jnp.float32)

        def leaf(g: Any, w: Any, z: Any, u: Any, mask: Any) -> jax.Array:
            pull = price * (w.astype(jnp.float32) - z + u)
            return g if mask.ndim == 0 else g + pull.astype(g.dtype)

        return jax.tree.map(leaf, grad, params, *state.memory, state.masks)

    def choose(params: Any, masks: Masks, memory: Any, now: Any, **evidence: Any) -> Chosen:
        total = jax.tree.map(lambda w, u: w.astype(jnp.float32) + u, params, memory.dual)
        masks = pattern(scored(score, total, evidence), now)
        sparse = where_kept(masks, total)
        return masks, AdmmMemory(sparse, jax.tree.map(jnp.subtract, total, sparse))

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
