"""Schedules: step -> sparsity, optax's own type. What optax has is taken from there."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxprune.types import Schedule


def polynomial(init: float, final: float, *, begin: int, end: int, power: float = 3.0) -> Schedule:
    r""":math:`s_t = s_f + (s_i - s_f) (1 - (t - b)/(e - b))^p`, constant outside [begin, end].

    Raises:
      ValueError: for end <= begin, or sparsities outside [0, 1].

    References:
      Zhu and Gupta, [To prune, or not to prune](https://arxiv.org/abs/1710.01878), 2017, eq. 1.

    Example:
      >>> schedule = polynomial(0.0, 0.8, begin=0, end=10)
      >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 20)]
      [0.0, 0.7, 0.8, 0.8]
    """
    if end <= begin:
        raise ValueError(
            f"the schedule ends at {end}, before it begins at {begin}; wanted end > begin"
        )
    for name, value in (("init", init), ("final", final)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} sparsity is {value}; wanted a fraction in [0, 1]")
    ramp = optax.polynomial_schedule(init, final, power, end - begin, begin)

    def schedule(step: Any) -> Any:
        return jnp.where(step >= end, jnp.float32(final), jnp.asarray(ramp(step), jnp.float32))

    return schedule


def cubic(init: float, final: float, *, begin: int, end: int) -> Schedule:
    """The gradual schedule of Zhu and Gupta, 2017: :func:`polynomial` of power 3.

    Example:
      >>> float(cubic(0.0, 0.5, begin=2, end=4)(4))
      0.5
    """
    return polynomial(init, final, begin=begin, end=end, power=3.0)


def one_shot(final: float, *, at: int) -> Schedule:
    """Zero before step ``at``, ``final`` from then on.

    Raises:
      ValueError: for a sparsity outside [0, 1].

    Example:
      >>> [float(one_shot(0.5, at=3)(t)) for t in (2, 3)]
      [0.0, 0.5]
    """
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"final sparsity is {final}; wanted a fraction in [0, 1]")
    return lambda step: jnp.where(step >= at, jnp.float32(final), jnp.float32(0.0))


constant = optax.constant_schedule
