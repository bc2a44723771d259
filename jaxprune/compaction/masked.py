"""Parameters and their masks, parsed once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.masks import apply_masks
from jaxprune.sharding import reshaped
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.parents import Order


class Masked(NamedTuple):
    """Parameters and masks as flat lists, parsed and checked once."""

    structure: Structure
    params: list[Any]
    masks: list[np.ndarray]

    @classmethod
    def of(cls, structure: Structure, params: Any, masks: Any) -> Masked:
        return cls(structure, jax.tree.leaves(params), structure.mask_leaves(masks))

    def full_masks(self) -> list[np.ndarray]:
        """The masks at the shapes of their leaves."""
        pairs = zip(self.masks, self.structure.shapes, strict=True)
        return [np.broadcast_to(mask, shape) for mask, shape in pairs]

    def value(self, i: int) -> Any:
        """One masked parameter; raises TypeError where there is only its shape."""
        if is_shape(self.params[i]):
            raise TypeError(
                f"compact folds removed slices of {self.structure.paths[i]} into constants, and it "
                f"is a shape only, {self.params[i]}; pass its array, other leaves may be shapes"
            )
        return apply_masks(self.params[i], self.masks[i])

    def in_order(self, orders: Mapping[str, Order]) -> Masked:
        """With what is to be removed last under each parent."""
        if not orders:
            return self
        leaves = (in_order(self.structure, orders, x) for x in (self.params, self.full_masks()))
        return Masked(self.structure, *leaves)

    def values(self) -> list[Any]:
        """The masked parameters."""
        return apply_masks(self.params, self.masks)


def in_order(structure: Structure, orders: Mapping[str, Order], leaves: list[Any]) -> list[Any]:
    """Leaves at full shapes, with what is to be removed last under each parent."""
    leaves = list(leaves)
    for name, order in orders.items():
        for i in structure.owners(name):
            if is_shape(leaves[i]):
                continue
            move = functools.partial(order.apply, axs=structure.param_axes[i])
            leaves[i] = reshaped(move, leaves[i])
    return leaves


def is_shape(leaf: Any) -> bool:
    """Is it a shape only, of a leaf that is read later?"""
    return isinstance(leaf, jax.ShapeDtypeStruct)
