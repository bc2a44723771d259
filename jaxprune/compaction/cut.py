"""Slicing the leaves of params to the small sizes, and putting them back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction.blocks import View
from jaxprune.compaction.masked import Masked, is_shape
from jaxprune.compaction.plan import Plan
from jaxprune.masks import apply_masks
from jaxprune.rules.registry import KEPT
from jaxprune.sharding import reshaped
from jaxprune.structure import infer
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.parents import Order


@dataclass(frozen=True)
class Cut:
    """How the leaves of params are sliced, and put back."""

    structure: Structure
    plan: Plan

    @property
    def view(self) -> View:
        return self.plan.split.view(KEPT)

    @functools.cached_property
    def _orders(self) -> dict[int, list[Order]]:
        """The orders that each leaf's units are put in."""
        found: dict[int, list[Order]] = {}
        for name, order in self.plan.orders.items():
            for i in self.structure.owners(name):
                found.setdefault(i, []).append(order)
        return found

    def slice(self, leaf: Any, i: int) -> Any:
        """The kept slices; axes along which the leaf repeats stay as they are."""
        axs, shape = self.structure.param_axes[i], self.structure.shapes[i]
        if is_shape(leaf):
            pairs = zip(axs, leaf.shape, strict=True)
            small = (self.view.size(a) if n == a.size else n for a, n in pairs)
            return jax.ShapeDtypeStruct(tuple(small), leaf.dtype)
        orders = self._orders.get(i, ())

        def cut(leaf: Any) -> Any:
            if np.shape(leaf) != shape and orders:
                leaf = jnp.broadcast_to(leaf, shape)
            for order in orders:
                leaf = order.apply(leaf, axs)
            for k, axis in enumerate(axs):
                if self.view.size(axis) != axis.size and np.shape(leaf)[k] == axis.size:
                    leaf = leaf.take(self.view.index(axis), axis=k)
            return leaf

        return reshaped(cut, leaf)

    def masked(self, full: Masked) -> Any:
        """The kept slices of the masked parameters, as a tree."""
        pairs = zip(full.params, full.full_masks(), strict=True)
        small = [(self.slice(leaf, i), self.slice(m, i)) for i, (leaf, m) in enumerate(pairs)]
        leaves = [leaf if mask.all() else _masked(leaf, mask) for leaf, mask in small]
        return jax.tree.unflatten(self.structure.treedef, leaves)

    def outputs(self, outputs: Any) -> Any:
        """Slices the results that are updated parameters; others are full size already."""
        leaves, treedef = jax.tree.flatten(outputs)
        paths = self.structure.paths
        at = {path: i for i, path in enumerate(paths)}
        known = list(zip(paths, self.structure.shapes, strict=True))
        given = list(zip(infer.paths_of(outputs), map(np.shape, leaves), strict=True))
        small = [
            leaf if name is None else self.slice(leaf, at[name])
            for leaf, name in zip(leaves, infer.followed(given, known), strict=True)
        ]
        return jax.tree.unflatten(treedef, small)

    def grow(self, leaf: Any, i: int) -> Any:
        """A small leaf at its full shape, zeros where units are gone."""
        axs = self.structure.param_axes[i]
        if np.shape(leaf) != self.view.shape(axs):
            raise ValueError(
                f"expand got shape {np.shape(leaf)} for {self.structure.paths[i]}, wanted "
                f"{self.view.shape(axs)}"
            )
        if self.view.shape(axs) == self.structure.shapes[i]:
            return leaf
        index = np.ix_(*(self.view.index(a) for a in axs))

        def grow(leaf: Any) -> Any:
            full = jnp.zeros(self.structure.shapes[i], leaf.dtype).at[index].set(leaf)
            for order in reversed(self._orders.get(i, ())):
                full = order.apply(full, axs, back=True)
            return full

        return reshaped(grow, leaf, self.structure.layouts[i])


def _masked(leaf: Any, mask: np.ndarray) -> Any:
    """Zeros where the mask is False; an array of the kind that it was given, a shape as it is."""
    if is_shape(leaf):
        return leaf
    if isinstance(leaf, np.ndarray):
        return np.where(mask, leaf, np.zeros_like(leaf))
    return apply_masks(leaf, mask)
