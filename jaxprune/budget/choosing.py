"""From budgets to counts: what is best as far as is known, and what is chosen in the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxprune.budget import score_tables, solver
from jaxprune.budget.correction import Measurements
from jaxprune.budget.limits import Limits, least_of
from jaxprune.budget.model import Model
from jaxprune.budget.score_tables import Objective
from jaxprune.budget.solver import Problem, Total
from jaxprune.compaction.api import Compact
from jaxprune.structure.dimensions import Structure

MET = 0.99  # A speed-up of this share of the target counts as met: clocks are noisy.
CLOSE = 0.96  # The search stops once this share of the budget is used: 3 % above the target.
NEAR = 0.1  # A search also stops to solve anew that close to the target: clocks decide then.
GAIN = 0.25  # What wins back such a share of the worth that a choice gives up is worth a long run.
PROBES = 6  # At most so many choices a step below one are looked at.
BESIDE = (1.03, 1.0, 0.97)  # A long run also measures what is best at these shares of the budget.


@dataclass(eq=False)
class Try:
    """One choice, and what came of it.

    Attributes:
      choice: index of a candidate count for each dimension.
      keep: dimension name -> boolean vector, True = kept.
      masks: a tree like params.
      said: costs as the tables say, by name.
      predicted: costs as they are expected to be found, by name.
      largest: whether no more units may be kept.
      apart: whether it is a uniform choice beside others, whose costs correct no table.
      doubt: how far the time may be from what is predicted, as a share.
      small: the compact network, once it was made.
      program: it, compiled.
      speedup: what the clock said of it.
      found: costs as they were found, by name.
      notes: what a reader must know of the compact network.
      used: how much of the tightest budget is used, as a fraction.
      enough: whether the target is met and hardly anything of the budget is left.
    """

    choice: np.ndarray
    keep: dict[str, np.ndarray]
    masks: Any
    said: dict[str, float]
    predicted: dict[str, float]
    largest: bool
    apart: bool = False
    doubt: float = 0.0
    small: Compact | None = None
    program: Any = None
    speedup: Any = None
    found: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    used: float = 0.0
    enough: bool = False

    def judge(self, budgets: Mapping[str, float]) -> None:
        """Sets ``used`` and ``enough`` by what was found, or predicted where nothing was found."""
        costs = self.predicted | self.found
        slack = {name: MET if name == "latency" else 1.0 for name in budgets}
        self.used = max(costs[name] * slack[name] / b for name, b in budgets.items())
        self.enough = self.used <= 1 and (self.used >= CLOSE or self.largest)

    @property
    def near(self) -> bool:
        """Whether so much of the budget is used that what is beside it is worth a long run."""
        return abs(self.used - 1) <= NEAR

    def same(self, choice: np.ndarray) -> bool:
        return bool((self.choice == choice).all())


@dataclass(frozen=True, eq=False)
class Choices:
    """Which counts may be kept, what they are worth, and what they cost as far as is known.

    Attributes:
      structure: the structure of the network.
      model: costs as tables over counts; "latency" is added when it is first needed.
      objective: what is to be large, a function or a name in ``score_tables.OBJECTIVES``; None for
        what fits the kind of scores.
      most: the largest count that may be chosen, by dimension.
      worth: the objective, over counts.
      score: the score that is kept, over counts.
      order: units with the best first, by dimension.
      measured: what corrects the tables.
      room: whether units below a quarter of a dimension weigh more than their scores.
      held: the largest count below a cliff that was found, by dimension, for what is solved.
    """

    structure: Structure
    model: Model
    objective: str | Objective | None
    most: Mapping[str, int]
    worth: Total
    score: Total
    order: Mapping[str, np.ndarray]
    measured: Measurements
    room: bool = False
    held: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        structure: Structure,
        model: Model,
        scores: Any,
        objective: str | Objective | None,
        most: Mapping[str, int],
        measured: Measurements,
        room: bool = False,
    ) -> Choices:
        """Choices by scores of entries or units."""
        worth, order, score = score_tables.score_total(structure, model, scores, objective, room)
        return cls(structure, model, objective, most, worth, score, order, measured, room)

    def staged(
        self, scores: Any, minimum: Limits | None, objective: str | Objective | None
    ) -> Choices:
        """Choices by other scores, with counts at least ``minimum``; measurements are shared."""
        objective = self.objective if objective is None else objective
        score_tables.check_scores(self.structure, self.model.names, scores, objective)
        model = self.model.at_least(least_of(self.structure, self.most, minimum))
        return Choices.of(
            self.structure, model, scores, objective, self.most, self.measured, self.room
        )

    @property
    def full(self) -> np.ndarray:
        """The choice that is the dense network."""
        return np.array([len(counts) - 1 for counts in self.model.counts])

    def share(self, choice: np.ndarray) -> float:
        """The fraction of the score that a choice keeps."""
        return self.score.at(choice) / self.score.at(self.full)

    def keep(self, choice: np.ndarray) -> dict[str, np.ndarray]:
        """The best units of each dimension, as boolean vectors by name."""
        keep = {}
        for name, count in self.model.chosen(choice).items():
            keep[name] = np.zeros(self.structure.dims[name].size, bool)
            keep[name][self.order[name][:count]] = True
        return keep

    # ------------------------------------------------------------------------------- costs

    def expected(self, cost: str, choice: np.ndarray) -> float:
        """What a choice is expected to cost, by all that was measured."""
        table = self.model.tables[cost]
        return float(self.measured.corrected(cost, table.at(choice), table.at(self.full)))

    def problem(self, budgets: Mapping[str, float]) -> Problem:
        """What the solver gets: tables, and the budgets that they may show."""
        shown = {
            name: self.measured.said(name, budget, self.model.tables[name].at(self.full))
            for name, budget in budgets.items()
        }
        return self.model.problem(self.worth, shown, {**self.most, **self.held})

    def solved(self, budgets: Mapping[str, float], uniform: bool = False) -> np.ndarray | None:
        """The best choice within budgets (uniform: one fraction of all), None if there is none."""
        find = solver.first_uniform if uniform else solver.solve
        return find(self.problem(budgets))

    def cheapest(self, budgets: Mapping[str, float]) -> np.ndarray:
        """The choice that uses least of the budgets."""
        return solver.cheapest(self.problem(budgets))

    # ------------------------------------------------------------------------------- tries

    def tried(self, choice: np.ndarray, apart: bool = False) -> Try:
        """A choice with its masks and costs, not measured yet."""
        tables, keep = self.model.tables, self.keep(choice)
        most = self.model.problem(self.worth, {}, self.most).full()
        return Try(
            choice=choice,
            keep=keep,
            masks=self.structure.traced_masks(keep),
            said={name: table.at(choice) for name, table in tables.items()},
            predicted={name: self.expected(name, choice) for name in tables},
            largest=bool((choice == most).all()),
            apart=apart,
            doubt=self._doubt(choice),
        )

    def beside(
        self, budgets: Mapping[str, float], uniform: bool, tries: Sequence[Try]
    ) -> list[Try]:
        """What is best a little above and below the budget, as far as is known, if it is new.

        A uniform choice is among it: what single operations tell may be wrong about the whole, and
        then one fraction for all dimensions may keep more in the same time.
        """
        found: list[Try] = []
        for part, even in [*((part, uniform) for part in BESIDE), (1.0, True)]:
            scaled = {n: b * (part if n == "latency" else 1) for n, b in budgets.items()}
            choice = self.solved(scaled, even)
            if choice is not None and not any(t.same(choice) for t in [*tries, *found]):
                found.append(self.tried(choice, apart=even and not uniform))
        return found

    def below(self, tried: Try) -> list[Try]:
        """Choices that are a step below in one dimension, those that spare most time first.

        A compiler may choose other algorithms for a whole network than for its operations. Then
        one step may be worth more than all that tables say.
        """
        steps = np.eye(len(tried.choice), dtype=int)[tried.choice > 0]
        found = sorted(tried.choice - steps, key=self.model.tables["latency"].at)
        return [self.tried(choice) for choice in found[:PROBES]]

    def held_below(self, over: Try, under: Try) -> Choices:
        """Choices that keep no more than ``under`` where it keeps less than ``over``."""
        less = np.flatnonzero(under.choice < over.choice)
        names, counts = self.model.names, self.model.chosen(under.choice)
        return replace(self, held={**self.held, **{names[k]: counts[names[k]] for k in less}})

    @property
    def free(self) -> Choices:
        """Choices that aren't held below any cliff."""
        return replace(self, held={})

    def better(
        self, budgets: Mapping[str, float], uniform: bool, tries: Sequence[Try]
    ) -> list[Try]:
        """What to measure next, by all that is known now, before the best of some tries is taken.

        Where none meets the target all that is near it; else what is expected to meet it and gives
        up much less. A uniform choice meets it now and then where better ones just miss it.
        """
        more, best = self.beside(budgets, uniform, tries), self.best(tries)
        if best.used > 1:
            return more
        worth = self.worth.at(best.choice)
        gain = GAIN * (self.worth.at(self.full) - worth)
        for tried in more:
            tried.judge(budgets)
        return [t for t in more if t.used <= 1 and self.worth.at(t.choice) > worth + gain]

    def upwards(
        self, budgets: Mapping[str, float], start: np.ndarray, held: Collection[int], uniform: bool
    ) -> list[np.ndarray]:
        """Choices from ``start`` up, whatever their time: a unit of candidates more with each.

        Steps of most worth for their time come first; ``held`` dimensions stay. Uniform choices
        have one way up.
        """
        problem = self.problem(budgets)
        if uniform:
            larger = [c for c in solver.uniform(problem) if c.sum() > start.sum()]
            return [start, *reversed(larger)] if not held else [start]
        whole = self.model.tables["latency"].at(self.full)
        problem.budgets = {**problem.budgets, "latency": whole}
        way = [start]
        for choice in solver.rises(problem, start, held):
            way += _single_steps(way[-1], choice)
        return way

    def exchanged(self, budgets: Mapping[str, float], start: Try, seconds: float) -> np.ndarray:
        """What is worth most around a try that was measured, if ``seconds`` may be taken.

        Near by the time follows the tables, by as much as they were off there.
        """
        problem = self.problem(budgets)
        allowed = start.said["latency"] * seconds / start.found["latency"]
        problem.budgets = {**problem.budgets, "latency": allowed}
        return solver.exchange(problem, solver.fill(problem, start.choice))

    def _doubt(self, choice: np.ndarray) -> float:
        """How far a time may be off: by the scatter of what was timed, and as others were."""
        times = self.model.times
        if times is None:
            return 0.0
        scatter = times.spread(self.model.chosen_of(choice))
        return float(np.hypot(scatter, self.measured.doubt("latency")))

    def best(self, tries: Sequence[Try]) -> Try:
        """Of the tries that meet the target the one that keeps most; else the nearest one."""
        good = [t for t in tries if t.used <= 1]
        if not good:
            return min(tries, key=lambda t: t.used)
        return max(good, key=lambda t: self.worth.at(t.choice))


def _single_steps(low: np.ndarray, high: np.ndarray) -> list[np.ndarray]:
    """The choices above ``low`` up to ``high``, which differs in one dimension."""
    unit = np.sign(high - low)
    return [low + k * unit for k in range(1, int((high - low).sum()) + 1)]
