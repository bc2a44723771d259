"""What an optimizer's state holds, however deeply wrappers nest it: masks, and averages of params.

Nodes are told by the names of their fields, as ``optax.tree_utils.tree_get`` tells them, so that a
state is read that a checkpoint has turned into dicts, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.masks import PackedMask, filled, left_out
from jaxprune.typing import Masks, Params, PyTree

_SCHEDULE_FREE = {"b1", "weight_sum", "step_count", "max_lr", "base_optimizer_state", "z"}


class Held(NamedTuple):
    """What one training method in a state holds."""

    masks: Masks  # as it holds them: perhaps packed, of some leaves of params, or of one vector
    thresholds: Any  # of jp.training.soft_threshold, or None


class Average(NamedTuple):
    """Of ``optax.contrib.schedule_free``: params y lie between the average x and ``z``."""

    b1: Any
    z: Params


def held(opt_state: Any) -> list[Held]:
    """What all training methods in a state hold, outermost first."""
    found = []
    for fields in _nodes(opt_state):
        if "masks" in fields and _are_masks(fields["masks"]):
            memory = _fields(fields.get("memory"))
            is_soft = memory.keys() == {"thresholds"}
            found.append(Held(fields["masks"], memory["thresholds"] if is_soft else None))
    return found


def averages(opt_state: Any) -> list[Average]:
    """The averages in a state, outermost first."""
    return [Average(fields["b1"], fields["z"]) for fields in _nodes(opt_state) if _averages(fields)]


def _averages(fields: Mapping[str, Any]) -> bool:
    return fields.keys() >= _SCHEDULE_FREE


def _nodes(state: Any) -> Iterator[Mapping[str, Any]]:
    """The fields of each node of a state that has some; not of those inside masks and copies."""
    fields = _fields(state)
    yield fields
    own = "masks" in fields and _are_masks(fields["masks"])
    inside = {"masks", "memory"} if own else {"z"} if _averages(fields) else set()
    children = [child for name, child in fields.items() if name not in inside]
    for child in children if fields else _children(state):
        yield from _nodes(child)


def _fields(node: Any) -> Mapping[str, Any]:
    if isinstance(node, Mapping):
        return node
    return node._asdict() if isinstance(node, tuple) and hasattr(node, "_asdict") else {}


def _children(node: Any) -> list[Any]:
    """One level down; none of a leaf, which is its own only one."""
    children = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    return [child for child in children if child is not node]


def _are_masks(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=_is_packed)
    return all(_is_packed(x) or jnp.issubdtype(jnp.result_type(x), jnp.bool_) for x in leaves)


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedMask)


def hung_on(params: Params, tree: PyTree, value: Any) -> PyTree:
    """``tree`` in params' structure, wherever it was made.

    ``optax.masked`` and ``partition`` leave leaves out, which get ``value``; ``optax.flatten``
    makes one vector of all; ``nnx.Optimizer`` wraps leaves in variables of another type.
    """
    tree = filled(_unflattened(tree, params), params, value)
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (params, tree)]
    if paths[0] != paths[1]:
        return tree
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))


def _unflattened(tree: PyTree, params: Params) -> PyTree:
    """A vector of all entries of params, or one number for all, cut into leaves."""
    leaves, treedef = jax.tree.flatten(params)
    sizes = [np.size(leaf) for leaf in leaves]
    is_one = jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)) and not left_out(tree)
    if not is_one or jax.tree_util.treedef_is_leaf(treedef):
        return tree
    if np.ndim(tree) == 0:
        return jax.tree.unflatten(treedef, [tree] * len(leaves))
    if np.shape(tree) != (sum(sizes),):
        return tree
    pieces = jnp.split(jnp.asarray(tree), np.cumsum(sizes)[:-1])
    shaped = [piece.reshape(np.shape(leaf)) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)
