"""What a recovery did, as a table."""

from __future__ import annotations

from typing import Any, NamedTuple


class Stage(NamedTuple):
    """One stage: what was done, the held-out loss after it, and how long it took in seconds."""

    name: str
    loss: float
    seconds: float
    said: str = ""


class Recovery(NamedTuple):
    """What :func:`jp.recover` did; ``print`` it to see the table.

    Attributes:
      stages: in their order.
      removed: the share of the parameters that is gone.
      steps: training steps, those of trials included.
    """

    stages: tuple[Stage, ...]
    removed: float
    steps: int

    def __str__(self) -> str:
        head = f"{self.removed:.0%} of the parameters removed; {self.steps} training steps"
        wide = max(len(s.name) for s in self.stages)
        lines = [f"{'stage':<{wide}}  held-out loss  seconds"]
        for s in self.stages:
            lines.append(f"{s.name:<{wide}}  {s.loss:>13.4g}  {s.seconds:>7.1f}  {s.said}".rstrip())
        return "\n".join([head, *lines])

    def _repr_html_(self) -> str:
        from html import escape

        head = "<tr><th>stage</th><th>held-out loss</th><th>seconds</th><th></th></tr>"
        rows: list[Any] = [
            f"<tr><td>{escape(s.name)}</td><td>{s.loss:.4g}</td><td>{s.seconds:.1f}</td>"
            f"<td>{escape(s.said)}</td></tr>"
            for s in self.stages
        ]
        caption = escape(str(self).splitlines()[0])
        return f"<table><caption>{caption}</caption>{head}{''.join(rows)}</table>"
