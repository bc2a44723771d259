"""Refit toward the dense model's hidden states, not only to what each kernel gave.

A refit kernel gives what the dense one would for the inputs that it meets. The blocks before it
have changed those, so that the residual stream drifts. Here the kernels that write into the stream
also make up for a share of the drift:

    minimise |X V - T|^2 + damping |V - W|^2 over the kept rows of V,
    T = F W + share (D - R - F W)

with F the kernel's inputs in the pruned model before its own units went, X those that stay, R the
stream that is added to, D the dense model's stream after the addition. All drift (share 1) fits the
calibration text and loses on other text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from tqdm import tqdm

import jaxprune as jp
from benchmarks.models import smollm2

SHARE = 0.25  # The study oneshot_drift chose it on unseen texts.
DAMPING = 0.01  # of the mean diagonal of X^T X
# kernels that write into the stream -> their inputs
PARTS = {"o": jax.jit(smollm2.attention_inputs), "down": jax.jit(smollm2.hidden)}

States = list[jax.Array]  # batches of hidden states


def pruned_blocks(
    structure: jp.typing.Structure,
    blocks: Sequence[Any],
    states: States,
    keep: Sequence[Any],
    share: float = SHARE,
) -> tuple[list[Any], list[Any]]:
    """All blocks cut and refit, one after another; and their masks.

    ``states``: before the first block. ``keep``: per block, dimension -> whether a unit stays.
    """
    dense, pruned, masks = states, [], []
    for p, units in zip(tqdm(blocks, desc="pruning"), keep):
        masks.append(structure.traced_masks(units))
        cut = jp.apply_masks(p, masks[-1])
        for kernel, inputs in PARTS.items():
            kept = np.any(np.broadcast_to(masks[-1][kernel], p[kernel].shape), 1)
            dense = [x + inputs(p, x) @ p[kernel] for x in dense]
            cut = cut | {kernel: _refit(p, cut, kernel, kept, states, dense, share)}
            states = [x + inputs(cut, x) @ cut[kernel] for x in states]
        pruned.append(cut)
    return pruned, masks


def _refit(
    p: Any, cut: Any, kernel: str, kept: Any, states: States, dense: States, share: float
) -> jax.Array:
    """One kernel; ``dense``: the dense stream behind it, ``states``: the pruned one before it."""
    inputs = PARTS[kernel]

    def pair(x: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = inputs(p, x) @ p[kernel]
        return inputs(cut, x), whole + share * (d - x - whole)

    pairs = (pair(x, d) for x, d in zip(states, dense))  # one batch is held at a time
    return solve(p[kernel], kept, pairs, DAMPING)


def solve(
    w: jax.Array, kept: np.ndarray, pairs: Iterable[tuple[jax.Array, jax.Array]], damping: float
) -> jax.Array:
    """The kept rows that give the second of each pair from the first; others are zero."""
    gram, cross = np.zeros((w.shape[0],) * 2), np.zeros(w.shape)
    for x, target in pairs:
        a, b = _products(x, target)
        gram, cross = gram + np.asarray(a, np.float64), cross + np.asarray(b, np.float64)
    solved = np.zeros(w.shape, np.float32)
    if kept.any():
        gram, cross = gram[np.ix_(kept, kept)], cross[kept]
        ridge = damping * np.diag(gram).mean()
        factor = scipy.linalg.cho_factor(gram + ridge * np.eye(len(gram)))
        solved[kept] = scipy.linalg.cho_solve(factor, cross + ridge * np.asarray(w)[kept])
    return jnp.asarray(solved, w.dtype)


@jax.jit
def _products(x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, target = (a.reshape(-1, a.shape[-1]) for a in (x, target))
    return x.T @ x, x.T @ target
