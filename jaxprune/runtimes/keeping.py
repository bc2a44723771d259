"""Which weights stay in float where others are quantised.

In an engine's file a leaf is not what it was: it is transposed, folded with a norm, or part of a
matrix with other leaves. So a program is written twice, the second time with these leaves changed,
its twin, and the constants that differ are those that are made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.typing import path_str

FACTOR = 1.5  # Zeros stay zeros, and no two numbers become one.


def changed(params: Any, names: Sequence[str]) -> Any:
    """Params with the leaves of these names multiplied.

    Args:
      params: a tree of arrays.
      names: paths of leaves, or of what they lie in: "params/Dense_0" is all of that layer's.

    Raises:
      ValueError: for a name of no floating leaf.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_str(path) for path, _ in leaves]
    floats = [path for path, (_, x) in zip(paths, leaves) if _is_float(x)]
    for name in names:
        if not any(_within(path, name) for path in floats):
            told = ", ".join(map(repr, floats[:12])) + (" ..." if len(floats) > 12 else "")
            raise ValueError(
                f"keep_float names {name!r}, which is no floating weight of this function; there "
                f"are {told or 'none'}. Pass such paths, or those of a layer: "
                "keep_float=jp.runtimes.sensitivity(params, metric).keep_float(floor)"
            )
    new = [
        x * FACTOR if _is_float(x) and any(_within(path, name) for name in names) else x
        for path, (_, x) in zip(paths, leaves)
    ]
    return jax.tree.unflatten(treedef, new)


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/")


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def differing(mine: Mapping[Any, Any], twin: Mapping[Any, Any], names: Sequence[str]) -> set[Any]:
    """The constants of a file that are others in its twin's, by what the engine calls them.

    Raises:
      ValueError: where none is, or the files hold other constants.
    """
    if mine.keys() != twin.keys():
        raise ValueError(
            f"the file holds other constants when {', '.join(names)} change, so that those that "
            "stay in float can't be told; leave out keep_float, or quantize"
        )
    found = {key for key, array in mine.items() if not np.array_equal(array, twin[key])}
    if not found:
        raise ValueError(
            f"no constant of the file is made of {', '.join(names)}: the function doesn't read "
            "them; leave them out of keep_float"
        )
    return found
