"""Scores as ``{dimension: vector}``, one number for each unit, told from those like params."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._trees import difference
from jaxprune.selection import known
from jaxprune.sharding import host
from jaxprune.structure.dimensions import Structure


def like_params(structure: Structure, scores: Any) -> bool:
    """Whether scores are of entries: a tree like params."""
    return bool(jax.tree.structure(scores) == structure.treedef)


def check_names(structure: Structure, names: Sequence[str], scores: Any) -> None:
    """Raises ValueError unless there are scores for each of ``names``, and for dimensions alone."""
    if not (isinstance(scores, Mapping) and set(scores) & set(structure.dims)):
        raise ValueError(
            f"scores have another structure than params: the tree "
            f"{difference(scores, structure.treedef)}; wanted one like params, such as "
            "jp.magnitude(params), or {dimension name: scores of its units} for each of "
            f"{list(names)[:8]}"
        )
    unknown = [name for name in scores if name not in structure.dims]
    missing = [name for name in names if name not in scores]
    if unknown or missing:
        raise ValueError(
            f"scores of units are wanted for each dimension that may change; there are none for "
            f"{missing[:8]}, and {unknown[:8]} name no dimension; give them, as "
            "structure.unit_scores does, or leave dimensions out by dims=[...]"
        )


def check_shape(name: str, x: Any, wanted: tuple[int, ...]) -> None:
    """Raises ValueError unless the scores of a leaf or a dimension are as many as wanted."""
    if np.shape(x) != wanted:
        raise ValueError(
            f"the scores of {name} have shape {np.shape(x)}, wanted {wanted}: one number for "
            "each entry of params, or for each unit of a dimension"
        )


def rankable(structure: Structure, names: Sequence[str], scores: Any) -> dict[str, jax.Array]:
    """The vectors of ``names``, checked; what is traced may hold NaN, which ranks lowest."""
    check_names(structure, names, scores)
    for name in names:
        check_shape(name, scores[name], (structure.dims[name].size,))
        if known(scores[name]) and np.isnan(host(scores[name])).any():
            raise ValueError(f"the scores of {name} hold NaN, so that its units can't be ranked")
    return {n: jnp.asarray(host(scores[n]) if known(scores[n]) else scores[n]) for n in names}
