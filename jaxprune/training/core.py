"""The common core: a training method is the function that renews its masks, and settings.

Two kinds of methods differ in what params hold between steps. Those built by :func:`method` land
on masked parameters: a pruned entry *is* 0. Those built by
:func:`jaxprune.training.dense.dense_method` keep all weights, and the network computes
with :func:`forward_params`. Both have one state, :class:`MaskState`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.masks import check_masks, check_structure
from jaxprune.patterns import as_pattern
from jaxprune.sharding import layout, like, put
from jaxprune.training.landing import (
    all_pruned,
    check_finite,
    check_like,
    check_update,
    is_placeholder,
    land_on_masked,
    where_kept,
)
from jaxprune.training.moments import check_moments, forget_pruned
from jaxprune.training.renewal import (
    all_kept,
    check_every,
    check_schedule,
    renewal_of,
    scheduled,
    strong,
)
from jaxprune.training.wrappers import warn_of_wrappers
from jaxprune.typing import Masks, Params, PatternFn, Schedule, ScoreFn, Scores, path_str

Renew = Callable[..., Masks]  # (params, masks, sparsity, **evidence) -> masks
Due = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (step, sparsity, last) -> bool
Moments = Literal["reset", "inherit"]

NOTHING = optax.identity()  # A method without a memory has this one.


class MaskState(NamedTuple):
    """State of every training method."""

    count: jax.Array  # type: ignore[assignment] # int32, shape (): updates so far
    sparsity: jax.Array  # float32, shape (): the scheduled one that the masks were made for
    masks: Masks  # bool, True = kept, in params' structure; shapes as the pattern makes them
    memory: Any  # what the method itself remembers; () for most
    inner_state: optax.OptState  # of the wrapped transformation


def method(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    renew: Renew,
    *,
    pattern: PatternFn,
    start: ScoreFn | None = None,
    every: int = 1,
    due: Due | None = None,
    moments: Moments = "reset",
    memory: optax.GradientTransformation = NOTHING,
    name: str = "this method",
) -> optax.GradientTransformationExtraArgs:
    r"""Returns a training method: an optimizer whose updates land on masked parameters.

    At a step where masks are renewed ``renew`` is given params as they are *before* the step; its
    masks hold for this step already. Then the inner update :math:`u_t` is rewritten so that
    ``optax.apply_updates`` gives, bitwise,

    .. math:: p_{t+1} = m_t \odot (p_t + u_t)

    Args:
      inner: any optax transformation; extra arguments of ``update`` are forwarded to it.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule ``step -> sparsity``.
      renew: ``(params, masks, sparsity, **evidence) -> masks`` of the shapes that ``pattern``
        makes. The evidence is ``grad`` (the updates as they arrive), ``step``, ``last`` (the
        sparsity that the masks were made for), ``memory`` and the extra arguments of ``update``,
        which win. :func:`jp.training.drop` and :func:`jp.training.grow` are its usual parts.
      pattern: which entries live and die together.
      start: None: everything is kept until the first renewal, at step 0. A score: ``init`` makes
        the first masks with it, and the first renewal is at step ``every``.
      every: steps between two renewals of the masks.
      due: ``(step, sparsity, last) -> bool``, in place of ``every``.
      moments: "reset": the inner optimizer sees no gradient of pruned entries and forgets what it
        has accumulated for them, so that they come back with moments of 0. "inherit": it always
        sees the whole gradient, and an entry comes back with the moments that it would have.
      memory: a transformation that sees all gradients, such as ``optax.ema(0.9)``; what it makes of
        them is the evidence ``memory``.
      name: for messages.

    Raises:
      ValueError, TypeError: see :func:`jp.prune`.

    Example:
      A method that starts from random masks and, every tenth step, replaces 30 % of what it keeps:

      >>> import functools, jax, jax.numpy as jnp, jaxprune as jp, optax
      >>> random = functools.partial(jp.random, key=jax.random.key(0))
      >>> pattern = jp.unstructured()
      >>> def renew(params, masks, sparsity, *, grad, **evidence):
      ...     kept = jp.training.drop(jp.magnitude(params), masks, sparsity, 0.3, pattern)
      ...     return jp.training.grow(jp.magnitude(grad), kept, sparsity, pattern)
      >>> tx = jp.training.method(
      ...     optax.adam(1e-3), 0.75, renew, pattern=pattern, start=random, every=10
      ... )
      >>> state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> int(optax.tree_utils.tree_get(state, "masks")["kernel"].sum())
      4
    """
    check_every(every)
    check_schedule(sparsity)
    check_moments(moments)
    made = _Method(
        as_transform(inner), sparsity, renew, as_pattern(pattern), start, every, due, moments,
        optax.with_extra_args_support(memory), name,
    )  # fmt: skip
    return optax.GradientTransformationExtraArgs(made.init, made.update)


@dataclass(frozen=True)
class _Method:
    """What :func:`method` was given, checked, and what it does at the start and at each step."""

    inner: optax.GradientTransformationExtraArgs
    sparsity: float | Schedule
    renew: Renew
    pattern: PatternFn
    start: ScoreFn | None
    every: int
    due: Due | None
    moments: Moments
    memory: optax.GradientTransformationExtraArgs
    name: str

    def init(self, params: Any) -> MaskState:
        masks = first_masks(self.start, self.pattern, params, self.sparsity)
        inner_state = self.inner.init(params)
        if not is_placeholder(params):
            check_finite(self.name, params, all_pruned(masks))
            warn_of_wrappers(self.name, inner_state)
        return MaskState(
            count=jnp.zeros((), jnp.int32),
            sparsity=jnp.asarray(scheduled(self.sparsity, 0) if self.start else 0, jnp.float32),
            masks=masks,
            memory=self.memory.init(params),
            inner_state=inner_state,
        )

    def update(
        self, updates: Any, state: MaskState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MaskState]:
        check_update(self.name, updates, params, state)
        signal, remembered = self.memory.update(updates, state.memory, params, **extra_args)
        evidence = {"grad": updates, "memory": signal, **extra_args}
        masks, made_for = self.renewed(params, state, evidence)
        inner_state = state.inner_state
        if self.moments == "reset":
            # Before the step, so that no moment is stored with and without what is forgotten.
            always = jax.tree.map(jnp.logical_and, state.masks, masks)
            inner_state = forget_pruned(self.inner, inner_state, always)
            updates = where_kept(masks, updates)
        updates, inner_state = self.inner.update(updates, inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        state = MaskState(count, made_for, masks, remembered, inner_state)
        return land_on_masked(updates, params, masks), state

    def renewed(
        self, params: Params, state: MaskState, evidence: dict[str, Any]
    ) -> tuple[Masks, jax.Array]:
        """The masks of this step, and the sparsity that they were made for."""
        step, last, old = state.count, state.sparsity, state.masks

        def new(now: jax.Array) -> tuple[Masks, jax.Array]:
            masks = self.renew(params, old, now, **{"step": step, "last": last} | evidence)
            check_renewed(masks, old)
            return laid_out_as(masks, old), now

        time, now = self.renewal(step, last)
        return jax.lax.cond(time, new, lambda now: (old, last), now)

    def renewal(self, step: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Is it time, and the sparsity of the masks that are then made."""
        if self.due is not None:
            now = jnp.asarray(scheduled(self.sparsity, step), jnp.float32)
            return self.due(step, now, last), now
        time, now = renewal_of(self.sparsity, step, last, self.every)
        return time & (step >= (1 if self.start else 0)), now


def first_masks(
    start: ScoreFn | None, pattern: PatternFn, params: Params, sparsity: float | Schedule
) -> Masks:
    """The masks before step 0, sharded as params are."""
    # Asks the pattern for the schedule's end.
    masks = all_kept(pattern, params, sparsity)
    if start is None or is_placeholder(params):
        return masks
    scores = _first_scores(start, params)
    return jax.tree.map(like, strong(pattern(scores, scheduled(sparsity, 0))), params)


def _first_scores(start: ScoreFn, params: Params) -> Scores:
    try:
        return scored(start, params, {"step": jnp.zeros((), jnp.int32)})
    except TypeError as error:
        raise TypeError(
            f"init makes the first masks and has params alone, so the score failed: {error}; bind "
            "its evidence: functools.partial(jp.saliency, grad=jax.grad(loss)(params))"
        ) from error


def laid_out_as(new: Any, old: Any) -> Any:
    """A renewed state with the types of the old one, in which Explicit axes say how arrays lie."""

    def leaf(x: Any, before: Any) -> Any:
        found = layout(before)
        return x if found is None else put(x, found)

    return jax.tree.map(leaf, new, old)


def check_score(score: Any) -> None:
    """Raises TypeError unless a score is a function."""
    if not callable(score):
        raise TypeError(
            f"score is a {type(score).__name__}; wanted a function (params, **evidence) -> scores "
            "such as jp.magnitude"
        )


def scored(score: ScoreFn, params: Params, evidence: dict[str, Any]) -> Scores:
    """The scores at a renewal, checked; a method's own memory is no evidence for them."""
    evidence = {name: value for name, value in evidence.items() if name not in ("last", "memory")}
    scores = score(params, **evidence)
    check_like("scores", scores, params, "return a score for each entry of each leaf")
    return scores


def check_renewed(masks: Masks, old: Masks) -> None:
    """Raises ValueError unless new masks have the shapes of those in the state."""
    check_structure("new masks", masks, old, "make them with the pattern of the method")
    flat = jax.tree_util.tree_leaves_with_path(masks)
    for (path, mask), before in zip(flat, jax.tree.leaves(old), strict=True):
        if jnp.shape(mask) != jnp.shape(before):
            raise ValueError(
                f"the new mask of {path_str(path)} has the shape {jnp.shape(mask)}, that in the "
                f"state {jnp.shape(before)}; make new masks with the pattern of the method, for a "
                "state never changes its shapes"
            )
    check_masks(old, masks)


def as_transform(inner: Any) -> optax.GradientTransformationExtraArgs:
    """``inner`` with extra arguments; ``optax.MultiSteps`` has them, but isn't of the type."""
    if isinstance(inner, optax.MultiSteps):
        return optax.GradientTransformationExtraArgs(inner.init, inner.update)
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner is a {type(inner).__name__}; wanted an optax transformation such as "
            "optax.adam(1e-3)"
        )
    return optax.with_extra_args_support(inner)
