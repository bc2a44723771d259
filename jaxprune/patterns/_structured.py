"""Whole units of logical dimensions, in all their slots."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxprune import selection
from jaxprune._alike import map_alike
from jaxprune.distributions import ByPath, Rule, as_distribution, by_path, uniform
from jaxprune.ir import axes
from jaxprune.patterns._factory import factory
from jaxprune.patterns.choose import check_sparsity
from jaxprune.reduce import Reduction, check_reduce, mean
from jaxprune.sharding import host, on_meshes, parts
from jaxprune.structure.dimensions import Dimension, Structure
from jaxprune.structure.named_scores import like_params, rankable
from jaxprune.structure.select import chosen_dims
from jaxprune.typing import Distribution, Masks, Pattern, Scores


@factory("jp.structured(structure)")
def structured(
    structure: Structure,
    *,
    dims: str | Sequence[str] = "*",
    distribution: Distribution | Mapping[str, Rule] = uniform,
    round_to: int | Mesh | AbstractMesh = 1,
    reduce: Reduction = mean,
) -> Pattern:
    """Returns the pattern that keeps or removes whole units of dimensions, in all their slots.

    The score of a unit is the mean (or sum) of the entry scores over all its slots, so that a
    producer, its bias and its consumers vote together; or it is given, as
    :func:`jp.scores.taylor_units` does: ``{dimension: vector}``, for each of ``dims``. Leaves
    that should not vote (running statistics in Flax variables) get a score of zero before. Inputs,
    logits and frozen dimensions are never cut, and at least one unit (``round_to`` units, as many
    experts as a token chooses) of each dimension stays.

    Args:
      structure: what ``jp.infer_structure`` found.
      dims: names or labels of dimensions, with wildcards: ``"layers/*/mlp hidden"``.
      distribution: from a dict {dimension name: unit scores} and the global sparsity (the
        fraction of units) to one sparsity per dimension; or a mapping from patterns of names or
        labels to sparsities, ``{"*heads": 0.25, "*hidden": 0.5}``, see
        :func:`jp.distributions.by_path`.
      round_to: the number of kept units is a multiple of it, rounded to the nearest, where the
        dimension is at least that large; all of them at sparsity 0. A mesh: widths that it divides,
        along the axes that the params lie on with which the structure was inferred; for params
        that lie on none, along all axes together.
      reduce: what becomes of a unit's entries: ``jp.reduce.mean``, ``jp.reduce.sum``,
        ``jp.reduce.taylor`` for the signed scores of ``jp.scores.taylor``, or another function
        ``(sums, counts) -> scores``. Scores of units are taken as they are.

    Returns:
      ``(scores, sparsity) -> masks`` for ``jp.compact``; jittable.

    Raises:
      TypeError: for scores in the place of the structure.
      ValueError: for dims or a pattern of the distribution that match nothing prunable, a
        round_to that is neither a whole number from 1 on nor a mesh, a reduce that is no function,
        and scores that hold NaN, or lack a dimension that may be cut.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> masks = jp.structured(structure)(jp.magnitude(params), 0.5)
      >>> masks["up"].astype(int)
      Array([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=int32)
    """
    if not isinstance(structure, Structure):
        raise TypeError(
            f"structured wants what jp.infer_structure found, got a {type(structure).__name__}; it "
            "is a factory of patterns: jp.structured(structure)(scores, 0.5)"
        )
    names = chosen_dims(structure, dims)
    check_reduce(reduce)
    steps = {name: _step(structure, structure.dims[name], round_to) for name in names}
    distribution = _by_name(distribution, [structure.dims[name] for name in names])

    @on_meshes(1)
    def of_entries(scores: Scores, sparsity: Any) -> Masks:
        every = structure.unit_scores(scores, reduce)
        return best({name: jnp.asarray(every[name]) for name in names}, sparsity)

    def best(units: dict[str, jax.Array], sparsity: Any) -> Masks:
        wanted = distribution(units, sparsity)
        counts = {
            name: _kept_units(structure.dims[name], wanted[name], steps[name]) for name in names
        }
        return structure.traced_masks(_best(units, counts))

    def masks(scores: Scores | Mapping[str, Any], sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        if like_params(structure, scores):
            return of_entries(scores, sparsity)
        return best(rankable(structure, names, scores), sparsity)

    return Pattern(masks, "jp.structured(...)")


def _step(structure: Structure, dim: Dimension, round_to: int | Mesh | AbstractMesh) -> int:
    """What the number of a dimension's kept units is a multiple of."""
    if not isinstance(round_to, Mesh | AbstractMesh):
        if not isinstance(round_to, int | np.integer) or round_to < 1:
            raise ValueError(
                f"round_to is {round_to}; wanted a whole number of units such as 8, or the mesh "
                "that is to divide them"
            )
        return int(round_to)
    if not any(structure.layouts):
        return round_to.size
    steps = [1]
    for i in structure.owners(dim.name):
        axs, layout = structure.param_axes[i], structure.layouts[i]
        for axis, (_, count) in zip(axs, parts(layout, len(axs)) if layout else ()):
            if dim.axis in axes.leaves(axis):
                alone = axes.find(axis).kind == axes.PROD
                steps.append(count // math.gcd(count, axis.size // dim.size if alone else 1))
    return math.lcm(*steps)


def _by_name(
    distribution: Distribution | Mapping[str, Rule], dims: Sequence[Dimension]
) -> Distribution:
    """A table of patterns over names and labels becomes one of names; the first match counts."""
    distribution = as_distribution(distribution)
    if not isinstance(distribution, ByPath):
        return distribution
    table: dict[str, Rule] = {}
    for pattern, rule in distribution.table.items():
        names = [glob.escape(d.name) for d in dims if d.matches(pattern)]
        fresh = [name for name in names if name not in table]
        if not fresh:
            have = ", ".join(f"{d.name} ({d.label})" for d in dims[:8])
            raise ValueError(
                f"distribution: {pattern!r} is the first match of none of the chosen dimensions "
                f"{have}; correct it, move it up, or leave it out"
            )
        table.update(dict.fromkeys(fresh, rule))
    return by_path(table, distribution.default)


def _kept_units(dim: Dimension, sparsity: Any, round_to: int) -> Any:
    """Units to keep: the nearest multiple of ``round_to``, never none; all at sparsity 0."""
    size, xp = dim.size, np if selection.known(sparsity) else jnp
    step = min(round_to, size)
    least = min(-(-max(dim.least, 1) // step) * step, size)
    exact = (np.float32(1.0) - xp.asarray(sparsity, np.float32)) * np.float32(size)
    nearest = xp.clip(xp.round(exact / np.float32(step)).astype(np.int32) * step, least, size)
    return xp.where(exact >= size, size, nearest)


def _best(units: Mapping[str, jax.Array], counts: Mapping[str, Any]) -> dict[str, Any]:
    """For each dimension the mask of so many units of largest score."""
    if all(map(selection.known, [*units.values(), *counts.values()])):
        best = selection.keep_largest_at_hand
        return {name: best(host(x), int(counts[name])) for name, x in units.items()}
    columns = units.values(), [counts[name] for name in units]
    return dict(zip(units, map_alike(selection.keep_largest, *columns)))
