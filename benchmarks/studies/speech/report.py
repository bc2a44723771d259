"""What the rows of all splits say together: a summary, a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot
from rich.console import Console
from rich.table import Table

from benchmarks.studies.speech import prompts

matplotlib.use("Agg")  # files only; after this, nothing opens a window

COLOURS = {"no training": "#0072B2", "recovered": "#D55E00"}  # Okabe and Ito's blue and vermilion
TIMED = "transcription, batch 4"


def summary(found: dict[str, Any], splits: int) -> dict[str, Any]:
    """For each row: its error rate by split, and what it is above the dense model's there."""
    every = [found.get(str(split), {}) for split in range(splits)]
    names = dict.fromkeys(n for rows in every for n, row in rows.items() if "heard" in row)
    return {name: _row(name, every, found.get("times", {})) for name in names}


def _row(name: str, every: list[dict[str, Any]], times: dict[str, Any]) -> dict[str, Any]:
    every = [rows for rows in every if name in rows]
    ours = [rows[name]["heard"] for rows in every]
    theirs = [rows["dense"]["heard"] for rows in every]
    mean, low, high = prompts.difference(ours, theirs)
    chunks = [chunk for split in ours for chunk in split]
    return {
        "wer": [round(prompts.rate(split), 2) for split in ours],
        "above_dense": [round(prompts.rate(a) - prompts.rate(b), 2) for a, b in zip(ours, theirs)],
        "mean": round(mean, 2),
        "interval": [round(low, 2), round(high, 2)],
        "repeating_chunks": sum(chunk[2] > 1 for chunk in chunks),
        "unfinished_chunks": sum(bool(chunk[3]) for chunk in chunks),
        "chunks": len(chunks),
        "splits": len(every),
        "speedup": {
            at: part["rows"][name]["speedup"]["median"]
            for at, part in times.items()
            if name in part["rows"]
        },
    }


def show(result: dict[str, Any]) -> None:
    Console(width=120).print(table(result))


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        "row", "splits", "WER [%]", "above dense", "95 %", "loops, no end", "speed-up",
        title=f"Whisper tiny.en, {result['device']['processor']}",
    )  # fmt: skip
    for name, row in result["summary"].items():
        wer = sum(row["wer"]) / len(row["wer"])
        low, high = row["interval"]
        bad = f"{row['repeating_chunks']}, {row['unfinished_chunks']} of {row['chunks']}"
        speed = row["speedup"].get(TIMED)
        cells = (f"{row['mean']:+.2f}", f"{low:+.2f} to {high:+.2f}", bad)
        shown.add_row(
            name, str(row["splits"]), f"{wer:.2f}", *cells, f"{speed:.2f} x" if speed else ""
        )
    return shown


def picture(result: dict[str, Any], path: Path) -> Path | None:
    """Error above the dense model's against the measured time of two minutes of sound."""
    timed = result["networks"].get("times", {}).get(TIMED)
    if timed is None:
        return None
    figure, ax = matplotlib.pyplot.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    drawn = [row["median_seconds"] for n, row in timed["rows"].items() if n in result["summary"]]
    for name, row in timed["rows"].items():
        said = result["summary"].get(name)
        if said is not None:
            seconds = row["median_seconds"]
            _point(ax, name, 1e3 * seconds, said, slowest=seconds == max(drawn))
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_yscale("symlog", linthresh=1)  # Loops are a hundred times what pruning costs else.
    ax.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    ax.margins(x=0.15)
    where = f"{result['device']['processor']}, {result['device']['cores']} cores"
    ax.set_xlabel(f"measured time of 2 min of sound [ms]\n{where}")
    ax.set_ylabel("word error rate above dense [points]")
    ax.set_title("Whisper tiny.en: bars are 95 % of a paired bootstrap", fontsize="medium")
    marks = {kind: ax.plot([], [], m, color=COLOURS[kind])[0] for kind, m in MARKS.items()}
    ax.legend(marks.values(), marks.keys(), frameon=False)
    figure.savefig(path, dpi=150)
    matplotlib.pyplot.close(figure)
    return path


MARKS = {"no training": "o", "recovered": "s"}


def _point(ax: Any, name: str, milliseconds: float, said: dict[str, Any], slowest: bool) -> None:
    kind = "recovered" if name.endswith("recovered") else "no training"
    low, high = said["interval"]
    mean = said["mean"]
    bars = [[max(mean - low, 0)], [max(high - mean, 0)]]
    ax.errorbar(
        milliseconds, mean, bars, fmt=MARKS[kind], color=COLOURS[kind], capsize=2, linewidth=1
    )
    short = name.removesuffix(", recovered")
    at = (6, -11) if kind == "recovered" else (6, 5)
    if slowest:  # There is no room beside it but to the left.
        at = (-6, at[1])
    ax.annotate(
        short, (milliseconds, mean), at, textcoords="offset points", fontsize="x-small",
        ha="right" if slowest else "left",
    )  # fmt: skip
