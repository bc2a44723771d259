"""What searches chose, to be read and to be compacted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxprune._tables import Part, Shown, Table
from jaxprune.budget.target import Budget, Target
from jaxprune.structure.dimensions import Structure


class Unreachable(ValueError):
    """A target that no choice of widths meets; the text says what the least is."""


@dataclass(frozen=True, eq=False)
class SearchResult(Shown):
    """What :func:`jp.search` chose. ``print`` it to see the widths, what was expected and found.

    A result owns its data: what the search measures later doesn't change it.

    Attributes:
      keep: dimension name -> boolean vector, True = kept; all False removes the whole branch.
      masks: a tree like params, for :func:`jp.compact`.
      predicted: costs by name (also attributes), in the units of the target: "speedup", "latency"
        in seconds, and those that :class:`jp.Target` counts; what is 0 is left out.
      measured: the same, found on the compacted network; empty when nothing was verified.
      dense: costs of the dense network.
      score: the fraction of the score that is kept.
      target: what was asked for.
      notes: what a reader must know, a line each.
      interval: between what "latency" and "speedup" were expected, by the scatter of the times of
        operations and by how far off predictions of this search were; empty for counted costs.
    """

    keep: dict[str, np.ndarray]
    masks: Any
    predicted: Budget
    measured: Budget
    dense: Budget
    score: float
    target: Target
    notes: tuple[str, ...] = ()
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    _structure: Structure = field(repr=False, default=None)  # type: ignore[assignment]
    _choice: Any = field(repr=False, default=None)

    @property
    def widths(self) -> list[tuple[str, int, int]]:
        """Of each dimension its label, the units kept and its size."""
        dims = self._structure.dims
        return [(dims[n].label or n, int(v.sum()), v.size) for n, v in self.keep.items()]

    def _parts(self) -> Iterator[Part]:
        yield f"{self.target}: keeps {self.score:.1%} of the score"
        costs = [self._cost(name) for name in self.predicted]
        yield Table(("", "dense", "predicted", "within", "measured"), costs, (1, 2, 3, 4))
        kept = [(label, f"{n}", f"{size}") for label, n, size in self.widths]
        yield Table(("dimension", "kept", "of"), kept, (1, 2))
        yield from (f"note: {note}" for note in self.notes)

    def _cost(self, name: str) -> tuple[str, ...]:
        measured = f"{self.measured[name]:.4g}" if name in self.measured else "-"
        dense = 1.0 if name == "speedup" or self.target.is_fraction(name) else self.dense[name]
        within = " - ".join(f"{x:.3g}" for x in self.interval.get(name, ()))
        return name, f"{dense:.4g}", f"{self.predicted[name]:.4g}", within, measured


@dataclass(frozen=True, eq=False)
class MetricResult(Shown):
    """What :func:`jp.prune_to_metric` found.

    Attributes:
      plan: the furthest plan whose metric is at least the floor.
      params: its parameters, masked, fine-tuned if that was asked for; full size.
      metric: the metric of these parameters.
      floor: what was asked for.
      trace: every budget that was tried, with its metric, in order.
    """

    plan: SearchResult
    params: Any
    metric: float
    floor: float
    trace: tuple[tuple[float, float], ...]

    @property
    def masks(self) -> Any:
        """The masks of the plan, a tree like params."""
        return self.plan.masks

    def _parts(self) -> Iterator[Part]:
        yield f"metric {self.metric:.4g}, floor {self.floor:.4g}"
        rows = [(f"{budget:.4g}", f"{value:.4g}") for budget, value in self.trace]
        yield Table(("tried: part of the dense cost", "metric"), rows, (0, 1))
        yield from self.plan._parts()


_WHEN_ASKED = ("active_params", "kv_cache", "peak_memory")  # columns where a target names them
_POINT = {  # What a point needs, and how to get it.
    "speedup": "jp.pareto(..., targets=[1.5, 2.0]) for speed-ups",
    "metric": "jp.pareto(..., metric=accuracy), a function of params",
}


@dataclass(frozen=True, eq=False)
class ParetoFront(Shown):
    """Models at several targets from one search, by :func:`jp.pareto`.

    Attributes:
      plans: one per target.
      metrics: the metric of each plan's parameters; empty without a metric.
      params: the parameters of each plan, masked and fine-tuned; empty without a metric and
        finetune.
      dense: the metric of the dense network, or None.
    """

    plans: tuple[SearchResult, ...]
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

    def _parts(self) -> Iterator[Part]:
        rows = self.rows()
        asked = {name for plan in self.plans for name in plan.target.given}
        hidden = {"score", *_WHEN_ASKED} - asked
        names = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in hidden]
        found = ["measured" if plan.measured else "predicted" for plan in self.plans]
        yield Table(
            ("target", "score kept", *names, "costs"),
            [
                (
                    str(plan.target),
                    f"{row['score']:.1%}",
                    *(f"{row[name]:.4g}" if name in row else "" for name in names),
                    how,
                )
                for plan, row, how in zip(self.plans, rows, found)
            ],
            range(1, len(names) + 2),
        )
        if self.dense is not None:
            yield f"metric of the dense network: {self.dense:.4g}"
