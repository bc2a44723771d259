r"""Scores of whole blocks of a residual network: which layers matter least.

A residual block adds to its stream, and the network goes on without it. Everywhere ``block(p, x)``
is one block on the hidden states of one batch, ``blocks`` is a list of their parameters in order or
one tree whose leaves have the layers first (as a scan takes them), and ``states`` is a list of the
hidden states before the first block. Scores are a vector, one number >= 0 per block, larger = keep:
``{name of the layers dimension: scores}`` is what ``jp.search`` and ``structure.masks`` understand.

All blocks of one structure share one compiled program. Loss and divergence run what follows each
block: in all about half the square of the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._progress import Progress, track
from jaxprune.typing import Params

Block = Callable[[Params, Any], Any]
Blocks = Params | Sequence[Params]
States = Sequence[Any]


def block_influence(
    block: Block, blocks: Blocks, states: States, *, progress: Progress = None
) -> np.ndarray:
    r"""Returns by how much each block turns its input, the cheapest score: one pass.

    .. math:: S_l = 1 - E_t \frac{x_{l,t}^\top x_{l+1,t}}{\|x_{l,t}\| \, \|x_{l+1,t}\|}

    over tokens t, where x has the features last.

    Args:
      block, blocks, states: as everywhere here.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        blocks, such as ``tqdm.tqdm``.

    Returns:
      (blocks,) float64 in [0, 2], 0 for a block that keeps all directions.

    Raises:
      TypeError: for states that aren't a list or tuple.
      ValueError: without blocks or states, for leaves of different numbers of layers, a block that
        returns another shape than it got, or scores that are not finite.

    References:
      Men et al., `ShortGPT <https://arxiv.org/abs/2403.03853>`__, 2024, eq. 1.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> blocks = {"w": jnp.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])}  # three layers
      >>> block = lambda p, x: x + p["w"]
      >>> jp.scores.block_influence(block, blocks, [jnp.array([[1.0, 0.0]])]).round(3)
      array([0.   , 0.   , 0.293])
    """
    given = _checked(block, blocks, states)
    turned = jax.jit(_turned)
    found = []
    for (_, before), (_, after) in _pairs(block, given, states, progress):
        found.append(float(np.mean([float(turned(x, y)) for x, y in zip(before, after)])))
    return _finite(found)


def block_loss(
    block: Block,
    blocks: Blocks,
    states: States,
    loss: Callable[..., Any],
    *,
    targets: Sequence[Any] | None = None,
    replaced: Blocks | None = None,
    progress: Progress = None,
) -> np.ndarray:
    """Returns by how much the loss rises without each block, or with another in its place.

    Args:
      block, blocks, states: as everywhere here.
      loss: ``(x, target) ->`` a number, of the hidden states behind the last block: head, norm and
        labels are its own. Without targets ``(x) ->`` a number.
      targets: one for each of the states.
      replaced: blocks that stand in for each of them, such as pruned ones, in the same form as
        ``blocks``; None leaves a block out.
      progress: as for :func:`block_influence`.

    Returns:
      (blocks,) float64, the mean over the states; 0 where the loss doesn't rise.

    Raises:
      TypeError: for states or targets that aren't a list or tuple.
      ValueError: as for :func:`block_influence`; for another number of targets or replaced blocks.

    References:
      Kim et al., `Shortened LLaMA <https://arxiv.org/abs/2402.02834>`__, 2024, section 3.1, where
      perplexity is what rises.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> blocks = [{"w": jnp.array(3.0)}, {"w": jnp.array(-1.0)}]
      >>> block = lambda p, x: x + p["w"]
      >>> loss = lambda x, y: jnp.sum((x - y) ** 2)
      >>> states, targets = [jnp.zeros(1)], [jnp.full(1, 2.0)]
      >>> jp.scores.block_loss(block, blocks, states, loss, targets=targets)
      array([9., 1.])
    """
    _check_states("targets", targets if targets is not None else states)
    if targets is not None and len(targets) != len(states):
        raise ValueError(
            f"there are {len(targets)} targets and {len(states)} states; give one target for each"
        )
    rest = [()] * len(states) if targets is None else [(t,) for t in targets]
    judge = jax.jit(lambda x, *target: loss(x, *target))
    dense: list[float] = []

    def value(ends: States) -> float:
        each = [float(judge(x, *target)) for x, target in zip(ends, rest)]
        dense.append(float(np.mean(each)))
        return dense[-1] - dense[0]

    return _without(block, blocks, states, value, replaced, progress)


def block_divergence(
    block: Block,
    blocks: Blocks,
    states: States,
    predict: Callable[[Any], Any],
    *,
    replaced: Blocks | None = None,
    progress: Progress = None,
) -> np.ndarray:
    r"""Returns how far predictions move without each block, or with another in its place.

    .. math:: S_l = E_t \sum_c p_{t,c} (\log p_{t,c} - \log q^{(l)}_{t,c})

    in nats over positions t, with p the network's predictions and q those without block l. It needs
    no labels, and scatters less over texts than a loss does.

    Args:
      block, blocks, states: as everywhere here.
      predict: hidden states behind the last block -> logits, classes last.
      replaced, progress: as for :func:`block_loss`.

    Returns:
      (blocks,) float64.

    Raises:
      TypeError: for states that aren't a list or tuple.
      ValueError: as for :func:`block_loss`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> blocks = {"w": jnp.array([[0.0, 0.0], [2.0, 0.0]])}
      >>> block = lambda p, x: x + p["w"]
      >>> jp.scores.block_divergence(block, blocks, [jnp.zeros((1, 2))], lambda x: x).round(3)
      array([0.   , 0.328])
    """
    logs = jax.jit(lambda x: jax.nn.log_softmax(predict(x)))
    apart = jax.jit(lambda p, q: jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))
    dense: list[Any] = []

    def value(ends: States) -> float:
        if not dense:
            dense.extend(logs(x) for x in ends)
        return float(np.mean([float(apart(p, logs(x))) for p, x in zip(dense, ends)]))

    return _without(block, blocks, states, value, replaced, progress)


# ------------------------------------------------------------------------------------- running


def _turned(x: Any, y: Any) -> Any:
    """1 - cosine of the hidden states before and after a block, the mean over tokens."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    sizes = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(1 - jnp.sum(x * y, -1) / jnp.maximum(sizes, 1e-30))


Point = tuple[Params, list[Any]]


def _pairs(
    block: Block, blocks: Sequence[Params], states: States, progress: Progress
) -> Iterator[tuple[Point, Point]]:
    """Each block with the states before it, and the same with those after it."""
    run = jax.jit(lambda p, x: block(p, x))  # its own: block may close over what has changed
    now = [*states]
    for p in track(blocks, "scoring blocks", progress):
        after = [run(p, x) for x in now]
        _check_shape(p, now[0], after[0])
        yield (p, now), (p, after)
        now = after


def _without(
    block: Block,
    blocks: Blocks,
    states: States,
    value: Callable[[States], float],
    replaced: Blocks | None,
    progress: Progress,
) -> np.ndarray:
    """The value at the end of the network without each block; it first gets the dense end."""
    given = _checked(block, blocks, states)
    others = None if replaced is None else _listed("replaced", replaced)
    if others is not None and len(others) != len(given):
        raise ValueError(
            f"there are {len(others)} replaced blocks and {len(given)} blocks; give one for each"
        )
    run = jax.jit(lambda p, x: block(p, x))

    def ends(now: Sequence[Any], rest: Sequence[Params]) -> list[Any]:
        for p in rest:
            now = [run(p, x) for x in now]
        return [*now]

    value(ends(states, given))
    found = []
    for k, ((_, before), _) in enumerate(_pairs(block, given, states, progress)):
        inside = before if others is None else [run(others[k], x) for x in before]
        found.append(value(ends(inside, given[k + 1 :])))
    return _finite(found)


# -------------------------------------------------------------------------------------- checks


def _checked(block: Block, blocks: Blocks, states: States) -> list[Params]:
    _check_states("states", states)
    if not callable(block):
        raise TypeError(
            f"block is a {type(block).__name__}; wanted a function (params of one block, hidden "
            "states) -> hidden states"
        )
    return _listed("blocks", blocks)


def _check_states(name: str, states: Any) -> None:
    if not isinstance(states, list | tuple):
        raise TypeError(f"{name} is a {type(states).__name__}; wanted a list, one for each batch")
    if not states:
        raise ValueError(f"{name} is empty; pass at least one batch: [x]")


def _listed(name: str, blocks: Blocks) -> list[Params]:
    """Blocks as a list; leaves that have the layers first are taken apart."""
    if isinstance(blocks, list | tuple):
        found = [*blocks]
    else:
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(blocks)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                f"the first axes of the leaves of {name} are {sorted(sizes)}; wanted one number of "
                "layers in all of them, as a scan takes, or a list of blocks"
            )
        (count,) = next(iter(sizes))
        found = [jax.tree.map(lambda leaf, k=k: leaf[k], blocks) for k in range(count)]
    if not found:
        raise ValueError(f"{name} is empty; pass the parameters of at least one block")
    return found


def _check_shape(p: Params, x: Any, y: Any) -> None:
    if np.shape(x) != np.shape(y):
        raise ValueError(
            f"block returned {np.shape(y)} for hidden states of {np.shape(x)}; wanted the same "
            "shape, so that the network goes on without it"
        )


def _finite(found: Sequence[float]) -> np.ndarray:
    scores = np.maximum(np.asarray(found, np.float64), 0)  # a little below is rounding
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(
            f"the score of block {bad[0]} is {scores[bad[0]]}; look for NaN and infinities in its "
            "parameters and in the states"
        )
    return scores
