"""What ``benchmarks.oneshot`` measured: README's table, and a plot of perplexity over sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
DOMAINS = {"excerpt": "excerpt", "docs": "documentation", "glosses": "glosses"}
POINTS = ("50%", "2:4", "30%", "60%", "70%", "4:8")
# Okabe and Ito's colours; the marker and the line style tell methods apart, too.
STYLES = {
    "magnitude": ("#000000", "o", ":"),
    "wanda": ("#E69F00", "s", ":"),
    "ria": ("#56B4E9", "^", ":"),
    "sparsegpt": ("#D55E00", "D", "--"),
    "magnitude + refit": ("#000000", "o", "-"),
    "wanda + refit": ("#E69F00", "s", "-"),
    "ria + refit": ("#56B4E9", "^", "-"),
    "sparsegpt + refit": ("#D55E00", "D", "-"),
    "alps": ("#009E73", "v", "-"),
}


def mixed(row: Row) -> bool:
    """Of the default: documentation as in the rows on it alone, and as many glosses."""
    return row["calibration"] == "docs + glosses" and row["sequences"] == 64


def markdown(found: dict[str, Any]) -> str:
    """A line for each method and point; what calibration on documentation alone gives beside."""
    head = ["removed", "method", *DOMAINS.values(), "documentation alone: excerpt", "glosses"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    lines.append(["", "dense", *_perplexities(found["dense"], DOMAINS), "", ""])
    alone = {_name(r): r for r in found["rows"] if r["calibration"] == "docs"}
    rows = sorted(filter(mixed, found["rows"]), key=lambda r: (POINTS.index(r["at"]), r["drift"]))
    for row in rows:
        cells = _perplexities(row, DOMAINS)
        beside = None if row["drift"] else alone.get(_name(row))
        cells += _perplexities(beside, ("excerpt", "glosses")) if beside else ["", ""]
        lines.append([row["at"].replace("%", " %"), _method(row), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _method(row: Row) -> str:
    return f"{row['method']}, drift {row['drift']:g}" if row["drift"] else row["method"]


def _name(row: Row) -> tuple[str, str]:
    return row["at"], row["method"]


def _perplexities(row: Row, of: Any) -> list[str]:
    return [f"{row[key]:,.1f}" if row[key] < 1000 else f"{row[key]:,.0f}" for key in of]


def caption(found: dict[str, Any], path: str) -> str:
    versions = found["versions"]
    return (
        f"Perplexities of {found['model']}, after pruning every attention and MLP kernel in one "
        f"shot (jax {versions['jax']}, {found['date']}, one seed, [oneshot.json]({path})). "
        "Excerpt: the tutorial's chapter on classes; documentation: other held-out pages; glosses: "
        "WordNet's nouns. Calibrated on 32 x 256 tokens of Python's library pages and as many of "
        "WordNet's verbs; the last two columns on the library pages alone. Drift 0.5: half of what "
        "pruned kernels have changed is made up for by those behind them."
    )


def plot(found: dict[str, Any], path: Path) -> Path:
    """Perplexity of documentation and glosses over the share removed, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharex=True)
    for ax, domain in zip(axes, ("excerpt", "glosses")):
        for method in STYLES:
            _line(ax, found, method, domain)
        ax.axhline(found["dense"][domain], color="0.5", lw=1)
        ax.annotate("dense", (0.99, found["dense"][domain]), xycoords=("axes fraction", "data"),
                    xytext=(0, 3), textcoords="offset points", ha="right", color="0.4")  # fmt: skip
        ax.set(title=domain, yscale="log", xlabel="weights removed (crosses: 2:4; stars: drift)")
        ax.set_ylabel("perplexity, log scale")
        ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, 0))
        ax.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        ax.yaxis.set_minor_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        ax.set_xlim(0, 0.75)
        ax.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("SmolLM2-135M, single weights in one shot", fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _line(ax: Any, found: dict[str, Any], method: str, domain: str) -> None:
    every = [r for r in found["rows"] if mixed(r) and r["method"] == method]
    rows = [r for r in every if not r["drift"]]
    points = sorted((float(r["at"][:-1]) / 100, r[domain]) for r in rows if "%" in r["at"])
    color, marker, style = STYLES[method]
    fill = color if style == "-" else "white"  # hollow: no weights repaired, or SparseGPT alone
    if points:
        points = [(0.0, found["dense"][domain]), *points]
        ax.plot(*zip(*points), color=color, marker=marker, mfc=fill, ls=style, label=method)
    halves = [r[domain] for r in rows if r["at"] == "2:4"]
    ax.plot([0.5] * len(halves), halves, color=color, marker="x", ls="")
    corrected = [r[domain] for r in every if r["drift"] and r["at"] in ("50%", "2:4")]
    ax.plot([0.5] * len(corrected), corrected, color=color, marker="*", ms=10, ls="")
