"""Masks at one bit an entry, for any training method."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxprune.masks import PackedMask, pack, unpack
from jaxprune.training.core import MaskState, as_transform
from jaxprune.training.landing import is_placeholder
from jaxprune.training.sparse_params import KeepParamsSparseState
from jaxprune.typing import Masks, PyTree

_STATES = (MaskState, KeepParamsSparseState)


def packed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a training method so that its masks take one bit an entry between steps.

    They are packed and unpacked at each step, which costs time; a sharded leaf is gathered for it
    where 8 times the number of its shards doesn't divide the last axis. What the method itself
    remembers stays as it is. ``jp.training.forward_params`` reads packed masks;
    ``jp.masks.unpack(optax.tree_utils.tree_get(state, "masks"))`` gives them back.

    Args:
      tx: a training method, or any transformation with methods inside.

    Returns:
      A transformation with tx's state, in which masks are :class:`jp.masks.PackedMask`.

    Raises:
      TypeError: when tx is no optax transformation.
      ValueError: by ``init``, when there are no masks to pack.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> tx = jp.training.packed(jp.training.rigl(optax.adam(1e-3), 0.75))
      >>> state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> optax.tree_utils.tree_get(state, "masks")["kernel"].bits.nbytes
      2
    """
    tx = as_transform(tx)

    def init(params: Any) -> Any:
        state = tx.init(params)
        found = [x for x in jax.tree.leaves(state, is_leaf=_has_masks) if _has_masks(x)]
        if not found:
            raise ValueError(
                "packed finds no masks in the state; wrap a training method: "
                "jp.training.packed(jp.training.rigl(optax.adam(1e-3), 0.9))"
            )
        return state if is_placeholder(params) else _with_masks(state, pack)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        updates, state = tx.update(updates, _with_masks(state, unpack), params, **extra_args)
        return updates, _with_masks(state, pack)

    return optax.GradientTransformationExtraArgs(init, update)


def unpacked(masks: PyTree) -> Masks:
    """Masks, whether they are packed or not."""
    is_packed = isinstance(_first(masks), PackedMask)
    return unpack(masks) if is_packed else masks


def _first(masks: PyTree) -> Any:
    leaves = jax.tree.leaves(masks, is_leaf=lambda x: isinstance(x, PackedMask))
    return leaves[0] if leaves else None


def _has_masks(node: Any) -> bool:
    return isinstance(node, _STATES)


def _with_masks(state: Any, change: Any) -> Any:
    def node(x: Any) -> Any:
        return x._replace(masks=change(x.masks)) if _has_masks(x) else x

    return jax.tree.map(node, state, is_leaf=_has_masks)
