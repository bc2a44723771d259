"""What an optimizer has accumulated for entries that come back, whatever the optimizer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.sharding import over
from jaxprune.typing import Masks


def forget_pruned(inner: Any, state: optax.OptState, masks: Masks) -> optax.OptState:
    """``state`` of ``inner`` with 0 for each pruned entry, so that it comes back with nothing.

    Done where the state has a tree like params with leaves of the same shapes: momenta, second
    moments, accumulated gradients, copies of params. What Adafactor keeps per row and column
    belongs to no single entry and stays.
    """

    def leaf(moment: Any, mask: Any) -> Any:
        left_out = isinstance(moment, optax.MaskedNode)  # a leaf of another group
        if left_out or np.ndim(mask) == 0 or not _fits(mask, moment):
            return moment
        return jnp.where(over(mask, moment), moment, jnp.zeros_like(moment))

    def is_leaf(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return optax.tree_map_params(inner, leaf, state, masks, is_leaf=is_leaf)


def _fits(mask: Any, moment: Any) -> bool:
    """Does the mask say something on each entry of the moment?"""
    pairs = zip(np.shape(mask), np.shape(moment), strict=False)
    return np.ndim(mask) == np.ndim(moment) and all(m in (1, n) for m, n in pairs)


def check_moments(moments: Any) -> None:
    """Raises ValueError for an unknown setting."""
    if moments not in ("reset", "inherit"):
        raise ValueError(f"moments is {moments!r}; wanted 'reset' or 'inherit'")
