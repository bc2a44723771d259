"""When masks are renewed, and what they are before the first time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_number
from jaxprune.selection import known
from jaxprune.sharding import like
from jaxprune.training.landing import is_placeholder
from jaxprune.typing import Masks, Params, PatternFn, Schedule

_LAST_STEP = np.iinfo(np.int32).max  # Optax's counters stop here.


def scheduled(sparsity: float | Schedule, step: Any) -> Any:
    """The sparsity at a step; a number is a constant schedule."""
    return sparsity(step) if callable(sparsity) else sparsity


def final(sparsity: float | Schedule) -> Any:
    """The sparsity at the end of all schedules, known even under jit."""
    return _at(sparsity, _LAST_STEP)


def _at(sparsity: float | Schedule, step: Any) -> Any:
    with jax.ensure_compile_time_eval():
        return scheduled(sparsity, step)


def check_schedule(sparsity: float | Schedule) -> None:
    """Raises ValueError unless the schedule, as far as it is known, ends and begins in [0, 1]."""
    for where, step, rounding in (("ends", _LAST_STEP, 0.0), ("begins", 0, 1e-6)):
        value = _at(sparsity, step)
        if not known(value):
            continue  # a hyperparameter of the step, such as optax.inject_hyperparams makes
        if is_number(value) and -rounding <= float(value) <= 1 + rounding:
            continue
        raise ValueError(
            f"sparsity {where} at {value}; wanted the fraction of entries to remove, a number in "
            "[0, 1], or a schedule of it that stays there, such as "
            "jp.schedules.cubic(0, 0.9, begin=0, end=1000)"
        )


def check_number(name: str, sparsity: Any) -> None:
    """Raises ValueError for a schedule, where masks of one sparsity are made."""
    if callable(sparsity):
        raise ValueError(
            f"{name} makes masks of one sparsity, and is given a schedule; pass a number such as "
            "0.9, or write jp.prune(inner, jp.magnitude, schedule)"
        )
    check_schedule(sparsity)


def check_every(every: Any) -> None:
    """Raises ValueError unless ``every`` is a whole number of steps, known before tracing."""
    if not (isinstance(every, int | np.integer) and every >= 1):
        raise ValueError(
            f"every is {every}; wanted the number of steps between two renewals of the masks, an "
            "integer >= 1 (optax.inject_hyperparams needs it in static_args)"
        )


def all_kept(pattern: PatternFn, params: Params, sparsity: float | Schedule) -> Masks:
    """Masks of the shapes that ``pattern`` gives, everything kept; computes no score.

    A score may need evidence that ``init`` doesn't have, and a state may never change its shapes.
    The pattern is asked for the schedule's last sparsity: one that it can't express fails here.
    """
    if is_placeholder(params):
        return params
    shapes = jax.eval_shape(lambda scores: pattern(scores, final(sparsity)), _abstract(params))
    return jax.tree.map(lambda p, m: like(jnp.ones(m.shape, bool), p), params, shapes)


def strong(masks: Masks) -> Masks:
    """Masks whose type is no longer weak, as that of comparisons with Python numbers is.

    A state whose types change from one step to the next is compiled for again.
    """
    return jax.tree.map(lambda mask: jnp.asarray(mask, bool), masks)


def _abstract(params: Params) -> Params:
    """Shapes and types alone: how params are sharded is no matter here."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)


def is_due(
    sparsity: float | Schedule, count: jax.Array, last: jax.Array, every: int | jax.Array
) -> jax.Array:
    """Are the masks to be renewed at this step?

    Every ``every`` steps, and in between as soon as the schedule stands where it will stand at the
    next renewal and that isn't what the masks have (``last``). So a schedule reaches its target at
    its end step, whatever ``every`` is, at the price of at most one more renewal in between.
    """
    regular = count % every == 0
    if not callable(sparsity):
        return regular  # a number; or a hyperparameter, whose future isn't known
    now, then = (_value(sparsity, step) for step in (count, _following(count, every)))
    return regular | ((now == then) & (now != last))


def renewal_of(
    sparsity: float | Schedule, count: jax.Array, last: jax.Array, every: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Are masks to be renewed at this step, which land params on them, and for what sparsity?

    As :func:`is_due` says, for the sparsity of the step. Only where a ramp comes to rest at the
    next step its last masks are made now, so that after ``end`` updates params have the sparsity of
    step ``end``. A ramp moves over this step, too, in one direction: a jump isn't one.
    """
    now = _value(sparsity, count)
    if not callable(sparsity):
        return count % every == 0, now
    before, after, later = (
        _value(sparsity, step) for step in (jnp.maximum(count - 1, 0), count + 1, count + 2)
    )
    rests = (after == later) & (after == _value(sparsity, _following(count, every)))
    moves_on = (before != now) & (now != after) & ((before < now) == (now < after))
    arrives = moves_on & rests
    due = is_due(sparsity, count, last, every) | (arrives & (after != last))
    return due, jnp.where(arrives, after, now)


def _value(sparsity: float | Schedule, step: Any) -> jax.Array:
    return jnp.asarray(scheduled(sparsity, step), jnp.float32)


def _following(count: jax.Array, every: int | jax.Array) -> jax.Array:
    """The next step after this one that is a multiple of ``every``."""
    return (count // every + 1) * every
