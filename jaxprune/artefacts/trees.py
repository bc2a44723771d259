"""Trees of array types as JSON: what a program takes and gives, without code."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

NODES: dict[Any, str] = {dict: "dict", tuple: "tuple", list: "list"}


def describe(tree: Any, where: str) -> Any:
    """A tree of arrays or their types as JSON; sizes may be names.

    Raises:
      TypeError: for a node that is no dict, tuple, list or None.

    Example:
      >>> import jax.numpy as jnp
      >>> describe({"x": jnp.zeros((2, 3)), "y": None}, "the arguments")
      {'dict': {'x': 'float32[2,3]', 'y': None}}
    """
    if tree is None:
        return None
    kind = NODES.get(type(tree))
    if kind == "dict" and all(isinstance(key, str) for key in tree):
        return {kind: {key: describe(x, where) for key, x in tree.items()}}
    if kind in ("tuple", "list"):
        return {kind: [describe(x, where) for x in tree]}
    if not jax.tree_util.all_leaves([tree]):
        raise TypeError(
            f"{where} hold a {type(tree).__name__}, which can't be described in a file; wanted "
            "dicts by strings, tuples, lists and arrays"
        )
    aval = jax.typeof(tree)
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def restore(found: Any) -> Any:
    """The tree of ``jax.ShapeDtypeStruct`` that :func:`describe` described.

    Raises:
      ValueError: for anything else.

    Example:
      >>> restore({"tuple": ["float32[b,3]"]})
      (ShapeDtypeStruct(shape=(b, 3), dtype=float32),)
    """
    if found is None:
        return None
    if isinstance(found, str) and (parts := re.fullmatch(r"(\w+)\[(.*)\]", found)):
        shape = jax.export.symbolic_shape(parts[2]) if parts[2] else ()
        return jax.ShapeDtypeStruct(shape, np.dtype(parts[1]))
    if isinstance(found, dict) and len(found) == 1:
        ((kind, inside),) = found.items()
        if kind == "dict" and isinstance(inside, dict):
            return {key: restore(x) for key, x in inside.items()}
        if kind in ("tuple", "list") and isinstance(inside, list):
            return (tuple if kind == "tuple" else list)(map(restore, inside))
    raise ValueError(f"holds {found!r:.80} where a tree of types is wanted")
