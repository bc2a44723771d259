"""Scores that should do badly: what a method has to beat. The third is :func:`jp.random`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxprune._leaf import widen
from jaxprune.scores.weights import map_floats
from jaxprune.typing import Params, ScoreFn, Scores


def smallest(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`1 / |w|`: keeps the smallest weights, the opposite of :func:`jp.magnitude`.

    Never negative, so that gradual pruning keeps what is pruned at zero. Weights that are 0 score
    infinity.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.smallest({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([0.5, 1. ], dtype=float32)}
    """
    return map_floats(lambda w: 1 / jnp.abs(widen(w)), params)


def inverted(score: ScoreFn) -> ScoreFn:
    """Returns the score that keeps what ``score`` would remove, for one-shot pruning.

    A score that matters must do much better than its inverse. It is negated; in gradual pruning a
    pruned entry, which counts as 0, would come back.

    References:
      Frankle et al., `Missing the Mark <https://arxiv.org/abs/2009.08576>`__, 2021, which inverts
      SNIP, GraSP and SynFlow.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> worst = jp.scores.inverted(jp.magnitude)
      >>> jp.unstructured()(worst({"w": jnp.array([[-2.0, 1.0]])}), 0.5)["w"].astype(int)
      Array([[0, 1]], dtype=int32)
    """

    def negated(params: Params, **evidence: Any) -> Scores:
        return map_floats(jnp.negative, score(params, **evidence))

    return negated
