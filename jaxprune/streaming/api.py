"""Pruning a checkpoint block by block, from disk to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from jaxprune._calls import calls_fn
from jaxprune._progress import Progress, check, inner, track
from jaxprune.calibration.api import Calibrator
from jaxprune.oneshot._walk import (
    Block,
    ErrorOf,
    Prune,
    Walk,
    check_blocks,
    check_order,
    check_share,
)
from jaxprune.streaming.checkpoint import Checkpoint
from jaxprune.streaming.embedding import Embed, Hidden
from jaxprune.streaming.job import Job
from jaxprune.streaming.settings import digests
from jaxprune.typing import Masks, Params, PyTree, Where

Repair = Callable[[Params, Masks, Any], Params]


class Streamed(NamedTuple):
    """What :func:`stream` gives.

    Attributes:
      folder: where the result is.
      densities: of each block, the fraction of entries that its masks keep, as ``jp.density``.
    """

    folder: Path
    densities: list[float]


@calls_fn("jp.oneshot.stream")
def stream(
    source: str | Path,
    target: str | Path,
    block: Block,
    blocks: Sequence[PyTree],
    batches: Iterable[Any],
    prune: Prune | None = None,
    *,
    masks: Sequence[Masks] | None = None,
    repair: Repair | None = None,
    cut: bool = False,
    embed: Embed | None = None,
    added: Callable[[int, str], str] | None = None,
    order: Sequence[Where] | Literal["use"] | None = None,
    error_propagation: float = 0.0,
    error_of: ErrorOf = "outputs",
    where: Where | None = None,
    grams: bool | Where = True,
    settings: Any = None,
    progress: Progress = None,
) -> Streamed:
    """Prunes a checkpoint that does not fit into memory, and writes one of the same format.

    As :func:`jp.oneshot.sequential`, and equal to it bit for bit: each block is calibrated on what
    the already pruned ones give. At most two blocks and the hidden states are in memory. A call
    that was cut short, by whatever, goes on where it was when it is made again, and ends with the
    same files.

    The target gets a shard for each block and one for each shard of the source with other tensors,
    which are copied, an index, and ``stream.json``, which tells of the source, the settings and the
    finished parts by their digests. Other files of the source, such as a configuration, are not
    copied. The source is never written to.

    Args:
      source: what :class:`jp.oneshot.Checkpoint` opens.
      target: a folder; made where it does not exist.
      block: ``block(p, hidden) -> hidden``, as for :func:`jp.oneshot.sequential`.
      blocks: for each block a tree of tensor names, such as ``{"up": "layers.0.up.weight"}``: what
        stands in its place is the tensor, or its transpose for ``jp.oneshot.Transposed(name)``.
      batches: hidden states before the first block, or what ``embed`` takes. Shapes alone
        (``jax.ShapeDtypeStruct``) where ``prune`` needs no statistics: it is given None then, and
        nothing is run.
      prune: ``prune(p, stats) -> (pruned, masks)``, any that :func:`jp.oneshot.sequential` takes.
      masks: in place of ``prune``, masks of each block that were chosen before, by one plan for all
        blocks: see :func:`jp.oneshot.survey`.
      repair: ``repair(p, masks, stats) -> pruned`` for such masks, as ``jp.oneshot.refit``; None
        sets to zero.
      cut: whether units that are masked whole are cut out of the tensors, as ``jp.compact`` does.
        Those that have to stay are told in a warning.
      embed: ``(fn, names)`` with ``fn(params, batch) -> hidden``, and the names of its params.
      added: ``(block's number, leaf's path) -> name`` of leaves that ``prune`` adds, as a bias.
      order, error_propagation, error_of, where, grams: as for :func:`jp.oneshot.sequential`.
      settings: what decides the result beside the shapes, any plain values, ``"wanda, 50 %"``. A
        call that goes on must have the same. None: ``prune`` and other functions are compared by
        their bytecode and the values that they read.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        blocks, such as ``tqdm.tqdm``.

    Raises:
      FileNotFoundError: without a checkpoint, or with a shard missing.
      FileExistsError: for a target with another checkpoint in it.
      OSError: when the disk is full; what is finished stays.
      RuntimeError: when another call streams to the target.
      TypeError: for names that are none, or without ``prune`` and ``masks``.
      ValueError: for a shard that is cut off or damaged, a tensor in two shards or two blocks, a
        block that gives another shape than it takes, a source that changes meanwhile or has changed
        since, other settings than those that the target was begun with, leaves without a name.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> from safetensors.numpy import save_file
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> weights = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
      >>> save_file({"0.w": weights[0], "1.w": weights[1]}, folder / "model.safetensors")
      >>> block = lambda p, x: x + jnp.tanh(x @ p["w"])
      >>> names = [{"w": f"{k}.w"} for k in range(2)]
      >>> prune = lambda p, stats: jp.oneshot.sparsegpt(p, stats, 0.5)
      >>> done = jp.oneshot.stream(folder, folder / "sparse", block, names, [jnp.eye(4)], prune)
      >>> done.densities
      [0.5, 0.5]
      >>> int((jp.oneshot.Checkpoint(done.folder).load(names)[0]["w"] == 0).sum())
      8
    """
    check_blocks("stream", blocks)
    check_share("stream", error_propagation, error_of)
    _check_method(prune, masks, repair, blocks)
    check(progress)
    checkpoint = Checkpoint(source)
    shapes = [checkpoint.shapes(names) for names in blocks]
    check_order("stream", order, shapes)
    hidden = Hidden("stream", checkpoint, embed, batches)
    hidden.check_block(block, shapes)
    decides = {
        "prune": prune, "repair": repair, "order": order, "where": where, "grams": grams,
        "added": added,
    } if settings is None else {"settings": settings}  # fmt: skip
    told = decides | {
        "names of blocks": blocks, "masks": masks, "cut": cut,
        "error_propagation": error_propagation, "error_of": error_of,
    }  # fmt: skip
    job = Job(
        checkpoint, Path(target), block, list(blocks), hidden,
        Walk(block, order, error_propagation, where, grams, progress, error_of),
        prune, masks, repair, cut, added, bool(error_propagation), progress,
    )  # fmt: skip
    return Streamed(job.target, job.run(digests(told) | hidden.digests(block, shapes)))


def _check_method(prune: Any, masks: Any, repair: Any, blocks: Sequence[Any]) -> None:
    if (prune is None) == (masks is None):
        raise TypeError(
            "stream wants either prune, a function (p, stats) -> (pruned, masks), or masks=, those "
            f"of each block; got {'neither' if prune is None else 'both'}"
        )
    if repair is not None and masks is None:
        raise TypeError(
            "stream: repair= is for masks=; with prune write the repair into it: "
            "lambda p, stats: (repair(p, masks, stats), masks)"
        )
    if masks is not None and len(masks) != len(blocks):
        raise ValueError(
            f"stream: masks are of {len(masks)} blocks, and blocks names {len(blocks)}; pass one "
            "tree of masks for each"
        )


@calls_fn("jp.oneshot.survey")
def survey(
    source: str | Path,
    block: Block,
    blocks: Sequence[PyTree],
    batches: Iterable[Any],
    look: Callable[[Params, Any], Any],
    *,
    embed: Embed | None = None,
    where: Where | None = None,
    grams: bool | Where = False,
    progress: Progress = None,
) -> list[Any]:
    """Returns what ``look(p, stats)`` gives for each block of a checkpoint, as it is.

    For a plan of all blocks, made before the first one is pruned: scores of units are small where
    the blocks are not. One block and the hidden states are in memory at a time.

    Args:
      source, block, blocks, batches, embed, where, grams: as for :func:`jp.oneshot.stream`, and
        Gram matrices only when they are asked for.
      look: ``look(p, stats)``, such as ``lambda p, stats: structure.unit_scores(
        jp.scores.flap(p, stats=stats), jp.reduce.sum)``; stats are None for batches of shapes.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        blocks.

    Raises:
      FileNotFoundError, TypeError, ValueError: as :func:`jp.oneshot.stream`.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> from safetensors.numpy import save_file
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> weights = {f"{k}.w": np.full((2, 2), k + 1, np.float32) for k in range(2)}
      >>> save_file(weights, folder / "model.safetensors")
      >>> names = [{"w": f"{k}.w"} for k in range(2)]
      >>> block = lambda p, x: x @ p["w"]
      >>> jp.oneshot.survey(
      ...     folder, block, names, [jnp.ones((3, 2))], lambda p, stats: stats.means["w"].tolist())
      [[1.0, 1.0], [2.0, 2.0]]
    """
    check_blocks("survey", blocks)
    checkpoint = Checkpoint(source)
    hidden = Hidden("survey", checkpoint, embed, batches)
    hidden.check_block(block, [checkpoint.shapes(names) for names in blocks])
    calibrate = Calibrator(block, where, grams, progress=inner(progress))
    run = jax.jit(lambda p, x: block(p, x))  # its own: block may close over what changes
    found, states = [], hidden.states()
    for k in track(range(len(blocks)), "surveying blocks", progress):
        p = checkpoint.load(blocks[k])
        found.append(look(p, calibrate(p, [(x,) for x in states]) if states else None))
        if k + 1 < len(blocks):
            states = [run(p, x) for x in states]
    return found
