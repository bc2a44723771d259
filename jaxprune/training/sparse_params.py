"""Fixed masks as a link in an optax chain, and the piece that all methods share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.masks import check_masks
from jaxprune.types import Masks, Params


def land_on_masked(updates: Any, params: Params, masks: Masks) -> Any:
    """Rewrites updates so that ``optax.apply_updates`` lands bitwise on the masked parameters.

    Where a mask is False the update is -p in p's own type, so that p + (-p) is exactly zero.
    """

    def one(u: Any, p: Any, m: Any) -> Any:
        if u is None or p is None:
            return u
        return jnp.where(m, u, (-p).astype(jnp.promote_types(u.dtype, p.dtype)))

    return jax.tree.map(one, updates, params, masks, is_leaf=lambda x: x is None)


def require_params(params: Any, name: str) -> None:
    """Raises ValueError when ``update`` was called without the parameters."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters: call update(grads, opt_state, params), not "
            "update(grads, opt_state)"
        )


class KeepParamsSparseState(NamedTuple):
    """The masks, so that they are found and checkpointed with the optimizer."""

    masks: Masks  # bool, broadcastable to params


def keep_params_sparse(masks: Masks) -> optax.GradientTransformation:
    """Keeps pruned parameters at zero: the last link of a chain, after the optimizer.

    Args:
      masks: a tree like params, True = kept.

    Raises:
      ValueError: (on init) for masks that do not fit params; (on update) for params=None.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> tx = optax.chain(optax.sgd(0.1), jp.keep_params_sparse({"w": jnp.array([True, False])}))
      >>> params = {"w": jnp.array([1.0, 5.0])}
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([0.9, 0. ], dtype=float32)}
    """

    def init_fn(params: Params) -> KeepParamsSparseState:
        check_masks(masks, params)
        return KeepParamsSparseState(jax.tree.map(jnp.asarray, masks))

    def update_fn(updates: Any, state: KeepParamsSparseState, params: Any = None) -> Any:
        require_params(params, "keep_params_sparse")
        return land_on_masked(updates, params, state.masks), state

    return optax.GradientTransformation(init_fn, update_fn)
