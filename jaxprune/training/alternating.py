"""Alternating sparse and dense phases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import UNSTRUCTURED
from jaxprune.scores.weights import magnitude
from jaxprune.training.core import Moments, check_score, method, scored
from jaxprune.training.renewal import check_number
from jaxprune.typing import Masks, PatternFn, ScoreFn


def ac_dc(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    begin: int,
    end: int,
    sparse_steps: int,
    dense_steps: int,
    score: ScoreFn = magnitude,
    pattern: PatternFn = UNSTRUCTURED,
    moments: Moments = "reset",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer with AC/DC: compressed and decompressed phases take turns.

    Dense until ``begin``; then ``sparse_steps`` on the entries of largest score, then
    ``dense_steps`` on all entries, starting from 0 where they were pruned, and so on; from ``end``
    on sparse for good. Masks are chosen at the first step of each sparse phase.

    Args:
      inner: any optax transformation.
      sparsity: the sparsity of the sparse phases, in [0, 1].
      begin, end: the steps between which phases take turns.
      sparse_steps, dense_steps: the lengths of phases.
      score: sees the gradient of the first step of a phase as ``grad``.
      pattern: ``(scores, sparsity) -> masks``.
      moments: the moments of entries at the begin of dense phases, "reset" or "inherit", see
        :func:`method`.

    Returns:
      An optax transformation whose ``update`` needs ``params``, with
      :class:`jp.training.MaskState`.

    Raises:
      ValueError: unless 0 <= begin < end and phases last at least a step; for a schedule in place
        of a number.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.ac_dc(
      ...     optax.sgd(0.1, momentum=0.9), 0.9, begin=10, end=85, sparse_steps=5, dense_steps=5
      ... )

    References:
      Peste et al., `AC/DC <https://arxiv.org/abs/2106.12379>`__, 2021, algorithm 1. There the last
      dense phase is longer and pruned entries keep no momentum; here phases are equal.
    """
    check_score(score)
    check_number("jp.training.ac_dc", sparsity)
    if sparse_steps < 1 or dense_steps < 1:
        raise ValueError(
            f"sparse_steps is {sparse_steps} and dense_steps {dense_steps}; wanted at least 1 each"
        )
    if not 0 <= begin < end:
        raise ValueError(
            f"phases take turns from step {begin} to {end}; wanted 0 <= begin < end, the steps at "
            "which the first and the last sparse phase begin"
        )

    def phases(step: Any) -> jax.Array:
        place = (step - begin) % (sparse_steps + dense_steps)
        return jnp.where(
            (step >= end) | ((step >= begin) & (place < sparse_steps)), jnp.float32(sparsity), 0
        )

    def renew(params: Any, masks: Masks, now: jax.Array, **evidence: Any) -> Masks:
        return pattern(scored(score, params, evidence), now)

    return method(
        inner,
        phases,
        renew,
        pattern=pattern,
        due=lambda step, now, last: now != last,
        moments=moments,
        name="jp.training.ac_dc",
    )
