"""Pruning along a schedule, wrapped around any optax transform."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.patterns import unstructured
from jaxprune.training.sparse_params import land_on_masked, require_params
from jaxprune.types import Masks, Params, Pattern, Schedule, ScoreFn, path_str


class PruneState(NamedTuple):
    """State of :func:`prune`."""

    count: jax.Array  # int32 scalar: updates done
    sparsity: jax.Array  # float32 scalar: what the masks were made for
    masks: Masks  # bool, in the pattern's own shapes
    inner_state: Any  # the wrapped transform's


def prune(
    inner: optax.GradientTransformation,
    score: ScoreFn,
    sparsity: float | Schedule,
    *,
    pattern: Pattern | None = None,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax transform so that training prunes: one line, no hooks.

    Masks are made anew when the step is a multiple of ``every`` and the scheduled sparsity has
    changed, and once more when the schedule has come to rest, so that its end is always reached.
    What is pruned stays pruned while the sparsity does not fall: pruned entries rank last. After
    each ``optax.apply_updates`` pruned entries are bitwise zero.

    Args:
      inner: the optimizer; extra arguments of ``update`` reach it and the score.
      score: ``(params, *, grad=, step=, ...) -> scores``; grad is the raw gradient.
      sparsity: a fraction in [0, 1], or a schedule step -> fraction.
      pattern: ``(scores, sparsity) -> masks``; default ``jp.unstructured()``.
      every: steps between mask updates.

    Returns:
      A transform whose state holds ``masks`` (``optax.tree_utils.tree_get(state, "masks")``).

    Raises:
      ValueError: for every < 1, a sparsity outside [0, 1], params=None, scores of another
        structure than params.

    References:
      Zhu and Gupta, [To prune, or not to prune](https://arxiv.org/abs/1710.01878), 2017.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> tx = jp.prune(optax.sgd(0.1), jp.magnitude, 0.5)
      >>> params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> updates, state = tx.update({"w": jnp.ones((1, 4))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"]
      Array([[0. , 0. , 2.9, 3.9]], dtype=float32)
    """
    if every < 1:
        raise ValueError(f"every is {every}; wanted a number of steps >= 1")
    if not callable(sparsity) and not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is {sparsity}; wanted a fraction in [0, 1] such as 0.9")
    pattern = unstructured() if pattern is None else pattern
    schedule = sparsity if callable(sparsity) else optax.constant_schedule(sparsity)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> PruneState:
        shapes = jax.eval_shape(lambda p: pattern(jax.tree.map(_as_score, p), 0.0), params)
        masks = jax.tree.map(lambda s: jnp.ones(s.shape, bool), shapes)
        return PruneState(jnp.int32(0), jnp.float32(0), masks, wrapped.init(params))

    def update_fn(updates: Any, state: PruneState, params: Any = None, **extra: Any) -> Any:
        require_params(params, "prune")
        now = jnp.asarray(schedule(state.count), jnp.float32)
        rest = now == jnp.asarray(schedule(state.count + every), jnp.float32)
        due = (now != state.sparsity) & ((state.count % every == 0) | rest)

        def remake() -> Masks:
            evidence = {**extra, "grad": updates, "step": state.count}
            scores = score(params, **evidence)
            _check_scores(scores, params)
            falls = now < state.sparsity
            return pattern(jax.tree.map(lambda s, m: _last(s, m | falls), scores, state.masks), now)

        masks = jax.lax.cond(due, remake, lambda: state.masks)
        new, inner_state = wrapped.update(updates, state.inner_state, params, **extra)
        made = jnp.where(due, now, state.sparsity)
        new_state = PruneState(state.count + 1, made, masks, inner_state)
        return land_on_masked(new, params, masks), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_score(p: Any) -> Any:
    return p


def _last(score: Any, mask: Any) -> Any:
    """Pruned entries rank below all others."""
    if not jnp.issubdtype(score.dtype, jnp.floating):
        return score
    return jnp.where(mask, score, -jnp.inf)


def _check_scores(scores: Any, params: Params) -> None:
    want, got = jax.tree.structure(params), jax.tree.structure(scores)
    if want != got:
        raise ValueError(
            f"the score function gave a tree of structure {got}, params have {want}; return one "
            "array per leaf, for example jax.tree.map(jnp.abs, params)"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(scores), strict=True)
    for (path, p), s in pairs:
        if np.shape(p) != np.shape(s):
            raise ValueError(
                f"the score of {path_str(path)} has shape {np.shape(s)}, its leaf {np.shape(p)}; "
                "wanted one score per entry"
            )
