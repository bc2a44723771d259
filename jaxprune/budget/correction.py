"""From what tables say of a network to what measuring will find: known points and lines between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

DOUBT = 0.2  # Before anything was measured, whole networks are this far from what tables say.
SURE = 0.02  # They are never known better than this.
RECENT = 3  # The largest of so many last misses is expected next.
CLIFF = 1.15  # What takes so many times as long as a larger network is off the way: a cliff.

LEAST = 1e-30  # The smallest budget for a table; a solver divides by it.


class Point(NamedTuple):
    """What was found for one value of a table; ``certain`` when a long run found it."""

    found: float
    certain: bool


@dataclass(eq=False)
class Measurements:
    """What has been measured, and how it corrects what tables say.

    All stages of a search share one object on purpose (:meth:`jp.Search.stage`): a cost that one of
    them has found is known to the others, whatever their scores are.

    Attributes:
      dense: costs of the dense network, by name; "latency" in seconds, once it has been timed.
      points: cost -> {what the table says of a network: what was found}.
      misses: cost -> how far findings were from what was predicted, as shares.

    Example:
      >>> from jaxprune.budget.correction import Measurements
      >>> measured = Measurements({"latency": 8.0})
      >>> measured.add("latency", 5.0, found=6.0, certain=True)
      >>> measured.corrected("latency", [2.5, 5.0, 7.5], whole=10.0).tolist()
      [3.0, 6.0, 7.0]
    """

    dense: dict[str, float]
    points: dict[str, dict[float, Point]] = field(default_factory=dict)
    misses: dict[str, list[float]] = field(default_factory=dict)

    def add(self, cost: str, said: float, found: float, certain: bool) -> None:
        """Keeps what was found where a table says ``said``."""
        self.points.setdefault(cost, {})[said] = Point(found, certain)

    def missed(self, cost: str, share: float) -> None:
        """Keeps how far a finding was from what was predicted."""
        self.misses.setdefault(cost, []).append(abs(share))

    def doubt(self, cost: str) -> float:
        """How far the next finding may be from what is predicted, as a share."""
        return max(self.misses.get(cost, [DOUBT])[-RECENT:] + [SURE])

    def forget_uncertain(self) -> None:
        """Drops what short runs found."""
        self.points = {
            cost: {said: p for said, p in points.items() if p.certain}
            for cost, points in self.points.items()
        }

    def corrected(self, cost: str, said: float | Sequence[float], whole: float) -> np.ndarray:
        """What is expected to be found where a table says ``said``; ``whole``: of all units."""
        return np.interp(said, *self._line(cost, whole))

    def said(self, cost: str, wanted: float, whole: float) -> float:
        """What a table may say of a network that is expected to be found at ``wanted``."""
        x, y = self._line(cost, whole)
        rises = np.concatenate([[True], np.diff(y) > 0])
        return max(float(np.interp(wanted, y[rises], x[rises])), LEAST)

    def _line(self, cost: str, whole: float) -> tuple[np.ndarray, np.ndarray]:
        """What the table says, ascending, and what was found; the dense network is among them."""
        known = {0.0: 0.0, whole: self.dense[cost]}
        known |= {said: p.found for said, p in self.points.get(cost, {}).items()}
        x = np.array(sorted(known))
        y = np.array([known[said] for said in x])
        near = on_the_way(y)
        return x[near], rising(y[near])


def on_the_way(values: np.ndarray) -> np.ndarray:
    """Which values aren't far above one that comes later, as booleans.

    A width may lie on a cliff: the network is slower than one that says more. A search can pass by.

    Example:
      >>> import numpy as np
      >>> from jaxprune.budget.correction import on_the_way
      >>> on_the_way(np.array([1.0, 3.1, 3.0, 9.0, 4.0])).tolist()
      [True, True, True, False, True]
    """
    later = np.minimum.accumulate(values[::-1])[::-1]
    return values <= CLIFF * later


def rising(values: Sequence[float]) -> np.ndarray:
    """The closest numbers that never fall: neighbors that do are replaced by their mean.

    Returns:
      As many numbers as ``values``, with the same mean.

    Example:
      >>> from jaxprune.budget.correction import rising
      >>> rising([1.0, 3.0, 2.0, 4.0]).tolist()
      [1.0, 2.5, 2.5, 4.0]
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return np.concatenate([np.full(len(b), np.mean(b)) for b in blocks])
