"""Scores that need the parameters alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.types import Params, Scores, Where, path_str


def is_float(leaf: Any) -> bool:
    """Does a leaf hold real or complex floats? Counters, keys and functions are no weights."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def leaf_name(path: str) -> str:
    """The last part of a path that says what a leaf is; NNX adds ``/value`` to all of its own."""
    return path.removesuffix("/value").rsplit("/", 1)[-1]


def magnitude(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`|w|` for every entry.

    Leaves that hold no floats are passed through, by this and all scores: no pattern prunes them.

    References:
      Han et al., [Learning both Weights and Connections](https://arxiv.org/abs/1506.02626), 2015.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.magnitude({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([2., 1.], dtype=float32)}
    """
    return jax.tree.map(lambda w: jnp.abs(w) if is_float(w) else w, params)


def l2(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`w^2`: summed over the entries of a unit, its squared L2 norm.

    Made for ``jp.structured(structure, reduce="sum")``. For single entries it ranks as
    :func:`magnitude` does. Half precision is squared in float32, where it can't overflow.

    References:
      Li et al., [Pruning Filters](https://arxiv.org/abs/1608.08710), 2017, section 3.1 names the
      norm of a filter; here of all slots of a unit, in the form of He et al.,
      [Soft Filter Pruning](https://arxiv.org/abs/1808.06866), 2018, eq. 2 with p = 2.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.l2({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([4., 1.], dtype=float32)}
    """
    return jax.tree.map(lambda w: jnp.square(jnp.abs(widen(w))) if is_float(w) else w, params)


def widen(x: Any) -> jax.Array:
    """At least float32: products of half-precision numbers underflow, and means of them tie."""
    return jnp.asarray(x, jnp.float32) if jnp.finfo(x.dtype).bits < 32 else jnp.asarray(x)


def random(params: Params, *, key: jax.Array, step: Any = None, **evidence: Any) -> Scores:
    """Returns uniform scores in [0, 1): the control that every comparison needs.

    Args:
      params: any pytree of arrays.
      key: a ``jax.random.key``.
      step: folded into the key where given, so that each renewal of the masks draws anew.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, jaxprune as jp
      >>> jp.random({"w": jnp.ones((2, 3))}, key=jax.random.key(0))["w"].shape
      (2, 3)
      >>> score = functools.partial(jp.random, key=jax.random.key(0))
      >>> tx = jp.prune(optax.sgd(0.1), score, 0.5)
    """
    if step is not None:
        key = jax.random.fold_in(key, step)
    leaves, treedef = jax.tree.flatten(params)
    drawn = [
        jax.random.uniform(jax.random.fold_in(key, i), np.shape(w)) if is_float(w) else w
        for i, w in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, drawn)


def is_norm_scale(path: str, leaf: Any) -> bool:
    """A leaf named scale or gamma, or a vector named weight (as in Equinox)."""
    name = leaf_name(path)
    return is_float(leaf) and (name in ("scale", "gamma") or (name == "weight" and leaf.ndim == 1))


def batch_norm_scale(params: Params, *, where: Where = is_norm_scale, **evidence: Any) -> Scores:
    r"""Returns :math:`|\gamma|` at the scales of normalisation layers, zero elsewhere.

    Made for ``jp.structured(structure, reduce="sum")``: a normalisation shares its dimension with
    the layer before it, so a channel's score is the sum of the scales that it passes through. In
    a pattern that ranks kernel entries themselves all of them would tie.

    Args:
      params: any pytree of arrays.
      where: (path, leaf) -> whether the leaf is such a scale.

    Raises:
      ValueError: when ``where`` selects no leaf.

    References:
      Liu et al., [Network Slimming](https://arxiv.org/abs/1708.06519), 2017, section 3. The L1
      term that drives scales to zero belongs to the loss, and is not added here.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.batch_norm_scale({"scale": jnp.array([-2.0]), "w": jnp.ones(1)})
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
