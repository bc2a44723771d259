"""Using masks: apply, count, check, pack to bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.types import Masks, Params, path_str


def check_masks(masks: Masks, params: Params) -> None:
    """Raises ValueError unless masks are booleans in params' structure that broadcast to it."""
    want: Any = jax.tree.structure(params)
    got: Any = jax.tree.structure(masks)
    if want != got:
        raise ValueError(
            f"masks have the structure {got}, params {want}; build masks with a pattern: "
            "pattern(scores, sparsity)"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(masks), strict=True)
    for (path, leaf), mask in pairs:
        if not fits(mask, np.shape(leaf)):
            raise ValueError(
                f"the mask of {path_str(path)} is {jnp.result_type(mask)}{np.shape(mask)}; wanted "
                f"booleans that broadcast to the leaf's shape {np.shape(leaf)}, True = kept"
            )


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
      params: any pytree of arrays.
      masks: booleans in the same structure, True = kept, broadcastable to their leaves.

    Raises:
      ValueError: when structures or shapes do not fit; the message names the leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.apply_masks({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    check_masks(masks, params)
    return jax.tree.map(_apply, params, masks)


def _apply(leaf: Any, mask: Any) -> Any:
    if np.shape(mask) == () and not isinstance(mask, jax.core.Tracer) and bool(mask):
        return leaf  # a dense leaf, whatever its type (a random key has no zero)
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def density(masks: Masks, params: Params) -> jax.Array:
    """Fraction of entries kept, over the leaves that a mask touches (not a scalar True).

    Returns:
      A scalar in [0, 1]; 1.0 when no leaf is masked.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
      >>> float(jp.density({"w": jnp.eye(2, dtype=bool), "b": jnp.asarray(True)}, params))
      0.5
    """
    check_masks(masks, params)
    pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True)
    touched = [(jnp.asarray(m), np.size(p)) for m, p in pairs if np.shape(m) != ()]
    if not touched:
        return jnp.float32(1)
    kept = sum(jnp.mean(m, dtype=jnp.float32) * n for m, n in touched)
    return jnp.asarray(kept / sum(n for _, n in touched))


def pack(masks: Masks) -> Any:
    """Packs every mask to bits, 8 to a uint8; :func:`unpack` brings it back."""
    return jax.tree.map(lambda m: jnp.packbits(jnp.ravel(m)), masks)


def unpack(packed: Any, like: Masks) -> Masks:
    """The masks that were packed; ``like`` gives their shapes."""

    def one(bits: jax.Array, mask: Any) -> jax.Array:
        return jnp.unpackbits(bits, count=np.size(mask)).reshape(np.shape(mask)).astype(bool)

    return jax.tree.map(one, packed, like)


def overlap(a: Masks, b: Masks) -> jax.Array:
    """Kept in both over kept in either (Jaccard), over the leaves that either mask touches."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    touched = [(x, y) for x, y in pairs if np.shape(x) != () or np.shape(y) != ()]
    both = sum(jnp.sum(x & y, dtype=jnp.float32) for x, y in touched)
    either = sum(jnp.sum(x | y, dtype=jnp.float32) for x, y in touched)
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)
