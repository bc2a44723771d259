"""Evidence that a score can't do without, and what is said where it is missing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxprune.masks import check_structure
from jaxprune.typing import Params, path_str


def required(score: str, name: str, value: Any, how: str) -> None:
    """Raises TypeError, with the way to compute it, when evidence is missing."""
    if value is None:
        raise TypeError(f"{score} needs the evidence {name}=; write {how}")


def check_stats(method: str, params: Params, stats: Any) -> None:
    """Raises unless stats are what ``jp.calibrate`` gives for params like these.

    Raises:
      TypeError: for anything else than all statistics.
      ValueError: for statistics of other params.
    """
    if not hasattr(stats, "grams"):
        raise TypeError(
            f"{method}: stats is a {type(stats).__name__}; wanted all that "
            "jp.calibrate(fn, params, batches) returns, not its .norms or .grams alone"
        )
    stats.check_params(method, params)


def required_tree(score: str, name: str, tree: Any, params: Params, how: str) -> None:
    """As :func:`required`; besides ValueError unless the tree has params' structure and shapes."""
    required(score, name, tree, how)
    check_structure(name, tree, params, f"pass {how}")
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True)
    for (path, w), x in pairs:
        if hasattr(w, "dtype") and np.shape(x) != np.shape(w):
            raise ValueError(
                f"{score}: {name} has shape {np.shape(x)} at {path_str(path)}, the leaf "
                f"{np.shape(w)}; pass {how}"
            )
