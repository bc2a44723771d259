"""Counts of dimensions that keep the most score under budgets. Knows tables, no networks.

Score and costs are sums of *terms*: a term is a table over the candidate counts of a few
dimensions, for one operation's cost depends on several. With prices for the costs the best counts
are climbed to one dimension at a time, each over all of its candidates: a step over a cliff (a
width that is off the device's tiles) is no obstacle. The prices are found by bisection.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SWEEPS = 30
BISECTIONS = 16
FILLED = 2  # So many of the choices found are filled up.
EXCHANGED = 12  # Up to so many dimensions also exchange units between them.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # Two budgets share the price so.
UNIFORM = 40  # So many uniform choices are looked at.
SAME = 1e-9  # A smaller relative difference is rounding.


@dataclass(frozen=True)
class Term:
    """``table[i, j, ...]`` is what the i-th, j-th, ... candidates of ``dims`` cost together."""

    dims: tuple[int, ...]
    table: np.ndarray


@dataclass
class Total:
    """A sum of terms, with those of each dimension at hand."""

    terms: Sequence[Term]
    count: int  # There are so many dimensions.
    constant: float = 0.0
    by_dim: list[list[Term]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_dim = [[] for _ in range(self.count)]
        for term in self.terms:
            for d in term.dims:
                self.by_dim[d].append(term)

    def at(self, choice: np.ndarray) -> float:
        """The sum for one candidate index per dimension."""
        found = (float(t.table[tuple(choice[list(t.dims)])]) for t in self.terms)
        return self.constant + sum(found)

    def only(self, candidates: Sequence[slice]) -> Total:
        """The same for some of the candidates of each dimension."""
        terms = [Term(t.dims, t.table[tuple(candidates[d] for d in t.dims)]) for t in self.terms]
        return Total(terms, self.count, self.constant)

    def line(self, choice: np.ndarray, dim: int) -> np.ndarray:
        """For every candidate of one dimension, the sum of its terms, the others as they are."""
        total: np.ndarray | float = 0.0
        for term in self.by_dim[dim]:
            total = (
                total + term.table[tuple(slice(None) if d == dim else choice[d] for d in term.dims)]
            )
        return np.asarray(total)


@dataclass
class Largest(Total):
    """The largest of several sums, such as the memory at one moment each."""

    def __init__(self, totals: Sequence[Total]):
        self.totals = totals
        super().__init__([t for total in totals for t in total.terms], totals[0].count)

    def at(self, choice: np.ndarray) -> float:
        return max(total.at(choice) for total in self.totals)

    def only(self, candidates: Sequence[slice]) -> Total:
        return Largest([total.only(candidates) for total in self.totals])

    def line(self, choice: np.ndarray, dim: int) -> np.ndarray:
        """For every candidate of one dimension, the largest sum, the others as they are."""
        return functools.reduce(np.maximum, [_whole(total, choice, dim) for total in self.totals])


def _whole(total: Total, choice: np.ndarray, dim: int) -> np.ndarray:
    line = total.line(choice, dim)
    here = line[choice[dim]] if line.ndim else line
    return line - here + total.at(choice)


@dataclass
class Problem:
    """Find one candidate per dimension: the most score, all costs within budgets.

    Attributes:
      sizes: number of candidates of each dimension, the last one keeps most.
      score: larger is better.
      costs: by name; what is to stay within ``budgets``.
      budgets: by name, positive.
    """

    sizes: Sequence[int]
    score: Total
    costs: Mapping[str, Total]
    budgets: Mapping[str, float]

    def over(self, choice: np.ndarray) -> float:
        """The largest cost, as a fraction of its budget."""
        return max(self.costs[n].at(choice) / b for n, b in self.budgets.items())

    def fits(self, choice: np.ndarray) -> bool:
        return self.over(choice) <= 1 + SAME

    def full(self) -> np.ndarray:
        return np.asarray(self.sizes) - 1

    @functools.cached_property
    def neighbors(self) -> list[set[int]]:
        """For each dimension those that share a term with it, itself among them."""
        found = [{d} for d in range(len(self.sizes))]
        for total in (self.score, *(self.costs[n] for n in self.budgets)):
            for term in total.terms:
                for d in term.dims:
                    found[d] |= {*term.dims}
        return found


def solve(problem: Problem) -> np.ndarray | None:
    """The best choice found, or None when not even the cheapest one fits.

    Never worse than the best uniform choice, for that is one of the starts.
    """
    if problem.fits(problem.full()):
        return problem.full()
    start = first_uniform(problem)
    starts = [] if start is None else [start]
    found = list(starts)
    for shares in _shares(len(problem.budgets)):
        for start in [problem.full(), *starts]:
            choice = _bisect(problem, shares, start)
            found += [] if choice is None else [choice]
    if not found:
        least = cheapest(problem)
        found = [least] if problem.fits(least) else []
    best = sorted(found, key=problem.score.at, reverse=True)[:FILLED]
    filled = [fill(problem, choice) for choice in best]
    chosen = max(filled, key=problem.score.at, default=None)
    many = len(problem.sizes) > EXCHANGED
    return chosen if chosen is None or many else exchange(problem, chosen)


def uniform(problem: Problem) -> Iterator[np.ndarray]:
    """Choices that keep the same fraction of the candidates of all dimensions, most first."""
    top = problem.full()
    for part in np.linspace(1, 0, UNIFORM):
        yield np.rint(part * top).astype(int)


def first_uniform(problem: Problem) -> np.ndarray | None:
    """The uniform choice that keeps most within the budgets, or None."""
    return next((c for c in uniform(problem) if problem.fits(c)), None)


def cheapest(problem: Problem) -> np.ndarray:
    """What costs least, as far as going down one dimension at a time leads."""
    return _climb(problem, _prices(problem, _shares(len(problem.budgets))[0], 1.0), 0.0)


def _shares(count: int) -> list[tuple[float, ...]]:
    """How a price may be shared out among budgets."""
    if count == 1:
        return [(1.0,)]
    even = (1 / count,) * count
    return [even, *((s, 1 - s, *(0.0,) * (count - 2)) for s in SHARES if s != 0.5)]


def _prices(problem: Problem, shares: Sequence[float], price: float) -> dict[str, float]:
    return {n: s * price / b for (n, b), s in zip(problem.budgets.items(), shares) if s}


def _climb(
    problem: Problem,
    prices: Mapping[str, float],
    weight: float = 1.0,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Best score less priced costs, one dimension at a time, until none wants to move."""
    choice = problem.full() if start is None else start.copy()
    for _ in range(SWEEPS):
        before = choice.copy()
        for d in range(len(problem.sizes)):
            gain = weight * problem.score.line(choice, d)
            paid = sum(p * problem.costs[n].line(choice, d) for n, p in prices.items())
            net = np.broadcast_to(gain - paid, (problem.sizes[d],))
            if net[choice[d]] < net.max() - SAME * np.abs(net).max():
                choice[d] = int(np.argmax(net))
        if (choice == before).all():
            break
    return choice


def _bisect(problem: Problem, shares: Sequence[float], start: np.ndarray) -> np.ndarray | None:
    """The choice at the lowest price that meets all budgets."""
    scale = max(abs(problem.score.at(problem.full())), 1e-30)
    low, high, best = 0.0, scale, None
    for _ in range(BISECTIONS):
        choice = _climb(problem, _prices(problem, shares, high), 1.0, start)
        if problem.fits(choice):
            best = choice
            break
        low, high = high, 8 * high
    if best is None:
        return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2 if low else high / 8
        choice = _climb(problem, _prices(problem, shares, middle), 1.0, start)
        if problem.fits(choice):
            high = middle
            best = max(best, choice, key=problem.score.at)
        else:
            low = middle
    return best


def rises(
    problem: Problem, choice: np.ndarray, held: Collection[int] = (), steps: Steps | None = None
) -> Iterator[np.ndarray]:
    """Choices upwards: the step up of most score per cost that fits, repeated; ``held`` stay."""
    choice, steps = choice.copy(), steps or Steps(problem)
    left = {n: 1 + SAME - problem.costs[n].at(choice) / b for n, b in problem.budgets.items()}
    while True:
        ups = [steps.best_up(choice, d, left) for d in range(len(choice)) if d not in held]
        worth, d, to = max(ups, default=(0.0, 0, 0))
        if worth <= 0:
            return
        _, paid = steps.known[d]
        left = {n: x - paid[n][to - int(choice[d]) - 1] for n, x in left.items()}
        choice[d] = to
        yield choice.copy()
        steps = steps.after(d)


def fill(
    problem: Problem, choice: np.ndarray, held: Collection[int] = (), steps: Steps | None = None
) -> np.ndarray:
    """Uses what is left of the budgets: the last of the choices upwards."""
    return functools.reduce(lambda _, last: last, rises(problem, choice, held, steps), choice)


def exchange(problem: Problem, choice: np.ndarray) -> np.ndarray:
    """Takes from one dimension and fills up the others, as long as that adds score."""
    better = True
    while better:
        better = False
        steps = Steps(problem)
        for d in range(len(choice)):
            for lower in range(int(choice[d])):
                trial = choice.copy()
                trial[d] = lower
                trial = fill(problem, trial, (d,), steps.after(d))
                if problem.score.at(trial) > problem.score.at(choice) * (1 + SAME):
                    choice, better, steps = trial, True, Steps(problem)
                    break
    return choice


class Steps:
    """What a step in each dimension adds to score and costs; only what a step changes is anew."""

    def __init__(self, problem: Problem, known: Mapping[int, Any] | None = None):
        self.problem, self.known = problem, dict(known or {})

    def after(self, dim: int) -> Steps:
        """The steps after one in a dimension: those of its neighbors are other ones."""
        near = self.problem.neighbors[dim]
        return Steps(self.problem, {d: x for d, x in self.known.items() if d not in near})

    def best_up(
        self, choice: np.ndarray, d: int, left: Mapping[str, float]
    ) -> tuple[float, int, int]:
        """(score per cost, dimension, candidate) of the best one above; 0 when there is none."""
        if d not in self.known:
            self.known[d] = self._above(choice, d)
        worth, paid = self.known[d]
        fits = functools.reduce(np.logical_and, (paid[n] <= left[n] for n in paid))
        if not len(worth) or not fits.any():
            return 0.0, d, 0
        best = int(np.where(fits, worth, -np.inf).argmax())
        return float(worth[best]), d, int(choice[d]) + 1 + best

    def _above(self, choice: np.ndarray, d: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Of the candidates above the chosen one: score per cost, and shares of budgets."""
        problem, here = self.problem, int(choice[d])

        def change(total: Total) -> np.ndarray:
            line = total.line(choice, d)
            return line[here + 1 :] - line[here] if line.ndim else np.zeros(most - here)

        most = problem.sizes[d] - 1
        paid = {n: change(problem.costs[n]) / b for n, b in problem.budgets.items()}
        dearest = functools.reduce(np.maximum, paid.values())
        return change(problem.score) / np.maximum(dearest, 1e-12), paid


def merged(terms: Sequence[Term]) -> list[Term]:
    """One term for each set of dimensions."""
    tables: dict[tuple[int, ...], np.ndarray] = {}
    for term in terms:
        before = tables.get(term.dims)
        tables[term.dims] = term.table if before is None else before + term.table
    return [Term(dims, table) for dims, table in tables.items()]
