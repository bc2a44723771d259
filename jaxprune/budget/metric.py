"""What the network's accuracy allows: pruning down to a floor, and a family of targets."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxprune.budget.latency import Progress
from jaxprune.budget.result import SearchPlan, Unreachable
from jaxprune.budget.search import Search
from jaxprune.budget.sensitivity import Metric, several, value_of
from jaxprune.budget.target import Target
from jaxprune.masks import apply_masks, check_structure
from jaxprune.structure.structure import Structure

Finetune = Callable[[Any, Any], Any]  # (masked params, masks) -> params
Point = tuple[SearchPlan, Any, float]  # a plan, its parameters, their metric

BISECTIONS = 6
COSTS = ("flops", "params", "bytes", "speedup")


@dataclass(frozen=True, eq=False)
class MetricPlan:
    """What :func:`prune_to_metric` found.

    Attributes:
      plan: the furthest plan whose metric is at least the floor.
      params: its parameters, masked, fine-tuned if that was asked for; full size.
      metric: of these parameters.
      floor: what was asked for.
      trace: every budget that was tried, with its metric, in order.
    """

    plan: SearchPlan
    params: Any
    metric: float
    floor: float
    trace: tuple[tuple[float, float], ...]

    @property
    def masks(self) -> Any:
        return self.plan.masks

    def __str__(self) -> str:
        rows = [f"  {budget:.4g}: {value:.4g}" for budget, value in self.trace]
        head = f"metric {self.metric:.4g}, floor {self.floor:.4g}; tried (budget: metric)"
        return "\n".join([head, *rows, str(self.plan)])


def prune_to_metric(
    fn: Callable[..., Any],
    params: Any,
    structure: Structure,
    scores: Any,
    *args: Any,
    metric: Metric,
    floor: float,
    cost: str = "flops",
    finetune: Finetune | None = None,
    steps: int = BISECTIONS,
    verify: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> MetricPlan:
    """Prunes as far as a metric allows, by bisection over the budget.

    Args:
      fn, params, structure, scores, *args: as for :func:`jp.search`.
      metric: ``params -> number``, larger = better; params are masked and at full size.
      floor: the least metric that is acceptable.
      cost: what is to become small: "flops", "params", "bytes", or "speedup" to become large.
      finetune: ``(masked params, masks) -> params``, run at every budget that is tried.
      steps: budgets tried.
      verify: measure the last plan, as :func:`jp.search` does.
      progress: wraps the iterable of steps, such as ``tqdm.tqdm``.
      **options: of :func:`jp.search`.

    Returns:
      A :class:`MetricPlan`.

    Raises:
      TypeError: for an unknown option, or a metric that doesn't return one number.
      ValueError: when the dense network itself is below the floor, no budget that was tried is in
        reach or none of them at the floor, for an unknown cost, steps below 1, or a finetune that
        returns another tree.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> found = jp.prune_to_metric(
      ...     fn, params, structure, jp.magnitude(params), x,
      ...     metric=lambda p: fn(p, x).sum(), floor=9.5, round_to=1,
      ... )
      >>> int(found.plan.keep["up:1"].sum()), round(found.metric, 1)
      (5, 10.0)
    """
    if cost not in COSTS:
        raise ValueError(f"cost is {cost!r}; wanted one of {COSTS}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; wanted at least 1 budget to try, such as {BISECTIONS}")
    _check_options("prune_to_metric", options)
    dense = value_of(metric, params)
    _check_dense(dense, floor)
    search = Search(fn, params, structure, scores, *args, **options)
    at = functools.partial(_at, search, cost, metric, finetune)
    every = progress(range(steps)) if progress is not None else range(steps)
    best, trace, refused = _bisect(at, floor, every)
    if best is None:
        raise ValueError(_none_found(steps, trace, refused, floor, dense)) from refused
    plan, tuned, value = best
    return MetricPlan(search.verified(plan) if verify else plan, tuned, value, floor, trace)


def _check_options(who: str, options: Iterable[str]) -> None:
    """Raises for an option that the search doesn't have, in the name of what was called."""
    every = inspect.signature(Search).parameters.values()
    known = [p.name for p in every if p.kind == p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"{who} has no option {unknown[0]!r}; those that it hands on to the search are "
            f"{', '.join(known)}"
        )


def _check_dense(dense: float, floor: float) -> None:
    if math.isnan(dense):
        raise ValueError(
            "the dense network's metric is NaN, so that no floor can be kept; give a metric that "
            "is a number for params as they are"
        )
    if not dense >= floor:
        raise ValueError(
            f"the dense network's metric is {dense:.4g}, below the floor of {floor:.4g} already; "
            "lower the floor, or give a metric of which larger is better"
        )


def _bisect(
    at: Callable[[float], Point], floor: float, steps: Iterable[Any]
) -> tuple[Point | None, tuple[tuple[float, float], ...], Unreachable | None]:
    """The furthest point at the floor, every budget with its metric, the last one out of reach."""
    low, high = 0.0, 1.0  # of the dense network's cost
    best, trace, refused = None, [], None
    for _ in steps:
        part = (low + high) / 2
        try:
            found = at(part)
        except Unreachable as error:
            low, refused = part, error
            continue
        (budget,), value = found[0].target.given.values(), found[2]
        trace.append((budget, value))
        if value >= floor:
            high, best = part, found
        else:
            low = part
    return best, tuple(trace), refused


def _at(search: Search, cost: str, metric: Metric, finetune: Finetune | None, part: float) -> Point:
    """The plan at a part of the dense cost, its parameters and metric."""
    target = Target(**{cost: 1 / part if cost == "speedup" else part})
    plan = search.plan(target, verify=False)
    params = _tuned(search.params, plan.masks, finetune)
    return plan, params, value_of(metric, params)


def _tuned(params: Any, masks: Any, finetune: Finetune | None) -> Any:
    """Masked, and fine-tuned if that is asked for."""
    params = apply_masks(params, masks)
    if finetune is None:
        return params
    tuned = finetune(params, masks)
    check_structure(
        "what finetune returned", tuned, params, "return a tree like params, and nothing beside it"
    )
    return apply_masks(tuned, masks)


def _none_found(
    steps: int, trace: Any, refused: Unreachable | None, floor: float, dense: float
) -> str:
    if not trace:
        return f"no budget of {steps} that were tried is in reach; at the last one: {refused}"
    return (
        f"no budget of {steps} that were tried keeps the metric at {floor:.4g} (dense "
        f"{dense:.4g}; tried, budget and metric: {[*trace]}); give finetune=, or more steps"
    )


_POINT = {  # what a point needs, and how to get it
    "speedup": "jp.pareto(..., targets=[1.5, 2.0]) for speed-ups",
    "metric": "jp.pareto(..., metric=accuracy), a function of params",
}


@dataclass(frozen=True, eq=False)
class Family:
    """Models at several targets from one search, by :func:`pareto`.

    Attributes:
      plans: one per target.
      metrics: of each plan's parameters; empty without a metric.
      params: of each plan, masked and fine-tuned; empty without a metric and finetune.
      dense: the metric of the dense network, or None.
    """

    plans: tuple[SearchPlan, ...]
    metrics: tuple[float, ...] = ()
    params: tuple[Any, ...] = ()
    dense: float | None = None

    def points(self) -> list[tuple[float, float]]:
        """(speed-up, metric) per plan, for :func:`jp.plot.accuracy_speedup`.

        Raises:
          ValueError: when there is no metric, or a plan without a speed-up.
        """
        rows = self.rows()
        for plan, row in zip(self.plans, rows):
            for name, instead in _POINT.items():
                if name not in row:
                    raise ValueError(f"{plan.target} has no {name} to show; write {instead}")
        return [(row["speedup"], row["metric"]) for row in rows]

    def rows(self) -> list[dict[str, float]]:
        """A dict per plan: score, metric where there is one, costs measured or else predicted."""
        metrics: Sequence[Any] = self.metrics or (None,) * len(self.plans)
        return [
            {
                "score": p.score,
                **({"metric": m} if m is not None else {}),
                **(p.predicted | p.measured),
            }
            for p, m in zip(self.plans, metrics)
        ]


def pareto(
    fn: Callable[..., Any],
    params: Any,
    structure: Structure,
    scores: Any,
    *args: Any,
    targets: Sequence[float | Target],
    metric: Metric | None = None,
    finetune: Finetune | None = None,
    uniform: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Family:
    """The models at a list of targets; tables and measurements are made once.

    Args:
      fn, params, structure, scores, *args: as for :func:`jp.search`.
      targets: :class:`jp.Target` each, or numbers, which are speed-ups.
      metric: ``params -> number``; params are masked and at full size.
      finetune: ``(masked params, masks) -> params``, before the metric, if there is one.
      uniform: the same fraction of every dimension in place of the best counts, to compare with.
      verify: measure each plan, as :func:`jp.search` does.
      progress: wraps the iterable of targets, such as ``tqdm.tqdm``.
      **options: of :func:`jp.search`.

    Returns:
      A :class:`Family`. ``jp.plot.accuracy_speedup({name: family.points(), ...})`` draws several of
      them.

    Raises:
      TypeError: for an unknown option, a target that isn't one number, or a metric that doesn't
        return one.
      ValueError: for no targets or a single one, a finetune that returns another tree, and as
        :func:`jp.search`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> family = jp.pareto(
      ...     fn, params, structure, jp.magnitude(params), x, round_to=1,
      ...     targets=[jp.Target(params=0.75), jp.Target(params=0.5)],
      ... )
      >>> [row["params"] for row in family.rows()]
      [0.75, 0.5]
    """
    given = several("targets", targets)
    every = [t if isinstance(t, Target) else Target(speedup=t) for t in given]
    if not every:
        raise ValueError("pareto got no targets; write targets=[1.25, 1.5, 2, 3] for speed-ups")
    _check_options("pareto", options)
    search = Search(fn, params, structure, scores, *args, **options)
    plans, metrics, trained = [], [], []
    for target in progress(every) if progress is not None else every:
        plans.append(search.plan(target, verify, uniform=uniform))
        if metric is not None or finetune is not None:
            trained.append(_tuned(params, plans[-1].masks, finetune))
        if metric is not None:
            metrics.append(value_of(metric, trained[-1]))
    dense = None if metric is None else value_of(metric, params)
    return Family(tuple(plans), tuple(metrics), tuple(trained), dense)
