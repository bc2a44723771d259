"""Scores of whole channels, from the parameters alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._leaf import is_float, leaf_name, widen
from jaxprune.scores.weights import map_floats
from jaxprune.typing import Params, Scores, Where, path_str


def is_norm_scale(path: str, leaf: Any) -> bool:
    """A leaf named scale or gamma, or a vector named weight (as in Equinox)."""
    name = leaf_name(path)
    return is_float(leaf) and (name in ("scale", "gamma") or (name == "weight" and leaf.ndim == 1))


def batch_norm_scale(params: Params, *, where: Where = is_norm_scale, **evidence: Any) -> Scores:
    r"""Returns :math:`|\gamma|` at the scales of normalisation layers, zero elsewhere.

    Made for ``jp.structured(structure, reduce=jp.reduce.sum)``: a normalisation shares its
    dimension with the layer before it, so a channel's score is the sum of the scales that it passes
    through. In a pattern that ranks kernel entries themselves all of them would tie.

    Args:
      params: any pytree of arrays.
      where: (path, leaf) -> whether the leaf is such a scale.

    Raises:
      ValueError: when ``where`` selects no leaf.

    References:
      Liu et al., `Network Slimming <https://arxiv.org/abs/1708.06519>`__, 2017, section 3. The L1
      term that drives scales to zero belongs to the loss, and is not added here.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.batch_norm_scale({"scale": jnp.array([-2.0]), "w": jnp.ones(1)})
      {'scale': Array([2.], dtype=float32), 'w': Array([0.], dtype=float32)}
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    chosen = [where(path_str(path), w) for path, w in flat]
    if not any(chosen):
        raise ValueError(
            "batch_norm_scale finds no scale of a normalisation among the leaves "
            f"{[path_str(path) for path, _ in flat][:6]}; pass where=lambda path, leaf: ..., or "
            "score a network without normalisation with jp.scores.l2"
        )

    def score(w: Any, is_scale: bool) -> Any:
        if not is_float(w):
            return w
        return jnp.abs(w) if is_scale else jnp.abs(jnp.zeros_like(w))

    scores = [score(w, is_scale) for (_, w), is_scale in zip(flat, chosen, strict=True)]
    return jax.tree.unflatten(treedef, scores)


def fpgm(params: Params, **evidence: Any) -> Scores:
    r"""Returns how far an entry's filter is from the other filters of its leaf.

    .. math:: \sum_j \lVert F_i - F_j \rVert_2

    with :math:`F_i` the slice i of the last axis, an output of a kernel (..., in, out). A filter
    near all the others, that is near their geometric median, can be replaced by them. Leaves of
    fewer than two axes score 0. Made for ``jp.channel()``, and for ``jp.structured(structure)``:
    there the entries of consumers give every unit of a dimension the same share, and don't vote.

    References:
      He et al., `Geometric Median <https://arxiv.org/abs/1811.00250>`__, 2019, eq. 5 and 6 (numbers
      not checked).

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.fpgm({"w": jnp.array([[0.0, 1.0, 5.0]])})["w"]
      Array([[6., 5., 9.]], dtype=float32)
    """
    return map_floats(_distances, params)


def _distances(w: jax.Array) -> jax.Array:
    wide = widen(w)
    if wide.ndim < 2 or wide.size == 0:
        return jnp.zeros_like(jnp.abs(wide))
    filters = wide.reshape(-1, wide.shape[-1])

    def total(one: jax.Array) -> jax.Array:
        return jnp.sum(jnp.linalg.norm(filters - one[:, None], axis=0))

    # One filter at a time: all pairs at once take out x out x in entries of memory.
    return jnp.broadcast_to(jax.lax.map(total, filters.T), wide.shape)
