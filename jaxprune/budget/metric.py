"""What the network's accuracy allows: sensitivity curves, and pruning down to a floor."""

from __future__ import annotations

import functools
import glob
import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.budget.latency import Progress
from jaxprune.budget.search import Search, SearchPlan, Unreachable
from jaxprune.budget.target import Target, as_number
from jaxprune.chosen import is_kernel
from jaxprune.masks import apply_masks, check_structure
from jaxprune.patterns import unstructured
from jaxprune.structure.patterns import chosen_dims, structured
from jaxprune.structure.structure import Structure
from jaxprune.types import path_str

Metric = Callable[[Any], Any]  # params, masked and at full size -> a number, larger = better
Finetune = Callable[[Any, Any], Any]  # (masked params, masks) -> params
Point = tuple[SearchPlan, Any, float]  # a plan, its parameters, their metric

BISECTIONS = 6
FRACTIONS = (0.25, 0.5, 0.75, 0.9)
COSTS = ("flops", "params", "bytes", "speedup")


@dataclass(frozen=True)
class Sensitivity:
    """How a metric falls when one dimension, or one leaf, is pruned and all else stays.

    Attributes:
      fractions: of units (of a leaf: of entries) removed.
      curves: name -> the metric at each fraction.
      dense: the metric of the dense network.
    """

    fractions: tuple[float, ...]
    curves: dict[str, tuple[float, ...]]
    dense: float

    def save(self, path: str | Path) -> None:
        """Writes JSON, to be read by :meth:`load`; JSON has no NaN, which becomes null."""
        curves = {name: [_written(v) for v in values] for name, values in self.curves.items()}
        content = {"fractions": self.fractions, "curves": curves, "dense": _written(self.dense)}
        Path(path).write_text(json.dumps(content, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Reads what :meth:`save` wrote."""
        read = json.loads(Path(path).read_text())
        curves = {name: tuple(map(_read, values)) for name, values in read["curves"].items()}
        return cls(tuple(read["fractions"]), curves, _read(read["dense"]))

    def allowed(self, floor: float) -> dict[str, float]:
        """The largest fraction of each that alone keeps the metric at ``floor``, 0 for none.

        A curve counts up to where it first falls below, straight lines between its points. NaN
        is below, too, and no line leads to it, nor to infinity.
        """
        return {name: self._allowed(values, floor) for name, values in self.curves.items()}

    def _allowed(self, values: Sequence[float], floor: float) -> float:
        x, y = (0.0, *self.fractions), (self.dense, *values)
        below = [k for k in range(len(x)) if not y[k] >= floor]  # NaN is, too
        if not below or below[0] == 0:
            return 0.0 if below else x[-1]
        k = below[0]
        fall = y[k - 1] - y[k]
        part = (y[k - 1] - floor) / fall if math.isfinite(fall) else 0.0
        return x[k - 1] + (x[k] - x[k - 1]) * part


def _written(value: float) -> float | str | None:
    """As strict JSON has it: null for NaN, a text for infinity."""
    return None if math.isnan(value) else value if math.isfinite(value) else str(value)


def _read(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def sensitivity(
    metric: Metric,
    params: Any,
    scores: Any,
    *,
    structure: Structure | None = None,
    dims: str | Sequence[str] = "*",
    where: Callable[[Any, Any], Any] = is_kernel,
    fractions: Sequence[float] = FRACTIONS,
    progress: Progress | None = None,
) -> Sensitivity:
    """Prunes one dimension, or one leaf, at a time, and evaluates a metric.

    Args:
      metric: ``params -> number``, larger = better, on a held-out batch; params are masked and at
        full size, so that one compiled function serves all.
      params: the dense parameters.
      scores: a tree like params, larger = keep.
      structure: units of its dimensions are removed; None: single entries of each leaf.
      dims: which dimensions of the structure.
      where: which leaves, ``(path, leaf) -> bool``, without a structure.
      fractions: removed, in (0, 1).
      progress: wraps an iterable, such as ``tqdm.tqdm``.

    Returns:
      A :class:`Sensitivity`; :func:`jp.plot.sensitivity` draws it.

    Raises:
      TypeError: for a metric that doesn't return one number.
      ValueError: for fractions outside (0, 1) or not ascending, dims without a structure, or when
        nothing is chosen.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.arange(8.0).reshape(2, 4)}
      >>> found = jp.sensitivity(lambda p: p["w"].sum(), params, params, fractions=(0.5,))
      >>> found.dense, found.curves
      (28.0, {'w': (22.0,)})

    References:
      Li et al., [Pruning Filters](https://arxiv.org/abs/1608.08710), 2017, section 3.2.
    """
    fractions = _checked_fractions(fractions)
    if structure is None and dims != "*":
        raise ValueError(
            f"dims={dims!r} are dimensions of a structure, and structure is None; give "
            "structure=jp.infer_structure(fn, params, ...), or choose leaves by where="
        )
    one = _of_dimensions(structure, dims) if structure is not None else _of_leaves(params, where)
    wanted = [(name, f) for name in one for f in fractions]
    values = [
        _value(metric, apply_masks(params, one[name](scores, f)))
        for name, f in (progress(wanted) if progress is not None else wanted)
    ]
    rows = zip(one, np.array(values).reshape(len(one), len(fractions)).tolist())
    return Sensitivity(fractions, {n: tuple(row) for n, row in rows}, _value(metric, params))


def _checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(f) for f in _several("fractions", fractions))
    if not found or not all(0 < f < 1 for f in found) or sorted(found) != [*found]:
        raise ValueError(f"fractions are {found}; wanted ascending numbers between 0 and 1")
    return found


def _several(name: str, values: Iterable[Any]) -> list[Any]:
    """A list of what must be several; raises for a single one."""
    try:
        return list(values)
    except TypeError:
        raise ValueError(
            f"{name} is {values!r}; wanted several: write {name}=[{values!r}]"
        ) from None


def _value(metric: Metric, params: Any) -> float:
    """The metric of params; raises unless it is one number."""
    found = metric(params)
    number = as_number(found)
    if number is None:
        is_array = isinstance(found, np.ndarray | jax.Array)
        got = f"{found.dtype}{found.shape}" if is_array else type(found).__name__
        raise TypeError(
            f"metric returned {got}; wanted one number, larger = better, such as "
            "jnp.mean(labels == logits.argmax(-1))"
        )
    return float(number)


def _of_dimensions(structure: Structure, dims: str | Sequence[str]) -> dict[str, Any]:
    return {
        name: structured(structure, dims=glob.escape(name)) for name in chosen_dims(structure, dims)
    }


def _of_leaves(params: Any, where: Callable[[Any, Any], Any]) -> dict[str, Any]:
    flat = [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    chosen = [path for path, leaf in flat if where(path, leaf)]
    if not chosen:
        raise ValueError("where chooses no leaf of params; there is no sensitivity to find")
    return {name: unstructured(where=_only(name)) for name in chosen}


def _only(name: str) -> Callable[[Any, Any], bool]:
    return lambda path, leaf: path == name


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
    dense = _value(metric, params)
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
    return plan, params, _value(metric, params)


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
    several = _several("targets", targets)
    every = [t if isinstance(t, Target) else Target(speedup=t) for t in several]
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
            metrics.append(_value(metric, trained[-1]))
    dense = None if metric is None else _value(metric, params)
    return Family(tuple(plans), tuple(metrics), tuple(trained), dense)
