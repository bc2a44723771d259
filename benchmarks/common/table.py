"""The table of the main job: one row per method, averaged over seeds; printed, and for README."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]

HEADINGS = (
    "method",
    "removed",
    "test accuracy",
    "before tuning",
    "weights",
    "file",
    "MFLOPs",
    "batch {0}",
    "speed-up",
    "batch {1}",
    "speed-up",
    "compact = masked",
)
NOTES = (
    "removed: the share asked for, of the units of each dimension (structured; what stays is "
    "rounded to multiples of 8) or of the weights (others). "
    "before tuning: accuracy of the one-shot masks on the trained network. gradual trains longer "
    "than one-shot is tuned (settings in the JSON): part of its lead is that.",
    "weights: not zero. file: npz, kB; masked networks keep their zeros, so theirs is the dense "
    "one, and they run the dense program. MFLOPs: per image, from the jaxpr.",
    "speed-up: median over rounds of dense time / this time, all networks interleaved in one run. "
    "compact = masked: max |difference| / max |logit|, float32, on test images; exact: the "
    "certificate says that every masked unit is gone.",
)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Returns the rows of one method together, one per seed, in the order of their first."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        key = (row["pattern"], row["score"], row["schedule"], row["sparsity"])
        found.setdefault(key, []).append(row)
    return list(found.values())


def mean(group: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in group)


def speedup(group: Sequence[Row], batch: int) -> float:
    """Returns the mean over seeds of the median speed-up at the ``batch``-th batch size."""
    return statistics.fmean(row["timing"][batch]["speedup"]["median"] for row in group)


def name(row: Row) -> str:
    """Returns what the row is, without its operating point."""
    parts = (row["pattern"], row["score"], row["schedule"] if row["pattern"] != "dense" else "")
    return ", ".join(part for part in parts if part)


def headings(rows: Sequence[Row]) -> list[str]:
    return [heading.format(*(t["batch"] for t in rows[0]["timing"])) for heading in HEADINGS]


def cells(group: Sequence[Row]) -> list[str]:
    """Returns one line of the table."""
    first = group[0]
    return [
        name(first),
        f"{first['sparsity']:.1%}" if first["sparsity"] else "",
        _percent([row["accuracy"] for row in group]),
        "" if first.get("accuracy_untuned") is None else f"{mean(group, 'accuracy_untuned'):.1%}",
        f"{mean(group, 'params_kept'):,.0f}",
        f"{mean(group, 'bytes_on_disk') / 1e3:,.0f} kB",
        f"{mean(group, 'flops_per_image') / 1e6:.2f}",
        f"{statistics.fmean(row['timing'][0]['median_seconds'] for row in group) * 1e3:.2f} ms",
        f"{speedup(group, 0):.2f} x",
        f"{statistics.fmean(row['timing'][1]['images_per_second'] for row in group):,.0f} /s",
        f"{speedup(group, 1):.2f} x",
        _equality([row["equality"] for row in group]),
    ]


def rich_table(rows: Sequence[Row], title: str) -> Table:
    table = Table(*headings(rows), title=title, caption="\n".join(NOTES), caption_justify="left")
    for i, column in enumerate(table.columns):
        column.justify = "left" if i == 0 else "right"
    previous = None
    for group in groups(rows):
        if group[0]["pattern"] == "structured" and name(group[0]) != previous:
            table.add_section()
        previous = name(group[0])
        table.add_row(*cells(group))
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Returns the same table as Markdown."""
    lines = [headings(rows), ["---"] + ["---:"] * (len(HEADINGS) - 1)]
    lines += [cells(group) for group in groups(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + "\n\n".join(NOTES)


def _percent(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.1%}"
    half = (max(values) - min(values)) / 2
    return f"{text} ± {half:.1%}" if len(values) > 1 else text


def _equality(found: Sequence[Any]) -> str:
    if found[0] is None:
        return ""
    worst = max(one["max_relative_error"] for one in found)
    if all(one["exact"] for one in found):
        return f"{worst:.0e}, exact"
    kept = sum(one["units_masked"] - one["units_removed"] for one in found)
    return f"{worst:.0e}, {kept} masked units stay"
