"""Whether a function is the one that was saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxprune._trees import difference
from jaxprune.artefacts.fingerprint import fingerprint
from jaxprune.artefacts.leaves import TYPE, struct_of, type_of
from jaxprune.structure.infer import paths_of

FUNCTION = {
    "program": str,
    "constants": str,
    "jax": str,
    "x64": bool,
    "params": [TYPE],
    "args": [TYPE | {"path": str}],
}
MEANT = "if it is meant to be another one, say so: jp.load(..., same_function=True)"


def describe(fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> dict[str, Any]:
    """A function's fingerprint, and the types of the arguments that it was traced for."""
    return {
        **fingerprint(fn, params, args),
        "jax": jax.__version__,
        "x64": bool(jax.config.read("jax_enable_x64")),
        "params": [type_of(leaf) for leaf in jax.tree.leaves(params)],
        "args": [
            type_of(leaf) | {"path": path}
            for path, leaf in zip(paths_of(tuple(args)), jax.tree.leaves(args), strict=True)
        ],
    }


def check(
    fn: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    saved: Mapping[str, Any],
    order: Mapping[str, int],
) -> None:
    """Traces a function for the types that another was saved for and compares.

    Args:
      fn: the function at hand.
      params: full shapes.
      args: example arguments; their sizes may be others than when the model was saved.
      saved: what :func:`describe` gave.
      order: path of a parameter -> its place among the saved ones.

    Raises:
      ValueError: for another function; for arguments of another structure.
    """
    mine, theirs = paths_of(tuple(args)), [row["path"] for row in saved["args"]]
    if mine != theirs:
        raise ValueError(
            f"args are not what the model was saved for: their tree {_other(mine, theirs)}; "
            f"pass arguments like those that jp.compact was given; {MEANT}"
        )
    rows = [saved["params"][order[path]] for path in paths_of(params)]
    with jax.enable_x64(saved["x64"]):
        inputs = _as_saved(params, rows), _as_saved(tuple(args), saved["args"])
        try:
            found = fingerprint(fn, *inputs)
        except Exception as error:
            types = [str(leaf) for leaf in jax.tree.leaves(inputs[1])]
            raise ValueError(
                f"fn can't be traced for what the model was saved for, {types} ({error}): pass the "
                f"function that jp.compact was given; {MEANT}"
            ) from error
    _compare(found, saved)


def _other(mine: Sequence[str], theirs: Sequence[str]) -> str:
    trees = (dict.fromkeys(paths, 0) for paths in (mine, theirs))
    return difference(*trees) or "has its leaves in another order"


def _as_saved(tree: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The leaves as they were when the model was saved; where they are so, with their sharding."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, rows, strict=True)
    same = [leaf if type_of(leaf) == _type(row) else struct_of(row) for leaf, row in pairs]
    return jax.tree.unflatten(treedef, same)


def _type(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in TYPE}


def _compare(found: Mapping[str, str], saved: Mapping[str, Any]) -> None:
    differ = [part for part in found if found[part] != saved[part]]
    if not differ:
        return
    if saved["jax"] != jax.__version__:
        warnings.warn(
            f"the model was saved with jax {saved['jax']}, and jax {jax.__version__} writes its "
            "function otherwise, so that it can't be told whether fn is the same: compare with "
            "small.certificate.check(), or jp.load(..., same_function=True), which doesn't ask",
            stacklevel=4,
        )
        return
    raise ValueError(
        f"the model was saved for another function: its {' and '.join(differ)} differ from fn's. "
        "Pass the function, with the closed-over arrays and JAX's settings, that jp.compact was "
        f"given, or call jp.compact again; {MEANT}"
    )
