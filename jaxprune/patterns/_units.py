"""What patterns of units (blocks, channels) share: scores per unit, and how they are ranked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._alike import map_alike
from jaxprune._leaf import widen
from jaxprune.distributions import Rule
from jaxprune.patterns.choose import check_sparsity, choose, kept_counts
from jaxprune.selection import keep_largest
from jaxprune.sharding import on_meshes
from jaxprune.typing import Distribution, Masks, PatternFn, Scores, Where

Pool = Callable[[str, jax.Array], jax.Array]  # (path, scores of a leaf) -> scores of its units
Spread = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (kept units, shape) -> mask


def of_units(
    distribution: Distribution | Mapping[str, Rule],
    where: Where,
    pool: Pool,
    spread: Spread,
) -> PatternFn:
    """Returns a choice that ranks units: ``pool`` gives their scores, ``spread`` their entries."""

    @on_meshes(1)
    def pattern(scores: Scores, sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        chosen = choose(scores, where)
        units = {path: pool(path, leaf) for path, leaf in chosen.leaves.items()}
        counts = kept_counts(distribution, units, sparsity)
        columns = units.values(), [counts[path] for path in units]
        kept = map_alike(keep_largest, *columns, any_shape=True)
        return chosen.masks(
            {
                path: spread(mask, chosen.leaves[path].shape)
                for path, mask in zip(units, kept, strict=True)
            }
        )

    return pattern


def mean_score(scores: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the mean over axes, in float32 at least: in half precision means would tie."""
    return jnp.mean(widen(scores), axis=axes)


def check_axis(what: str, path: str, scores: jax.Array, axis: int) -> None:
    """Raises ValueError unless the scores of a leaf have the axis."""
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"{what} on {path}, shape {scores.shape}: there is no axis {axis}; pass another axis=, "
            "or leave the leaf out with where=lambda path, leaf: ..."
        )
