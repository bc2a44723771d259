"""The core of methods that keep all weights and compute with masked ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import as_pattern
from jaxprune.training.core import (
    MaskState,
    as_transform,
    check_renewed,
    check_score,
    first_masks,
    laid_out_as,
)
from jaxprune.training.landing import check_update, where_kept
from jaxprune.training.renewal import (
    check_every,
    check_schedule,
    is_due,
    scheduled,
)
from jaxprune.typing import Masks, Params, PatternFn, Schedule, ScoreFn

Chosen = tuple[Masks, Any]  # masks for the next forward pass, and the method's memory


def no_memory(params: Params, masks: Masks) -> Any:
    """The memory of a method that has none."""
    return ()


def same_gradient(params: Params, grad: Any, state: MaskState) -> Any:
    """The gradient as it arrives."""
    return grad


def same_memory(params: Params, grad: Any, state: MaskState) -> Any:
    """The memory as it is."""
    return state.memory


def every_entry(masks: Masks, memory: Any) -> Masks | None:
    """All entries are trained."""
    return None


def dense_method(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    choose: Callable[..., Chosen],
    *,
    pattern: PatternFn,
    start: ScoreFn,
    every: int = 1,
    memory: Callable[[Params, Masks], Any] = no_memory,
    gradient: Callable[[Params, Any, MaskState], Any] = same_gradient,
    remember: Callable[[Params, Any, MaskState], Any] = same_memory,
    trained: Callable[[Masks, Any], Masks | None] = every_entry,
    name: str = "this method",
) -> optax.GradientTransformationExtraArgs:
    """Returns a method whose stored params stay dense: masks apply in the forward pass only.

    ``update`` takes the gradient at ``jp.training.forward_params(params, state)``. Masks are chosen
    *after* the step, from the params that it leads to, so that those in the state always belong to
    the next forward pass. It must be the last transformation that changes updates.

    Args:
      inner: any optax transformation.
      sparsity: a number or a schedule; at step t the forward pass has ``sparsity(t)``.
      choose: ``(params, masks, memory, sparsity, **evidence) -> (masks, memory)``, where masks are
        due; the evidence is ``grad``, ``step`` and the extra arguments of ``update``.
      pattern: the pattern of the first masks.
      start: the score of the first masks.
      every: steps between two choices.
      memory: ``(params, masks) ->`` what the method remembers, at first.
      gradient: ``(params, grad, state) -> grad``, the gradient that the inner optimizer gets.
      remember: ``(params, grad, state) ->`` the memory after this step.
      trained: ``(masks, memory) ->`` masks of the entries that a step may change; None for all.
      name: for messages.

    Raises:
      ValueError, TypeError: see :func:`jp.prune`.

    Example:
      Straight-through pruning whose masks follow a running mean of magnitudes:

      >>> import jax, jax.numpy as jnp, jaxprune as jp, optax
      >>> def choose(params, masks, memory, sparsity, **evidence):
      ...     mean = jax.tree.map(lambda m, w: 0.9 * m + 0.1 * jnp.abs(w), memory, params)
      ...     return jp.unstructured()(mean, sparsity), mean
      >>> tx = jp.training.dense_method(
      ...     optax.sgd(0.1), 0.75, choose, pattern=jp.unstructured(), start=jp.magnitude,
      ...     memory=lambda params, masks: jp.magnitude(params),
      ... )
      >>> state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> int(state.masks["kernel"].sum())
      4
    """
    check_score(start)
    check_every(every)
    check_schedule(sparsity)
    made = _DenseMethod(
        as_transform(inner), sparsity, choose, as_pattern(pattern), start, every, memory, gradient,
        remember, trained, name,
    )  # fmt: skip
    return optax.GradientTransformationExtraArgs(made.init, made.update)


@dataclass(frozen=True)
class _DenseMethod:
    """What :func:`dense_method` was given, checked, and what it does at each step."""

    inner: optax.GradientTransformationExtraArgs
    sparsity: float | Schedule
    choose: Callable[..., Chosen]
    pattern: PatternFn
    start: ScoreFn
    every: int
    memory: Callable[[Params, Masks], Any]
    gradient: Callable[[Params, Any, MaskState], Any]
    remember: Callable[[Params, Any, MaskState], Any]
    trained: Callable[[Masks, Any], Masks | None]
    name: str

    def init(self, params: Any) -> MaskState:
        masks = first_masks(self.start, self.pattern, params, self.sparsity)
        return MaskState(
            count=jnp.zeros((), jnp.int32),
            sparsity=jnp.asarray(scheduled(self.sparsity, 0), jnp.float32),
            masks=masks,
            memory=self.memory(params, masks),
            inner_state=self.inner.init(params),
        )

    def update(
        self, updates: Any, state: MaskState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MaskState]:
        check_update(self.name, updates, params, state)
        raw, remembered = updates, self.remember(params, updates, state)
        updates = self.gradient(params, updates, state)
        updates, inner_state = self.inner.update(updates, state.inner_state, params, **extra_args)
        free = self.trained(state.masks, state.memory)
        updates = updates if free is None else where_kept(free, updates)

        # Not in the branch, which would have to be given updates: a step that applies them has this
        # sum anyway, and then never stores them.
        after = optax.apply_updates(params, updates)
        count = optax.safe_increment(state.count)
        evidence = {"grad": raw, "step": count, **extra_args}
        state = state._replace(count=count, memory=remembered, inner_state=inner_state)
        return updates, self.chosen(after, state, evidence)

    def chosen(self, after: Params, state: MaskState, evidence: dict[str, Any]) -> MaskState:
        """The state with masks and memory for the next forward pass."""
        old = (state.masks, state.memory, state.sparsity)

        def new(now: jax.Array) -> tuple[Masks, Any, jax.Array]:
            masks, memory = self.choose(after, state.masks, state.memory, now, **evidence)
            check_renewed(masks, state.masks)
            return (*laid_out_as((masks, memory), old[:2]), now)

        now = jnp.asarray(scheduled(self.sparsity, state.count), jnp.float32)
        time = is_due(self.sparsity, state.count, state.sparsity, self.every)
        masks, memory, made_for = jax.lax.cond(time, new, lambda now: old, now)
        return state._replace(masks=masks, memory=memory, sparsity=made_for)
