"""Gradual pruning around any optimizer: masks follow a score and a schedule of sparsity."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxprune.patterns import UNSTRUCTURED
from jaxprune.training.core import check_score, method, scored
from jaxprune.training.landing import hold
from jaxprune.typing import Masks, PatternFn, Schedule, ScoreFn


def prune(
    inner: optax.GradientTransformation,
    score: ScoreFn,
    sparsity: float | Schedule,
    *,
    pattern: PatternFn = UNSTRUCTURED,
    every: int = 1,
    regrow: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that its updates land on parameters pruned to a scheduled sparsity.

    At a step where masks are renewed, params are scored *before* the step; the new masks hold for
    this step already. The inner update is then rewritten so that ``optax.apply_updates`` gives

    .. math:: p_{t+1} = m_t \odot (p_t + u_t)

    bitwise: pruned entries are exactly +0 after every step, kept entries get exactly the inner
    update. Nothing else has to be called, before or after.

    Masks are renewed at the steps 0, ``every``, 2 ``every``, ... counted from 0 as optax counts for
    learning rates, and besides where the schedule comes to rest. A ramp such as
    ``jp.schedules.cubic`` or ``optax.linear_schedule`` makes its last masks at the step before its
    end: after ``end`` updates, counted 0 to ``end - 1``, params have the target sparsity, whatever
    ``every`` is. What jumps, such as ``jp.schedules.one_shot``, prunes at its own step. Only these
    steps cost anything. Under ``jax.vmap`` of ``update`` the choice becomes a select, and each step
    costs a renewal; outside ``jax.jit`` each call compiles the choice anew.

    It may stand in ``optax.chain`` (as the last link that changes updates), ``partition``,
    ``masked``, ``MultiSteps``, ``apply_if_finite`` and ``inject_hyperparams``. Wrappers that undo
    the zeros (docs/wrappers.md) are warned of by ``init``, where they can be recognised; what is to
    be evaluated, saved and served is ``jp.training.masked_params(params, state)``. Gradients reach
    the score as they arrive here: raw when ``prune`` comes first, clipped after a clipping link; a
    ``grad=`` among the extra arguments of ``update`` wins over both.

    A sum cannot bring back a NaN or an infinity. ``init`` refuses *parameters* that are not finite,
    where their values are known (not traced); one that diverges later and is then pruned stays NaN
    (``jp.training.masked_params`` gives 0). A non-finite *update* of a pruned entry does no harm.

    Args:
      inner: any optax transformation; extra arguments of ``update`` are forwarded to it.
      score: ``(params, **evidence) -> scores``, larger = keep. The evidence is ``grad``, ``step``
        and the extra arguments of ``update``; bind other evidence with ``functools.partial``.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule ``step -> sparsity``.
      pattern: ``(scores, sparsity) -> masks``: which entries live and die together.
      every: steps between two renewals of the masks.
      regrow: False: a pruned entry counts as 0 and loses all ties, so that under a score that is
        never negative masks are nested: what is pruned stays pruned while the schedule does not
        fall. True: entries compete at each renewal with the scores that they have then, pruned ones
        (whose value is 0) like the others. Where the schedule falls, they always do.

    Returns:
      An optax transformation whose ``update`` needs ``params``. Its state is
      :class:`jp.training.MaskState`;
      ``optax.tree_utils.tree_get(state, "masks")`` finds the masks wherever it stands. After
      ``init`` everything is kept.

    Raises:
      ValueError: when the schedule begins or ends outside [0, 1], or every is below 1; from
        ``init``, when the pattern prunes nothing or can't express the sparsity, or a leaf that it
        prunes holds NaN or infinity; from ``update``, when params is None, or updates, params,
        scores and state do not belong together.
      TypeError: when inner is no optax transformation, or score or pattern no function; from
        ``update``, for a state that a checkpoint has turned into a dict.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"kernel": jnp.array([[4.0, -3.0], [2.0, -1.0]])}
      >>> tx = jp.prune(optax.sgd(0.5), jp.magnitude, 0.5)
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(grads, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[3.5, -3.5], [0.0, 0.0]]
      >>> optax.tree_utils.tree_get(state, "masks")["kernel"].tolist()
      [[True, True], [False, False]]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`__, 2017, section
      3, for ``jp.magnitude`` along ``jp.schedules.cubic``. There masked weights keep their values
      and may come back; here they are 0.
    """
    check_score(score)

    def renew(params: Any, masks: Masks, now: jax.Array, *, last: Any, **evidence: Any) -> Masks:
        scores = scored(score, params, evidence)
        return pattern(hold(scores, masks, (now >= last) & (not regrow)), now)

    return method(
        inner,
        sparsity,
        renew,
        pattern=pattern,
        every=every,
        moments="inherit",
        name="jp.prune",
    )
