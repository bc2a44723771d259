"""Schedules: step -> sparsity, optax's own type. The curves are optax's where it has them.

Each goes from ``init`` at step ``begin`` to ``final`` at step ``end``, both reached exactly, and
holds its values before and after. Training methods make the last masks of such a ramp at step
``end - 1``, so that a training of ``end`` steps, counted from 0, ends at ``final``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._leaf import is_number
from jaxprune.selection import known
from jaxprune.typing import Schedule


def polynomial(init: Any, final: Any, *, begin: int, end: int, power: float = 3) -> Schedule:
    r"""Returns :math:`s_t = s_f + (s_i - s_f) (1 - (t - b) / (e - b))^p`.

    Args:
      init, final: sparsities in [0, 1]; may be traced hyperparameters.
      begin, end: steps.
      power: 1 is linear, 3 the curve of the paper: fast where much is redundant, slow at the end.

    Raises:
      ValueError: for end <= begin, a sparsity outside [0, 1], or power <= 0.

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`__, 2017, eq. 1.

    Example:
      >>> import jaxprune as jp
      >>> schedule = jp.schedules.polynomial(0.0, 0.8, begin=0, end=10)
      >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 20)]
      [0.0, 0.7, 0.8, 0.8]
    """
    if not power > 0:
        raise ValueError(f"power is {power}; wanted a positive number such as 3")
    steps = _steps(begin, end)
    return _between(init, final, begin, end, optax.polynomial_schedule(1.0, 0.0, power, steps))


def cubic(init: Any, final: Any, *, begin: int, end: int) -> Schedule:
    """Returns :func:`polynomial` of power 3, the schedule of gradual magnitude pruning.

    Example:
      >>> import jaxprune as jp
      >>> float(jp.schedules.cubic(0.0, 0.5, begin=2, end=4)(4))
      0.5
    """
    return polynomial(init, final, begin=begin, end=end, power=3)


def linear(init: Any, final: Any, *, begin: int, end: int) -> Schedule:
    """Returns :func:`polynomial` of power 1.

    Example:
      >>> import jaxprune as jp
      >>> schedule = jp.schedules.linear(0.0, 0.8, begin=0, end=4)
      >>> [round(float(schedule(t)), 1) for t in (0, 1, 4)]
      [0.0, 0.2, 0.8]
    """
    return polynomial(init, final, begin=begin, end=end, power=1)


def cosine(init: Any, final: Any, *, begin: int, end: int) -> Schedule:
    """Returns half a cosine from ``init`` to ``final``, level at both ends.

    Example:
      >>> import jaxprune as jp
      >>> schedule = jp.schedules.cosine(0.0, 0.8, begin=0, end=10)
      >>> [round(float(schedule(t)), 3) for t in (0, 5, 10)]
      [0.0, 0.4, 0.8]
    """
    return _between(init, final, begin, end, optax.cosine_decay_schedule(1.0, _steps(begin, end)))


def exponential(init: Any, final: Any, *, begin: int, end: int) -> Schedule:
    """Returns a density that falls by the same factor each step, as iterative rounds do.

    Raises:
      ValueError: for a final sparsity of 1, which no factor reaches.

    References:
      Tanaka et al., `SynFlow <https://arxiv.org/abs/2006.05467>`__, 2020, algorithm 1, for init =
      0.

    Example:
      >>> import jaxprune as jp
      >>> schedule = jp.schedules.exponential(0.0, 0.75, begin=0, end=2)
      >>> [round(float(schedule(t)), 3) for t in (0, 1, 2)]
      [0.0, 0.5, 0.75]
    """
    _steps(begin, end)
    for name, value in (("init", init), ("final", final)):
        _check(name, value)
        if known(value) and value == 1:
            raise ValueError(
                f"exponential: {name} is 1, a density of 0 that no factor reaches; write "
                "jp.schedules.cubic, or a sparsity below 1"
            )

    def schedule(step: Any) -> jax.Array:
        part = _done(step, begin, end) / (end - begin)
        value = 1 - (1 - jnp.float32(init)) ** (1 - part) * (1 - jnp.float32(final)) ** part
        return _at_ends(value, init, final, part)

    return schedule


def rounds(init: Any, final: Any, *, begin: int, every: int, count: int) -> Schedule:
    r"""Returns ``count`` steps down, each to the same fraction of the density before it.

    .. math:: 1 - s_k = (1 - s_i) \left(\frac{1 - s_f}{1 - s_i}\right)^{k / n}

    from step ``begin + (k - 1) every`` on, k = 1, ..., n: the first round prunes at ``begin``, the
    last one at ``begin + (count - 1) every``.

    Args:
      init, final: sparsities in [0, 1); may be traced hyperparameters.
      begin: the step of the first round.
      every: steps from one round to the next.
      count: the number of rounds, n.

    Raises:
      ValueError: for every or count below 1, or a sparsity that :func:`exponential` refuses.

    References:
      Frankle and Carbin, `Lottery Tickets <https://arxiv.org/abs/1803.03635>`__, 2019, section 1:
      p^{1/n} of the weights that are left go in each of n rounds.

    Example:
      >>> import jaxprune as jp
      >>> schedule = jp.schedules.rounds(0.0, 0.75, begin=5, every=10, count=2)
      >>> [round(float(schedule(t)), 3) for t in (4, 5, 14, 15, 99)]
      [0.0, 0.5, 0.5, 0.75, 0.75]
    """
    if not (every >= 1 and count >= 1):
        raise ValueError(
            f"rounds has every={every}, count={count}; wanted at least one step from round to "
            "round, and at least one round"
        )
    curve = exponential(init, final, begin=0, end=count)

    def schedule(step: Any) -> jax.Array:
        # Clipped before it is divided: begin may lie far from the step.
        since = jnp.clip(jnp.asarray(step) - begin, -1, (count - 1) * every)
        return curve(since // every + 1)

    return schedule


def cyclic(schedule: Schedule, *, period: int, count: int, begin: int = 0) -> Schedule:
    """Returns ``count`` repetitions of a schedule, each starting again at the schedule's step 0.

    The last one is not cut off: it goes on, and rests where the schedule rests. Before ``begin``
    the value is that of step 0. It is ``optax.join_schedules`` of copies, at the price of one.

    With ``jp.schedules.cubic`` it is cyclical pruning; with ``jp.schedules.one_shot`` it
    alternates between a dense and a pruned phase, as AC/DC does. Where a schedule falls,
    ``jp.prune`` lets all entries compete again.

    Args:
      schedule: step -> sparsity.
      period: steps of one cycle.
      count: the number of cycles.
      begin: where the first one starts.

    Raises:
      ValueError: for a period or count below 1.

    References:
      Srinivas et al., `Cyclical Pruning <https://arxiv.org/abs/2202.01290>`__, 2022.

    Example:
      >>> import jaxprune as jp
      >>> half = jp.schedules.one_shot(0.5, at=3)
      >>> schedule = jp.schedules.cyclic(half, period=5, count=2)
      >>> [float(schedule(t)) for t in (0, 3, 4, 5, 7, 8, 99)]
      [0.0, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5]
    """
    if not (period >= 1 and count >= 1):
        raise ValueError(
            f"cyclic has period={period}, count={count}; wanted at least one step a cycle, and at "
            "least one cycle"
        )

    def repeated(step: Any) -> jax.Array:
        since = jnp.maximum(jnp.asarray(step) - begin, 0)
        return schedule(since - period * jnp.minimum(since // period, count - 1))

    return repeated


def one_shot(final: Any, *, at: int) -> Schedule:
    """Returns zero before step ``at`` and ``final`` from then on.

    Raises:
      ValueError: for a sparsity outside [0, 1].

    Example:
      >>> import jaxprune as jp
      >>> [float(jp.schedules.one_shot(0.5, at=3)(t)) for t in (2, 3)]
      [0.0, 0.5]
    """
    _check("final", final)
    return lambda step: jnp.where(jnp.asarray(step) >= at, jnp.float32(final), 0.0)


def constant(sparsity: Any) -> Schedule:
    """Returns ``sparsity`` at every step; what ``jp.prune`` makes of a number.

    Raises:
      ValueError: for a sparsity outside [0, 1].

    Example:
      >>> import jaxprune as jp
      >>> float(jp.schedules.constant(0.5)(7))
      0.5
    """
    _check("sparsity", sparsity)
    return lambda step: jnp.full(jnp.shape(step), sparsity, jnp.float32)


def _between(init: Any, final: Any, begin: int, end: int, weight: Schedule) -> Schedule:
    """From init to final as ``weight`` falls from 1 to 0 over the steps since ``begin``."""
    _check("init", init)
    _check("final", final)

    def schedule(step: Any) -> jax.Array:
        done = _done(step, begin, end)
        w = jnp.asarray(weight(done), jnp.float32)
        value = jnp.float32(init) * w + jnp.float32(final) * (1 - w)
        return _at_ends(value, init, final, done / (end - begin))

    return schedule


def _done(step: Any, begin: int, end: int) -> jax.Array:
    """Steps since ``begin``, within the ramp; a float32, which any step counter promotes to."""
    return jnp.clip(jnp.asarray(step) - begin, 0, end - begin).astype(jnp.float32)


def _at_ends(value: jax.Array, init: Any, final: Any, part: Any) -> jax.Array:
    """Exactly init and final at the ends, whatever the curve rounds to there."""
    value = jnp.where(part >= 1, jnp.float32(final), value)
    return jnp.where(part <= 0, jnp.float32(init), value)


def _steps(begin: Any, end: Any) -> int:
    if not end > begin:
        raise ValueError(
            f"the schedule begins at step {begin} and ends at {end}; wanted end > begin, or write "
            "jp.schedules.one_shot(final, at=step)"
        )
    return end - begin


def _check(name: str, value: Any) -> None:
    if not is_number(value) or (known(value) and not 0 <= float(value) <= 1):
        raise ValueError(f"{name} is {value!r}; wanted a sparsity in [0, 1] such as 0.9")
