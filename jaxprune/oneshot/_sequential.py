"""Block by block: each is calibrated on what the already pruned ones before it give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jaxprune._calls import calls_fn
from jaxprune._progress import Progress, track
from jaxprune._renamed import renamed
from jaxprune.oneshot._run import Pruned
from jaxprune.oneshot._walk import (
    Block,
    ErrorOf,
    Prune,
    Walk,
    check_blocks,
    check_order,
    check_share,
    listed,
)
from jaxprune.typing import Params, Where


@renamed("jp.oneshot.sequential", drift="error_propagation")
@calls_fn("jp.oneshot.sequential")
def sequential(
    block: Block,
    blocks: Sequence[Params],
    batches: Iterable[Any],
    prune: Prune,
    *,
    order: Sequence[Where] | Literal["use"] | None = None,
    error_propagation: float = 0.0,
    error_of: ErrorOf = "outputs",
    where: Where | None = None,
    grams: bool | Where = True,
    progress: Progress = None,
) -> Pruned:
    """Returns pruned blocks and their masks, a list of each.

    A pruned block changes what those behind it read: each is fit to the inputs that it will meet.
    Only one block's statistics are held at a time.

    Args:
      block: ``block(p, x) -> x``, the hidden states of one batch. It is compiled here once for all
        blocks of one structure, and once per group with its statistics.
      blocks: parameters of each, in order. Blocks stacked for a scan are unstacked first:
        ``[jax.tree.map(lambda leaf: leaf[k], stack) for k in range(layers)]``.
      batches: hidden states before the first block.
      prune: ``prune(p, stats) -> (pruned, masks)``, such as
        ``lambda p, stats: jp.oneshot.sparsegpt(p, stats, 0.5)``. Without ``order``
        it may add leaves, such as a bias, that ``block`` uses where they exist.
      order: groups of a block's leaves, as (path, leaf) -> bool, that are pruned one after another:
        each is calibrated on what the pruned ones before it give within the block, too, at one
        more pass over the batches. ``"use"`` reads the groups off the jaxpr: weights whose inputs
        depend on the same weights before them. ``prune`` is given the leaves of a group, None for
        all others; leaves of no group stay. None prunes a block at once, or, with
        ``error_propagation``, in the order of use.
      error_propagation: a share in [0, 1] of how far a weight's outputs have drifted from the dense
        network's, because of all that was pruned before it, that is made up for: the weights that
        ``prune`` is given are corrected for it by least squares. A quarter to a half repairs much,
        on other texts, too; all of it fits the calibration alone. It needs Gram matrices, and holds
        the dense hidden states beside the pruned ones.
      error_of: what has drifted: the weight's "outputs", or "states": weights whose outputs the
        block adds to its hidden states make up for how far those are from the dense network's
        behind the block, all others for their own outputs. It is for whole units, whose loss the
        stream carries on. Attention and MLP as two blocks, ``[attention 0, mlp 0, ...]``, have two
        such weights.
      where, grams: as for :func:`jaxprune.calibrate`.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        blocks, such as ``tqdm.tqdm``. ``prune`` has a ``progress`` of its own.

    Raises:
      ValueError: without blocks or batches; for a group that has no leaf in one of the blocks, or
        shares leaves with another one; for an error_propagation outside [0, 1], or of a weight that
        a loop within the block uses; for an error_of that is none, or without a share; and as
        :func:`jaxprune.calibrate`.
      TypeError: for a stack in place of a list of blocks, or names in place of functions in
        ``order``; when prune doesn't return (pruned, masks).

    References:
      Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`__, 2023, whose published
      code goes through the blocks in this way.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> block = lambda p, x: x + jnp.tanh(x @ p["w"])
      >>> blocks = [{"w": jnp.eye(4) + 0.1}, {"w": jnp.ones((4, 4))}]
      >>> pruned, masks = jp.oneshot.sequential(
      ...     block, blocks, [jnp.eye(4)], lambda p, stats: jp.oneshot.sparsegpt(p, stats, 0.5))
      >>> [float(jp.density(p, m)) for p, m in zip(pruned, masks)]
      [0.5, 0.5]
    """
    check_blocks("sequential", blocks)
    check_share("sequential", error_propagation, error_of)
    check_order("sequential", order, blocks)
    walk = Walk(block, order, error_propagation, where, grams, progress, error_of)
    states = dense_states = listed("sequential", batches)
    pruned, masks = [], []
    for dense in track(blocks, "pruning blocks", progress):
        p, kept = walk.prune(prune, dense, states, dense_states)
        pruned.append(p)
        masks.append(kept)
        states = walk.behind(p, states)
        dense_states = walk.behind(dense, dense_states) if error_propagation else []
    return Pruned(pruned, masks)
