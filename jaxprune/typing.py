"""The trees and the four function types that carry the whole library.

A **mask** is boolean and ``True`` means *kept*. This is the one place where that is said; no name
anywhere inverts it. A mask broadcasts against its leaf (size-1 axes are untouched axes) and a
scalar ``True`` is a dense leaf, so that params, scores, sparsities and masks share one tree
structure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax

PyTree = Any
Array = jax.Array

# Trees of one structure: what the four function types take and give.
Params = PyTree  # float leaves of any shape
Scores = PyTree  # larger = keep; same shapes as params
Sparsities = PyTree  # one scalar in [0, 1] per leaf
Masks = PyTree  # boolean, True = kept


class ScoreFn(Protocol):
    """``(params, **evidence) -> scores``; evidence is keyword-only, unknown evidence is ignored."""

    def __call__(self, params: Params, **evidence: Any) -> Scores: ...


Distribution = Callable[[Scores, Any], Sparsities]
Pattern = Callable[[Scores, Any], Masks]
Schedule = Callable[[Any], Any]  # optax's own type: step -> sparsity

Where = Callable[[str, Any], bool]  # (leaf's path, leaf) -> is it meant?


def ending_in(path: str, names: Collection[str]) -> str | None:
    """The longest ending of ``path`` among ``names``: ``0/mu/w`` is a moment of ``w``."""
    keys = path.split("/")
    endings = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((name for name in endings if name and name in names), None)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """(path, leaf) of all leaves of a tree, in order.

    Raises:
      ValueError: for two leaves with the same path, such as ``{"a/b": x, "a": {"b": y}}``.
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    named = [(path_str(path), leaf) for path, leaf in flat]
    if len(dict(named)) < len(named):
        _refuse_equal([path for path, _ in flat])
    return named


def _refuse_equal(paths: Sequence[tuple[Any, ...]]) -> None:
    first: dict[str, Any] = {}
    for path in paths:
        if path_str(path) in first:
            both = ", ".join(map(jax.tree_util.keystr, (first[path_str(path)], path)))
            raise ValueError(
                f"two leaves have the path {path_str(path)}; rename one, paths tell leaves apart: "
                f"{both}"
            )
        first[path_str(path)] = path


def path_str(path: tuple[Any, ...]) -> str:
    """A leaf's path as one string, ``params/Dense_0/kernel``; the way all messages name leaves."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
