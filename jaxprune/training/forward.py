"""The weights that the network computes with, where they differ from the stored ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.masks import apply_masks, check_masks
from jaxprune.training.packing import unpacked
from jaxprune.training.soft_threshold import shrink
from jaxprune.types import Params


def forward_params(params: Params, opt_state: Any) -> Params:
    """Returns the weights to use in the loss and in evaluation, with zeros where pruned.

    A pure function, to be called before differentiation: the gradient is then that of the masked
    network with respect to *all* entries, which straight-through estimators need:

    ``grads = jax.grad(loss)(jp.training.forward_params(params, opt_state), batch)``

    For methods that land on masked parameters it returns params as they are, except before the
    first step, where it makes them sparse. Under soft thresholds it also shrinks what is kept.

    Args:
      params: the stored ones.
      opt_state: that of the optimizer, with one training method anywhere in it.

    Raises:
      ValueError: when there is none in it, or it was made for other params.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"kernel": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
      >>> tx = jp.training.static(optax.sgd(0.1), 0.5, score=jp.magnitude)
      >>> jp.training.forward_params(params, tx.init(params))["kernel"].tolist()
      [[4.0, -3.0, 0.0, 0.0]]
    """
    masks = optax.tree_utils.tree_get(opt_state, "masks")
    if masks is None:
        raise ValueError(
            "opt_state holds no masks; pass the state of an optimizer inside a training method, "
            "such as tx = jp.training.rigl(optax.adam(1e-3), 0.9)"
        )
    masks = _hung_on(params, _filled(unpacked(masks), params, True))
    check_masks(masks, params)
    thresholds = optax.tree_utils.tree_get(opt_state, "thresholds")
    if thresholds is None:
        return apply_masks(params, masks)
    return shrink(params, masks, _hung_on(params, _filled(thresholds, params, 0.0)))


def _filled(tree: Any, params: Params, value: Any) -> Any:
    """``tree`` with one value where ``optax.masked`` or ``partition`` left leaves out."""

    def left_out(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def fill(node: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: jnp.asarray(value), part) if left_out(node) else node

    if not any(map(left_out, jax.tree.leaves(tree, is_leaf=left_out))):
        return tree
    return jax.tree.map(fill, tree, params, is_leaf=left_out)


def _hung_on(params: Params, tree: Any) -> Any:
    """``tree`` in params' structure, where it has the same leaves at the same paths.

    ``nnx.Optimizer`` wraps the leaves of its state in variables of another type than params have.
    """
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (params, tree)]
    if paths[0] != paths[1]:
        return tree
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))
