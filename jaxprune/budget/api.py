"""``search``, ``pareto``, ``prune_to_metric``: each makes a :class:`jp.Search` and asks it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxprune._calls import calls_fn
from jaxprune._progress import Progress, inner
from jaxprune._renamed import renamed
from jaxprune.budget import metric as metrics
from jaxprune.budget.metric import BISECTIONS, Finetune, Metric
from jaxprune.budget.result import MetricResult, ParetoFront, SearchResult
from jaxprune.budget.search import Search, targets_of
from jaxprune.budget.target import Target
from jaxprune.structure.dimensions import Structure

OPTIONS = tuple(Search.__init__.__kwdefaults__ or ())  # The names are those of its signature.


@renamed("jp.search", rounds="repeats")
@calls_fn("jp.search", *OPTIONS)
def search(
    fn: Callable[..., Any],
    params: Any,
    structure: Structure,
    scores: Any,
    *args: Any,
    target: Target,
    verify: bool = True,
    metric: Metric | None = None,
    **options: Any,
) -> SearchResult:
    """Chooses how many units of each dimension to keep: the most score that meets a target.

    It is ``jp.Search(...).plan(target)``; :class:`jp.Search` says how it works, and serves several
    targets.

    Args:
      fn, params, structure, scores, *args: as for :class:`jp.Search`.
      target: what to reach, a :class:`jp.Target`.
      verify: compact and measure. Without it the prediction stands alone.
      metric: ``params -> number``, larger = better, which decides between the choices that meet the
        target; see :meth:`jp.Search.plan`.
      **options: of :class:`jp.Search`: dims, minimum, maximum, objective, round_to, device, table,
        repeats, progress, runtime.

    Returns:
      A :class:`jp.budget.SearchResult`: ``.keep``, ``.masks``, ``.predicted``, ``.measured``.

    Raises:
      TypeError: for an unknown option, one of another kind, or a metric that doesn't return one
        number.
      ValueError: for a target that cannot be met, with the least that can; and as
        :class:`jp.Search`.

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
    """
    found = Search(fn, params, structure, scores, *args, **options)
    return found.plan(target, verify=verify, metric=metric)


@renamed("jp.pareto", rounds="repeats")
@calls_fn("jp.pareto", *OPTIONS)
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
    progress: Progress = None,
    **options: Any,
) -> ParetoFront:
    """The models at a list of targets; tables and measurements are made once.

    It is ``jp.Search(...).pareto(targets)``.

    Args:
      fn, params, structure, scores, *args: as for :class:`jp.Search`.
      targets: :class:`jp.Target` each, or numbers, which are speed-ups.
      metric: ``params -> number``; params are masked and at full size.
      finetune: ``(masked params, masks) -> params``, before the metric, if there is one.
      uniform: the same fraction of every dimension in place of the best counts, to compare with.
      verify: measure each plan, as :func:`jp.search` does.
      progress: None or True to show how far it is, once it takes long; False for silence; or what
        wraps the targets, such as ``tqdm.tqdm``.
      **options: of :class:`jp.Search`.

    Returns:
      A :class:`jp.budget.ParetoFront`; ``jp.plot.accuracy_speedup({name: front.points(), ...})``
      draws several of them.

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
      >>> front = jp.pareto(
      ...     fn, params, structure, jp.magnitude(params), x, round_to=1,
      ...     targets=[jp.Target(params=0.75), jp.Target(params=0.5)],
      ... )
      >>> [row["params"] for row in front.rows()]
      [0.75, 0.5]
    """
    every = targets_of(targets)  # A wrong one is said before anything is timed.
    options = {"progress": inner(progress)} | options
    found = Search(fn, params, structure, scores, *args, **options)
    return found.pareto(
        every, metric=metric, finetune=finetune, uniform=uniform, verify=verify, progress=progress
    )


@renamed("jp.prune_to_metric", cost="minimize", steps="bisections", rounds="repeats")
@calls_fn("jp.prune_to_metric", *OPTIONS)
def prune_to_metric(
    fn: Callable[..., Any],
    params: Any,
    structure: Structure,
    scores: Any,
    *args: Any,
    metric: Metric,
    floor: float,
    minimize: str = "flops",
    finetune: Finetune | None = None,
    bisections: int = BISECTIONS,
    verify: bool = True,
    progress: Progress = None,
    **options: Any,
) -> MetricResult:
    """Prunes as far as a metric allows, by bisection over the budget.

    It is ``jp.Search(...).to_metric(metric, floor=floor)``.

    Args:
      fn, params, structure, scores, *args: as for :class:`jp.Search`.
      metric: ``params -> number``, larger = better; params are masked and at full size.
      floor: the least metric that is acceptable.
      minimize: what is to become small: "flops" or another counted cost of :class:`jp.Target`; or
        "speedup" to become large.
      finetune: ``(masked params, masks) -> params``, run at every budget that is tried.
      bisections: budgets tried.
      verify: measure the last plan, as :func:`jp.search` does.
      progress: None or True to show how far it is, once it takes long; False for silence; or what
        wraps the bisections, such as ``tqdm.tqdm``.
      **options: of :class:`jp.Search`.

    Returns:
      A :class:`jp.budget.MetricResult`.

    Raises:
      TypeError: for an unknown option, or a metric that doesn't return one number.
      ValueError: when the dense network itself is below the floor, no budget that was tried is in
        reach or none of them at the floor, for an unknown cost, bisections below 1, or a finetune
        that returns another tree.

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
    metrics.check_bisection(minimize, bisections)  # It is said before anything is timed.
    options = {"progress": inner(progress)} | options
    found = Search(fn, params, structure, scores, *args, **options)
    return found.to_metric(
        metric, floor=floor, minimize=minimize, finetune=finetune, bisections=bisections,
        verify=verify, progress=progress,
    )  # fmt: skip
