"""Regularised pruning: a penalty drives weights or whole units towards 0 before they are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import reduce
from jaxprune._leaf import widen
from jaxprune.patterns import UNSTRUCTURED, structured
from jaxprune.patterns.choose import choose, is_kernel
from jaxprune.scores.channels import batch_norm_scale, is_norm_scale
from jaxprune.scores.weights import l2, magnitude
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.select import chosen_dims
from jaxprune.training._static import one_shot
from jaxprune.training.core import as_transform
from jaxprune.training.renewal import scheduled
from jaxprune.training.straight_through import check_rate
from jaxprune.typing import Params, PatternFn, Schedule, ScoreFn, Where

Penalty = Callable[[Params], jax.Array]  # params -> a number


class AddPenaltyState(NamedTuple):
    """State of :func:`add_penalty`."""

    count: jax.Array  # type: ignore[assignment] # int32, shape (): updates so far


def l1(*, where: Where = is_kernel) -> Penalty:
    r"""Returns the penalty :math:`\sum |w|` over the leaves that ``where`` means.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> float(jp.training.l1()({"w": jnp.array([[-2.0, 1.0]]), "b": jnp.ones(1)}))
      3.0
    """

    def penalty(params: Params) -> jax.Array:
        leaves = choose(params, where).leaves.values()
        return sum((jnp.sum(jnp.abs(widen(w))) for w in leaves), jnp.zeros(()))

    return penalty


def group_lasso(structure: Structure, *, dims: str | Sequence[str] = "*") -> Penalty:
    r"""Returns the penalty :math:`\sum_u \sqrt{n_u} \, \|w_u\|_2` over the units of dimensions.

    :math:`w_u` are the :math:`n_u` entries of unit u over all its slots: what ``jp.structured``
    removes together shrinks together, to exact groups of small norm.

    Args:
      structure: what ``jp.infer_structure`` found.
      dims: names or labels of dimensions, with wildcards.

    Raises:
      ValueError: for dims that match nothing prunable.

    References:
      Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006, eq.
      2.1; for the structures of networks Wen et al., `SSL <https://arxiv.org/abs/1608.03665>`__,
      2016, eq. 2, there per layer.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [0.0]])}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 1)))
      >>> round(float(jp.training.group_lasso(structure)(params)), 3)  # sqrt(2) * 5
      7.071
    """
    names = chosen_dims(structure, dims)

    def penalty(params: Params) -> jax.Array:
        squares = structure.unit_scores(l2(params), reduce.sum)
        sizes = structure.unit_scores(jax.tree.map(jnp.ones_like, params), reduce.sum)
        norms = [jnp.sum(jnp.sqrt(sizes[n]) * _root(jnp.asarray(squares[n]))) for n in names]
        return sum(norms, jnp.zeros(()))

    return penalty


def _root(x: jax.Array) -> jax.Array:
    """The square root, with gradient 0 at 0: a unit that is gone stays gone."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def add_penalty(
    penalty: Penalty, strength: float | Schedule
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`\lambda_t \nabla R(w_t)` to the updates, as ``optax.add_decayed_weights`` does.

    Args:
      penalty: :math:`R`, any differentiable function of params to a number.
      strength: :math:`\lambda`, or a schedule. Where it is 0 nothing is computed.

    Raises:
      ValueError: for a negative strength; from ``update``, when params is None.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = optax.chain(jp.training.add_penalty(jp.training.l1(), 1e-4), optax.sgd(0.1))
    """
    check_rate("strength", scheduled(strength, 0))

    def init(params: Any) -> AddPenaltyState:
        return AddPenaltyState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: AddPenaltyState, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError(
                "add_penalty computes the penalty of params, and params is None; write "
                "tx.update(grads, state, params)"
            )
        now = jnp.asarray(scheduled(strength, state.count), jnp.float32)

        def pulled(updates: Any) -> Any:
            slopes = jax.grad(penalty)(params)
            return jax.tree.map(lambda u, s: u + (now * widen(s)).astype(u.dtype), updates, slopes)

        updates = jax.lax.cond(now > 0, pulled, lambda updates: updates, updates)
        return updates, AddPenaltyState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def regularized(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    penalty: Penalty,
    strength: float | Schedule,
    at: int,
    score: ScoreFn = magnitude,
    pattern: PatternFn = UNSTRUCTURED,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: trains under a penalty until step ``at``, prunes, and trains on without.

    Args:
      inner: any optax transformation.
      sparsity: fraction to remove at step ``at``, in [0, 1].
      penalty: ``params -> number``: :func:`l1`, :func:`group_lasso`, or any other.
      strength: its weight, or a schedule.
      at: the step at which masks are made, and from which on there is no penalty.
      score: the score at that step.
      pattern: ``(scores, sparsity) -> masks``; with ``jp.structured`` whole units go, and
        ``jp.compact`` makes the network smaller.

    Returns:
      What :func:`one_shot` returns.

    Raises:
      ValueError: when ``at`` leaves no step for the penalty, or for a negative strength.

    Example:
      Group lasso that ends in structured masks:

      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> tx = jp.training.regularized(
      ...     optax.adam(1e-3), 0.5, penalty=jp.training.group_lasso(structure), strength=1e-3,
      ...     at=1000, score=jp.scores.l2, pattern=jp.structured(structure, reduce=jp.reduce.sum),
      ... )
    """
    if not at >= 1:
        raise ValueError(
            f"at is {at}; wanted a step >= 1, before which the penalty acts; to prune at once "
            "write jp.training.one_shot(inner, sparsity)"
        )

    def until(step: Any) -> Any:
        return jnp.where(step < at, scheduled(strength, step), 0)

    inner = optax.chain(add_penalty(penalty, until), as_transform(inner))
    return one_shot(inner, sparsity, at=at, score=score, pattern=pattern)


def network_slimming(
    inner: optax.GradientTransformation,
    sparsity: float,
    structure: Structure,
    *,
    at: int,
    strength: float | Schedule = 1e-4,
    dims: str | Sequence[str] = "*",
    where: Where = is_norm_scale,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with network slimming: L1 on the scales of normalisations, then channels.

    Until step ``at`` the loss has the term :math:`\lambda \sum |\gamma|`; then the channels of
    least :math:`|\gamma|` go, in all slots of their dimension.

    Args:
      inner: any optax transformation.
      sparsity: fraction of the units of each dimension.
      structure: what ``jp.infer_structure`` found.
      at: the step at which channels go.
      strength: :math:`\lambda`.
      dims: names or labels of dimensions; leave out those without a normalisation, whose units
        tie.
      where: (path, leaf) -> whether the leaf is a scale.

    Returns:
      What :func:`regularized` returns.

    Raises:
      ValueError: for a dimension without scales.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"up": jnp.ones((3, 8)), "scale": jnp.ones(8), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"] * p["scale"]) @ p["down"]
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> tx = jp.training.network_slimming(optax.adam(1e-3), 0.5, structure, at=1000)

    References:
      Liu et al., `Network Slimming <https://arxiv.org/abs/1708.06519>`__, 2017, eq. 1. There one
      threshold ranks all layers together; here each dimension loses its fraction, unless
      ``regularized`` is given another distribution.
    """
    unscaled = _without_scales(structure, chosen_dims(structure, dims), where)
    if unscaled:
        raise ValueError(
            f"no scale of a normalisation lies on the dimensions {', '.join(unscaled[:6])}, so "
            "their units would tie; leave them out with dims=, or pass where=lambda path, leaf: ..."
        )

    def score(params: Params, **evidence: Any) -> Any:
        return batch_norm_scale(params, where=where)

    return regularized(
        inner,
        sparsity,
        penalty=l1(where=where),
        strength=strength,
        at=at,
        score=score,
        pattern=structured(structure, dims=dims, reduce=reduce.sum),
    )


def _without_scales(structure: Structure, names: Sequence[str], where: Where) -> list[str]:
    """The dimensions on which no leaf lies that ``where`` means."""
    leaves = [
        np.full(shape, where(path, jax.ShapeDtypeStruct(shape, jnp.float32)), np.float32)
        for path, shape in zip(structure.paths, structure.shapes, strict=True)
    ]
    found = structure.unit_scores(jax.tree.unflatten(structure.treedef, leaves), reduce.sum)
    return [name for name in names if not np.any(found[name])]
