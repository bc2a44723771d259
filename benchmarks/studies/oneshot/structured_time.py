"""``python -m benchmarks oneshot_structured_time``: how fast the cut models are on this device.

All rows of ``oneshot_structured.json`` in one interleaved run, beside what the search's table of
single operations predicts. A network of the same widths stands for each row: values don't change a
time. The result is per device: ``oneshot_structured_time.json``, and a plot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy.interpolate import interpn

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average
from benchmarks.models import smollm2
from benchmarks.studies.oneshot import search as oneshot_search
from benchmarks.studies.oneshot import structured

COLORS, MARKERS = jp.plot.curves.COLORS, "osD^v*P"
RUNS = {"prefill": structured.TOKENS, "one token": 1}  # tokens

Kept = Mapping[str, list[int]]  # dimension -> how many units of each block stay


def predicted(found: jp.Search, kept: Kept) -> float:
    """The speed-up by the search's table; between the counts that were timed it is linear."""
    model = found.model
    counts = {f"blocks/{k}/{dim}": n for dim, each in kept.items() for k, n in enumerate(each)}
    total = model.tables["latency"]

    def seconds(counts: Mapping[str, int]) -> float:
        each = (_between(model, term, counts) for term in total.terms)
        return total.constant + sum(each)

    full = {name: int(c[-1]) for name, c in zip(model.names, model.counts)}
    return seconds(full) / seconds(full | counts)


def _between(model: Any, term: Any, counts: Mapping[str, int]) -> float:
    if not term.dims:
        return float(term.table)
    point = [counts[model.names[d]] for d in term.dims]
    return float(interpn([model.counts[d] for d in term.dims], np.asarray(term.table), point)[0])


def timed(params: Any, rows: Mapping[str, Kept], rounds: int) -> dict[str, dict[str, Any]]:
    """Times of a prefill and of one token, of all rows and the dense model in one run."""
    found: dict[str, dict[str, Any]] = {name: {} for name in rows}
    for run, tokens in RUNS.items():
        x = jnp.zeros((1, tokens), jnp.int32)
        entries: dict[str, Any] = {"dense": (smollm2.apply, (params, x))}
        for name, kept in rows.items():
            small = jp.compact(smollm2.apply, params, structured.first(params, kept), x)
            entries[name] = (small.fn, (small.params, x))
        compared = jp.compare(entries, repeats=rounds)
        for name in rows:
            speedup = compared.ratios[name]._asdict()
            found[name][run] = compared.timings[name].to_json() | {"speedup": speedup}
    return found


def plot(cut: Mapping[str, Any], times: Mapping[str, Any], path: Path) -> Figure:
    """Perplexity over the measured speed-up of a prefill: a line for each recipe, weaker to
    stronger; far-off rows are left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    dense = cut["dense"]["excerpt"]
    for name in cut["rows"].keys() & times.keys():
        perplexity = cut["rows"][name]["excerpt"]
        if perplexity < 10 * dense:
            point = times[name]["prefill"]["speedup"]["median"], perplexity
            lines.setdefault(family(name), []).append(point)
    fig, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    for k, (name, points) in enumerate(sorted(lines.items())):
        color, marker = COLORS[k % len(COLORS)], MARKERS[k // 2 % len(MARKERS)]
        by_perplexity = sorted(points, key=lambda point: point[1])
        ax.plot(*zip(*by_perplexity), f"{marker}-", color=color, lw=1, label=name)
    ax.axhline(dense, color="grey", lw=0.8, ls="--", label="dense")
    ax.set(xlabel="measured speed-up of a prefill of 256 tokens", ylabel="perplexity, excerpt")
    ax.set_yscale("log")
    ticks = [20, 25, 30, 40, 50, 60, 80, 100, 130, 160]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(0.95 * dense, 1.1 * max(y for points in lines.values() for _, y in points))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right center", fontsize="small", frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return fig


def family(name: str) -> str:
    """The recipe without how much of it: ``"FLAP + stream -20 %"`` is of ``"FLAP + stream"``."""
    return re.sub(r" (-[\d/]+( %)?|[\d.]+ x)", "", name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("oneshot_structured_time", __doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    cut = results.load(results.begun("oneshot_structured.json", args.results))
    path = results.folder(args.results) / "oneshot_structured_time.json"
    params, _ = smollm2.load()
    kept = {name: row["kept"] for name, row in cut["rows"].items()}
    table = oneshot_search.searching(params)
    result = results.header("oneshot_structured_time") | {"load_average": load_average()}
    result["rows"] = timed(params, kept, args.rounds)
    for name, row in result["rows"].items():
        row["prefill"]["predicted"] = round(predicted(table, kept[name]), 4)
    results.save(result, path)
    plot(cut, result["rows"], path.with_suffix(".png"))
