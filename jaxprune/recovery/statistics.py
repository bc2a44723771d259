"""Running statistics of a network whose weights have changed, measured anew."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._leaf import is_float, widen
from jaxprune._progress import Progress
from jaxprune.scores.evidence import Batches, watched
from jaxprune.typing import Params

Update = Callable[..., Any]  # (params, *batch) -> params with updated statistics


def estimate_statistics(
    update: Update, params: Params, batches: Batches, *, progress: Progress = None
) -> Params:
    r"""Returns params whose running statistics are the means over batches of those of each batch.

    An update in train mode is :math:`r \leftarrow m r + (1 - m) s`, with the statistic s of the
    batch and a momentum m that is not known here. It is linear in r: its values at r = 0 and
    r = 1 give both, and s is averaged as it is, without what was there before.

    Args:
      update: ``(params, *batch) -> params``, a step in train mode that changes statistics alone.
      params: any pytree of arrays.
      batches: a list of tuples of what follows params in ``update``.
      progress: None or True for a bar, False for silence, or a function such as ``tqdm.tqdm``.

    Returns:
      A tree like params; leaves that ``update`` hands on unchanged are as they were.

    Raises:
      TypeError: for batches that are used up after one pass, or a batch that is no tuple.
      ValueError: for no batches, or an update that returns another structure than params.

    References:
      Wu and Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`__, 2021,
      PreciseBN; there variances are combined over batches, here averaged.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> update = lambda p, x: p | {"mean": 0.9 * p["mean"] + 0.1 * x.mean()}
      >>> params = {"w": jnp.ones(2), "mean": jnp.array(7.0)}
      >>> batches = [(jnp.array([1.0, 3.0]),), (jnp.array([4.0]),)]
      >>> float(jp.recovery.estimate_statistics(update, params, batches)["mean"])
      3.0
    """
    leaves, treedef = jax.tree.flatten(params)
    changed: list[bool] = []
    total, count = list[Any](), 0
    for batch in watched(batches, progress):
        jax.block_until_ready(total)  # One batch is ahead at most, so that what is shown is true.
        if not count:
            changed = _changed(update, params, batch)
            one = jax.jit(functools.partial(_of_batch, update, changed, treedef))
        found = one(leaves, *batch)
        total = [a + b for a, b in zip(total, found)] if count else found
        count += 1
    means = iter(total)
    new = [
        jnp.asarray(next(means) / count, jnp.result_type(x)) if moves else x
        for moves, x in zip(changed, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def _changed(update: Update, params: Params, batch: Any) -> list[bool]:
    """Which leaves of floats the update does not hand on as they are."""
    closed, shape = jax.make_jaxpr(update, return_shape=True)(params, *batch)
    given: Any = jax.tree.structure(params)
    if given != jax.tree.structure(shape):
        raise ValueError(
            "update returns another tree than params; wanted params with updated statistics, such "
            'as variables | {"batch_stats": new}'
        )
    program = closed.jaxpr
    pairs = zip(jax.tree.leaves(params), program.invars, program.outvars)
    return [is_float(x) and before is not after for x, before, after in pairs]


def _of_batch(
    update: Update, changed: list[bool], treedef: Any, leaves: list[Any], *batch: Any
) -> list[Any]:
    """The statistics of one batch: where the update starts from zeros, and from ones."""

    def starting(value: float) -> list[Any]:
        filled = [jnp.full_like(x, value) if c else x for c, x in zip(changed, leaves)]
        new = jax.tree.leaves(update(jax.tree.unflatten(treedef, filled), *batch))
        return [widen(x) for c, x in zip(changed, new) if c]

    return [zero / (1 - (one - zero)) for zero, one in zip(starting(0.0), starting(1.0))]
