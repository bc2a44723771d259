"""Channels: slices along one axis of each leaf on its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jaxprune.distributions import Rule, uniform
from jaxprune.patterns._factory import factory
from jaxprune.patterns._units import check_axis, mean_score, of_units
from jaxprune.patterns.choose import is_kernel
from jaxprune.typing import Distribution, Masks, Pattern, Scores, Where


@factory("jp.channel()")
def channel(
    axis: int = -1,
    distribution: Distribution | Mapping[str, Rule] = uniform,
    *,
    where: Where = is_kernel,
) -> Pattern:
    """Returns the pattern that keeps slices along ``axis`` of each leaf, ranked by mean score.

    Each leaf is cut on its own: nothing is removed from biases, normalisations and consumers, and
    an output layer loses logits. A UserWarning says so on each use. For whole networks there is
    ``jp.structured``.

    Returns:
      ``(scores, sparsity) -> masks`` of shape (1, ..., size, ..., 1). Sparsity and distribution
      count channels.

    Example:
      >>> import warnings, jax.numpy as jnp, jaxprune as jp
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     jp.channel()({"w": jnp.array([[1.0, 4.0]])}, 0.5)["w"].astype(int)
      Array([[0, 1]], dtype=int32)
    """

    def pool(path: str, scores: jax.Array) -> jax.Array:
        check_axis(f"channel({axis})", path, scores, axis)
        return mean_score(scores, tuple(i for i in range(scores.ndim) if i != axis % scores.ndim))

    def spread(kept: jax.Array, leaf: tuple[int, ...]) -> jax.Array:
        return kept.reshape([-1 if i == axis % len(leaf) else 1 for i in range(len(leaf))])

    units = of_units(distribution, where, pool, spread)

    def masks(scores: Scores, sparsity: Any) -> Masks:
        warnings.warn(
            f"channel({axis}) cuts each leaf on its own: biases, normalisations and consumers stay "
            "uncoupled, and an output layer loses logits; write jp.structured("
            "jp.infer_structure(fn, params, x)) to cut whole units of a network",
            stacklevel=3,
        )
        return units(scores, sparsity)

    return Pattern(masks, f"jp.channel({axis})", where)
