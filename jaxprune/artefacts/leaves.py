"""Leaves as JSON and arrays: shapes, types, random keys, Python and NumPy leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.artefacts.checks import Size
from jaxprune.artefacts.host import is_key, to_host
from jaxprune.artefacts.tensors import DTYPES
from jaxprune.structure.infer import paths_of

PYTHON = {"bool": bool, "int": int, "float": float, "complex": complex}
TYPE = {"shape": [Size], "dtype": set(DTYPES), "weak": bool, "key": str}
LEAF = TYPE | {"path": str, "kind": {"jax", "numpy", *PYTHON}}


def type_of(leaf: Any) -> dict[str, Any]:
    """Shape and type of a leaf as JAX sees it; of random keys the words' type and the generator."""
    aval = jax.typeof(leaf)
    key, dtype = "", aval.dtype
    if is_key(leaf):
        key, dtype = str(jax.random.key_impl(jnp.empty((), dtype))), np.dtype(np.uint32)
    weak = bool(getattr(aval, "weak_type", False))
    return {"shape": list(aval.shape), "dtype": dtype.name, "weak": weak, "key": key}


def struct_of(row: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """What :func:`type_of` described."""
    dtype = jax.random.key(0, impl=row["key"]).dtype if row["key"] else DTYPES[row["dtype"]]
    return jax.ShapeDtypeStruct(tuple(row["shape"]), dtype, weak_type=row["weak"])


def describe(paths: Sequence[str], shapes: Sequence[Sequence[int]], params: Any) -> list[Any]:
    """A row for each leaf: its path, its full shape, and what it takes to make it again.

    Raises:
      TypeError: for a leaf of a type that can't be written.
    """
    leaves = zip(paths, shapes, jax.tree.leaves(params), strict=True)
    return [_describe(path, shape, leaf) for path, shape, leaf in leaves]


def _describe(path: str, shape: Sequence[int], leaf: Any) -> dict[str, Any]:
    kind = type(leaf).__name__ if type(leaf) in PYTHON.values() else "jax"
    kind = "numpy" if isinstance(leaf, (np.ndarray, np.generic)) else kind
    row = type_of(leaf)
    if kind != "jax":
        row["dtype"] = np.asarray(leaf).dtype.name
    if row["dtype"] not in DTYPES or row["key"] not in ("", *_GENERATORS):
        raise TypeError(
            f"{path} is {jax.typeof(leaf)}, which can't be written; wanted numbers, booleans or "
            f"random keys of {', '.join(_GENERATORS)}"
        )
    return row | {"path": path, "kind": kind, "shape": list(shape)}


_GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg")


def arrays_of(paths: Sequence[str], params: Any) -> dict[str, np.ndarray]:
    """Leaves by path, in host memory.

    Raises:
      ValueError: for two leaves of one path.
    """
    leaves = jax.tree.leaves(params)
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise ValueError(f"two leaves of params are named {twice!r}; give them other names")
    return {f"params/{path}": to_host(x) for path, x in zip(paths, leaves, strict=True)}


def restore(row: Mapping[str, Any], array: np.ndarray) -> Any:
    """The leaf that :func:`describe` and :func:`to_host` made ``row`` and ``array`` of.

    Raises:
      ValueError: when it would be of another type here.
    """
    if row["kind"] == "numpy":
        return array.copy()
    if row["kind"] in PYTHON:
        return PYTHON[row["kind"]](array[()])
    if row["key"]:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=row["key"])
    here = jax.dtypes.canonicalize_dtype(array.dtype)
    if here != array.dtype:
        raise ValueError(
            f"holds {row['path']} as {array.dtype}, which would become {here} here: call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    return _weak(jnp.asarray(array)) if row["weak"] else jnp.asarray(array)


def _weak(leaf: jax.Array) -> jax.Array:
    """The same with a weak type, as Python numbers have it."""
    zeros = jnp.full(leaf.shape, np.zeros((), leaf.dtype).item())
    return zeros.at[...].set(leaf) if zeros.dtype == leaf.dtype else leaf


def small_shape(row: Mapping[str, Any], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the array that holds a leaf: random keys have an axis of words."""
    words = jax.random.key_data(jax.random.key(0, impl=row["key"])).shape if row["key"] else ()
    return (*shape, *words)


def check(
    saved: Sequence[Mapping[str, Any]], params: Any, when: Sequence[Mapping[str, Any]]
) -> None:
    """The saved leaves are those of this model, whatever their order.

    Types may be those of the saved leaves or those that params had ``when`` it was compacted.
    """
    names, leaves = paths_of(params), jax.tree.leaves(params)
    theirs = {row["path"]: tuple(row["shape"]) for row in saved}
    ours = {path: np.shape(leaf) for path, leaf in zip(names, leaves, strict=True)}
    for path in [*theirs, *ours]:
        if theirs.get(path) != ours.get(path):
            raise ValueError(
                stale(f"{path} is saved as {theirs.get(path)} and is {ours.get(path)} in params")
            )
    if len(saved) != len(theirs) or len(saved) != len(leaves) or len(saved) != len(when):
        raise ValueError(stale(f"{len(saved)} leaves are saved, {len(leaves)} are in params"))
    rows = {row["path"]: (_named(row), _named(then)) for row, then in zip(saved, when)}
    for path, leaf in zip(names, leaves, strict=True):
        mine = type_of(leaf)
        if _named(mine) not in rows[path] and not mine["weak"]:
            raise ValueError(
                stale(f"{path} is saved as {rows[path][0]} and is {_named(mine)} in params")
            )


def _named(row: Mapping[str, Any]) -> str:
    return row["key"] or row["dtype"]


def stale(what: str) -> str:
    return f"the saved plan is of another model: {what}; call jp.compact again"
