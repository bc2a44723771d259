"""What a recovery did, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxprune._tables import Part, Shown, Table


class Stage(NamedTuple):
    """One stage: what was done, the held-out loss after it, and how long it took in seconds."""

    name: str
    loss: float
    seconds: float
    said: str = ""


@dataclass(frozen=True)
class Recovery(Shown):
    """What :func:`jp.recover` did; ``print`` it to see the table.

    Attributes:
      stages: in their order.
      removed: the share of the parameters that is gone.
      steps: training steps, those of trials included.
    """

    stages: tuple[Stage, ...]
    removed: float
    steps: int

    def _parts(self) -> Iterator[Part]:
        yield f"{self.removed:.0%} of the parameters removed; {self.steps} training steps"
        rows = [(s.name, f"{s.loss:.4g}", f"{s.seconds:.1f}", s.said) for s in self.stages]
        yield Table(("stage", "held-out loss", "seconds", ""), rows, (1, 2))
