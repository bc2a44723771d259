"""The plain chain link: parameters stay on masks that are already known."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.masks import check_masks
from jaxprune.training.landing import (
    check_finite,
    check_update,
    is_placeholder,
    land_on_masked,
)
from jaxprune.training.wrappers import warn_of_wrappers
from jaxprune.typing import Masks


class KeepParamsSparseState(NamedTuple):
    """State of :func:`keep_params_sparse`."""

    masks: Masks  # bool, True = kept, in params' structure; each broadcasts to its leaf


def keep_params_sparse(masks: Masks) -> optax.GradientTransformation:
    """Modifies the updates to keep parameters sparse, that is exactly 0 where masks are False.

    The counterpart of ``optax.keep_params_nonnegative``: after ``optax.apply_updates`` a pruned
    entry is bitwise +0, whatever it was before (if finite: no sum brings NaN or infinity back, and
    ``init`` refuses those that it is shown), and a kept entry has got exactly its update. It must
    be the last link that changes updates; ``init`` warns of optax's links that come after, and
    ``jp.training.masked_params`` gives the sparse params even then.

    The masks live in the state, not in the closure: there ``optax.tree_utils.tree_get(state,
    "masks")`` finds them, checkpoints save them, and they are no constants of a jitted step. The
    state takes a copy, so that a step may donate it.

    Args:
      masks: booleans in the structure of params, True = kept, each broadcastable to its leaf.

    Returns:
      An optax transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: by ``init``, when masks do not fit params, or a pruned entry is NaN or infinite;
        by ``update``, when params is None or differs in structure or shape.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"w": jnp.array([3.0, -2.0])}
      >>> tx = optax.chain(
      ...     optax.sgd(0.5), jp.keep_params_sparse({"w": jnp.array([True, False])})
      ... )
      >>> grads = {"w": jnp.array([1.0, 1.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([2.5, 0. ], dtype=float32)}
    """

    def init(params: Any) -> KeepParamsSparseState:
        if is_placeholder(params):
            return KeepParamsSparseState(masks=params)
        check_masks(params, masks)
        check_finite("jp.keep_params_sparse", params, masks)
        warn_of_wrappers("jp.keep_params_sparse")
        return KeepParamsSparseState(masks=jax.tree.map(jnp.array, masks))

    def update(
        updates: Any, state: KeepParamsSparseState, params: Any = None
    ) -> tuple[Any, KeepParamsSparseState]:
        check_update("jp.keep_params_sparse", updates, params, state)
        return land_on_masked(updates, params, state.masks), state

    return optax.GradientTransformation(init, update)
