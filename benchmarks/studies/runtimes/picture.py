"""Quality against measured time, each model in the engine where it is fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt

import jaxprune as jp

matplotlib.use("Agg")  # files only

KINDS = ("dense", "pruned", "dense, int8", "pruned, int8")


class Point(NamedTuple):
    """A model where it is fastest."""

    milliseconds: float
    quality: float
    engine: str


def fastest(rows: list[dict[str, Any]], quality: str) -> dict[str, Point]:
    """Of each kind the row of the least time; other orders and refused rows are left out."""
    found: dict[str, Point] = {}
    for row in rows:
        kind = row["model"] + (", int8" if row["int8"] else "")
        if kind not in KINDS or "milliseconds" not in row or _again(row, rows):
            continue
        some = "some in float" if "in float" in row else None
        label = " ".join(filter(None, [row["engine"], row["int8"], some]))
        point = Point(row["milliseconds"], row[quality], label)
        found[kind] = min(found.get(kind, point), point)
    return found


def _again(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether the same file was written again with some weights in float."""
    same = ("model", "engine", "int8")
    return "in float" not in row and any(
        "in float" in other and all(other[k] == row[k] for k in same) for other in rows
    )


def draw(panels: dict[str, tuple[str, dict[str, Point]]], path: Path) -> None:
    """A panel for each network: ``{title: (label of the quality, points by kind)}``."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for ax, (title, (label, points)) in zip(axes[0], panels.items()):
        for k, kind in enumerate(KINDS):
            if kind in points:
                ms, quality, engine = points[kind]
                ax.plot(ms, quality, jp.plot.curves.MARKERS[k], color=jp.plot.curves.COLORS[k],
                        markersize=9, label=f"{kind}: {ms:.3g} ms, {engine}")  # fmt: skip
        ax.set(title=title, xlabel="milliseconds per batch, fastest engine", ylabel=label)
        ax.set_xlim(0, 1.15 * max(point.milliseconds for point in points.values()))
        ax.margins(y=0.25)
        ax.legend(frameon=False, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
