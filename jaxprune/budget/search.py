"""From a target to widths: what costs least score on this device, checked by measuring it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune._calls import calls_fn
from jaxprune._progress import Progress, check, inner, track, working
from jaxprune._renamed import renamed
from jaxprune.budget import metric as metrics
from jaxprune.budget import trust
from jaxprune.budget.choosing import Choices, Try
from jaxprune.budget.correction import Measurements
from jaxprune.budget.latency import LatencyTable
from jaxprune.budget.limits import Limits, check_kinds, check_masked, check_runtime, limits_of
from jaxprune.budget.metric import BISECTIONS, Finetune, Metric
from jaxprune.budget.model import Model, add_latency, build
from jaxprune.budget.result import MetricResult, ParetoFront, SearchResult, Unreachable
from jaxprune.budget.roofline import Device
from jaxprune.budget.roofline import device as device_of
from jaxprune.budget.score_tables import Objective, check_scores
from jaxprune.budget.target import COUNTED, Budget, Target
from jaxprune.budget.verification import Verifier
from jaxprune.costs.api import cost
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.select import chosen_dims

ATTEMPTS = 5  # At most so many times a choice is solved for, compacted and measured.
LANDINGS = 6  # At most so many times operations are timed where a search lands, and it goes on;
SHORT = 1  # where the network is measured there, too, so many times between two measurements.


class Search:
    """Chooses how many units of each dimension to keep: the most score that meets a target.

    One operation depends on several dimensions, so its cost is a table over their counts; all
    tables together, and the score that is kept, go to one solver. Times are measured on this
    device, operation by operation, at aligned widths. Where a whole branch may go (heads, hidden
    units or scanned layers of a residual network), its depth competes with all widths. The result
    is compacted and measured beside the dense network in one interleaved run; what is found
    corrects the prediction, and the search is repeated until the target is met.

    One search serves many targets (:meth:`plan`, :meth:`pareto`), a metric (:meth:`to_metric`) and
    other scores (:meth:`stage`): tables and measurements are made once.

    Args:
      fn, params, *args: as for :func:`jp.compact`; shapes will do for params and args.
      structure: what ``jp.infer_structure`` found.
      scores: a tree like params of numbers >= 0, larger = keep; or {dimension name: a vector}.
      dims: names or labels of the dimensions that may change, with wildcards.
      minimum, maximum: {pattern of names or labels: units kept at least, at most}; floats up to 1.0
        are fractions. By default an eighth of each dimension stays, and less than a quarter only
        where that spares the others much (or where ``jp.scores.loss_units`` measured what is lost);
        ``minimum={"*": 0}`` lets whole branches go.
      objective: what is to be large, where :math:`S_l` is the score of leaf l (of a dimension for
        scores of units) and :math:`s_l` the share of it that is kept. "sum" keeps the most of
        :math:`\\sum_l S_l s_l`. "balanced" keeps the most of :math:`\\sum_l \\sqrt{s_l}`: for those
        whose leaves can't be compared, such as magnitudes, for which the sum goes to leaves of many
        entries and few FLOPs. "proportional" keeps the most of :math:`\\sum_l S_l \\log s_l`. Or a
        function ``(whole, share) -> worth`` of S_l, a float, and an array of shares. None takes the
        sum of scores of units, and balances scores of entries
        (``python -m benchmarks recovery`` compares them).
      round_to: products stay aligned to it: counts are multiples of it, or of less where several
        units fill it together (heads), or in a dimension of less than two steps; None asks the
        device.
      device: None for this one, measured; or the name of one in ``jp.budget.DEVICES``, or a
        :class:`jp.budget.Device`, for which time is an estimate from published peaks.
      table: where measured times are kept; None for the default file of this device, which is
        written below ``$JAXPRUNE_CACHE`` or ``~/.cache/jaxprune``.
      repeats: samples of each time of the network.
      progress: None or True to show what is timed and how much is left, once it takes long; False
        for silence; or what wraps the operations that are timed, such as ``tqdm.tqdm``.
      runtime: where times count, ``jp.runtimes.onnx(quantize="dynamic")``; None is XLA. Operations
        are timed there, each as a program of its own, and the network is measured there.

    Attributes:
      dense: costs of the dense network by name, a copy; "latency" is there once it was timed.
      device: what times are estimated for, or None where they are measured.
      choices, verifier, measured: the parts of a search, which solve, measure, and remember.
      model: costs as tables over counts.

    Raises:
      TypeError: for an option of another kind, or a name that isn't one.
      ValueError: for a network without prunable dimensions, an unknown device, limits that
        contradict each other, scores that are negative or do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> search = jp.Search(fn, params, structure, jp.magnitude(params), x, round_to=1)
      >>> [search.plan(jp.Target(params=part)).widths for part in (0.75, 0.5)]
      [[('hidden', 6, 8)], [('hidden', 4, 8)]]

    References:
      Kurtic et al., `ZipLM <https://arxiv.org/abs/2302.04089>`__, 2023, which measures a table of
      single dimensions; here an operation's cost depends on several, and counts are solved for
      together. Shen et al., `HALP <https://arxiv.org/abs/2110.10811>`__, 2021.
    """

    @renamed("jp.Search", rounds="repeats")
    @calls_fn("jp.Search")
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
        objective: str | Objective | None = None,
        round_to: int | None = None,
        device: str | Device | None = None,
        table: LatencyTable | None = None,
        repeats: int = 9,
        progress: Progress = None,
        runtime: Any = None,
    ):
        self.device = device_of(device) if isinstance(device, str) else device
        check_kinds(structure, params, device, table, round_to)
        self._runtime = check_runtime(runtime, device, table)
        names = chosen_dims(structure, dims)
        check_scores(structure, names, scores, objective)
        limits = limits_of(structure, names, minimum, maximum)
        most = {name: high for name, (_, high) in limits.items()}
        check(progress)
        self._given_table, self._progress = table, progress
        aligned = self._alignment() if round_to is None else round_to
        with working("search: what widths a network may have", inner(progress)):
            model = build(fn, params, args, structure, names, aligned, limits, progress)
        total = cost(fn, params, *args)
        self.measured = Measurements({name: getattr(total, name) for name in COUNTED})
        self.choices = Choices.of(
            structure, model, scores, objective, most, self.measured, room=minimum is None
        )
        self.verifier = Verifier(
            fn, params, args, structure, self.measured, repeats, self.device is None, progress,
            self._runtime,
        )  # fmt: skip
        self._notes = (*total.notes, *trust.estimated(self.device))
        self._by_default = "" if minimum else " (an eighth of each stays by default)"

    def plan(
        self,
        target: Target,
        *,
        verify: bool = True,
        uniform: bool = False,
        metric: Metric | None = None,
    ) -> SearchResult:
        """The plan for one target.

        Args:
          target: a :class:`jp.Target`.
          verify: compact and measure. Without it the prediction stands alone.
          uniform: the same fraction of every dimension in place of the best counts.
          metric: ``params -> number``, larger = better; params are masked and at full size. Of the
            choices that meet the target the one of largest metric is taken, not the one that keeps
            most score. A uniform choice is among them.

        Returns:
          A :class:`jp.budget.SearchResult`: ``.keep``, ``.masks``, ``.predicted``, ``.measured``.

        Raises:
          TypeError: for a target that isn't a :class:`jp.Target`, or a metric that doesn't return
            one number.
          ValueError: for a target that cannot be met, with the least that can.
        """
        if not isinstance(target, Target):
            raise TypeError(f"target is {target!r}; write target=jp.Target(speedup=2.0)")
        if metric is not None:
            self._check_masked("a metric")
        with working(f"search for {target}", inner(self._progress)):
            budgets = self._budgets(target)
            choices, tries = self._attempts(target, budgets, verify, uniform)
            whole = tries[-1].same(self.choices.full)
            if verify and target.timed and self.verifier.timed and not whole:
                tries = self.verifier.decided(choices, budgets, uniform, tries)
            if metric is not None:
                rivals = self._rivals(budgets, verify, uniform, tries)
                return self._result(target, metrics.best(metric, self._params, rivals))
            return self._result(target, self.choices.best(tries))

    def _rivals(
        self, budgets: Mapping[str, float], verify: bool, uniform: bool, tries: Sequence[Try]
    ) -> list[Try]:
        """The choices that a metric decides between: those that meet the target, or the nearest."""
        more = self.choices.beside(budgets, uniform, tries)
        if verify and more:
            self.verifier.verify(more, budgets)
        for tried in more:
            tried.judge(budgets)
        return [t for t in [*tries, *more] if t.used <= 1] or [self.choices.best(tries)]

    def pareto(
        self,
        targets: Sequence[float | Target],
        *,
        metric: Metric | None = None,
        finetune: Finetune | None = None,
        uniform: bool = False,
        verify: bool = True,
        progress: Progress = None,
    ) -> ParetoFront:
        """The models at a list of targets; see :func:`jp.pareto` for arguments and errors."""
        every = targets_of(targets)
        if metric is not None or finetune is not None:
            self._check_masked("a metric or finetune")
        plans, values, trained = [], [], []
        for target in track(every, "plans", progress, label=str):
            plans.append(self.plan(target, verify=verify, uniform=uniform))
            if metric is not None or finetune is not None:
                trained.append(metrics.tuned(self._params, plans[-1].masks, finetune))
            if metric is not None:
                values.append(metrics.value_of(metric, trained[-1]))
        dense = None if metric is None else metrics.value_of(metric, self._params)
        return ParetoFront(tuple(plans), tuple(values), tuple(trained), dense)

    @renamed("to_metric", cost="minimize", steps="bisections")
    def to_metric(
        self,
        metric: Metric,
        *,
        floor: float,
        minimize: str = "flops",
        finetune: Finetune | None = None,
        bisections: int = BISECTIONS,
        verify: bool = True,
        progress: Progress = None,
    ) -> MetricResult:
        """The furthest plan at a floor; see :func:`jp.prune_to_metric` for arguments and errors."""
        metrics.check_bisection(minimize, bisections)
        self._check_masked("a metric")
        dense = metrics.value_of(metric, self._params)
        metrics.check_dense(dense, floor)
        at = functools.partial(self._point, metric, minimize, finetune)
        every = track(range(bisections), "budgets", progress)
        best, trace, refused = metrics.bisect(at, floor, every)
        if best is None:
            text = metrics.none_found(bisections, trace, refused, floor, dense)
            raise ValueError(text) from refused
        plan, params, value = best
        return MetricResult(self.verified(plan) if verify else plan, params, value, floor, trace)

    def stage(
        self,
        scores: Any,
        *,
        minimum: Limits | None = None,
        objective: str | Objective | None = None,
    ) -> Search:
        """A search with other scores and, if given, more units kept at least.

        It is for pruning in stages: what units are worth changes when others have gone. Nothing is
        timed again: all stages share one :class:`Measurements`, so each knows what any of them has
        found.

        Args:
          scores: as for the search.
          minimum: as for the search; what it kept at least stays, too.
          objective: as for the search; None for the same one.

        Returns:
          A :class:`jp.Search` with the same options.

        Raises:
          ValueError: for scores that do not fit, or a minimum above the search's maximum.

        Example:
          >>> import jax.numpy as jnp, jaxprune as jp
          >>> params = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
          >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
          >>> x = jnp.ones((1, 3))
          >>> structure = jp.infer_structure(fn, params, x)
          >>> search = jp.Search(
          ...     fn, params, structure, jp.magnitude(params), x, device="h100", round_to=1
          ... )
          >>> later = search.stage({"up:1": jnp.arange(8.0)[::-1]}, minimum={"*": 3})
          >>> later.plan(jp.Target(params=0.4)).keep["up:1"].astype(int)
          array([1, 1, 1, 0, 0, 0, 0, 0])
        """
        if self.verifier.timed:
            self._time()
        other = copy.copy(self)
        other.choices = self.choices.staged(scores, minimum, objective)
        return other

    def verified(self, plan: SearchResult) -> SearchResult:
        """A plan of this search that was not measured, measured."""
        budgets = self._budgets(plan.target)
        tried = self.choices.tried(plan._choice)
        with working(f"measuring the plan for {plan.target}", inner(self._progress)):
            self.verifier.verify([tried], budgets)
            self.verifier.count(tried)
        measured = plan.target.in_units(tried.found, self.measured.dense)
        before = tuple(note for note in plan.notes if note != trust.UNMEASURED)
        undecided = trust.undecided(plan.target, tried, self.measured.dense)
        notes = (*before, *tried.notes, *trust.missed(tried.used), *undecided)
        return dataclasses.replace(plan, measured=measured, notes=notes)

    @property
    def dense(self) -> Budget:
        """Costs of the dense network, "latency" among them once it was timed."""
        return Budget(self.measured.dense)

    @property
    def model(self) -> Model:
        """Costs as tables over counts."""
        return self.choices.model

    # ------------------------------------------------------------------------------- times

    @functools.cached_property
    def _table(self) -> LatencyTable:
        """The table of this device; the default file is only read when a time is wanted."""
        given = self._given_table
        return LatencyTable(runtime=self._runtime) if given is None else given

    def _alignment(self) -> int | LatencyTable:
        return self.device.tile if self.device is not None else self._table

    def _time(self) -> None:
        """Times the dense network and its operations, or estimates them, once."""
        if "latency" in self.model.tables:
            return
        dense = self.measured.dense
        if self.device is not None:
            add_latency(self.model, self.device, None, None)
            dense["latency"] = self.model.tables["latency"].at(self.choices.full)
            return
        dense["latency"] = self.verifier.dense_seconds()
        add_latency(self.model, self._table, dense["latency"], self._progress)

    # ----------------------------------------------------------------------------- choices

    @property
    def _params(self) -> Any:
        return self.verifier.params

    def _budgets(self, target: Target) -> dict[str, float]:
        """The target as absolute limits, by cost."""
        if "kv_cache" in target.given and not self.measured.dense["kv_cache"]:
            raise ValueError(
                f"{target}: the function hands back no leaf of params anew, so that it has no "
                "cache; give one decode step with its cache in params, which returns it under the "
                'same path: fn({"weights": ..., "cache": ...}, token) -> {"logits": ..., '
                '"cache": ...}'
            )
        if target.timed:
            self._time()
        return target.budgets(self.measured.dense)

    def _attempts(
        self, target: Target, budgets: Mapping[str, float], verify: bool, uniform: bool
    ) -> tuple[Choices, list[Try]]:
        """Solves and measures, each time knowing more, until the budget is met and used.

        Returns:
          The choices that are left, without those on cliffs that were found, and all tries.
        """
        choices, tries = self.choices, list[Try]()
        measurable = verify and target.timed and self.verifier.timed
        for _ in range(ATTEMPTS):
            choice = self._landed(choices, budgets, uniform, SHORT if measurable else LANDINGS)
            if choice is None:  # Times are expected, not known: the cheapest is measured first.
                choice = choices.cheapest(budgets)
                if not measurable or any(t.same(choice) for t in tries):
                    raise Unreachable(self._unreachable(target, budgets))
            if any(t.same(choice) for t in tries):
                break  # It is the best as far as is known: a longer run decides.
            tries.append(choices.tried(choice))
            begin = time.monotonic()
            if verify:
                self.verifier.verify(tries[-1:], budgets)
            took = time.monotonic() - begin
            if measurable and not uniform and len(tries) == 1:
                choices, below = self.verifier.descended(choices, tries[0], budgets, took)
                tries += below
            if not verify or any(t.enough or (measurable and t.near) for t in tries):
                break
        return choices, tries

    def _landed(
        self, choices: Choices, budgets: Mapping[str, float], uniform: bool, landings: int
    ) -> np.ndarray | None:
        """The best choice, once what dominates it was timed at it, or nearly so."""
        for _ in range(landings):
            choice = choices.solved(budgets, uniform)
            landed = choices.cheapest(budgets) if choice is None else choice
            if "latency" not in budgets or not self.model.refine(landed):
                return choice
        return choices.solved(budgets, uniform)

    def _unreachable(self, target: Target, budgets: Mapping[str, float]) -> str:
        least = self.choices.cheapest(budgets)
        costs = {name: self.choices.expected(name, least) for name in budgets}
        found = target.in_units(costs, self.measured.dense)
        said = ", ".join(f"{n}={found[n]:.4g}" for n in target.given)
        return (
            f"{target} cannot be met with the {len(self.model.names)} dimensions that may change; "
            f"with all of them at their least it would be {said}; ask for that at most, allow more "
            f"dimensions (dims=), or lower minimum={self._by_default} or round_to="
        )

    def _result(self, target: Target, best: Try) -> SearchResult:
        dense = self.measured.dense
        if best.small is not None:
            self.verifier.count(best)
        return SearchResult(
            keep=best.keep,
            masks=best.masks,
            predicted=target.in_units(best.predicted, dense),
            measured=target.in_units(best.found, dense),
            dense=self.dense,
            score=self.choices.share(best.choice),
            target=target,
            notes=(
                *best.notes,
                *self._notes,
                *trust.missed(best.used),
                *trust.undecided(target, best, dense),
                *(trust.doubtful(self.model.times) if target.timed else ()),
                *(() if best.found else (trust.UNMEASURED,)),
            ),
            interval=trust.interval(best, dense),
            _structure=self.choices.structure,
            _choice=best.choice,
        )

    def _check_masked(self, what: str) -> None:
        check_masked(self.choices.structure, self.model.names, what)

    def _point(
        self, metric: Metric, minimize: str, finetune: Finetune | None, part: float
    ) -> metrics.Point:
        """The plan at a part of the dense cost, its parameters and their metric."""
        target = Target(**{minimize: 1 / part if minimize == "speedup" else part})
        plan = self.plan(target, verify=False)
        params = metrics.tuned(self._params, plan.masks, finetune)
        return plan, params, metrics.value_of(metric, params)


def targets_of(targets: Sequence[float | Target]) -> list[Target]:
    """Targets as such; numbers are speed-ups."""
    given = metrics.several("targets", targets)
    if not given:
        raise ValueError("pareto got no targets; write targets=[1.25, 1.5, 2, 3] for speed-ups")
    return [t if isinstance(t, Target) else Target(speedup=t) for t in given]
