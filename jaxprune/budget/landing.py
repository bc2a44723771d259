"""From the best network that fits up to the target, with the clock in hand.

Tables add up what operations take. A whole network has cliffs that they don't know of: compilers
fuse operations and choose algorithms by size, so that one step of a width may cost more than all
others. So the way from what fits up to the dense network is cut into single steps, and networks on
it are measured, ever closer to where the target is met. Where that is a cliff, the dimension stays
below it, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxprune.budget.choosing import CLOSE, MET, Choices, Try

RUNS = 4  # At most so many runs lead to the target, each of four networks at most,
SECONDS = 60.0  # and none begins once the walk has lasted so long.
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
    if choices.best(tries).used > 1:
        return []
    walk, begin = Walk(choices, budgets, uniform, [*tries]), time.monotonic()
    for _ in range(RUNS):
        new = walk.next()
        if not new or time.monotonic() - begin > SECONDS:
            break
        verify(new)
        walk.learn(new)
    return walk.known[len(tries) :]


class Walk:
    """Where a walk is: the way that it is on, the dimensions that stay, and all known tries."""

    def __init__(
        self, choices: Choices, budgets: Mapping[str, float], uniform: bool, known: list[Try]
    ):
        self.choices, self.budgets, self.uniform, self.known = choices, budgets, uniform, known
        self.seconds = AIM / MET * budgets["latency"]
        self.held: set[int] = set()
        self.above: dict[int, Try] = {}  # what is to be measured on the way, by position
        self.way = self._from(choices.best(known))

    def next(self) -> list[Try]:
        """What to measure next: on the way, and beside it; none where it ends."""
        while self.way.low + 1 == self.way.high < len(self.way.choices):  # There is a cliff.
            over, under = (self.way.choices[k] for k in (self.way.high, self.way.low))
            self.held |= {*np.flatnonzero(over != under)}
            self.way = self._from(self.way.top)
        top = self.way.top
        if top.enough:
            return []
        picks = self.way.picks(self.seconds)
        self.above = {k: self.choices.tried(self.way.choices[k], top.apart) for k in picks}
        return [*self.above.values(), *self._aside(top)]

    def learn(self, new: Sequence[Try]) -> None:
        """Goes on from the best of those that were measured."""
        self.known += new
        self.way.known |= self.above
        best = self.choices.best([self.way.top, *new])
        if best is not self.way.top:
            self.held = set()
            self.way = self._from(best)

    def _aside(self, top: Try) -> list[Try]:
        """What is worth most near by as tables tell, if it is worth more and isn't known."""
        worth, known = self.choices.worth, [*self.known, *self.above.values()]
        for part in () if self.uniform else PARTS:
            between = top.found["latency"] + part * (self.seconds - top.found["latency"])
            choice = self.choices.exchanged(self.budgets, top, between)
            better = worth.at(choice) > worth.at(top.choice)
            if better and not any(t.same(choice) for t in known):
                return [self.choices.tried(choice)]
        return []

    def _from(self, start: Try) -> Way:
        table, choices = self.choices.model.tables["latency"], self.choices
        every = choices.upwards(self.budgets, start.choice, self.held, self.uniform)
        dense = table.at(choices.full), choices.measured.dense["latency"]
        return Way(every, [table.at(c) for c in every], {0: start}, dense)
