"""Which parameter each leaf of another tree belongs to: optimizer states, averages, gradients.

First by structure: a subtree that looks like params, or like one collection of them, maybe with a
small tree in place of each leaf. Then by path: one that ends with a parameter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.typing import ending_in, path_str

Shape = tuple[int, ...]


class _Like(NamedTuple):
    """A structure to look for, and which parameters its leaves are."""

    treedef: Any
    numbers: tuple[int, ...]


def places(
    tree: Any, treedef: Any, paths: Sequence[str], shapes: Sequence[Shape]
) -> list[int | None]:
    """For each leaf of a tree the number of its parameter; None for a leaf that passes as it is.

    Raises:
      ValueError: for a leaf that belongs to a parameter and isn't shaped like it.
    """
    whole = _Like(treedef, tuple(range(len(paths))))
    if jax.tree.structure(tree) == treedef:
        owners: list[int | None] = list(whole.numbers)
    else:
        owners = _owners(tree, whole, paths, shapes)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    found: list[int | None] = []
    for (path, leaf), owner in zip(flat, owners, strict=True):
        if owner is None:
            _check_stranger(path_str(path), leaf, paths, shapes)
        elif not _passes(leaf) and not _is_like(np.shape(leaf), shapes[owner]):
            raise ValueError(_misfit(path_str(path), leaf, paths[owner], shapes[owner]))
        found.append(None if owner is None or np.shape(leaf) == () or _passes(leaf) else owner)
    return found


def _owners(
    tree: Any, whole: _Like, paths: Sequence[str], shapes: Sequence[Shape]
) -> list[int | None]:
    if jax.tree_util.treedef_is_leaf(whole.treedef):  # params are one array, whose path is empty
        leaves = jax.tree.leaves(tree)
        return [0 if _floats(x) or np.shape(x) == shapes[0] else None for x in leaves]
    owners = _by_structure(tree, whole)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    for i, (path, _) in enumerate(flat):
        name = ending_in(path_str(path), paths) if owners[i] is None else None
        owners[i] = owners[i] if name is None else paths.index(name)
    parts = list(_collections(whole.treedef))
    trials = [(part, lambda x, i: _is_like(np.shape(x), shapes[i])) for part in parts]
    trials += [(part, lambda x, i: True) for part in parts if _is_deep(part.treedef)]
    for part, fits in trials:
        if all(i is not None or _passes(x) for i, (_, x) in zip(owners, flat)):
            break
        by_part = _by_structure(tree, part, fits)
        owners = [b if a is None else a for a, b in zip(owners, by_part, strict=True)]
    return owners


def _is_deep(treedef: Any) -> bool:
    """Whether it has more than one level, so that a tree hardly looks like it by chance."""
    return not all(map(jax.tree_util.treedef_is_leaf, treedef.children()))


def _collections(treedef: Any) -> Iterator[_Like]:
    """The children of params: an optimizer may see ``variables["params"]`` alone."""
    start = 0
    for child in treedef.children():
        numbers = tuple(range(start, start + child.num_leaves))
        start += child.num_leaves
        if len(numbers) > 1:
            yield _Like(child, numbers)


def _by_structure(
    tree: Any, like: _Like, fits: Callable[[Any, int], bool] = lambda leaf, i: True
) -> list[int | None]:
    """Owners of the leaves in the innermost subtrees that look like a structure."""
    return _search(tree, like, fits)[0]


def _search(
    node: Any, like: _Like, fits: Callable[[Any, int], bool]
) -> tuple[list[int | None], bool]:
    below = [_search(child, like, fits) for child in _children(node)]
    owners = [owner for found, _ in below for owner in found]
    if not below:
        return [None] * len(jax.tree.leaves(node)), False
    if any(matched for _, matched in below):
        return owners, True
    if _top(node) != like.treedef.node_data():
        return owners, False
    try:
        subtrees = like.treedef.flatten_up_to(node)
    except (ValueError, TypeError):  # it looks otherwise
        return owners, False
    pairs = [(x, i) for sub, i in zip(subtrees, like.numbers) for x in jax.tree.leaves(sub)]
    if not all(fits(x, i) for x, i in pairs):
        return owners, False
    return [i for _, i in pairs], bool(pairs)


def _children(node: Any) -> list[Any]:
    """The nodes one level down; none of a leaf."""
    found = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    return [] if len(found) == 1 and found[0] is node else found


def _top(node: Any) -> Any:
    """The type of a node and its keys."""
    treedef: Any = jax.tree.structure(node, is_leaf=lambda x: x is not node)
    return treedef.node_data()


def _passes(leaf: Any) -> bool:
    """A single number belongs to a parameter as a whole, or stands for nothing."""
    return prod(np.shape(leaf)) == 1


def _is_like(shape: Shape, wanted: Shape) -> bool:
    """Whether it is the parameter's shape, with 1 for some axes."""
    same = len(shape) == len(wanted) and all(n in (1, m) for n, m in zip(shape, wanted))
    return same or prod(shape) == 1


def _floats(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _check_stranger(path: str, leaf: Any, paths: Sequence[str], shapes: Sequence[Shape]) -> None:
    """Raises for what belongs to a parameter, or to all, in a layout that can't be told."""
    if _passes(leaf) or jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
        return
    total = sum(map(prod, shapes))
    if np.shape(leaf) == (total,) and _floats(leaf):
        raise ValueError(_misfit(path, leaf, f"all parameters in one vector of {total}"))
    for name, shape in zip(paths, shapes):
        if _stands_below(path, name):
            raise ValueError(_misfit(path, leaf, name, shape))


def _stands_below(path: str, name: str) -> bool:
    """Whether a parameter's path is followed by more keys; numbers alone say too little."""
    named = not all(key.isdigit() for key in name.split("/"))
    return named and f"/{name}/" in f"/{path}"


def _misfit(path: str, leaf: Any, name: str, shape: Shape | None = None) -> str:
    what = (
        f"wanted {shape} as {name or 'params'} has"
        if shape is not None
        else f"which is that of {name}"
    )
    return (
        f"restrict got shape {np.shape(leaf)} for {path}, {what}; for a state that is not shaped "
        "like params (factored moments, accumulators per axis) call init(small.params)"
    )
