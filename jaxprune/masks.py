"""Using masks: apply, count, combine, check, pack to bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._trees import difference
from jaxprune.selection import count
from jaxprune.sharding import over
from jaxprune.typing import Masks, Params, PyTree, path_str


def check_structure(what: str, tree: PyTree, params: Params, instead: str) -> None:
    """Raises ValueError, naming what differs, unless both have one structure."""
    wanted: Any = jax.tree.structure(params)
    if jax.tree.structure(tree) != wanted:
        how = difference(tree, wanted)
        raise ValueError(f"the tree of {what} does not match params: it {how}; {instead}")


def left_out(node: Any) -> bool:
    """Does ``optax.masked``, ``partition`` or ``multi_transform`` have this in place of a leaf?"""
    return isinstance(node, optax.MaskedNode)


def filled(tree: PyTree, params: Params, value: Any) -> PyTree:
    """``tree`` with ``value`` for each leaf that optax has left out of it."""

    def fill(node: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: value, part) if left_out(node) else node

    if not any(map(left_out, jax.tree.leaves(tree, is_leaf=left_out))):
        return tree
    try:
        return jax.tree.map(fill, tree, params, is_leaf=left_out)
    except ValueError:  # It isn't of these params, which a check of its structure says better.
        return tree


def check_masks(params: Params, masks: Masks) -> None:
    """Raises ValueError unless masks are booleans in params' structure that broadcast to it.

    Masks in the place of params are a TypeError: params come first everywhere.
    """
    if _are_masks(params) and not _are_masks(masks):
        raise TypeError(
            "params holds booleans alone, masks do not; params come first: write (params, masks)"
        )
    check_structure("masks", masks, params, "build masks with a pattern: pattern(scores, sparsity)")
    for path, leaf, mask in _pairs(params, masks):
        if not fits(mask, np.shape(leaf)):
            raise ValueError(
                f"the mask of {path} is {jnp.result_type(mask)}{np.shape(mask)}; wanted booleans "
                f"that broadcast to the leaf's shape {np.shape(leaf)}, True = kept"
            )


def _pairs(params: Params, *masks: Masks) -> Iterator[tuple[Any, ...]]:
    flat = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), *ms in zip(flat, *map(jax.tree.leaves, masks), strict=True):
        yield path_str(path), leaf, *ms


def fits(mask: Any, shape: tuple[int, ...]) -> bool:
    """Is it boolean and broadcastable to ``shape``?"""
    try:
        return (
            jnp.issubdtype(jnp.result_type(mask), jnp.bool_)
            and np.broadcast_shapes(np.shape(mask), shape) == shape
        )
    except ValueError:
        return False


def apply_masks(params: Params, masks: Masks) -> Params:
    """Returns params with zeros where masks are False; NaN can't leak through.

    Args:
      params: any pytree. Leaves that are not numbers (random keys, functions) stay as they are.
      masks: booleans in the same structure, True = kept, broadcastable to their leaves. A leaf that
        ``optax.multi_transform`` left out of a state's masks stays dense.

    Raises:
      ValueError: when structures or shapes do not fit; the message names the leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.apply_masks({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    masks = filled(masks, params, True)
    check_masks(params, masks)
    return jax.tree.map(_apply, params, masks)


def _apply(leaf: Any, mask: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return leaf
    return jnp.where(over(mask, leaf), leaf, jnp.zeros_like(leaf))


def density(params: Params, masks: Masks) -> jax.Array:
    """Returns the fraction of entries kept, over the leaves that were pruned.

    Those are the leaves whose mask is not a scalar: a scalar True is a dense leaf.

    Args:
      params: any pytree.
      masks: booleans in the same structure; a leaf that optax left out of them is dense.

    Returns:
      A float32 scalar in [0, 1]; 1.0 when every leaf is dense.

    Raises:
      TypeError: for masks in the place of params.
      ValueError: when structures or shapes do not fit; the message names the leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
      >>> float(jp.density(params, {"w": jnp.eye(2, dtype=bool), "b": jnp.asarray(True)}))
      0.5
    """
    if _are_masks(params) and not _are_masks(masks):
        raise TypeError(
            "density: params holds booleans alone, and masks others; params come first now: write "
            "jp.density(params, masks)"
        )
    masks = filled(masks, params, True)
    check_masks(params, masks)
    return _fraction(
        (_entries(mask, leaf), np.size(leaf))
        for _, leaf, mask in _pairs(params, masks)
        if np.shape(mask)
    )


def _are_masks(tree: PyTree) -> bool:
    """Does a tree hold booleans, and nothing else?"""
    dtypes = [getattr(x, "dtype", type(x)) for x in jax.tree.leaves(tree)]
    return all(dtype in (bool, np.dtype(bool)) for dtype in dtypes)


def _entries(mask: Any, leaf: Any) -> jax.Array:
    """How many entries of the leaf are kept; counted in integers, which stay exact."""
    each = np.size(leaf) // max(np.size(mask), 1)
    return count(jnp.asarray(mask)).astype(jnp.float32) * each


def _fraction(pairs: Iterator[tuple[Any, Any]]) -> jax.Array:
    part = whole = jnp.float32(0)
    for p, w in pairs:
        part, whole = part + p, whole + w
    return jnp.where(whole > 0, part / jnp.maximum(whole, 1), 1.0)


def union(a: Masks, b: Masks) -> Masks:
    """Returns what either keeps.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([False, False])}
      >>> jp.masks.union(a, b)["w"]
      Array([ True, False], dtype=bool)
    """
    return _combine(jnp.logical_or, a, b)


def intersection(a: Masks, b: Masks) -> Masks:
    """Returns what both keep.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> a, b = {"w": jnp.array([True, True])}, {"w": jnp.array([False, True])}
      >>> jp.masks.intersection(a, b)["w"]
      Array([False,  True], dtype=bool)
    """
    return _combine(jnp.logical_and, a, b)


def _combine(operation: Any, a: Masks, b: Masks) -> Masks:
    check_structure("the second masks", b, a, "combine masks that were made for the same params")
    return jax.tree.map(operation, a, b)


def overlap(params: Params, a: Masks, b: Masks) -> jax.Array:
    """Returns kept in both over kept in either (Jaccard), over the leaves that a or b prunes.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> a, b = {"w": jnp.array([True, True, False])}, {"w": jnp.array([False, True, False])}
      >>> float(jp.masks.overlap({"w": jnp.ones(3)}, a, b))
      0.5
    """
    check_masks(params, a)
    check_masks(params, b)
    both, either = intersection(a, b), union(a, b)
    return _fraction(
        (_entries(m, leaf), _entries(n, leaf))
        for _, leaf, m, n in _pairs(params, both, either)
        if np.shape(m)
    )


@partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["shape"])
@dataclass(frozen=True)
class PackedMask:
    """A mask as bits, 8 to a byte."""

    bits: jax.Array  # uint8, (..., last / 8); flat, ceil(size / 8), where 8 doesn't divide last
    shape: tuple[int, ...]  # the mask's


def pack(masks: Masks) -> PyTree:
    """Returns masks at one bit an entry, for keeping and saving; :func:`unpack` is the inverse.

    Neighbours along the last axis share a byte, so that a sharded mask stays where it is; if 8
    doesn't divide that axis, then neighbours in memory order, which gathers it.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.masks.pack({"w": jnp.array([True, False, True])})["w"].bits
      Array([160], dtype=uint8)
    """

    def one(mask: Any) -> PackedMask:
        shape = np.shape(mask)
        rows = jnp.asarray(mask) if _in_rows(shape) else jnp.ravel(mask)
        return PackedMask(jnp.packbits(rows, axis=-1), shape)

    return jax.tree.map(one, masks)


def unpack(packed: PyTree) -> Masks:
    """Returns the masks that :func:`pack` was given.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> packed = jp.masks.pack({"w": jnp.array([True, False, True])})
      >>> jp.masks.unpack(packed)["w"]
      Array([ True, False,  True], dtype=bool)
    """

    def one(leaf: PackedMask) -> jax.Array:
        count = leaf.shape[-1] if _in_rows(leaf.shape) else int(np.prod(leaf.shape))
        bits = jnp.unpackbits(leaf.bits, axis=-1, count=count)
        return bits.astype(bool).reshape(leaf.shape)

    return jax.tree.map(one, packed, is_leaf=lambda x: isinstance(x, PackedMask))


def _in_rows(shape: tuple[int, ...]) -> bool:
    """Do 8 bits divide the last axis?"""
    return bool(shape) and shape[-1] % 8 == 0
