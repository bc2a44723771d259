"""Pictures: accuracy against measured speed-up, measured against theoretical speed-up, density.

Colours are Okabe and Ito's, told apart by colour-blind readers, and every series has a marker of
its own. Each function draws on ``ax`` (a new one if None) and returns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("jp.plot needs matplotlib: pip install matplotlib") from error
    return plt.figure(figsize=(6.4, 4.2), layout="constrained").add_subplot()


def _series(ax: Any, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for i, (name, points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(x, y, color=colour, marker=marker, label=name, linewidth=1.5)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)


def accuracy_speedup(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    dense: float | None = None,
    ax: Any = None,
) -> Any:
    """Test accuracy against measured speed-up: name -> (speed-up, accuracy in [0, 1]) points."""
    ax = _axes(ax)
    if dense is not None:
        ax.axhline(100 * dense, color="0.5", linestyle="--", linewidth=1, label="dense accuracy")
    ax.axvline(1, color="0.8", linewidth=1)
    _series(ax, {n: [(s, 100 * a) for s, a in points] for n, points in series.items()})
    ax.set(xlabel="measured speed-up over dense [x]", ylabel="test accuracy [%]")
    return ax


def measured_theoretical(
    series: Mapping[str, Sequence[tuple[float, float]]], *, ax: Any = None
) -> Any:
    """Measured against theoretical speed-up (FLOPs ratio): name -> (theoretical, measured)."""
    ax = _axes(ax)
    top = max(max(x, y) for points in series.values() for x, y in points)
    ax.plot([1, top], [1, top], color="0.5", linestyle="--", linewidth=1, label="as FLOPs promise")
    _series(ax, series)
    ax.set(xlabel="FLOPs of dense / FLOPs [x]", ylabel="measured speed-up over dense [x]")
    return ax


def densities(summary: Any, *, ax: Any = None) -> Any:
    """Density per leaf, from ``jp.summary(params, masks)``; leaves of one entry are left out."""
    ax = _axes(ax)
    rows = [r for r in summary.rows if r.size > 1][::-1]
    ax.barh([r.path for r in rows], [r.kept / r.size for r in rows], color=COLOURS[0])
    ax.set(xlabel="density (kept fraction)", xlim=(0, 1))
    return ax
