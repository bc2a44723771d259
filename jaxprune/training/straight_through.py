"""Straight-through training: all weights learn from the gradient of the masked network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import UNSTRUCTURED, n_m
from jaxprune.scores.weights import magnitude
from jaxprune.selection import known
from jaxprune.training.core import MaskState, scored
from jaxprune.training.dense import Chosen, dense_method, same_gradient
from jaxprune.training.landing import is_placeholder
from jaxprune.training.renewal import final, scheduled
from jaxprune.typing import Masks, Params, PatternFn, Schedule, ScoreFn

_TWO_OF_FOUR = n_m(2, 4)


def check_rate(name: str, value: Any) -> None:
    """Raises ValueError for a negative number, as far as it is known."""
    if known(value) and not float(value) >= 0:
        raise ValueError(f"{name} is {value}; wanted a number >= 0")


def ste(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    score: ScoreFn = magnitude,
    every: int = 1,
    pattern: PatternFn = UNSTRUCTURED,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with straight-through pruning: masked forward, dense backward.

    .. math:: w_{t+1} = w_t - \gamma \, \nabla L(m_t \odot w_t), \quad
       m_t = \text{pattern}(\text{score}(w_t), s_t)

    All weights are stored and learn, so that a pruned one may come back with the value that it has
    reached. The loss must be computed at ``jp.training.forward_params(params, state)``, which also
    gives the sparse network in the end.

    Args:
      inner: any optax transformation.
      sparsity: fraction of entries to remove, in [0, 1], or a schedule.
      score: the score of the stored params; ``init`` scores too, with no evidence but ``step``.
      every: steps between two renewals of the masks.
      pattern: ``(scores, sparsity) -> masks``.

    Returns:
      An optax transformation whose ``update`` needs ``params``, with
      :class:`jp.training.MaskState`; its masks belong to the next forward pass.

    Raises:
      ValueError: see :func:`jp.prune`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"kernel": jnp.array([[3.0, 2.0]])}
      >>> tx = jp.training.ste(optax.sgd(1.0), 0.5)
      >>> state = tx.init(params)
      >>> loss = lambda p: 2 * p["kernel"].sum()
      >>> grads = jax.grad(loss)(jp.training.forward_params(params, state))
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["kernel"].tolist(), jp.training.forward_params(params, state)["kernel"].tolist()
      ([[1.0, 0.0]], [[1.0, 0.0]])

    References:
      Bengio et al., `Estimating or Propagating Gradients <https://arxiv.org/abs/1308.3432>`__,
      2013; for pruning Lin et al., `DPF <https://arxiv.org/abs/2006.07253>`__, 2020, eq. DPF.
    """
    return _straight_through(inner, sparsity, score, every, pattern, "ste")


def sr_ste(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule = 0.5,
    *,
    decay: float = 2e-4,
    score: ScoreFn = magnitude,
    every: int = 1,
    pattern: PatternFn = _TWO_OF_FOUR,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with SR-STE, which trains N:M sparse networks from scratch.

    .. math:: w_{t+1} = w_t - \gamma \, (\nabla L(m_t \odot w_t) + \lambda \, (1 - m_t) \odot w_t)

    :func:`ste` with a pull on pruned weights towards 0, which keeps the masks from flickering. The
    term is added to the gradient before the optimizer sees it.

    Args:
      inner: any optax transformation.
      sparsity: 1 - n/m for N:M.
      decay: :math:`\lambda`; the paper's for 2:4 is 2e-4. 0 is :func:`ste`.
      score, every: as in :func:`ste`.
      pattern: ``jp.n_m(2, 4)`` unless told otherwise.

    Returns:
      What :func:`ste` returns; the loss must be computed at ``jp.training.forward_params``.

    Raises:
      ValueError: for a negative decay, a sparsity that N:M can't express.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.sr_ste(optax.adamw(1e-3), 0.75, pattern=jp.n_m(1, 4))

    References:
      Zhou et al., `Learning N:M <https://arxiv.org/abs/2102.04010>`__, 2021, eq. 9. With an
      adaptive optimizer the pull is rescaled as the gradient is; the paper has SGD.
    """
    check_rate("decay", decay)

    def refined(params: Params, grad: Any, state: MaskState) -> Any:
        return jax.tree.map(
            lambda g, w, m: jnp.where(m, g, g + jnp.asarray(decay, g.dtype) * w.astype(g.dtype)),
            grad,
            params,
            state.masks,
        )

    return _straight_through(inner, sparsity, score, every, pattern, "sr_ste", refined)


def _straight_through(
    inner: Any,
    sparsity: Any,
    score: ScoreFn,
    every: int,
    pattern: PatternFn,
    name: str,
    gradient: Any = same_gradient,
) -> optax.GradientTransformationExtraArgs:
    def choose(params: Any, masks: Masks, memory: Any, now: Any, **evidence: Any) -> Chosen:
        return pattern(scored(score, params, evidence), now), memory

    return dense_method(
        inner,
        sparsity,
        choose,
        pattern=pattern,
        start=score,
        every=every,
        gradient=gradient,
        name=f"jp.training.{name}",
    )


def top_kast(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule,
    *,
    backward: float | Schedule,
    decay: float = 1e-4,
    every: int = 1,
    pattern: PatternFn = UNSTRUCTURED,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with Top-KAST: sparse forward, and a larger sparse set that learns.

    The forward pass uses the set A, the fraction :math:`D = 1 - s` of largest :math:`|w|`. The
    gradients and updates reach B, the fraction ``1 - backward``, which contains A. A penalty pulls
    on A, and 1/D times as hard on what is in B only, which must earn its place:

    .. math:: \Delta w_i = \nabla_i L(m_A \odot w) + \lambda w_i
       \begin{cases} 1 & i \in A \\ 1 / D & i \in B \setminus A \\ \end{cases}

    and 0 outside B, where weights wait as they are.

    Args:
      inner: any optax transformation.
      sparsity: the sparsity of the forward pass, in [0, 1], or a schedule.
      backward: the sparsity of B, at most that of the forward pass, or a schedule.
      decay: :math:`\lambda` of the L2 penalty, added to the gradient.
      every: steps between two choices of A and B.
      pattern: ``(scores, sparsity) -> masks``.

    Returns:
      An optax transformation with :class:`jp.training.MaskState`: ``masks`` are A, ``memory`` is B.
      The loss must be computed at ``jp.training.forward_params(params, state)``.

    Raises:
      ValueError: for a backward sparsity above that of the forward pass, or a negative decay.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.top_kast(optax.adam(1e-3), 0.9, backward=0.5)

    References:
      Jayakumar et al., `Top-KAST <https://arxiv.org/abs/2106.03517>`__, 2020, sections 2.2 and 2.3.
      There a lookup of the sets runs every 100 steps on the host; here it may run every step.
    """
    check_rate("decay", decay)
    _check_backward(sparsity, backward)

    def both(params: Params, now: Any, step: Any) -> Chosen:
        scores = magnitude(params)
        masks, wider = pattern(scores, now), pattern(scores, scheduled(backward, step))
        return masks, jax.tree.map(jnp.logical_or, masks, wider)

    def choose(
        params: Any, masks: Masks, memory: Any, now: Any, *, step: Any, **evidence: Any
    ) -> Chosen:
        return both(params, now, step)

    def gradient(params: Params, grad: Any, state: MaskState) -> Any:
        def leaf(g: Any, w: Any, a: Any, b: Any) -> jax.Array:
            if a.ndim == 0:
                return g
            pull = jnp.where(a, 1, 1 / jnp.maximum(1 - state.sparsity, 1e-6))
            return jnp.where(b, g + (decay * pull).astype(g.dtype) * w.astype(g.dtype), 0)

        return jax.tree.map(leaf, grad, params, state.masks, state.memory)

    def memory(params: Params, masks: Masks) -> Masks:
        if is_placeholder(params):
            return params
        return both(params, scheduled(sparsity, 0), 0)[1]

    return dense_method(
        inner,
        sparsity,
        choose,
        pattern=pattern,
        start=magnitude,
        every=every,
        memory=memory,
        gradient=gradient,
        trained=lambda masks, memory: memory,
        name="jp.training.top_kast",
    )


def _check_backward(sparsity: float | Schedule, backward: float | Schedule) -> None:
    forward_end, backward_end = final(sparsity), final(backward)
    if not (known(forward_end) and known(backward_end)):
        return
    if not 0 <= float(backward_end) <= float(forward_end):
        raise ValueError(
            f"backward is {backward_end} in the end; wanted a sparsity from 0 to that of the "
            f"forward pass, {forward_end}: more entries learn than are used"
        )
