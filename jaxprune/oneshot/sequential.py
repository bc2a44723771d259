"""Block by block: each is calibrated on what the already pruned ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxprune.calibration import Stats, calibrate
from jaxprune.types import Masks, Params, Where

Prune = Callable[[Params, Stats], tuple[Params, Masks]]


def sequential(
    block: Callable[[Params, Any], Any],
    blocks: Sequence[Params],
    batches: Iterable[Any],
    prune: Prune,
    *,
    where: Where | None = None,
    grams: bool | Where = True,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> tuple[list[Params], list[Masks]]:
    """Returns pruned blocks and their masks.

    A pruned block changes what those behind it read: each is fit to the inputs that it will meet.
    Only one block's statistics are held at a time.

    Args:
      block: ``block(p, x) -> x``, the hidden states of one batch, jitted here once.
      blocks: parameters of each, in order. Blocks stacked for a scan are unstacked first:
        ``[jax.tree.map(lambda leaf: leaf[k], stack) for k in range(layers)]``.
      batches: hidden states before the first block.
      prune: ``prune(p, stats) -> (pruned, masks)``, such as
        ``lambda p, stats: jp.oneshot.sparsegpt(p, stats, 0.5)``.
      where, grams: as for :func:`jaxprune.calibrate`.
      progress: wraps the iterable of blocks, such as ``tqdm.tqdm``.

    Raises:
      ValueError: without blocks, and as :func:`jaxprune.calibrate`.
      TypeError: when prune doesn't return (pruned, masks).

    References:
      Frantar and Alistarh, [SparseGPT](https://arxiv.org/abs/2301.00774), 2023, whose published
      code goes through the blocks in this way.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> block = lambda p, x: x + jnp.tanh(x @ p["w"])
      >>> blocks = [{"w": jnp.eye(4) + 0.1}, {"w": jnp.ones((4, 4))}]
      >>> pruned, masks = jp.oneshot.sequential(
      ...     block, blocks, [jnp.eye(4)], lambda p, stats: jp.oneshot.sparsegpt(p, stats, 0.5))
      >>> [float(jp.density(m, p)) for m, p in zip(masks, pruned)]
      [0.5, 0.5]
    """
    if not blocks:
        raise ValueError("sequential: blocks is empty; pass the parameters of each block, in order")
    run = jax.jit(block)
    states = list(batches)
    pruned, masks = [], []
    for p in progress(blocks) if progress is not None else blocks:
        stats = calibrate(block, p, states, where=where, grams=grams)
        found = prune(p, stats)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                f"sequential: prune returned {type(found).__name__}; wanted (pruned, masks), both "
                "like the block's parameters"
            )
        pruned.append(found[0])
        masks.append(found[1])
        states = [run(found[0], x) for x in states]
    return pruned, masks
