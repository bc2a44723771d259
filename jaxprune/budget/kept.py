"""How much score counts of dimensions keep, as tables for the solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.budget.model import Model, dims_in
from jaxprune.budget.solver import Term, Total, merged
from jaxprune.structure.structure import Structure

OBJECTIVES = ("sum", "balanced")


def score_total(
    structure: Structure, model: Model, scores: Any, objective: str = "sum"
) -> tuple[Total, dict[str, np.ndarray], Total]:
    """What is to be large, per dimension its units with the best first, and the score kept.

    Scores per entry: a leaf keeps its sum times, for each of its dimensions, the share of that sum
    in the units kept. That is exact for one dimension in a leaf, and for several it takes their
    shares as independent. Scores per unit (``{dimension: vector}``) simply add.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; wanted one of {OBJECTIVES}")
    terms, order = _terms(structure, model, scores)
    total = Total(merged(terms), len(model.names))
    if objective == "sum":
        return total, order, total
    return Total(merged([_balanced(t) for t in terms]), len(model.names)), order, total


def _balanced(term: Term) -> Term:
    """The root of the share that is kept: going from half to nothing costs more than the first."""
    return Term(term.dims, np.sqrt(term.table / max(term.table.max(), 1e-300)))


def _terms(
    structure: Structure, model: Model, scores: Any
) -> tuple[list[Term], dict[str, np.ndarray]]:
    if jax.tree.structure(scores) == structure.treedef:
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(scores)]
        _check(structure, leaves)
        units = structure.unit_scores(scores, "sum")
        order = {n: _best_first(np.asarray(units[n])) for n in model.names}
        return _of_entries(structure, model, leaves, order), order
    return _of_units(structure, model, scores)


def _check(structure: Structure, leaves: Sequence[np.ndarray]) -> None:
    for path, leaf in zip(structure.paths, leaves):
        if leaf.size and not leaf.min() >= 0:
            raise ValueError(
                f"the score of {path} is {leaf.min()} somewhere; what is kept adds up, so wanted "
                "are finite numbers >= 0: take jnp.abs of it, or give scores of whole units, "
                "{dimension name: vector}"
            )
    if not any(leaf.sum() > 0 for leaf in leaves):
        raise ValueError("all scores are 0, so that nothing tells one unit from another")


def _best_first(units: np.ndarray) -> np.ndarray:
    return np.argsort(-units, kind="stable")


def _of_entries(
    structure: Structure,
    model: Model,
    leaves: Sequence[np.ndarray],
    order: Mapping[str, np.ndarray],
) -> list[Term]:
    own = [axes.find(structure.dims[n].axis) for n in model.names]
    index = {axis: i for i, axis in enumerate(own)}
    terms = []
    for axs, leaf in zip(structure.param_axes, leaves):
        dims = dims_in(axs, index)
        table = np.asarray(leaf.sum())
        for d in dims:
            k = index[d]
            share = _share(axs, leaf, d, order[model.names[k]], model.counts[k])
            table = table[..., None] * share
        terms.append(Term(tuple(index[d] for d in dims), table))
    return terms


def _share(
    axs: Sequence[Axis], leaf: np.ndarray, dim: Axis, order: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """For each count, the share of a leaf's score that its best units keep."""
    kept = np.ones(len(counts))
    for k, axis in enumerate(axs):
        others = tuple(i for i in range(leaf.ndim) if i != k)
        for units in axes.units_along(axis, dim):
            line = leaf.sum(others)
            inside = units >= 0
            of_units = np.bincount(units[inside], line[inside], minlength=dim.size)
            sums = np.concatenate([[0.0], np.cumsum(of_units[order])]) + line[~inside].sum()
            kept = kept * sums[counts] / max(line.sum(), 1e-300)
    return kept


def _of_units(
    structure: Structure, model: Model, scores: Any
) -> tuple[list[Term], dict[str, np.ndarray]]:
    if not isinstance(scores, Mapping) or not set(scores) & set(model.names):
        raise ValueError(
            f"scores have the structure {jax.tree.structure(scores)}; wanted one like params, "
            f"{structure.treedef}, such as jp.magnitude(params), or {{dimension name: scores of "
            "its units}"
        )
    terms, order = [], {}
    for k, name in enumerate(model.names):
        size = structure.dims[name].size
        units = np.asarray(scores.get(name, np.zeros(size)), np.float64)
        if units.shape != (size,) or not (units >= 0).all():
            raise ValueError(
                f"scores[{name!r}] has shape {units.shape} and the least value "
                f"{units.min(initial=0)}; wanted {(size,)} numbers >= 0, one per unit"
            )
        order[name] = _best_first(units)
        sums = np.concatenate([[0.0], np.cumsum(units[order[name]])])
        terms.append(Term((k,), sums[model.counts[k]]))
    return terms, order
