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

from jaxprune.budget import kept
from jaxprune.budget.latency import LatencyTable, Progress
from jaxprune.budget.model import add_latency, build
from jaxprune.budget.roofline import Device
from jaxprune.budget.roofline import device as device_of
from jaxprune.budget.solver import Problem, cheapest, first_uniform, solve
from jaxprune.budget.target import Costs, Target
from jaxprune.compact.compact import Compact, compact
from jaxprune.cost import cost
from jaxprune.measure import Comparison, benchmark, compare
from jaxprune.structure.patterns import chosen_dims
from jaxprune.structure.structure import Structure

ATTEMPTS = 5  # of solving, compacting and measuring
MET = 0.99  # of a speed-up counts as the speed-up: a clock's noise
CLOSE = 0.94  # of the budget used is enough: what is left isn't worth another attempt
COUNTED = ("flops", "bytes", "params")
FLOOR = 1 / 8  # of each dimension stays by default: what is nearly emptied doesn't train back

Limits = Mapping[str, float]


class Unreachable(ValueError):
    """A target that no choice of widths meets; the text says what the least is."""


@dataclass(frozen=True, eq=False)
class SearchPlan:
    """What :func:`search` chose. ``print`` it to see the widths, and what was expected and found.

    Attributes:
      keep: dimension name -> boolean vector, True = kept; an empty one is a branch that goes.
      masks: a tree like params, for :func:`jp.compact`.
      predicted: costs by name (also attributes), in the units of the target: "speedup", "latency"
        in seconds, "flops", "params", "bytes".
      measured: the same, found on the compacted network; empty when nothing was verified.
      dense: costs of the dense network.
      score: the fraction of the score that is kept.
      target: what was asked for.
      notes: what a reader must know, a line each.
    """

    keep: dict[str, np.ndarray]
    masks: Any
    predicted: Costs
    measured: Costs
    dense: Costs
    score: float
    target: Target
    notes: tuple[str, ...] = ()
    _structure: Structure = field(repr=False, default=None)  # type: ignore[assignment]
    _choice: Any = field(repr=False, default=None)

    @property
    def widths(self) -> list[tuple[str, int, int]]:
        """Of each dimension its label, the units kept and its size."""
        dims = self._structure.dims
        return [(dims[n].label or n, int(v.sum()), v.size) for n, v in self.keep.items()]

    def __str__(self) -> str:
        lines = [f"{self.target}: keeps {self.score:.1%} of the score"]
        lines += [f"{'':<10}  {'dense':>10}  {'predicted':>10}  {'measured':>10}"]
        for name, value in self.predicted.items():
            found = f"{self.measured[name]:.4g}" if name in self.measured else "-"
            dense = 1.0 if name == "speedup" or self.target.is_fraction(name) else self.dense[name]
            lines.append(f"{name:<10}  {dense:>10.4g}  {value:>10.4g}  {found:>10}")
        width = max((len(label) for label, *_ in self.widths), default=9)
        lines.append(f"{'dimension':<{width}}  {'kept':>6} of {'size':>6}")
        lines += [f"{label:<{width}}  {n:>6} of {size:>6}" for label, n, size in self.widths]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


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
      minimum, maximum: {pattern of names or labels: units kept at least, at most}; numbers below
        1 are fractions. By default an eighth of each dimension stays; ``minimum={"*": 0}`` lets
        whole branches go.
      objective: "sum" keeps the most score in total. "balanced" keeps the most of
        :math:`\\sum_l \\sqrt{s_l}`, where :math:`s_l` is the share of its own score that leaf l
        keeps: for scores whose leaves can't be compared, such as magnitudes, for which the sum
        goes to leaves of many entries and few FLOPs.
      round_to: counts are multiples of it; None asks the device.
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
        names = chosen_dims(structure, dims)
        if round_to is None:
            round_to = (self.device or self.table).alignment(_widest_type(params))
        limits = _limits(structure, names, minimum, maximum)
        self.model = build(fn, params, args, structure, names, round_to, limits)
        self.score, self.order, self.total = kept.score_total(
            structure, self.model, scores, objective
        )
        total = cost(fn, params, *args)
        self.dense = Costs({name: getattr(total, name) for name in COUNTED})
        self.points: dict[str, list[tuple[float, float]]] = {}  # cost -> (of the model, found)

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
        other.model = self.model.at_least(minimum)
        other.score, other.order, other.total = kept.score_total(
            self.structure, other.model, scores, "sum"
        )
        return other

    def plan(self, target: Target, verify: bool = True, uniform: bool = False) -> SearchPlan:
        """The plan for one target; see :func:`search`. Uniform: one fraction for all dimensions."""
        if target.timed:
            self._time()
        budgets = target.budgets(self.dense)
        tries: list[_Try] = []
        for _ in range(ATTEMPTS):
            measurable = verify and target.timed
            tries.append(self._try(target, budgets, uniform, tries if measurable else None))
            if verify:
                self._verify(tries[-1], budgets)
            if not verify or tries[-1].enough:
                break
        return self._chosen(target, tries)

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
        self._verify(tried, plan.target.budgets(self.dense))
        measured = plan.target.in_units(tried.found, self.dense)
        return dataclasses.replace(plan, measured=measured, notes=plan.notes + tried.notes)

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
        limits = {name: self._model_budget(name, b) for name, b in budgets.items()}
        problem = self.model.problem(self.score, limits)
        choice = first_uniform(problem) if uniform else solve(problem)
        if choice is None:
            choice = cheapest(problem)
            if measured is None or any((t.choice == choice).all() for t in measured):
                raise Unreachable(self._unreachable(target, problem))
        predicted = {n: self._corrected(n, t.at(choice)) for n, t in self.model.tables.items()}
        keep = self._keep(choice)
        return _Try(choice, keep, self.structure.traced_masks(keep), predicted)

    def _verify(self, tried: _Try, budgets: Mapping[str, float]) -> None:
        small = compact(self.fn, self.params, tried.masks, *self.args)
        tried.found = self._found(small, timed="latency" in budgets)
        tried.notes = _notes(self.structure, small, tried.keep)
        known = {name: b for name, b in budgets.items() if name in tried.found}
        for name in known:
            of_model = self.model.tables[name].at(tried.choice)
            self.points.setdefault(name, []).append((of_model, tried.found[name]))
        slack = {name: MET if name == "latency" else 1.0 for name in known}
        tried.used = max((tried.found[n] * slack[n] / b for n, b in known.items()), default=1.0)
        tried.enough = tried.used <= 1 and (
            tried.used >= CLOSE or (tried.choice == self._full).all()
        )

    def _found(self, small: Compact, timed: bool) -> dict[str, float]:
        total = cost(small.fn, small.params, *self.args)
        found = {name: float(getattr(total, name)) for name in COUNTED}
        if timed and self.device is None:
            ratio = self._compared(small).ratios["small"].median
            found["latency"] = self.dense["latency"] / ratio
        return found

    def _compared(self, small: Compact) -> Comparison:
        entries: dict[str, Any] = {
            "dense": (self.jitted, self.inputs),
            "small": (small.fn, (small.params, *self.inputs[1:])),
        }
        return compare(entries, rounds=self.rounds)

    def _known(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What the model said and what was found, ascending; the dense network is among them."""
        points = {0.0: 0.0, self.model.tables[name].at(self._full): self.dense[name]}
        points |= dict(self.points.get(name, []))
        x = np.array(sorted(points))
        return x, np.maximum.accumulate([points[v] for v in x])

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
            "dimensions (dims=), or lower minimum= or round_to="
        )

    def _chosen(self, target: Target, tries: list[_Try]) -> SearchPlan:
        """Of those that meet the target the one that keeps most; else the nearest one."""
        good = [t for t in tries if t.used <= 1]
        best = (
            max(good, key=lambda t: self.score.at(t.choice))
            if good
            else min(tries, key=lambda t: t.used)
        )
        notes = list(best.notes)
        if self.device is not None:
            notes.append(f"time is an estimate from the published peaks of {self.device.name}")
        if not good:
            notes.append(f"the target is missed: {best.used:.3f} of the budget is used")
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
    found: dict[str, float] = field(default_factory=dict)
    used: float = 0.0  # of the tightest budget, as a fraction
    enough: bool = False
    notes: tuple[str, ...] = ()


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


def _limits(
    structure: Structure, names: Sequence[str], minimum: Limits | None, maximum: Limits | None
) -> dict[str, tuple[int, int]]:
    """The least and the largest count of each dimension."""
    sizes = {name: structure.dims[name].size for name in names}
    limits = {name: (math.ceil(FLOOR * size), size) for name, size in sizes.items()}
    for which, given in (("maximum", maximum or {}), ("minimum", minimum or {})):
        for pattern, value in given.items():
            inside = [name for name in chosen_dims(structure, pattern) if name in limits]
            if not inside:
                raise ValueError(
                    f"{which}={{{pattern!r}: {value}}} names none of the dimensions that may "
                    "change; correct it, or choose more of them by dims="
                )
            for name in inside:
                size = structure.dims[name].size
                count = round(value * size) if 0 < value < 1 else int(value)
                if not 0 <= count <= size or (which == "maximum" and count < 1):
                    raise ValueError(
                        f"{which}={{{pattern!r}: {value}}} is {count} of {size} units of {name}; "
                        "wanted a number of units, or a fraction below 1"
                    )
                low, high = limits[name]
                limits[name] = (count, high) if which == "minimum" else (min(low, count), count)
                _check_order(name, *limits[name])
    return limits


def _check_order(name: str, low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"minimum of {name} is {low}, above its maximum {high}")


def _widest_type(params: Any) -> Any:
    """The type of the largest leaf."""
    return max(jax.tree.leaves(params), key=lambda leaf: leaf.size).dtype


def examples(tree: Any) -> Any:
    """Arrays for what is given as shapes only: time does not depend on values."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, tree
    )
