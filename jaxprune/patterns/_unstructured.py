"""Single entries: the largest of each leaf, or of each output."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._alike import map_alike
from jaxprune.distributions import Rule, uniform
from jaxprune.patterns._factory import factory
from jaxprune.patterns.choose import check_sparsity, choose, distribute, is_kernel, kept_counts
from jaxprune.selection import keep_largest, kept_count
from jaxprune.sharding import on_meshes
from jaxprune.typing import Distribution, Masks, Pattern, Scores, Where


@factory("jp.unstructured()")
def unstructured(
    distribution: Distribution | Mapping[str, Rule] = uniform,
    *,
    per_output: bool = False,
    where: Where = is_kernel,
) -> Pattern:
    """Returns the pattern that keeps single entries, the largest of each leaf.

    Args:
      distribution: global sparsity -> one per leaf, or a mapping for
        :func:`jaxprune.distributions.by_path`.
      per_output: rank within each slice of the last axis (kernels are (..., in, out)) instead of
        over the whole leaf, so that each output keeps as many inputs.
      where: (path, leaf) -> whether the leaf is pruned. To leave out the first and the last layer:
        ``lambda path, leaf: jp.is_kernel(path, leaf) and not path.startswith(("stem", "head"))``.

    Returns:
      ``(scores, sparsity) -> masks``, jittable, also for a traced sparsity. A leaf of n entries
      keeps n - round(sparsity * n), and at least one while sparsity < 1; with ``per_output`` that
      holds for each slice. NaN counts as the lowest score where it is traced.

    Raises:
      ValueError: (on use) for NaN scores, a sparsity outside [0, 1], an empty tree, a ``where``
        that selects nothing.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.unstructured()({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, 0.5)["w"].astype(int)
      Array([[0, 1],
             [1, 0]], dtype=int32)
    """

    keep = _keep_per_output if per_output else _keep_entries

    @on_meshes(1)
    def masks(scores: Scores, sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        chosen = choose(scores, where)
        leaves = chosen.leaves
        if per_output:
            _check_outputs(leaves)
            asked = distribute(distribution, leaves, sparsity)
        else:
            asked = kept_counts(distribution, leaves, sparsity)
        columns = leaves.values(), [asked[path] for path in leaves]
        if per_output:
            kept = map_alike(_keep_per_output, *columns)
        else:
            kept = map_alike(keep_largest, *columns, any_shape=True)
        return chosen.masks(dict(zip(leaves, kept)))

    return Pattern(masks, "jp.unstructured()", where, within=lambda sparsity: keep)


def _keep_entries(scores: jax.Array, sparsity: Any) -> jax.Array:
    return keep_largest(scores, kept_count(scores.size, sparsity))


def _check_outputs(leaves: Mapping[str, jax.Array]) -> None:
    """Raises ValueError unless all leaves have outputs."""
    for path, scores in leaves.items():
        if scores.ndim < 2:
            raise ValueError(
                f"per_output on {path}, shape {scores.shape}: there are no inputs to choose from; "
                "leave the leaf out with where=lambda path, leaf: leaf.ndim >= 2"
            )


def _keep_per_output(scores: jax.Array, sparsity: Any) -> jax.Array:
    if scores.size == 0:
        return jnp.ones(scores.shape, bool)
    columns = scores.reshape(-1, scores.shape[-1])
    one = functools.partial(keep_largest, entries=scores.size)
    keep = jax.vmap(one, in_axes=(1, None), out_axes=1)
    return keep(columns, kept_count(len(columns), sparsity)).reshape(scores.shape)


UNSTRUCTURED = unstructured()  # Methods that are given no pattern take this one.
