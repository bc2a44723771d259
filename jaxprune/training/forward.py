"""The weights that a network computes with, in training and after it, out of params and state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._leaf import is_float
from jaxprune.masks import apply_masks, check_masks, check_structure
from jaxprune.training._soft_threshold import shrink
from jaxprune.training.packing import unpacked
from jaxprune.training.states import Average, Held, averages, held, hung_on
from jaxprune.typing import Masks, Params


def forward_params(params: Params, opt_state: Any) -> Params:
    """Returns the weights to use in the loss, with zeros where pruned.

    A pure function, to be called before differentiation: the gradient is then that of the masked
    network with respect to *all* entries, which straight-through estimators need:

    ``grads = jax.grad(loss)(jp.training.forward_params(params, opt_state), batch)``

    For methods that land on masked parameters it returns params as they are, except before the
    first step, where it makes them sparse. Under soft thresholds it also shrinks what is kept.
    What is evaluated, saved and served is :func:`masked_params`.

    Args:
      params: the stored ones.
      opt_state: that of the optimizer, with training methods anywhere in it.

    Raises:
      ValueError: when there is none in it, or it was made for other params.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"kernel": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
      >>> tx = jp.training.static(optax.sgd(0.1), 0.5, score=jp.magnitude)
      >>> jp.training.forward_params(params, tx.init(params))["kernel"].tolist()
      [[4.0, -3.0, 0.0, 0.0]]
    """
    found = held(opt_state)
    if not found:
        raise ValueError(
            f"opt_state holds no masks, a {_kinds(opt_state)}; pass the state of an optimizer "
            "inside a training method, such as tx = jp.training.rigl(optax.adam(1e-3), 0.9); to "
            "apply masks that you have, write jp.apply_masks(params, masks)"
        )
    return _sparse(params, found)


def masked_params(params: Params, opt_state: Any) -> Params:
    r"""Returns the params to evaluate, save and serve, with zeros where masks are False.

    Some wrappers bring back what was pruned, or evaluate other params than those that train. This
    is the one call for all of them, and changes nothing where params are sparse already:

    * ``optax.contrib.schedule_free``, around a method or inside one: params are :math:`y`, and its
      average :math:`x = (y - (1 - b_1) z) / b_1` is evaluated, as by
      ``optax.contrib.schedule_free_eval_params``.
    * ``optax.lookahead``: of ``optax.LookaheadParams`` the slow ones are evaluated.
    * averages that you keep beside the optimizer, such as by ``optax.incremental_update``: pass
      them in place of params.
    * links that change updates after a method, such as ``optax.contrib.reduce_on_plateau``: entries
      miss their zeros, and get them here.
    * methods that keep all weights: as :func:`forward_params`.

    Args:
      params: what the optimizer updates, or an average of it.
      opt_state: that of the optimizer, with training methods or ``jp.keep_params_sparse`` anywhere
        in it. What several of them prune is pruned; leaves that none has stay as they are.

    Returns:
      Params in the same structure and types. A pure function: ``jit``, ``vmap`` and ``scan`` work.

    Raises:
      ValueError: when the state holds no masks, or was made for other params.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"kernel": jnp.array([[4.0, -3.0, 2.0, -1.0]])}
      >>> average = params  # by optax.incremental_update(params, average, 0.01) after each step
      >>> tx = jp.prune(optax.sgd(0.5), jp.magnitude, 0.5)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jp.training.masked_params(average, state)["kernel"].tolist()
      [[4.0, -3.0, 0.0, 0.0]]
    """
    if isinstance(params, optax.LookaheadParams):
        params = params.slow
    for average in averages(opt_state):
        params = _averaged(params, average)
    return forward_params(params, opt_state)


def _sparse(params: Params, found: list[Held]) -> Params:
    """Params with zeros where any of several methods has pruned; shrunk under soft thresholds.

    Raises:
      ValueError: when masks do not fit params; the message names the leaf.
    """
    for masks, thresholds in found:
        masks = hung_on(params, unpacked(masks), jnp.asarray(True))
        _check_same(masks, params)
        if thresholds is None:
            params = apply_masks(params, masks)
        else:
            params = shrink(params, masks, hung_on(params, thresholds, jnp.float32(0)))
    return params


def _check_same(masks: Masks, params: Params) -> None:
    try:
        check_masks(params, masks)
    except ValueError as error:
        raise ValueError(
            f"opt_state was made for other params than it is given now: {error}; pass the params "
            "that tx.update was given, or an average of them"
        ) from error


def _averaged(params: Params, average: Average) -> Params:
    """The params at which schedule-free training evaluates."""
    other = object()  # in place of leaves that are not averaged
    averaged = hung_on(params, average.z, other)
    check_structure(
        "the average in opt_state", averaged, params, "pass the params that tx.update was given"
    )

    def leaf(y: Any, z: Any) -> Any:
        if z is other or not is_float(y):
            return y
        wide = jnp.promote_types(jnp.promote_types(y.dtype, z.dtype), jnp.float32)
        b1 = jnp.asarray(average.b1, wide)
        return ((y.astype(wide) - (1 - b1) * z.astype(wide)) / b1).astype(y.dtype)

    return jax.tree.map(leaf, params, averaged)


def _kinds(state: Any) -> str:
    """The types of a state and of what it consists of."""
    name = type(state).__name__
    inside = [type(x).__name__ for x in state] if isinstance(state, tuple) else []
    return f"{name} of {', '.join(inside[:6])}" if inside else name
