"""What a search chose, to be read and to be compacted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxprune.budget.target import Costs, Target
from jaxprune.structure.structure import Structure


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
