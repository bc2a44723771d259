"""What the network's accuracy allows: sensitivity curves, and pruning down to a floor."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.budget.latency import Progress
from jaxprune.budget.search import Search, SearchPlan, Unreachable
from jaxprune.budget.target import Target
from jaxprune.chosen import is_kernel
from jaxprune.masks import apply_masks
from jaxprune.patterns import unstructured
from jaxprune.structure.patterns import chosen_dims, structured
from jaxprune.structure.structure import Structure
from jaxprune.types import path_str

Metric = Callable[[Any], Any]  # params, masked and at full size -> a number, larger = better
Finetune = Callable[[Any, Any], Any]  # (masked params, masks) -> params

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
        """Writes JSON, to be read by :meth:`load`."""
        Path(path).write_text(json.dumps(self.__dict__, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Reads what :meth:`save` wrote."""
        read = json.loads(Path(path).read_text())
        curves = {name: tuple(values) for name, values in read["curves"].items()}
        return cls(tuple(read["fractions"]), curves, read["dense"])

    def allowed(self, floor: float) -> dict[str, float]:
        """The largest fraction of each that alone keeps the metric at ``floor``, 0 for none.

        A curve counts up to where it first falls below, straight lines between its points.
        """
        return {name: self._allowed(values, floor) for name, values in self.curves.items()}

    def _allowed(self, values: Sequence[float], floor: float) -> float:
        x, y = (0.0, *self.fractions), (self.dense, *values)
        for k in range(len(x)):
            if y[k] < floor:
                if k == 0:
                    return 0.0
                return x[k - 1] + (x[k] - x[k - 1]) * (y[k - 1] - floor) / (y[k - 1] - y[k])
        return x[-1]


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
      dims: which dimensions.
      where: which leaves, ``(path, leaf) -> bool``, without a structure.
      fractions: removed, in (0, 1).
      progress: wraps an iterable, such as ``tqdm.tqdm``.

    Returns:
      A :class:`Sensitivity`; :func:`jp.plot.sensitivity` draws it.

    Raises:
      ValueError: for fractions outside (0, 1) or not ascending, or when nothing is chosen.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.arange(8.0).reshape(2, 4)}
      >>> found = jp.sensitivity(lambda p: p["w"].sum(), params, params, fractions=(0.5,))
      >>> found.dense, found.curves
      (28.0, {'w': (22.0,)})

    References:
      Li et al., [Pruning Filters](https://arxiv.org/abs/1608.08710), 2017, section 3.2.
    """
    fractions = tuple(float(f) for f in fractions)
    if (
        not fractions
        or min(fractions) <= 0
        or max(fractions) >= 1
        or sorted(fractions) != [*fractions]
    ):
        raise ValueError(f"fractions are {fractions}; wanted ascending numbers between 0 and 1")
    one = _of_dimensions(structure, dims) if structure is not None else _of_leaves(params, where)
    wanted = [(name, f) for name in one for f in fractions]
    values = [
        float(metric(apply_masks(params, one[name](scores, f))))
        for name, f in (progress(wanted) if progress is not None else wanted)
    ]
    rows = zip(one, np.array(values).reshape(len(one), len(fractions)).tolist())
    return Sensitivity(fractions, {n: tuple(row) for n, row in rows}, float(metric(params)))


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
      ValueError: when the dense network itself is below the floor, no budget that was tried is
        at the floor, or for an unknown cost.

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
    dense = float(metric(params))
    if dense < floor:
        raise ValueError(
            f"the dense network's metric is {dense:.4g}, below the floor of {floor:.4g} already; "
            "lower the floor, or give a metric of which larger is better"
        )
    search = Search(fn, params, structure, scores, *args, **options)
    low, high, best, trace = 0.0, 1.0, None, []
    for _ in progress(range(steps)) if progress is not None else range(steps):
        part = (low + high) / 2  # of the dense network's cost
        found = _at(search, cost, part, metric, finetune)
        if found is None:
            low = part
            continue
        trace.append((part if cost != "speedup" else 1 / part, found[2]))
        if found[2] >= floor:
            high, best = part, found
        else:
            low = part
    if best is None:
        raise ValueError(
            f"no budget of {steps} that were tried keeps the metric at {floor:.4g} (dense "
            f"{dense:.4g}; tried, budget and metric: {trace}); give finetune=, or more steps"
        )
    plan, tuned, value = best
    if verify:
        plan = search.verified(plan)
    return MetricPlan(plan, tuned, value, floor, tuple(trace))


def _at(
    search: Search, cost: str, part: float, metric: Metric, finetune: Finetune | None
) -> tuple[SearchPlan, Any, float] | None:
    """The plan at a part of the dense cost, its parameters and metric; None when out of reach."""
    target = Target(**{cost: 1 / part if cost == "speedup" else part})
    try:
        plan = search.plan(target, verify=False)
    except Unreachable:
        return None
    params = apply_masks(search.params, plan.masks)
    if finetune is not None:
        params = apply_masks(finetune(params, plan.masks), plan.masks)
    return plan, params, float(jnp.asarray(metric(params)))


@dataclass(frozen=True, eq=False)
class Family:
    """Models at several targets from one search, by :func:`pareto`.

    Attributes:
      plans: one per target.
      metrics: of each plan's parameters; empty without a metric.
      params: of each plan, masked and fine-tuned; empty without a metric.
      dense: the metric of the dense network, or None.
    """

    plans: tuple[SearchPlan, ...]
    metrics: tuple[float, ...] = ()
    params: tuple[Any, ...] = ()
    dense: float | None = None

    def points(self) -> list[tuple[float, float]]:
        """(speed-up, metric) per plan, for :func:`jp.plot.accuracy_speedup`."""
        return [(row["speedup"], row["metric"]) for row in self.rows()]

    def rows(self) -> list[dict[str, float]]:
        """A dict per plan: score, metric where there is one, and what was measured."""
        metrics: Sequence[Any] = self.metrics or (None,) * len(self.plans)
        return [
            {
                "score": p.score,
                **({"metric": m} if m is not None else {}),
                **(p.measured or p.predicted),
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
      finetune: ``(masked params, masks) -> params``, before the metric.
      uniform: the same fraction of every dimension in place of the best counts, to compare with.
      verify: measure each plan, as :func:`jp.search` does.
      progress: wraps the iterable of targets, such as ``tqdm.tqdm``.
      **options: of :func:`jp.search`.

    Returns:
      A :class:`Family`. ``jp.plot.accuracy_speedup({name: family.points(), ...})`` draws several of
      them.

    Raises:
      ValueError: for no targets, and as :func:`jp.search`.

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
    every = [t if isinstance(t, Target) else Target(speedup=t) for t in targets]
    if not every:
        raise ValueError("pareto got no targets; write targets=[1.25, 1.5, 2, 3] for speed-ups")
    search = Search(fn, params, structure, scores, *args, **options)
    plans, metrics, trained = [], [], []
    for target in progress(every) if progress is not None else every:
        plans.append(search.plan(target, verify, uniform=uniform))
        if metric is not None:
            tuned = apply_masks(params, plans[-1].masks)
            if finetune is not None:
                tuned = apply_masks(finetune(tuned, plans[-1].masks), plans[-1].masks)
            trained.append(tuned)
            metrics.append(float(metric(tuned)))
    dense = None if metric is None else float(metric(params))
    return Family(tuple(plans), tuple(metrics), tuple(trained), dense)
