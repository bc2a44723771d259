"""Scores that need the parameters alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.types import Params, Scores, path_str


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds (real or complex) floats; counters and random keys are never scored."""
    return jnp.issubdtype(jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype,
                          jnp.inexact)  # fmt: skip


def magnitude(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`|w|` for every entry; leaves that hold no floats pass unchanged.

    References:
      Han et al., [Learning both Weights and Connections](https://arxiv.org/abs/1506.02626), 2015.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.magnitude({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([2., 1.], dtype=float32)}
    """
    return jax.tree.map(lambda w: jnp.abs(w) if is_float(w) else w, params)


def random(params: Params, *, key: jax.Array, step: Any = None, **evidence: Any) -> Scores:
    """Returns uniform scores in [0, 1), a control that every comparison needs.

    Args:
      params: any pytree of arrays.
      key: a ``jax.random.key``.
      step: folded into the key where given, so that steps draw anew.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> jp.random({"w": jnp.ones((2, 3))}, key=jax.random.key(0))["w"].shape
      (2, 3)
    """
    if step is not None:
        key = jax.random.fold_in(key, step)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))[: len(leaves)]
    drawn = [
        jax.random.uniform(k, w.shape) if is_float(w) else w
        for k, w in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def batch_norm_scale(params: Params, **evidence: Any) -> Scores:
    r"""Returns :math:`|\gamma|` at the leaves named ``scale`` (or ``gamma``), zero elsewhere.

    Made for ``jp.structured(structure, reduce="sum")``: the score of a channel is then the sum of
    the scales of the normalisations that it passes through.

    Raises:
      ValueError: when no leaf is named scale or gamma.

    References:
      Liu et al., [Network Slimming](https://arxiv.org/abs/1708.06519), 2017, without its L1 term.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.batch_norm_scale({"scale": jnp.array([-2.0]), "w": jnp.ones(1)})
      {'scale': Array([2.], dtype=float32), 'w': Array([0.], dtype=float32)}
    """

    def named(path: Any) -> bool:
        return path_str(path).rsplit("/", 1)[-1] in ("scale", "gamma")

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(map(named, paths)):
        raise ValueError(
            "batch_norm_scale found no leaf named scale or gamma among "
            f"{[path_str(p) for p in paths[:6]]}; for networks without normalisation use "
            "jp.magnitude or jp.scores.taylor"
        )

    def one(path: Any, w: Any) -> Any:
        if not is_float(w):
            return w
        return jnp.abs(w) if named(path) else jnp.zeros_like(w)

    return jax.tree_util.tree_map_with_path(one, params)
