"""Blocks: tiles of the last axes of a leaf."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.distributions import Rule, uniform
from jaxprune.patterns._factory import factory
from jaxprune.patterns._units import mean_score, of_units
from jaxprune.patterns.choose import is_kernel
from jaxprune.selection import keep_largest, kept_count
from jaxprune.typing import Distribution, Pattern, Where


@factory("jp.block((4, 4))")
def block(
    shape: tuple[int, ...],
    distribution: Distribution | Mapping[str, Rule] = uniform,
    *,
    where: Where = is_kernel,
) -> Pattern:
    """Returns the pattern that keeps blocks of ``shape``, ranked by their mean score.

    Blocks lie on the last ``len(shape)`` axes: ``(4, 4)`` cuts the (in, out) of a convolution's
    (height, width, in, out), at each position of the window. Sparsity and distribution count
    blocks.

    Raises:
      ValueError: for a shape that isn't a tuple of positive integers; on use, for a leaf that the
        blocks don't tile.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.block((1, 2))({"w": jnp.array([[1.0, 1.0, 5.0, 0.0]])}, 0.5)["w"].astype(int)
      Array([[0, 0, 1, 1]], dtype=int32)
    """
    if not (isinstance(shape, tuple) and shape and all(_is_size(b) for b in shape)):
        raise ValueError(f"block({shape!r}): wanted a tuple of positive integers such as (4, 4)")

    def cut(leaf: tuple[int, ...]) -> tuple[int, ...]:
        tail = zip(leaf[-len(shape) :], shape, strict=True)
        return (*leaf[: -len(shape)], *(x for size, b in tail for x in (size // b, b)))

    def pool(path: str, scores: jax.Array) -> jax.Array:
        tail = scores.shape[-len(shape) :]
        if len(tail) < len(shape) or any(size % b for size, b in zip(tail, shape, strict=True)):
            raise ValueError(
                f"block({shape}) does not tile {path}, shape {scores.shape}: blocks lie on the "
                f"last {len(shape)} axes; choose sizes that divide {tail}, or leave the leaf out "
                "with where=lambda path, leaf: ..."
            )
        return mean_score(scores.reshape(cut(scores.shape)), tuple(range(1 - 2 * len(shape), 0, 2)))

    def spread(kept: jax.Array, leaf: tuple[int, ...]) -> jax.Array:
        full = cut(leaf)
        lead = len(leaf) - len(shape)
        thin = tuple(1 if i >= lead and (i - lead) % 2 else size for i, size in enumerate(full))
        return jnp.broadcast_to(kept.reshape(thin), full).reshape(leaf)

    def within(scores: jax.Array, sparsity: Any) -> jax.Array:
        means = pool("a matrix", scores)
        return spread(keep_largest(means, kept_count(means.size, sparsity)), scores.shape)

    return Pattern(
        of_units(distribution, where, pool, spread),
        f"jp.block({shape})",
        where,
        within=lambda sparsity: within,
        rows=shape[-2] if len(shape) > 1 else 1,
        inputs=functools.partial(_upright, shape),
    )


def _upright(
    block: tuple[int, ...], path: str, shape: tuple[int, ...], layout: Any
) -> tuple[int, ...]:
    """The leaf's input axes as they are, where blocks of the leaf are blocks of its matrices."""
    outs = layout.outs[-1:] == (len(shape) - 1,)
    ins = len(block) == 1 or layout.ins[-1:] == (len(shape) - 2,)
    if len(block) <= 2 and ins and outs:
        return tuple(layout.ins)
    raise ValueError(
        f"block({block}) on {path}, shape {shape}: one-shot methods follow blocks of (in, out) on "
        f"the last two axes, and its inputs are its axes {layout.ins}, its outputs {layout.outs}; "
        "leave it out with jp.block(shape, where=lambda path, leaf: ...), or choose first and "
        "repair after: masks = pattern(scores, sparsity); jp.oneshot.refit(params, masks, stats)"
    )


def _is_size(x: Any) -> bool:
    return isinstance(x, int | np.integer) and bool(x > 0)
