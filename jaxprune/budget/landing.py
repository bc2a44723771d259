"""From the best network that fits up to the target, with the clock in hand.

Tables add up what operations take. A whole network has cliffs that they don't know of: compilers
fuse operations and choose algorithms by size, so that one step of a width may cost more than all
others. So the way from what fits up to the dense network is cut into single steps, and networks on
it are measured, ever closer to where the target is met. Where that is a cliff, the dimension stays
below it, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxprune.budget.choosing import CLOSE, MET, Choices, Try

RUNS = 6  # At most so many runs lead to the target, each of four networks at most.
AIM = (1 + CLOSE) / 2  # The share of the budget that is aimed at: both sides are as near.
PARTS = (1, 2 / 3, 1 / 3)  # Of what is left so much is given to an exchange of units, in turn.


@dataclass
class Way:
    """Choices from one that fits upwards, one step each; some of them are measured.

    Attributes:
      choices: more is kept, and mostly more time taken, by each than by the one before.
      said: what the table says of their time.
      known: those that were measured, by position; the first one is, and fits.
      dense: the time of the dense network, as the table says it and measured.
    """

    choices: list[np.ndarray]
    said: list[float]
    known: dict[int, Try]
    dense: tuple[float, float]

    @property
    def low(self) -> int:
        """The last position that fits."""
        return max(k for k, t in self.known.items() if t.used <= 1)

    @property
    def high(self) -> int:
        """The first one above that doesn't; one beyond the end where none is known."""
        return min((k for k in self.known if k > self.low), default=len(self.choices))

    @property
    def top(self) -> Try:
        """The last one that fits."""
        return self.known[self.low]

    def picks(self, seconds: float) -> list[int]:
        """Where so much time is expected, and half of what lies before and behind it."""
        low, high = self.low, self.high
        inside = [k for k in (low, high) if k in self.known]
        ends = [(self.said[k], self.known[k].found["latency"]) for k in inside]
        (x0, y0), (x1, y1) = (*ends, self.dense)[:2]
        aim = x0 + (x1 - x0) * (seconds - y0) / max(y1 - y0, 1e-30)
        middle = int(np.clip(np.searchsorted(self.said, aim), low + 1, high - 1))
        picks = {(low + middle) // 2, middle, (middle + high) // 2}
        return sorted(k for k in picks if low < k < high)


def land(
    choices: Choices,
    verify: Callable[[Sequence[Try]], None],
    budgets: Mapping[str, float],
    uniform: bool,
    tries: Sequence[Try],
) -> list[Try]:
    """New tries between the best that fits and the target, measured until one is near enough."""
    best, seconds = choices.best(tries), AIM / MET * budgets["latency"]
    known, held = [*tries], set[int]()
    way = _way(choices, budgets, uniform, best, held)
    for _ in range(RUNS if best.used <= 1 else 0):
        while way.low + 1 == way.high < len(way.choices):  # There is a cliff.
            held |= {*np.flatnonzero(way.choices[way.high] != way.choices[way.low])}
            way = _way(choices, budgets, uniform, way.top, held)
        if way.top.enough:
            break
        above = {k: choices.tried(way.choices[k], best.apart) for k in way.picks(seconds)}
        tried = [*known, *above.values()]
        aside = [] if uniform else _aside(choices, way.top, budgets, seconds, tried)
        if not above and not aside:
            break
        verify([*above.values(), *aside])
        known, way.known = [*tried, *aside], way.known | above
        best = choices.best([way.top, *aside])
        if best is not way.top:
            held = set()
            way = _way(choices, budgets, uniform, best, held)
    return known[len(tries) :]


def _aside(
    choices: Choices, top: Try, budgets: Mapping[str, float], seconds: float, known: Sequence[Try]
) -> list[Try]:
    """What is worth most near by as tables tell, of those that are worth more and not known."""
    for part in PARTS:
        between = top.found["latency"] + part * (seconds - top.found["latency"])
        choice = choices.exchanged(budgets, top, between)
        better = choices.worth.at(choice) > choices.worth.at(top.choice)
        if better and not any(t.same(choice) for t in known):
            return [choices.tried(choice)]
    return []


def _way(
    choices: Choices, budgets: Mapping[str, float], uniform: bool, start: Try, held: set[int]
) -> Way:
    table = choices.model.tables["latency"]
    every = choices.upwards(budgets, start.choice, held, uniform)
    dense = table.at(choices.full), choices.measured.dense["latency"]
    return Way(every, [table.at(c) for c in every], {0: start}, dense)
