"""From a target to widths: what costs least score on this device, checked by measuring it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.budget import score_tables as kept
from jaxprune.budget.latency import LatencyTable, Progress
from jaxprune.budget.limits import Limits, check_kinds, limits_of
from jaxprune.budget.model import add_latency, build
from jaxprune.budget.result import SearchPlan, Unreachable
from jaxprune.budget.roofline import Device
from jaxprune.budget.roofline import device as device_of
from jaxprune.budget.solver import Problem, cheapest, first_uniform, solve
from jaxprune.budget.target import Costs, Target
from jaxprune.compaction.api import Compact, compact
from jaxprune.costs.api import cost
from jaxprune.measuring import benchmark, compare
from jaxprune.structure.select import chosen_dims
from jaxprune.structure.structure import Structure

ATTEMPTS = 5  # of solving, compacting and measuring
DECISIONS = 3  # long runs, if in none of them anything meets the target
MET = 0.99  # of a speed-up counts as the speed-up: a clock's noise
CLOSE = 0.94  # of the budget used is enough: what is left isn't worth another attempt
NEAR = (0.9, 1.08)  # of the budget used in a short run: a long one decides
BESIDE = (1.03, 1.0, 0.97)  # of the budget: what is found for these is measured, too
FINALISTS = 5  # in a long run
DECISIVE = 3  # times as many rounds, while the clock is unsure
SURE = 0.01  # standard error of a ratio, relative
MIN_ROUND = 0.05  # seconds: a round of one short call measures cold caches
COUNTED = ("flops", "bytes", "params")


def search(
    fn: Callable[..., Any],
    params: Any,
    structure: Structure,
    scores: Any,
    *args: Any,
    target: Target,
    dims: str | Sequence[str] = "*",
    minimum: Limits | None = None,
    maximum: Limits | None = None,
    objective: str = "sum",
    round_to: int | None = None,
    device: str | Device | None = None,
    table: LatencyTable | None = None,
    verify: bool = True,
    rounds: int = 9,
    progress: Progress | None = None,
) -> SearchPlan:
    """Chooses how many units of each dimension to keep: the most score that meets a target.

    One operation depends on several dimensions, so its cost is a table over their counts; all
    tables together, and the score that is kept, go to one solver. Times are measured on this
    device, operation by operation, at aligned widths. Where a whole branch may go (heads, hidden
    units or scanned layers of a residual network), its depth competes with all widths. The result
    is compacted and measured beside the dense network in one interleaved run; what is found
    corrects the prediction, and the search is repeated until the target is met.

    Args:
      fn, params, *args: as for :func:`jp.compact`.
      structure: what ``jp.infer_structure`` found.
      scores: a tree like params of numbers >= 0, larger = keep; or {dimension name: a vector}.
      target: what to reach.
      dims: names or labels of the dimensions that may change, with wildcards.
      minimum, maximum: {pattern of names or labels: units kept at least, at most}; floats up to 1.0
        are fractions. By default an eighth of each dimension stays; ``minimum={"*": 0}`` lets
        whole branches go.
      objective: "sum" keeps the most score in total. "proportional" keeps the most of
        :math:`\\sum_l S_l \\log s_l`, where :math:`S_l` is the score of leaf l (of a dimension for
        scores of units) and :math:`s_l` the share of it that is kept: the last units of what has
        shrunk are worth more than the first ones, which holds once a network is tuned. "balanced"
        keeps the most of :math:`\\sum_l \\sqrt{s_l}`: for scores of entries whose leaves can't be
        compared, such as magnitudes, for which the sum goes to leaves of many entries and few
        FLOPs.
      round_to: products stay aligned to it: counts are multiples of it, or of less where several
        units fill it together (heads), or in a dimension of less than two steps; None asks the
        device.
      device: None for this one, measured; or the name of one in ``jp.DEVICES``, or a
        :class:`jp.Device`, for which time is an estimate from published peaks.
      table: where measured times are kept; None for the default file of this device.
      verify: compact and measure. Without it the prediction stands alone.
      rounds: of each measurement of the network.
      progress: wraps an iterable of measurements, such as ``tqdm.tqdm``.

    Returns:
      A :class:`SearchPlan`: ``.keep``, ``.masks``, ``.predicted``, ``.measured``.

    Raises:
      ValueError: for a target that cannot be met, with the least that can; a network without
        prunable dimensions; an unknown device; scores that are negative or do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> scores, target = jp.magnitude(params), jp.Target(params=0.5)
      >>> plan = jp.search(fn, params, structure, scores, x, target=target, round_to=1)
      >>> plan.keep["up:1"].astype(int), plan.predicted.params
      (array([0, 0, 0, 0, 1, 1, 1, 1]), 0.5)

    References:
      Kurtic et al., [ZipLM](https://arxiv.org/abs/2302.04089), 2023, which measures a table of
      single dimensions; here an operation's cost depends on several, and counts are solved for
      together. Shen et al., [HALP](https://arxiv.org/abs/2110.10811), 2021.
    """
    search_ = Search(
        fn, params, structure, scores, *args, dims=dims, minimum=minimum, maximum=maximum,
        objective=objective, round_to=round_to, device=device, table=table, rounds=rounds,
        progress=progress,
    )  # fmt: skip
    return search_.plan(target, verify)


class Search:
    """The part of a search that many targets share: structure, tables, and what was measured."""

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        structure: Structure,
        scores: Any,
        *args: Any,
        dims: str | Sequence[str] = "*",
        minimum: Limits | None = None,
        maximum: Limits | None = None,
        objective: str = "sum",
        round_to: int | None = None,
        device: str | Device | None = None,
        table: LatencyTable | None = None,
        rounds: int = 9,
        progress: Progress | None = None,
    ):
        self.fn, self.params, self.args = fn, params, args
        self.structure, self.rounds, self.progress = structure, rounds, progress
        self.device = device_of(device) if isinstance(device, str) else device
        self._table = table
        check_kinds(structure, params, device, table, round_to)
        names = chosen_dims(structure, dims)
        kept.check_scores(structure, names, scores, objective)
        limits = limits_of(structure, names, minimum, maximum)
        self._floor = "" if minimum else " (an eighth of each stays by default)"
        aligned = self._alignment() if round_to is None else round_to
        self.model = build(fn, params, args, structure, names, aligned, limits, progress)
        self.most = {name: high for name, (_, high) in limits.items()}
        self.score, self.order, self.total = kept.score_total(
            structure, self.model, scores, objective
        )
        total = cost(fn, params, *args)
        self.dense = Costs({name: getattr(total, name) for name in COUNTED})
        self.notes = total.notes  # what isn't counted exactly
        # cost -> {of the model: (found, whether a long run did)}
        self.points: dict[str, dict[float, tuple[float, bool]]] = {}

    def _alignment(self) -> int | LatencyTable:
        return self.device.tile if self.device is not None else self.table

    @property
    def table(self) -> LatencyTable:
        if self._table is None:
            self._table = LatencyTable()
        return self._table

    def rescored(self, scores: Any, minimum: Mapping[str, int]) -> Search:
        """A search with other scores, and counts at least ``minimum``: nothing is timed again.

        For pruning in stages: what units are worth changes when others have gone.
        """
        if self.device is None:
            self._time()
        other = copy.copy(self)
        kept.check_scores(self.structure, self.model.names, scores)
        other.model = self.model.at_least(minimum)
        other.score, other.order, other.total = kept.score_total(
            self.structure, other.model, scores, "sum"
        )
        return other

    def plan(self, target: Target, verify: bool = True, uniform: bool = False) -> SearchPlan:
        """The plan for one target; see :func:`search`. Uniform: one fraction for all dimensions."""
        if not isinstance(target, Target):
            raise TypeError(f"target is {target!r}; write target=jp.Target(speedup=2.0)")
        if target.timed:
            self._time()
        budgets = target.budgets(self.dense)
        tries: list[_Try] = []
        for _ in range(ATTEMPTS):
            measurable = verify and target.timed and self.device is None
            tries.append(self._try(target, budgets, uniform, tries if measurable else None))
            if verify:
                self._verify(tries[-1:], budgets)
            if not verify or tries[-1].enough:
                break
        whole = (tries[-1].choice == self._full).all()
        if verify and "latency" in budgets and self.device is None and not whole:
            tries = self._decided(target, budgets, uniform, tries)
        return self._chosen(target, tries)

    def _decided(
        self, target: Target, budgets: dict[str, float], uniform: bool, tries: list[_Try]
    ) -> list[_Try]:
        """The tries near the target and their neighbours, measured in one long interleaved run.

        A short run puts some on the wrong side, and the one of most score is likely to be one that
        looked faster than it is.
        """
        measured: dict[_Try, None] = {}
        for _ in range(DECISIONS):
            near = [t for t in tries if NEAR[0] <= t.used <= NEAR[1]]
            near = near or [min(tries, key=lambda t: abs(t.used - 1))]
            near += self._beside(budgets, uniform, tries)
            near = sorted(near, key=lambda t: self.score.at(t.choice), reverse=True)[:FINALISTS]
            self._verify(near, budgets, DECISIVE)
            measured |= dict.fromkeys(near)
            if any(t.enough for t in near):
                break
            tries = list(measured)
        return list(measured)

    def _beside(
        self, budgets: Mapping[str, float], uniform: bool, tries: Sequence[_Try]
    ) -> list[_Try]:
        """What is best a little above and below the budget, as far as is known, if it is new.

        A uniform choice among it: what single operations tell may be wrong about the whole, and
        then one fraction for all dimensions may keep more in the same time.
        """
        found: list[_Try] = []
        for part, even in [*((part, uniform) for part in BESIDE), (1.0, True)]:
            scaled = {n: b * (part if n == "latency" else 1) for n, b in budgets.items()}
            choice = self._solved(scaled, even)
            new = choice is not None and not any(
                (t.choice == choice).all() for t in [*tries, *found]
            )
            if choice is not None and new:
                found.append(self._tried(choice))
                found[-1].apart = even and not uniform
        return found

    def _time(self) -> None:
        """Times the dense network and its operations, once."""
        if "latency" in self.model.tables:
            return
        if self.device is not None:
            add_latency(self.model, self.device, None, None)
            self.dense["latency"] = self.model.tables["latency"].at(self._full)
            return
        self.inputs = examples((self.params, *self.args))
        self.jitted = jax.jit(self.fn)
        self.dense["latency"] = benchmark(self.jitted, *self.inputs, rounds=self.rounds).median
        add_latency(self.model, self.table, self.dense["latency"], self.progress)

    @property
    def _full(self) -> np.ndarray:
        return np.array([len(c) - 1 for c in self.model.counts])

    def verified(self, plan: SearchPlan) -> SearchPlan:
        """A plan that was not measured, measured."""
        if plan.target.timed:
            self._time()
        tried = _Try(plan._choice, plan.keep, plan.masks, dict(plan.predicted))
        self._verify([tried], plan.target.budgets(self.dense))
        measured = plan.target.in_units(tried.found, self.dense)
        notes = plan.notes + tried.notes + _missed(tried.used)
        return dataclasses.replace(plan, measured=measured, notes=notes)

    def _try(
        self,
        target: Target,
        budgets: dict[str, float],
        uniform: bool,
        measured: list[_Try] | None,
    ) -> _Try:
        """Solves with what is known so far.

        Where nothing is expected to meet the target, what costs least is measured before that is
        said: times are expected, not known. ``measured``: tries so far, None if nothing will be.
        """
        choice = self._solved(budgets, uniform)
        if choice is None:
            problem = self._problem(budgets)
            choice = cheapest(problem)
            if measured is None or any((t.choice == choice).all() for t in measured):
                raise Unreachable(self._unreachable(target, problem))
        return self._tried(choice)

    def _problem(self, budgets: Mapping[str, float]) -> Problem:
        limits = {name: self._model_budget(name, b) for name, b in budgets.items()}
        return self.model.problem(self.score, limits, self.most)

    def _solved(self, budgets: Mapping[str, float], uniform: bool) -> np.ndarray | None:
        return (first_uniform if uniform else solve)(self._problem(budgets))

    def _tried(self, choice: np.ndarray) -> _Try:
        predicted = {n: self._corrected(n, t.at(choice)) for n, t in self.model.tables.items()}
        keep = self._keep(choice)
        return _Try(choice, keep, self.structure.traced_masks(keep), predicted)

    def _verify(self, tries: Sequence[_Try], budgets: Mapping[str, float], most: int = 1) -> None:
        """Measures some choices beside each other; ``most`` runs, while the clock is unsure."""
        for tried in tries:
            if tried.small is None:
                tried.small = compact(self.fn, examples(self.params), tried.masks, *self.args)
            total = cost(tried.small.fn, tried.small.params, *self.args)
            tried.found = {name: float(getattr(total, name)) for name in COUNTED}
            tried.notes = _notes(self.structure, tried.small, tried.keep)
        if "latency" in budgets and self.device is None:
            for tried, ratio in zip(tries, self._speedups([t.small for t in tries], most)):
                tried.found["latency"] = self.dense["latency"] / ratio
        for tried in tries:
            self._judge(tried, budgets, most > 1)
        if most > 1:  # what short runs said isn't needed any more
            self.points = {
                n: {x: p for x, p in at.items() if p[1]} for n, at in self.points.items()
            }

    def _judge(self, tried: _Try, budgets: Mapping[str, float], certain: bool) -> None:
        for name in budgets if not tried.apart else ():
            if name in tried.found:
                of_model = self.model.tables[name].at(tried.choice)
                self.points.setdefault(name, {})[of_model] = tried.found[name], certain
        tried.used = tried.part_of(budgets)
        tried.enough = tried.used <= 1 and (
            tried.used >= CLOSE or (tried.choice == self._problem(budgets).full()).all()
        )

    def _speedups(self, smalls: Sequence[Any], most: int) -> list[float]:
        """Of compact networks over the dense one, in one interleaved run."""
        entries: dict[str, Any] = {"dense": (self.jitted, self.inputs)}
        entries |= {str(i): (s.fn, (s.params, *self.inputs[1:])) for i, s in enumerate(smalls)}
        ratios = np.zeros((len(smalls), 0))
        for _ in range(most):
            timings = compare(entries, rounds=self.rounds, min_round=MIN_ROUND).timings
            samples = np.array([t.samples for t in timings.values()])
            ratios = np.concatenate([ratios, samples[0] / samples[1:]], axis=1)
            if uncertainty(ratios) < SURE:
                break
        return [float(r) for r in np.median(ratios, axis=1)]

    def _known(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What the model said and what was found, ascending; the dense network is among them."""
        points = {0.0: 0.0, self.model.tables[name].at(self._full): self.dense[name]}
        points |= {x: found for x, (found, _) in self.points.get(name, {}).items()}
        x = np.array(sorted(points))
        return x, rising([points[v] for v in x])

    def _corrected(self, name: str, of_model: float) -> float:
        return float(np.interp(of_model, *self._known(name)))

    def _model_budget(self, name: str, budget: float) -> float:
        """What the model may say so that the network is expected to meet a budget."""
        x, y = self._known(name)
        unique = np.concatenate([[True], np.diff(y) > 0])
        return max(float(np.interp(budget, y[unique], x[unique])), 1e-30)

    def _keep(self, choice: np.ndarray) -> dict[str, np.ndarray]:
        keep = {}
        for name, count in self.model.chosen(choice).items():
            keep[name] = np.zeros(self.structure.dims[name].size, bool)
            keep[name][self.order[name][:count]] = True
        return keep

    def _unreachable(self, target: Target, problem: Problem) -> str:
        least = cheapest(problem)
        costs = {n: self._corrected(n, self.model.tables[n].at(least)) for n in problem.budgets}
        found = target.in_units(costs, self.dense)
        said = ", ".join(f"{n}={found[n]:.4g}" for n in target.given)
        return (
            f"{target} cannot be met with the {len(self.model.names)} dimensions that may change; "
            f"with all of them at their least it would be {said}; ask for that at most, allow more "
            f"dimensions (dims=), or lower minimum={self._floor} or round_to="
        )

    def _chosen(self, target: Target, tries: list[_Try]) -> SearchPlan:
        """Of those that meet the target the one that keeps most; else the nearest one."""
        good = [t for t in tries if t.used <= 1]
        best = (
            max(good, key=lambda t: self.score.at(t.choice))
            if good
            else min(tries, key=lambda t: t.used)
        )
        notes = [*best.notes, *self.notes]
        if self.device is not None:
            notes.append(f"time is an estimate from the published peaks of {self.device.name}")
        notes += _missed(best.used)
        return SearchPlan(
            keep=best.keep,
            masks=best.masks,
            predicted=target.in_units(best.predicted, self.dense),
            measured=target.in_units(best.found, self.dense),
            dense=self.dense,
            score=self.total.at(best.choice) / self.total.at(self._full),
            target=target,
            notes=tuple(notes),
            _structure=self.structure,
            _choice=best.choice,
        )


@dataclass(eq=False)
class _Try:
    """One choice and what came of it."""

    choice: np.ndarray
    keep: dict[str, np.ndarray]
    masks: Any
    predicted: dict[str, float]
    small: Compact | None = None
    found: dict[str, float] = field(default_factory=dict)
    used: float = 0.0  # of the tightest budget, as a fraction
    enough: bool = False
    apart: bool = False  # of another kind: its time says nothing about those of the others
    notes: tuple[str, ...] = ()

    def part_of(self, budgets: Mapping[str, float]) -> float:
        """How much of the tightest budget is used, as found, or as predicted where it wasn't."""
        costs = self.predicted | self.found
        slack = {name: MET if name == "latency" else 1.0 for name in budgets}
        return max(costs[name] * slack[name] / b for name, b in budgets.items())


def uncertainty(ratios: np.ndarray) -> float:
    """The largest relative standard error of the medians of rows, as of a normal distribution."""
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75], axis=1)
    sigma = (high - low) / 1.35
    return float(np.max(1.25 * sigma / middle, initial=0)) / math.sqrt(max(ratios.shape[1], 1))


def rising(values: Sequence[float]) -> np.ndarray:
    """The closest numbers that never fall: neighbours that do are replaced by their mean."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return np.concatenate([np.full(len(b), np.mean(b)) for b in blocks])


def _missed(used: float) -> tuple[str, ...]:
    return (f"the target is missed: {used:.3f} of the budget is used",) if used > 1 else ()


def _notes(structure: Structure, small: Compact, keep: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Branches that go, and units that could not."""
    notes = []
    for name, vector in keep.items():
        label = structure.dims[name].label or name
        if not vector.any():
            notes.append(f"nothing is kept of {label}: the branch goes, the rest goes on")
        back = int((small.keep[name] & ~vector).sum())
        if back and vector.any():
            notes.append(f"{back} units of {label} could not go; see jp.compact's certificate")
    return tuple(notes)


def examples(tree: Any) -> Any:
    """Arrays for what is given as shapes only: time does not depend on values."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, tree
    )
