"""How much score counts of dimensions keep, as tables for the solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from jaxprune import reduce
from jaxprune._leaf import is_float
from jaxprune.budget.model import Model, dims_in
from jaxprune.budget.solver import Term, Total, merged
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.scores.removal import Measured
from jaxprune.sharding import host
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.named_scores import check_names, check_shape, like_params

ROOM = 1 / 4  # Below this share of a dimension its units weigh more than their scores:
SHORT = 0.2  # to empty it costs so much of all scores together.
LEAST = 1e-3  # A share counts as this at least: an emptied leaf is penalized, not -infinity.
# It gives what a leaf (or dimension) of score ``whole`` is worth that keeps a ``share`` of it.
Objective = Callable[[float, np.ndarray], np.ndarray]
OBJECTIVES: dict[str, Objective] = {
    "sum": lambda whole, share: whole * share,
    "proportional": lambda whole, share: whole * np.log(np.maximum(share, LEAST)),
    "balanced": lambda whole, share: np.sqrt(share),
}


def score_total(
    structure: Structure,
    model: Model,
    scores: Any,
    objective: str | Objective | None = None,
    room: bool = False,
) -> tuple[Total, dict[str, np.ndarray], Total]:
    """What is to be large, per dimension its units with the best first, and the score kept.

    ``room``: units below a quarter of a dimension weigh more than their scores: each is the loss
    without that unit alone, which says little of a dimension that is all but emptied. What
    :func:`jp.scores.loss_units` measured says it.

    Scores per entry: a leaf keeps its sum times, for each of its dimensions, the share of that sum
    in the units kept. That is exact for one dimension in a leaf, and for several it takes their
    shares as independent. Scores per unit (``{dimension: vector}``) simply add.
    """
    terms, order = _terms(structure, model, scores)
    total = Total(merged(terms), len(model.names))
    of = _objective(structure, scores, objective)
    worth = [_worth(t, of) for t in terms] if of is not OBJECTIVES["sum"] else terms
    found = Total(merged(worth), len(model.names))
    if room and not isinstance(scores, Measured):
        found = Total(merged([*found.terms, *_shortages(structure, model, found)]), found.count)
    return found, order, total


def _shortages(structure: Structure, model: Model, worth: Total) -> Iterator[Term]:
    """What units below a quarter of a dimension cost, beside their scores."""
    full = np.array([len(counts) - 1 for counts in model.counts])
    span = worth.at(full) - worth.at(np.zeros_like(full))
    for k, (name, counts) in enumerate(zip(model.names, model.counts, strict=True)):
        wanted = ROOM * structure.dims[name].size
        yield Term((k,), -SHORT * span * np.maximum(1 - counts / wanted, 0.0))


def _objective(structure: Structure, scores: Any, given: str | Objective | None) -> Objective:
    """What is given, or what fits the kind of scores.

    Scores of units, such as a loss's, are of one measure. Leaves of scores of entries, such as
    magnitudes, can't be compared: a sum goes to leaves of many entries and few FLOPs.
    """
    if given is None:
        given = "balanced" if like_params(structure, scores) else "sum"
    return OBJECTIVES[given] if isinstance(given, str) else given


def _worth(term: Term, of: Objective) -> Term:
    whole = max(float(term.table.max()), 1e-300)
    found = np.asarray(of(whole, term.table / whole), np.float64)
    if found.shape != term.table.shape or not np.isfinite(found).all():
        raise ValueError(
            f"objective gave an array of shape {found.shape} for shares of shape "
            f"{term.table.shape}; wanted a finite number for each share in [0, 1], as "
            "objective=lambda whole, share: np.sqrt(share) gives"
        )
    return Term(term.dims, found)


def check_scores(
    structure: Structure,
    names: Sequence[str],
    scores: Any,
    objective: str | Objective | None = None,
) -> None:
    """Raises unless the scores are numbers that add up, of entries or of the units of ``names``."""
    if not (objective is None or callable(objective) or objective in OBJECTIVES):
        raise ValueError(
            f"objective is {objective!r}; wanted one of {list(OBJECTIVES)}, or a function "
            "(whole, share) -> worth"
        )
    if like_params(structure, scores):
        given = dict(zip(structure.paths, _numbers(scores)))
        wanted = dict(zip(structure.paths, structure.shapes))
    else:
        check_names(structure, names, scores)
        given = {name: host(scores[name]).astype(np.float64) for name in names}
        wanted = {name: (structure.dims[name].size,) for name in names}
    for name, x in given.items():
        check_shape(name, x, wanted[name])
        _check_sums(name, x)
    if not any(x.sum() > 0 for x in given.values()):
        raise ValueError("all scores are 0, so that nothing tells one unit from another")


def _check_sums(name: str, x: np.ndarray) -> None:
    bad = x[~(np.isfinite(x) & (x >= 0))]
    if bad.size:
        raise ValueError(
            f"the scores of {name}, shape {x.shape}, are {bad[0]} somewhere; what is kept adds up, "
            "so wanted are finite numbers >= 0: take jnp.abs of negative ones, and look for NaN "
            "and infinities in params, gradients and calibration data"
        )


def _numbers(scores: Any) -> list[np.ndarray]:
    """Scores of all leaves; those that aren't floats, such as random keys, have none."""
    leaves = jax.tree.leaves(scores)
    return [host(x).astype(np.float64) if is_float(x) else np.zeros(np.shape(x)) for x in leaves]


def _terms(
    structure: Structure, model: Model, scores: Any
) -> tuple[list[Term], dict[str, np.ndarray]]:
    if not like_params(structure, scores):
        return _of_units(model, scores)
    units = structure.unit_scores(scores, reduce.sum)
    order = {n: _best_first(host(units[n])) for n in model.names}
    voting = {i for i, path in enumerate(structure.paths) if path not in structure.statistics}
    voting |= {i for name in model.names for i in structure.voters(name)}
    return _of_entries(structure, model, _numbers(scores), order, voting), order


def _best_first(units: np.ndarray) -> np.ndarray:
    return np.argsort(-units, kind="stable")


def _of_entries(
    structure: Structure,
    model: Model,
    leaves: Sequence[np.ndarray],
    order: Mapping[str, np.ndarray],
    voting: Set[int],
) -> list[Term]:
    """The score that each leaf keeps; running statistics have no vote."""
    own = [axes.find(structure.dims[n].axis) for n in model.names]
    index = {axis: i for i, axis in enumerate(own)}
    terms = []
    for i in sorted(voting):
        axs, leaf = structure.param_axes[i], leaves[i]
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


def _of_units(model: Model, scores: Mapping[str, Any]) -> tuple[list[Term], dict[str, np.ndarray]]:
    terms, order = [], {}
    for k, name in enumerate(model.names):
        units = host(scores[name]).astype(np.float64)
        order[name] = _best_first(units)
        sums = np.concatenate([[0.0], np.cumsum(units[order[name]])])
        terms.append(Term((k,), sums[model.counts[k]]))
    return terms, order
