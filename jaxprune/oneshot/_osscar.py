"""Whole units of a layer's inputs: removed one by one with repair, then exchanged while that helps.

A consumer (in, out) reads units: one input each, or ``group`` inputs next to each other, as a head
has. For a set S of kept inputs the best weights are known, and so is what they lose:

    W_S = (H_SS)^-1 (H W)_S,    loss(S) = tr((W - W_S)^T H (W - W_S))

with H the damped Gram matrix of the inputs. Both stages know what one step changes of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxprune.sharding import host


class Units(NamedTuple):
    """Chosen units of a consumer.

    Attributes:
      kept: (units,) booleans, True = kept, for ``structure.masks``.
      weights: (in, out) float64, refit to the kept inputs; zeros elsewhere.
      loss: what the outputs lose, summed over the Gram matrix's rows, squared; damping included.
      swaps: how many exchanges there were.
    """

    kept: np.ndarray
    weights: np.ndarray
    loss: float
    swaps: int


def osscar(
    weights: Any, gram: Any, count: int, *, group: int = 1, swaps: int = 100, damping: float = 0.01
) -> Units:
    r"""Returns which units of a consumer's inputs to keep, and its weights refit to them.

    First the unit u of least

    .. math:: \mathrm{tr}\bigl(W_u^\top ([H^{-1}]_{uu})^{-1} W_u\bigr)

    goes, and all others make up for it, until ``count`` are left (ZipLM). Then a kept and a removed
    unit are exchanged as long as that lowers the loss: kept ones in the order of what they are
    worth, each for the removed one that gains most (OSSCAR). Everything runs in float64 on the
    host: O(in^3) for the first stage, and O(in^3) for each exchange that is tried.

    Args:
      weights: the consumer (in, out), inputs first.
      gram: (in, in), of its inputs: a leaf of ``stats.grams``.
      count: units that are kept.
      group: inputs of each unit, next to each other.
      swaps: at most so many exchanges; 0 for the first stage alone.
      damping: this share of the mean diagonal is added to the diagonal.

    Returns:
      A :class:`Units`. ``structure.masks({dimension: units.kept})`` cuts all slots of the units,
      and the consumer's leaf takes ``units.weights``.

    Raises:
      ValueError: for shapes that don't belong together, a group that doesn't divide the inputs, a
        count outside 1 .. units, or a Gram matrix that is not finite.

    References:
      Kurtic et al., `ZipLM <https://arxiv.org/abs/2302.04089>`__, 2023, eq. 2 to 4; Meng et al.,
      `OSSCAR <https://arxiv.org/abs/2403.12983>`__, 2024, whose exchanges move several units at
      once: here one.

    Example:
      >>> import numpy as np, jaxprune as jp
      >>> x = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [0.0, 0.0, 3.0]])  # two inputs alike
      >>> found = jp.oneshot.osscar(np.ones((3, 1)), x.T @ x, 2, damping=1e-6)
      >>> int(found.kept[:2].sum()), found.weights.sum(0).round(2).tolist()
      (1, [3.0])
    """
    w, h = host(weights).astype(np.float64), host(gram).astype(np.float64)
    units = _checked(w, h, count, group)
    h = _damped(h, damping)
    kept = _greedy(w, h, count, units)
    done = 0
    while done < swaps and (better := _exchange(w, h, kept, units)) is not None:
        kept, done = better, done + 1
    chosen, (rows, refit) = np.zeros_like(w), _refit(w, h, kept, units)
    chosen[rows] = refit
    apart = w - chosen
    return Units(kept, chosen, float(np.sum(apart * (h @ apart))), done)


def _checked(w: np.ndarray, h: np.ndarray, count: int, group: int) -> np.ndarray:
    """The inputs of each unit, (units, group)."""
    if w.ndim != 2 or h.shape != (len(w), len(w)):
        raise ValueError(
            f"osscar: weights have shape {w.shape} and gram {h.shape}; wanted (in, out) and "
            "(in, in): transpose or reshape a consumer so that the axis it sums over is first"
        )
    if group < 1 or len(w) % group:
        raise ValueError(f"osscar: {len(w)} inputs are no whole units of group={group}")
    if not 1 <= count <= len(w) // group:
        raise ValueError(f"osscar: count is {count}; wanted 1 to {len(w) // group} units")
    if not np.isfinite(h).all():
        raise ValueError("osscar: gram holds NaN or infinity; look for them in calibration data")
    return np.arange(len(w)).reshape(-1, group)


def _damped(h: np.ndarray, damping: float) -> np.ndarray:
    diagonal = np.diagonal(h)
    mean = diagonal[diagonal > 0].mean() if (diagonal > 0).any() else 1.0
    return h + np.diag(np.where(diagonal > 0, damping * mean, mean))


def _costs(w: np.ndarray, inverse: np.ndarray, units: np.ndarray) -> np.ndarray:
    """What each unit's removal costs: tr(W_u^T ([H^-1]_uu)^-1 W_u)."""
    blocks = inverse[units[:, :, None], units[:, None, :]]
    rows = w[units]
    return np.sum(rows * np.linalg.solve(blocks, rows), (1, 2))


def _greedy(w: np.ndarray, h: np.ndarray, count: int, units: np.ndarray) -> np.ndarray:
    """Removes the cheapest unit, repairs with all others, again and again."""
    kept, w, inverse = np.ones(len(units), bool), w.copy(), np.linalg.inv(h)
    for _ in range(len(units) - count):
        left = np.flatnonzero(kept)
        gone = left[np.argmin(_costs(w, inverse, units[left]))]
        rows = units[gone]
        column = inverse[:, rows]
        share = np.linalg.solve(column[rows], np.concatenate([w[rows], column.T], 1))
        w = w - column @ share[:, : w.shape[1]]
        inverse = inverse - column @ share[:, w.shape[1] :]
        kept[gone] = False
    return kept


def _refit(
    w: np.ndarray, h: np.ndarray, kept: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The kept inputs, and the best weights for them."""
    rows = units[kept].reshape(-1)
    return rows, np.linalg.solve(h[np.ix_(rows, rows)], h[rows] @ w)


def _exchange(
    w: np.ndarray, h: np.ndarray, kept: np.ndarray, units: np.ndarray
) -> np.ndarray | None:
    """The first exchange that lowers the loss, the least worthy kept unit first; None for none."""
    rows, refit = _refit(w, h, kept, units)
    places = np.arange(len(rows)).reshape(-1, units.shape[1])
    costs = _costs(refit, np.linalg.inv(h[np.ix_(rows, rows)]), places)
    inside = np.flatnonzero(kept)
    for k in np.argsort(costs):
        less = kept.copy()
        less[inside[k]] = False
        gains = _gains(w, h, less, units)
        gains[inside[k]] = 0
        best = int(np.argmax(gains))
        if gains[best] > costs[k] * (1 + 1e-9):
            less[best] = True
            return less
    return None


def _gains(w: np.ndarray, h: np.ndarray, kept: np.ndarray, units: np.ndarray) -> np.ndarray:
    """By how much the loss falls with each unit that isn't kept; 0 for those that are."""
    gains = np.zeros(len(units))
    rest = np.flatnonzero(~kept)
    rows, others = units[kept].reshape(-1), units[rest].reshape(-1)
    cross = h[np.ix_(rows, others)]
    solved = np.linalg.solve(h[np.ix_(rows, rows)], np.concatenate([h[rows] @ w, cross], 1))
    left = (h[others] @ w) - cross.T @ solved[:, : w.shape[1]]  # H times what is still missed
    schur = h[np.ix_(others, others)] - cross.T @ solved[:, w.shape[1] :]
    gains[rest] = _costs(left, schur, np.arange(len(others)).reshape(len(rest), -1))
    return gains
