"""The trees and the four function types that carry the whole library.

A **mask** is boolean and ``True`` means *kept*. This is the one place where that is said; no name
anywhere inverts it. A mask broadcasts against its leaf (size-1 axes are untouched axes) and a
scalar ``True`` is a dense leaf, so that params, scores, sparsities and masks share one tree
structure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
PatternFn = Callable[[Scores, Any], Masks]  # a Pattern, or a user's own function
Schedule = Callable[[Any], Any]  # optax's own type: step -> sparsity

Where = Callable[[str, Any], bool]  # (leaf's path, leaf) -> is it meant?
ChooseInMatrix = Callable[[Array, Any], Array]  # (scores (in, out), sparsity) -> mask (in, out)


@dataclass(frozen=True, eq=False)
class Pattern:
    """``pattern(scores, sparsity) -> masks``, and what it says of how it chooses.

    The factories (``jp.unstructured``, ``jp.n_m``, ...) make these. A function of one's own
    ``(scores, sparsity) -> masks`` is taken wherever a pattern is, and wrapped there; only methods
    that choose while weights change need ``within``.

    Attributes:
      choose: the function that a call runs.
      name: what error messages call it.
      where: (path, leaf) -> whether the leaf is pruned; None: the pattern doesn't say.
      within: sparsity -> how it chooses within one matrix (in, out) at that sparsity; None: it
        can't, because it couples leaves.
      group: how many inputs of a matrix are chosen together, as the m of N:M; None: any number.
      rows: how many inputs are kept or go together, as in a block; None: each on its own.
      inputs: (path, shape, layout) -> the order of the leaf's input axes in which a mask of the
        matrix is one of the leaf; it raises ValueError where there is none. None: any order.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> choose = lambda scores, sparsity: jax.tree.map(lambda s: s > 0, scores)
      >>> jp.patterns.Pattern(choose, "positive")({"w": jnp.array([-1.0, 2.0])}, 0.5)["w"]
      Array([False,  True], dtype=bool)
    """

    choose: PatternFn
    name: str = "a pattern of one's own"
    where: Where | None = None
    within: Callable[[Any], ChooseInMatrix] | None = None
    group: int | None = None
    rows: int | None = None
    inputs: Callable[[str, tuple[int, ...], Any], tuple[int, ...]] | None = None

    def __call__(self, scores: Scores, sparsity: Any = None) -> Masks:
        """Returns the masks of the scores at a sparsity, as the factory says."""
        return self.choose(scores, sparsity)

    def __repr__(self) -> str:
        return self.name

    @property
    def __name__(self) -> str:
        """What jit, profilers and chex call it."""
        return self.name

    @property
    def __wrapped__(self) -> PatternFn:
        """The function whose source and signature ``inspect`` shows."""
        return self.choose


def ending_in(path: str, names: Collection[str]) -> str | None:
    """The longest ending of ``path`` among ``names``: ``0/mu/w`` is a moment of ``w``.

    Example:
      >>> import jaxprune as jp
      >>> jp.typing.ending_in("0/mu/dense/kernel", ["dense/kernel", "kernel"])
      'dense/kernel'
    """
    keys = path.split("/")
    endings = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((name for name in endings if name and name in names), None)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """(path, leaf) of all leaves of a tree, in order.

    Raises:
      ValueError: for two leaves with the same path, such as ``{"a/b": x, "a": {"b": y}}``.

    Example:
      >>> import jaxprune as jp
      >>> jp.typing.named_leaves({"b": 1, "a": {"c": 2}})
      [('a/c', 2), ('b', 1)]
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
    """A leaf's path as one string, ``params/Dense_0/kernel``; the way all messages name leaves.

    Example:
      >>> import jax, jaxprune as jp
      >>> ((path, _),) = jax.tree_util.tree_leaves_with_path({"params": {"kernel": 1.0}})
      >>> jp.typing.path_str(path)
      'params/kernel'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


# Where the types of results are defined, for annotations: ``jp.typing.Structure``.
RESULTS = {
    "Artefact": "jaxprune.runtimes.artefact",
    "Certificate": "jaxprune.compaction.certificate",
    "Compact": "jaxprune.compaction.model",
    "Comparison": "jaxprune.measuring",
    "Cost": "jaxprune.costs.api",
    "Dimension": "jaxprune.structure.dimensions",
    "Exported": "jaxprune.artefacts.export",
    "Frozen": "jaxprune.runtimes.freezing",
    "Pruned": "jaxprune.oneshot",
    "Runtime": "jaxprune.runtimes",
    "Stats": "jaxprune.calibration.api",
    "Structure": "jaxprune.structure.dimensions",
    "Summary": "jaxprune.report",
    "Timing": "jaxprune.measuring",
}


def __getattr__(name: str) -> Any:
    """The type of a result, imported when it is asked for: this file stands below all others."""
    if name in RESULTS:
        return getattr(importlib.import_module(RESULTS[name]), name)
    raise AttributeError(f"jp.typing has no attribute {name!r}", name=name)
