"""When masks are renewed, and what they are before the first time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.training.landing import is_placeholder
from jaxprune.types import Masks, Params, Pattern, Schedule

_LAST_STEP = np.iinfo(np.int32).max  # where optax's counters stop


def as_schedule(sparsity: Any) -> Schedule:
    """A number becomes a constant schedule. Its start and its end are checked to be in [0, 1]."""
    schedule = sparsity if callable(sparsity) else lambda step: sparsity
    for step in (0, _LAST_STEP):
        value = _evaluate(schedule, step)
        if isinstance(value, jax.core.Tracer):
            continue  # a hyperparameter of the step, such as optax.inject_hyperparams makes
        if not (np.shape(value) == () and 0 <= float(value) <= 1):
            at = f" at step {step}" if callable(sparsity) else ""
            raise ValueError(
                f"sparsity is {value}{at}; wanted the fraction of entries to remove, a number in "
                "[0, 1], or a schedule of it that stays there, such as "
                "jp.schedules.cubic(0, 0.9, begin=0, end=1000)"
            )
    return schedule


def _evaluate(schedule: Schedule, step: int) -> Any:
    with jax.ensure_compile_time_eval():
        return schedule(step)


def check_every(every: Any) -> None:
    """Raises ValueError unless ``every`` is a whole number of steps, known before tracing."""
    if not (isinstance(every, int | np.integer) and every >= 1):
        raise ValueError(
            f"every is {every}; wanted the number of steps between two renewals of the masks, an "
            "integer >= 1 (optax.inject_hyperparams needs it in static_args)"
        )


def all_kept(pattern: Pattern, params: Params, schedule: Schedule) -> Masks:
    """Masks of the shapes that ``pattern`` gives, everything kept; computes no score.

    A score may need evidence that ``init`` doesn't have, and a state may never change its shapes.
    The pattern is asked for the schedule's last sparsity: one that it can't express fails here.
    """
    if is_placeholder(params):
        return params
    final = _evaluate(schedule, _LAST_STEP)
    shapes = jax.eval_shape(lambda scores: pattern(scores, final), params)
    return jax.tree.map(lambda p, m: jnp.ones_like(p, bool, m.shape), params, shapes)


def is_due(schedule: Schedule, count: jax.Array, last: jax.Array, every: int) -> jax.Array:
    """Are the masks to be renewed at this step?

    Every ``every`` steps, and in between as soon as the schedule stands where it will stand at the
    next renewal and that isn't what the masks have (``last``). So a schedule reaches its target at
    its end step, whatever ``every`` is, at the price of at most one more renewal in between.
    """
    regular = count % every == 0
    now, then = scheduled(schedule, count), scheduled(schedule, (count // every + 1) * every)
    return regular | ((now == then) & (now != last))


def scheduled(schedule: Schedule, step: jax.Array) -> jax.Array:
    """The schedule's sparsity at a step: float32, shape ()."""
    return jnp.asarray(schedule(step), jnp.float32)
