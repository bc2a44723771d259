"""The two pictures of the main job: accuracy against speed, and speed against FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

import jaxprune as jp
from benchmarks.common import table

matplotlib.use("Agg")  # files only; after this, nothing opens a window


def save(rows: Sequence[table.Row], title: str, folder: Path, stem: str) -> list[Path]:
    """Writes the pictures at the large batch; returns their paths."""
    batch = rows[0]["timing"][1]["batch"]
    dense, *others = table.groups(rows)
    pruned = [group for group in others if group[0]["pattern"] != "dense"]
    compact = [group for group in pruned if group[0]["equality"] is not None]
    accuracy = jp.plot.accuracy_speedup(
        _series(pruned, lambda group: (table.speedup(group, 1), table.mean(group, "accuracy"))),
        dense=table.mean(dense, "accuracy"),
    )
    speed = jp.plot.measured_theoretical(
        _series(compact, lambda group: (table.mean(group, "flops_ratio"), table.speedup(group, 1)))
    )
    pictures = {"accuracy_speedup": accuracy, "measured_theoretical": speed}
    return [
        _write(ax, f"{title}, batch {batch}", folder / f"{stem}_{name}.png")
        for name, ax in pictures.items()
    ]


def _series(
    groups: Sequence[list[table.Row]], point: Callable[[list[table.Row]], tuple[float, float]]
) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        series.setdefault(table.name(group[0]), []).append(point(group))
    return series


def _write(ax: Any, title: str, path: Path) -> Path:
    ax.figure.suptitle(title, fontsize="medium")
    ax.figure.savefig(path, dpi=150)
    matplotlib.pyplot.close(ax.figure)
    return path
