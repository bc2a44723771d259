"""Masks in many small rounds, before or without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._leaf import is_float
from jaxprune.masks import apply_masks
from jaxprune.typing import Masks, Params, PatternFn, ScoreFn


def in_rounds(score: ScoreFn, pattern: PatternFn, *, rounds: int = 100) -> Callable[..., Masks]:
    r"""Returns ``(params, sparsity, **evidence) -> masks``: score, prune a little, score again.

    Round k of n leaves the density :math:`(1 - s)^{k / n}`, and scores the parameters as they are
    pruned then. What is pruned stays pruned. A score that needs a gradient must compute it there,
    since it changes from round to round::

        def score(params, **evidence):
            return jp.saliency(params, grad=jax.grad(loss)(params, *batch))

    Args:
      score: ``(params, **evidence) -> scores``; it is traced, once for all rounds but the first.
      pattern: ``(scores, sparsity) -> masks``.
      rounds: 1 is pruning in one shot.

    Raises:
      ValueError: for fewer than one round.

    References:
      Tanaka et al., `SynFlow <https://arxiv.org/abs/2006.05467>`__, 2020, algorithm 1, with n =
      100; for SNIP and GraSP: de Jorge et al., [Progressive Skeletonization](
      https://arxiv.org/abs/2006.09081), 2021, whose FORCE lets entries come back; here they don't.

    Example:
      >>> import functools, jax.numpy as jnp, jaxprune as jp
      >>> fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> params = {"up": jnp.array([[9.0, 2.0]]), "down": jnp.array([[1.0], [5.0]])}
      >>> flow = functools.partial(jp.scores.synflow, fn=fn, args=(jnp.ones((1, 1)),))
      >>> one_cut = functools.partial(jp.global_threshold, normalize=False, floor=0)
      >>> masks = jp.scores.in_rounds(flow, jp.unstructured(one_cut), rounds=4)(params, 0.5)
      >>> masks["up"].astype(int), masks["down"].ravel().astype(int)
      (Array([[0, 1]], dtype=int32), Array([0, 1], dtype=int32))
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; wanted 1 or more, such as 100")

    def masks(params: Params, sparsity: Any, **evidence: Any) -> Masks:
        def sparsity_at(k: Any) -> jax.Array:
            part = jnp.asarray(k, jnp.float32) / rounds
            target = jnp.asarray(sparsity, jnp.float32)
            return jnp.where(part >= 1, target, 1 - (1 - target) ** part)

        def one(k: Any, masks: Masks) -> Masks:
            scores = score(apply_masks(params, masks), **evidence)
            return pattern(jax.tree.map(_hold, scores, masks), sparsity_at(k + 1))

        first = pattern(score(params, **evidence), sparsity_at(1) if rounds > 1 else sparsity)
        return jax.lax.fori_loop(1, rounds, one, first)

    return masks


def _hold(score: Any, mask: jax.Array) -> Any:
    """Pruned entries rank below all others; a root mean square counts infinities as zeros."""
    return jnp.where(mask, score, -jnp.inf) if is_float(score) else score
