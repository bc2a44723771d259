"""Curves and masks. Every series has a marker of its own, so that it is told apart in print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np

from jaxprune.budget.sensitivity import Sensitivity
from jaxprune.report import Summary
from jaxprune.sharding import host

# Okabe and Ito, Color Universal Design (2008): https://jfly.uni-koeln.de/color/, yellow left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# There is one more than colors: pairs repeat late.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")

_PIXELS = 400  # A mask of more rows or columns is averaged over small areas.
_INSIDE = 5  # The legend of so many series has room inside the axes.

# name -> points; a coordinate is a number or the quartiles (low, median, high) of jp.compare.
Series = Mapping[str, Sequence[tuple[Any, Any]]]


def accuracy_speedup(series: Series, *, dense: float | None = None, ax: Any = None) -> Any:
    """Draws test accuracy against measured speed-up and returns the axes.

    Args:
      series: ``{name: [(speed-up, accuracy), ...]}``. A speed-up is a number or the quartiles that
        ``jp.compare(...).ratios`` holds, drawn as a bar; an accuracy is in [0, 1].
      dense: the dense network's accuracy, drawn as a line.
      ax: matplotlib axes, a new figure if None.

    Raises:
      TypeError: for series that aren't lists of points by name.
      ValueError: without points, or for an accuracy outside [0, 1].
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jaxprune as jp
      >>> ax = jp.plot.accuracy_speedup({"magnitude": [(1.4, 0.91), ((2.2, 2.3, 2.5), 0.89)]})
      >>> ax.get_xlabel()
      'measured speed-up over dense [x]'
    """
    points = _points(series, "accuracy_speedup", "[(speed-up, accuracy), ...]")
    _check_accuracies(points)
    ax = new_axes(ax, width=_width(points))
    ax.axvline(1, color="0.8", linewidth=1, zorder=0)
    _dense(ax, dense)
    _draw(ax, {name: [(x, 100 * y) for x, y in xy] for name, xy in points.items()})
    ax.set(xlabel="measured speed-up over dense [x]", ylabel="test accuracy [%]")
    return ax


def measured_theoretical(series: Series, *, ax: Any = None) -> Any:
    """Draws measured against theoretical speed-up on logarithmic axes and returns the axes.

    The dashed line is where a device would gain as much as the FLOPs promise; below the dotted one
    the pruned network is slower than the dense one.

    Args:
      series: ``{name: [(FLOPs of dense / FLOPs, measured speed-up), ...]}``; a speed-up is a number
        or the quartiles that ``jp.compare(...).ratios`` holds.
      ax: matplotlib axes, a new figure if None.

    Raises:
      TypeError: for series that aren't lists of points by name.
      ValueError: without points, or for a ratio that isn't positive.
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jaxprune as jp
      >>> ax = jp.plot.measured_theoretical({"aligned": [(2.0, 1.8), (4.0, 3.1)]})
      >>> ax.get_xscale()
      'log'
    """
    points = _points(series, "measured_theoretical", "[(FLOPs ratio, measured speed-up), ...]")
    values = np.concatenate([np.ravel(xy) for xy in points.values()])
    if not (values > 0).all():
        raise ValueError(f"measured_theoretical wants ratios above 0, got {values.min():g}")
    ax = new_axes(ax, width=_width(points))
    ends = [min(values.min(), 1), max(values.max(), 1)]
    ax.plot(ends, ends, "--", color="0.4", linewidth=1, label="as FLOPs promise", zorder=0)
    ax.axhline(1, linestyle=":", color="0.4", linewidth=1, label="as dense", zorder=0)
    _draw(ax, points)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    _label_ratios(ax.xaxis)
    _label_ratios(ax.yaxis)
    ax.set(xlabel="theoretical speed-up: FLOPs of dense / FLOPs [x]",
           ylabel="measured speed-up over dense [x]")  # fmt: skip
    return ax


def accuracy_density(series: Series, *, dense: float | None = None, ax: Any = None) -> Any:
    """Draws test accuracy against the density of masks and returns the axes.

    Densities are on a logarithmic axis and fall to the right.

    Args:
      series: ``{name: [(density, accuracy), ...]}``, both in [0, 1]. An accuracy is a number, or
        (low, middle, high), such as a mean over seeds with its spread, drawn as a bar.
      dense: the dense network's accuracy, drawn as a line.
      ax: matplotlib axes, a new figure if None.

    Raises:
      TypeError: for series that aren't lists of points by name.
      ValueError: without points, or for an accuracy or density outside [0, 1] or (0, 1].
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jaxprune as jp
      >>> ax = jp.plot.accuracy_density({"magnitude": [(0.1, 0.9), (0.02, (0.84, 0.86, 0.87))]})
      >>> ax.get_xlabel()
      'density (kept weights / weights) [%]'
    """
    points = _points(series, "accuracy_density", "[(density, accuracy), ...]")
    _check_accuracies(points)
    densities = sorted({float(x[1]) for xy in points.values() for x, _ in xy})
    if not 0 < densities[0] <= densities[-1] <= 1:
        raise ValueError(
            f"accuracy_density got densities from {densities[0]:g} to {densities[-1]:g}; wanted "
            "fractions of kept weights, in (0, 1]: 0.1 for a sparsity of 90 %"
        )
    ax = new_axes(ax, width=_width(points))
    _dense(ax, dense)
    _draw(ax, {name: [(100 * x, 100 * y) for x, y in xy] for name, xy in points.items()})
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.set_xticks([100 * x for x in densities], [f"{100 * x:.3g}" for x in densities])
    ax.minorticks_off()
    ax.set(xlabel="density (kept weights / weights) [%]", ylabel="test accuracy [%]")
    return ax


def over_steps(series: Series, *, ylabel: str, ax: Any = None) -> Any:
    """Draws what changes in the course of training, a line per run, and returns the axes.

    Args:
      series: ``{name: [(step, value), ...]}``: densities, accuracies in [0, 1], or the overlaps of
        :func:`jp.sanity.overlap_over_time`. A value may be quartiles (low, median, high), too.
      ylabel: what the values are, with their unit.
      ax: matplotlib axes, a new figure if None.

    Raises:
      TypeError: for series that aren't lists of points by name.
      ValueError: without points.
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jaxprune as jp
      >>> ax = jp.plot.over_steps({"gradual": [(0, 1.0), (100, 0.1)]}, ylabel="density")
      >>> ax.get_xlabel()
      'step'
    """
    points = _points(series, "over_steps", "[(step, value), ...]")
    ax = new_axes(ax, width=_width(points))
    _draw(ax, points)
    ax.set(xlabel="step", ylabel=ylabel)
    return ax


def sensitivity(found: Sensitivity, *, limit: int = 8, ax: Any = None) -> Any:
    """Draws the metric against the fraction that is removed of one dimension or leaf at a time.

    Args:
      found: what :func:`jp.sensitivity` returned.
      limit: curves drawn; those whose metric falls furthest come first.
      ax: matplotlib axes, a new figure if None.

    Raises:
      TypeError: for something else, its curves alone for example.
      ValueError: without curves.
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jaxprune as jp
      >>> curves = {"up": (0.9, 0.4), "down": (0.8, 0.7)}
      >>> found = jp.budget.Sensitivity((0.5, 0.9), curves, dense=0.9)
      >>> jp.plot.sensitivity(found).get_xlabel()
      'removed of one dimension or leaf [%]'
    """
    if not isinstance(found, Sensitivity):
        raise TypeError(
            "plot.sensitivity wants what jp.sensitivity(params, structure, scores, metric=...) "
            f"returned, got {type(found).__name__}"
        )
    steepest = sorted(found.curves, key=lambda name: min(found.curves[name]))[:limit]
    x = [100 * f for f in (0.0, *found.fractions)]
    series = {name: list(zip(x, (found.dense, *found.curves[name]))) for name in steepest}
    points = _points(series, "sensitivity", "[(fraction, metric), ...]")
    ax = new_axes(ax, width=_width(points))
    _draw(ax, points)
    ax.set(xlabel="removed of one dimension or leaf [%]", ylabel="metric")
    if len(found.curves) > limit:
        ax.set_title(f"the {limit} steepest of {len(found.curves)} curves", fontsize="medium")
    return ax


def densities(of: Summary | Mapping[str, Summary], *, ax: Any = None) -> Any:
    """Draws the density of each leaf, in the order of the tree, and returns the axes.

    Args:
      of: ``jp.summary(params, masks)``, or ``{name: summary}`` to compare several masks of the
        same parameters. Leaves that none of them prunes are left out, unless all are dense.
      ax: matplotlib axes, a new figure if None.

    Raises:
      TypeError: for something else, masks for example.
      ValueError: for summaries of different parameters.
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> s = jp.summary({"w": jnp.ones((2, 2))}, {"w": jnp.eye(2, dtype=bool)})
      >>> [label.get_text() for label in jp.plot.densities(s).get_yticklabels()]
      ['w']
    """
    several = of if isinstance(of, Mapping) else {"": of}
    if not several or not all(isinstance(s, Summary) for s in several.values()):
        raise TypeError(
            f"densities wants jp.summary(params, masks), or a dict of them, got {type(of).__name__}"
        )
    paths = {tuple(row.path for row in s.rows) for s in several.values()}
    if len(paths) > 1:
        raise ValueError("densities got summaries of different parameters; draw them apart")
    table = {name: [row.density for row in s.rows] for name, s in several.items()}
    pruned = np.min(list(table.values()), axis=0) < 1
    shown = np.flatnonzero(pruned if pruned.any() else np.ones_like(pruned))
    ax = new_axes(ax, height=1.2 + 0.22 * len(shown))
    for k, (name, values) in enumerate(table.items()):
        beside = 0.16 * (k - (len(table) - 1) / 2)  # equal densities don't hide each other
        ax.plot([values[i] for i in shown], np.arange(len(shown)) + beside, **_style(k),
                linestyle="", label=name)  # fmt: skip
    (path,) = paths
    ax.set_yticks(range(len(shown)), [path[i] for i in shown])
    ax.set(xlabel="density (kept entries / entries)", xlim=(-0.02, 1.02))
    ax.set_ylim(len(shown) - 0.5, -0.5)  # the first layer on top
    ax.grid(alpha=0.3)
    if isinstance(of, Mapping):
        _legend(ax)
    return ax


def mask(mask: Any, *, ax: Any = None) -> Any:
    """Draws a mask as a picture, kept entries dark, and returns the axes.

    All axes but the last are laid out as rows, so that columns are a kernel's outputs. A mask
    larger than the picture shows the density of small areas.

    Args:
      mask: booleans, True = kept, of at least one axis.
      ax: matplotlib axes, a new figure if None.

    Raises:
      TypeError: when it isn't boolean.
      ValueError: for a scalar or an empty mask.
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.plot.mask(jnp.eye(4, dtype=bool)).get_title()
      'density 0.250: kept dark, pruned light'
    """
    array = host(mask)
    if array.dtype != bool:
        raise TypeError(f"plot.mask wants booleans, True = kept, got {array.dtype}{array.shape}")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"plot.mask wants at least one entry on one axis, got shape {array.shape}")
    rows = array.reshape(-1, array.shape[-1])
    ax = new_axes(ax)
    ax.imshow(
        rows.astype(float), cmap=_two_colors(), vmin=0, vmax=1, aspect="auto",
        interpolation="nearest" if max(rows.shape) <= _PIXELS else "hanning",
    )  # fmt: skip
    above = " x ".join(map(str, array.shape[:-1])) or "1"
    ax.set(xlabel="last axis (outputs)", ylabel=f"other axes: {above}")
    ax.set_title(f"density {array.mean():.3f}: kept dark, pruned light", fontsize="medium")
    return ax


def _check_accuracies(points: dict[str, list[tuple[Any, Any]]]) -> None:
    for name, xy in points.items():
        for _, y in xy:
            if not 0 <= y[1] <= 1:
                raise ValueError(
                    f"an accuracy of series {name!r} is {y[1]:g}; wanted a fraction in [0, 1]"
                )


def _dense(ax: Any, accuracy: float | None) -> None:
    """A dashed line at the dense network's accuracy, if there is one."""
    if accuracy is None:
        return
    ax.axhline(100 * accuracy, color="0.4", linestyle="--", linewidth=1, zorder=0)
    ax.annotate(
        "dense",
        (0.01, 100 * accuracy),
        xycoords=("axes fraction", "data"),
        color="0.4",
        xytext=(0, -3),
        textcoords="offset points",
        va="top",
        fontsize="small",
    )


def _points(series: Series, who: str, wanted: str) -> dict[str, list[tuple[Any, Any]]]:
    """Every number as its (low, median, high), points sorted by x."""
    several = isinstance(series, Mapping)
    wrong = [p for p in series.values() if not isinstance(p, Sized)] if several else [series]
    if wrong:
        raise TypeError(f"{who} wants {{name: {wanted}}}, got {type(wrong[0]).__name__}")
    if not series or not all(len(points) for points in series.values()):
        raise ValueError(f"{who} got no points; wanted {{name: {wanted}}}, got {series!r:.80}")
    spread = lambda v: np.asarray(v, float) * np.ones(3)  # noqa: E731
    found = {name: [(spread(x), spread(y)) for x, y in xy] for name, xy in series.items()}
    return {name: sorted(xy, key=lambda p: p[0][1]) for name, xy in found.items()}


def _draw(ax: Any, points: Mapping[str, Sequence[tuple[Any, Any]]]) -> None:
    """Lines through the medians, bars from quartile to quartile."""
    for k, (name, xy) in enumerate(points.items()):
        x, y = (np.stack(values, axis=1) for values in zip(*xy, strict=True))
        bars = {
            side: np.abs(np.diff(values, axis=0))
            for side, values in (("xerr", x), ("yerr", y))
            if np.ptp(values, axis=0).any()
        }
        ax.errorbar(x[1], y[1], **bars, **_style(k), linewidth=1.3, capsize=2, elinewidth=1,
                    label=name)  # fmt: skip
    ax.grid(alpha=0.3, which="both", linewidth=0.6)
    _legend(ax)


def _style(k: int) -> dict[str, Any]:
    color = COLORS[k % len(COLORS)]
    return {"color": color, "marker": MARKERS[k % len(MARKERS)], "markersize": 6,
            "markeredgecolor": "white", "markeredgewidth": 0.6}  # fmt: skip


def _legend(ax: Any) -> None:
    """Inside where there is room, beside the axes when the series are many."""
    many = len(ax.get_legend_handles_labels()[0]) > _INSIDE
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}
    ax.legend(frameon=False, fontsize="small", **place)


def _width(points: Mapping[str, Any]) -> float:
    return 6.4 if len(points) <= _INSIDE else 8.8


def _label_ratios(axis: Any) -> None:
    """Labels 0.5, 1, 2, 4 in place of powers of two."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _two_colors() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("mask", ["#E8EEF2", COLORS[0]])


def as_patterns(dims: str | Sequence[str]) -> list[str]:
    """Patterns as they are given everywhere: one, or several."""
    patterns = [dims] if isinstance(dims, str) else list(dims)
    if not patterns:
        raise ValueError('dims is empty; wanted names or labels, dims="*" for all')
    return patterns


def new_axes(ax: Any, width: float = 6.4, height: float = 4.2) -> Any:
    """The given axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('jp.plot needs matplotlib: pip install "jaxprune[plot]"') from error
    return plt.figure(figsize=(width, min(height, 40)), layout="constrained").add_subplot()
