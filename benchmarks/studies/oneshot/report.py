"""What the study ``oneshot`` measured: README's table, and a plot of perplexity per method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.results import days

Row = dict[str, Any]
DOMAINS = {"excerpt": "excerpt", "docs": "documentation", "glosses": "glosses"}
POINTS = ("30%", "50%", "60%", "70%", "4:8", "2:4")
METHODS = (
    "magnitude", "ria", "wanda", "sparsegpt", "magnitude + refit", "ria + refit", "wanda + refit",
    "sparsegpt + refit", "alps", "wanda + permutation",
)  # fmt: skip
DRIFT = 0.25  # The study oneshot_drift chose the share that is shown.
LARGEST = 1000  # perplexity that is drawn: all beyond is noise
# Okabe and Ito's colours; the marker tells points apart, too.
STYLES = {
    "30%": ("#56B4E9", "^"),
    "50%": ("#0072B2", "o"),
    "60%": ("#009E73", "s"),
    "70%": ("#000000", "D"),
    "4:8": ("#CC79A7", "v"),
    "2:4": ("#D55E00", "X"),
}


def mixed(row: Row) -> bool:
    """Of the default: documentation as in the rows on it alone, and as many glosses."""
    both = row["calibration"] == "docs + glosses" and row["sequences"] == 64
    return both and row["drift"] in (0, DRIFT) and not row.get("seed")


def _alone(row: Row) -> bool:
    return row["calibration"] == "docs" and not row["drift"] and not row.get("seed")


def markdown(found: dict[str, Any]) -> str:
    """A line for each method and point; what calibration on documentation alone gives beside."""
    head = ["removed", "method", *DOMAINS.values(), "documentation alone: excerpt", "glosses"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    lines.append(["", "dense", *_perplexities(found["dense"], DOMAINS), "", ""])
    alone = {_name(r): r for r in found["rows"] if _alone(r)}
    for row in sorted(filter(mixed, found["rows"]), key=_place):
        cells = _perplexities(row, DOMAINS)
        beside = None if row["drift"] else alone.get(_name(row))
        cells += _perplexities(beside, ("excerpt", "glosses")) if beside else ["", ""]
        lines.append([row["at"].replace("%", " %"), _method(row), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _place(row: Row) -> tuple[int, float, int]:
    return POINTS.index(row["at"]), row["drift"], METHODS.index(row["method"])


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
        f"shot (jax {versions['jax']}, {days(found, found['rows'])}, one seed, "
        f"[oneshot.json]({path})). "
        "Excerpt: the tutorial's chapter on classes; documentation: other held-out pages; glosses: "
        "WordNet's nouns. Calibrated on 32 x 256 tokens of Python's library pages and as many of "
        "WordNet's verbs; the last two columns on the library pages alone. Drift: the share of "
        "what pruned kernels have changed that those behind them make up for."
    )


def plot(found: dict[str, Any], path: Path) -> Path:
    """Perplexity of excerpt and glosses: a line for each method, a marker for each point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for ax, domain in zip(axes, ("excerpt", "glosses")):
        for row in sorted(filter(mixed, found["rows"]), key=_place):
            if row[domain] <= LARGEST:
                _mark(ax, row, domain)
        ax.axvline(found["dense"][domain], color="0.4", ls="--", lw=1, label="dense")
        ax.set(title=domain, xscale="log", xlabel="perplexity, log scale; above 1,000 left out")
        ax.set_xlim(0.8 * found["dense"][domain], LARGEST)
        ax.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        ax.set_xticks([20, 30, 50, 100, 200, 500])
        ax.grid(alpha=0.3)
    axes[0].set_yticks(range(len(METHODS)), METHODS)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    once = dict(zip(labels, handles))  # in the order of the points, as drawn
    figure.legend(once.values(), once.keys(), loc="outside right center", frameon=False)
    figure.suptitle("SmolLM2-135M, single weights removed in one shot", fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _mark(ax: Any, row: Row, domain: str) -> None:
    """Hollow where drift is made up for; points of a method one below the other."""
    color, marker = STYLES[row["at"]]
    drift = f", drift {row['drift']:g}" if row["drift"] else ""
    k = POINTS.index(row["at"])
    height = METHODS.index(row["method"]) + 0.6 * (k / (len(POINTS) - 1) - 0.5)
    label = row["at"].replace("%", " %") + drift
    face = "white" if drift else color
    ax.plot(row[domain], height, marker, color=color, mfc=face, ms=6, ls="", label=label)
