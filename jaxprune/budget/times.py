"""Times of groups over all counts from few that are taken: at the ends, and where a search lands.

Between the least and the most of each dimension time goes along straight lines over the work: that
is curved over the width where a dimension is on both sides of a matrix. Devices have cliffs beside
that. So what dominates a choice is timed at that choice, too, and by how much it is off there is
spread over its neighborhood (Shepard, 1968): a search that landed where only the lines are fast
moves on. What hardly counts is timed once, and follows its work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxprune._progress import Progress
from jaxprune.budget.groups import Group
from jaxprune.budget.latency import LatencyTable
from jaxprune.costs.operations import grid
from jaxprune.ir.axes import Axis

SMALL = 0.005  # A group of a smaller share of the time of all is timed once.
LARGE = 0.03  # One of a larger share of the time at a choice is timed at that choice.

Counts = tuple[int, ...]  # One for each dimension of a group.


@dataclass(eq=False)
class Times:
    """Times of groups, some of which are taken and the others told from them.

    Attributes:
      groups: those that run.
      counts: the candidate counts of each dimension; all that is there comes last.
      table: where times are kept.
      progress: how taking them is shown.
      taken: of each group the counts at which it was timed, with the names of the times.
    """

    groups: Sequence[Group]
    counts: Mapping[Axis, np.ndarray]
    table: LatencyTable
    progress: Progress = False
    taken: list[dict[Counts, str]] = field(init=False)
    _known_places: dict[Any, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.taken = [{} for _ in self.groups]
        whole = {axis: int(counts[-1]) for axis, counts in self.counts.items()}
        self.take((i, self._at(g, whole)) for i, g in enumerate(self.groups))
        at = [self.seconds(i, whole) for i in range(len(self.groups))]
        large = [i for i, t in enumerate(at) if t > SMALL * sum(at)]
        self.take((i, counts) for i in large for counts in self._ends(self.groups[i]))

    @property
    def names(self) -> list[str]:
        """The names of all times that were taken, each once."""
        return [*dict.fromkeys(name for taken in self.taken for name in taken.values())]

    def take(self, points: Iterable[tuple[int, Counts]]) -> bool:
        """Times groups at counts that aren't known yet; False when all of them are."""
        new = [(i, at) for i, at in points if at not in self.taken[i]]
        wanted = {}
        for i, at in new:
            sizes = dict(zip(self.groups[i].dims, at))
            self.taken[i][at], timer = self.table.timed(self.groups[i], sizes)
            wanted[self.taken[i][at]] = timer
        self.table.measure(wanted, self.progress)
        return bool(new)

    def refine(self, chosen: Mapping[Axis, int]) -> bool:
        """Times what dominates a choice at that choice; False when it is known there."""
        at = [self.seconds(i, chosen) for i in range(len(self.groups))]
        large = [i for i, t in enumerate(at) if t > LARGE * sum(at)]
        return self.take((i, self._at(self.groups[i], chosen)) for i in large)

    def seconds(self, i: int, chosen: Mapping[Axis, int]) -> float:
        """What a group takes at a choice, in all turns of the loops around it."""
        group = self.groups[i]
        return float(self.over(i, {d: np.array([chosen[d]]) for d in group.dims}).sum())

    def over(self, i: int, counts: Mapping[Axis, np.ndarray]) -> np.ndarray:
        """The same over a grid of counts."""
        group, taken = self.groups[i], self.taken[i]
        sizes = grid(group.dims, counts)
        known = {at: self.table.entries[name].seconds for at, name in taken.items()}
        if len(known) == 1:
            found = self._by_work(group, sizes, *known.values())
        else:
            found = self._between(group, counts, known)
        shape = tuple(len(counts[d]) for d in group.dims)
        found = np.where(group.empty(sizes), 0, found) * group.times(sizes)
        return np.broadcast_to(found, shape)

    def spread(self, chosen: Mapping[Axis, int]) -> float:
        """How uncertain the time of a choice is by the scatter of what was timed, as a share."""
        at = np.array([self.seconds(i, chosen) for i in range(len(self.groups))])
        entries = self.table.entries
        scatter = [max(entries[n].spread for n in taken.values()) for taken in self.taken]
        return float(math.sqrt(((at * scatter) ** 2).sum()) / max(at.sum(), 1e-30))

    # ---------------------------------------------------------------------------- one group

    def _at(self, group: Group, chosen: Mapping[Axis, int]) -> Counts:
        """Counts of a group, none of which is 0: that costs nothing."""
        least = self._least(group)
        return tuple(max(int(chosen[d]), least[d]) for d in group.dims)

    def _least(self, group: Group) -> dict[Axis, int]:
        return {d: int(self.counts[d][self.counts[d] > 0][0]) for d in group.dims}

    def _ends(self, group: Group) -> Iterator[Counts]:
        """The least and the most of each dimension, with each other."""
        least = self._least(group)
        ends = [sorted({least[d], int(self.counts[d][-1])}) for d in group.dims]
        return itertools.product(*ends)

    @staticmethod
    def _by_work(group: Group, sizes: Any, known: float) -> Any:
        most = {d: np.max(n) for d, n in sizes.items()}
        full = float(np.max(group.work({d: d.size for d in most})))
        return known * group.work(sizes) / full if full else known

    def _between(
        self, group: Group, counts: Mapping[Axis, np.ndarray], known: Mapping[Counts, float]
    ) -> np.ndarray:
        places = [self._places(group, d, counts[d]) for d in group.dims]
        ends = list(self._ends(group))
        corners = np.array([known[at] for at in ends])
        shape = [len({at[k] for at in ends}) for k in range(len(group.dims))]
        lines = _lines(corners.reshape(shape), places)
        off = []
        for at, seconds in known.items():
            where = [self._places(group, d, np.array([n])) for d, n in zip(group.dims, at)]
            told = _lines(corners.reshape(shape), where).item()
            off.append(([float(w[0]) for w in where], math.log(seconds / told)))
        return lines * np.exp(_shepard(places, off)) if len(known) > len(ends) else lines

    def _places(self, group: Group, dim: Axis, counts: np.ndarray) -> np.ndarray:
        """Where counts lie between the least, 0, and the most, 1: by work, if it grows."""
        key = group, dim, counts.tobytes()
        if key not in self._known_places:
            self._known_places[key] = self._placed(group, dim, counts)
        return self._known_places[key]

    def _placed(self, group: Group, dim: Axis, counts: np.ndarray) -> np.ndarray:
        least, most = self._least(group)[dim], int(self.counts[dim][-1])
        full = {d: np.array(int(self.counts[d][-1])) for d in group.dims}

        def work(n: Any) -> np.ndarray:
            found = group.work(full | {dim: np.asarray(n)})
            return np.broadcast_to(np.asarray(found, float), np.shape(n))

        low, high = work(least), work(most)
        if not high > low:
            work, low, high = (lambda n: np.asarray(n, float)), float(least), float(most)  # type: ignore[assignment]
        return np.clip((work(counts) - low) / max(float(high - low), 1e-30), 0, 1)


def _lines(corners: np.ndarray, places: Sequence[np.ndarray]) -> np.ndarray:
    """Linear along each dimension in turn; ``corners`` has one or two entries along each."""
    for k, place in enumerate(places):
        shape = [-1 if j == k else 1 for j in range(len(places))]
        low, high = (np.take(corners, [end], k) for end in (0, -1))
        corners = low + (high - low) * place.reshape(shape)
    return corners


def _shepard(
    places: Sequence[np.ndarray], known: Sequence[tuple[Sequence[float], float]]
) -> np.ndarray:
    """Values between known ones, weighted by 1 / distance^2, over the grid of places."""
    grids = np.meshgrid(*places, indexing="ij", sparse=True)
    total = weights = np.zeros(())
    for at, value in known:
        weight = 1 / np.maximum(sum((g - a) ** 2 for g, a in zip(grids, at)), 1e-12)
        total, weights = total + weight * value, weights + weight
    return total / weights
