"""What the runs of this study say: each claim by one rule, as a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

import jaxprune as jp
from jaxprune.plot.curves import COLORS, MARKERS

matplotlib.use("Agg")  # files only; after this, nothing opens a window

RULE = (
    "A is above B: the difference of their mean test accuracies over seeds exceeds its standard "
    "error, sqrt(var(A) / n + var(B) / n). Costs nothing: the original is not above its shuffle. "
    "Collapse: in all seeds SynFlow's masks leave active entries in each layer, and SNIP's in none."
)
TITLES = {
    "schedule": "when and what to prune",
    "dynamic": "dynamic and static masks",
    "tickets": "lottery tickets",
    "before": "masks made before training, or in it (magnitude)",
    "collapse": "layer collapse, a deep network",
    "shuffled": "SNIP's masks shuffled in each layer",
}
ABOVE, NOTHING = "is above", "costs nothing against"
SPARSITIES = (0.9, 0.95, 0.98)


class Claim(NamedTuple):
    effect: str  # a key of TITLES
    first: str  # a method; with NOTHING the shuffled one
    says: str  # ABOVE or NOTHING
    second: str
    sparsity: float


def claims(tickets: int) -> Iterator[Claim]:
    """The table of what the literature reports, for a number of rounds of lottery tickets."""
    for s in SPARSITIES:
        yield Claim("schedule", "gradual, magnitude", ABOVE, "one-shot, magnitude", s)
        yield Claim("schedule", "one-shot, magnitude", ABOVE, "gradual, random", s)
        yield Claim("schedule", "one-shot, magnitude", ABOVE, "one-shot, random", s)
    for s in SPARSITIES[1:]:
        yield Claim("dynamic", "rigl", ABOVE, "set", s)
        yield Claim("dynamic", "set", ABOVE, "random, ERK", s)
    for r in controlled(tickets):
        for control in ("ticket, re-initialised", "ticket, random mask"):
            yield Claim("tickets", "ticket", ABOVE, control, 1 - 0.5**r)
    for method in ("SNIP", "GraSP", "SynFlow"):
        yield Claim("before", method, ABOVE, "random, uniform", 0.98)
        yield Claim("before", method, ABOVE, "random, ERK", 0.98)
        yield Claim("before", "one-shot, magnitude", ABOVE, method, 0.98)
        yield Claim("before", "gradual, magnitude", ABOVE, method, 0.98)
    for s in SPARSITIES:
        yield Claim("shuffled", "SNIP, shuffled", NOTHING, "SNIP", s)


def controlled(rounds: int) -> tuple[int, ...]:
    """The rounds whose tickets are compared with controls: each second one."""
    return tuple(range(2, rounds + 1, 2))


def name(method: str, sparsity: float) -> str:
    """The key of a run in the result."""
    return f"{method} {sparsity:.5g}"


def judged(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per claim whose runs are there, by RULE."""
    wanted = list(claims(result["settings"]["tickets"]))
    rows: list[dict[str, Any]] = []
    for network, found in result["networks"].items():
        rows += compared(network, found["accuracy"], wanted)
    return rows + [row for row in [_collapse(result["collapse"])] if row]


def compared(
    network: str, accuracy: Mapping[str, Any], wanted: Iterable[Claim]
) -> list[dict[str, Any]]:
    """One row per claim of which both methods have run."""
    rows = []
    for claim in wanted:
        runs = [accuracy.get(name(m, claim.sparsity), {}) for m in (claim.first, claim.second)]
        if all(runs):
            rows.append({"network": network} | judge(claim, *map(_values, runs)))
    return rows


def _values(runs: Mapping[str, float]) -> list[float]:
    return [runs[seed] for seed in sorted(runs, key=int)]


def judge(claim: Claim, first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    difference = statistics.fmean(first) - statistics.fmean(second)
    error = math.hypot(standard_error(first), standard_error(second))
    appears = difference > error if claim.says == ABOVE else -difference <= error
    return claim._asdict() | {
        "means": [statistics.fmean(first), statistics.fmean(second)],
        "difference": difference,
        "standard_error": error,
        "seeds": [len(first), len(second)],
        "appears": bool(appears),
    }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value, of which nothing is known."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _collapse(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """At 99.9 %: the numbers of layers with no active entry, over seeds."""
    snip, flow = (found.get(name(method, 0.999), {}) for method in ("SNIP", "SynFlow"))
    if not (snip and flow):
        return None
    lost = {"SynFlow": [run["collapsed"] for run in flow.values()],
            "SNIP": [run["collapsed"] for run in snip.values()]}  # fmt: skip
    return {
        "network": "deep perceptron",
        "effect": "collapse",
        "first": "SynFlow",
        "says": "keeps all layers alive, unlike",
        "second": "SNIP",
        "sparsity": 0.999,
        "collapsed_layers": lost,
        "appears": not any(lost["SynFlow"]) and all(lost["SNIP"]),
    }


# ---- the table ------------------------------------------------------------------------------


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the claims as plain text, one a line."""
    return "\n".join("  ".join(_padded(cells)) for cells in _cells(rows))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["network", "claim", "sparsity", "difference ± its standard error", "appears"]
    lines = [head, ["---"] * len(head), *_cells(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        yield [
            row["network"],
            f"{row['first']} {row['says']} {row['second']}",
            f"{row['sparsity']:.4g}",
            _difference(row),
            "one seed" if _one_seed(row) else "yes" if row["appears"] else "NO",
        ]


def _difference(row: Mapping[str, Any]) -> str:
    if "collapsed_layers" in row:
        return ", ".join(f"{m}: {max(n)} layers lost" for m, n in row["collapsed_layers"].items())
    error = "" if _one_seed(row) else f" ± {100 * row['standard_error']:.2f}"
    return f"{100 * row['difference']:+.2f}{error} points"


def _one_seed(row: Mapping[str, Any]) -> bool:
    """Whether a method has run once, of which no error and no verdict is known."""
    return 1 in row.get("seeds", ())


def _padded(cells: Sequence[str]) -> list[str]:
    return [cell.ljust(width) for cell, width in zip(cells, (16, 62, 8, 40, 3))]


# ---- the picture ----------------------------------------------------------------------------

# panel -> label -> (prefix of its runs, colour and marker)
SERIES = {
    "schedule": {
        "gradual magnitude": "gradual, magnitude",
        "one-shot magnitude": "one-shot, magnitude",
        "gradual random": "gradual, random",
        "one-shot random": "one-shot, random",
    },
    "dynamic": {"RigL": "rigl", "SET": "set", "static": "random, ERK"},
    "tickets": {
        "rewound": "ticket",
        "re-initialised": "ticket, re-initialised",
        "random mask": "ticket, random mask",
    },
    "shuffled": {"SNIP": "SNIP", "shuffled": "SNIP, shuffled"},
}
ROWS = ("random, uniform", "random, ERK", "GraSP", "SNIP", "SynFlow", "one-shot, magnitude",
        "gradual, magnitude")  # fmt: skip


def draw(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes one picture per network; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for network in result["networks"]:
        figure = picture(result, network)
        paths.append(folder / f"{stem}_{network}.png")
        figure.savefig(paths[-1], dpi=130)
        matplotlib.pyplot.close(figure)
    return paths


def picture(result: Mapping[str, Any], network: str) -> Any:
    """Returns a figure of six panels, the five effects of a network and the layer collapse."""
    import matplotlib.pyplot as plt

    accuracy = result["networks"][network]["accuracy"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    for ax, panel in zip(axes.flat, TITLES):
        ax.set_title(TITLES[panel], fontsize="medium")
        if panel == "before":
            _rows(ax, accuracy)
        elif panel == "collapse":
            _layers(ax, result["collapse"])
        else:
            _lines(ax, accuracy, SERIES[panel])
    seeds = len(accuracy.get(name("dense", 0), {}))
    figure.suptitle(f"{result['data'].split(' from ')[0]}, {network}: {seeds} seeds, mean ± "
                    "standard deviation")  # fmt: skip
    return figure


def _lines(ax: Any, accuracy: Mapping[str, Any], series: Mapping[str, str]) -> None:
    found = {label: list(_points(accuracy, method)) for label, method in series.items()}
    found = {label: points for label, points in found.items() if points}
    if not found:
        ax.set_axis_off()
        return
    jp.plot.accuracy_density(found, dense=_dense(accuracy), ax=ax)


def _points(
    accuracy: Mapping[str, Any], method: str
) -> Iterator[tuple[float, tuple[float, float, float]]]:
    """(density, mean with its standard deviation) of all runs of the method."""
    for run, values in accuracy.items():
        here, _, sparsity = run.rpartition(" ")
        if here == method:
            mean, spread = _mean_and_spread(values)
            yield 1 - float(sparsity), (mean - spread, mean, mean + spread)


def _mean_and_spread(values: Mapping[str, float]) -> tuple[float, float]:
    found = _values(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def _dense(accuracy: Mapping[str, Any]) -> float | None:
    runs = accuracy.get(name("dense", 0))
    return _mean_and_spread(runs)[0] if runs else None


def _rows(ax: Any, accuracy: Mapping[str, Any]) -> None:
    """A method a row; its accuracy at 98 %."""
    shown = [m for m in ROWS if name(m, 0.98) in accuracy]
    for k, method in enumerate(shown):
        mean, spread = _mean_and_spread(accuracy[name(method, 0.98)])
        ax.errorbar(100 * mean, k, xerr=100 * spread, color=COLORS[k], marker=MARKERS[k], capsize=3)
    ax.set_yticks(range(len(shown)), [_wrapped(m) for m in shown])
    ax.set(xlabel="test accuracy at 98 % sparsity [%]", ylim=(-0.6, len(shown) - 0.4))
    ax.grid(alpha=0.3)


def _wrapped(method: str) -> str:
    return method.replace(", ", ",\n")


def _layers(ax: Any, found: Mapping[str, Any]) -> None:
    for k, method in enumerate(("SynFlow", "SNIP", "GraSP", "magnitude")):
        points = sorted(
            (float(run.rpartition(" ")[2]), [x["layers"] - x["collapsed"] for x in seeds.values()])
            for run, seeds in found.items()
            if run.rpartition(" ")[0] == method
        )
        if not points:
            continue
        kept = [100 * (1 - s) for s, _ in points]
        alive = [statistics.fmean(n) - 0.07 * k for _, n in points]  # equal lines stay visible
        style = {"color": COLORS[k], "marker": MARKERS[k], "linestyle": ("-", "--", "-.", ":")[k]}
        ax.plot(kept, alive, label=method, linewidth=1.4, **style)
    ax.set_xscale("log")
    ax.invert_xaxis()
    ticks = [10, 5, 2, 1, 0.5, 0.1]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="weights kept [%]", ylabel="layers with active weights (mean)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
