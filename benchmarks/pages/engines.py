"""The tables of docs/runtimes.md: engines beside each other, and what searches in them found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.pages import markdown
from benchmarks.studies.runtimes import searched as study
from benchmarks.studies.runtimes.runtimes import ENGINES


def fastest(at: Path) -> str:
    """Returns milliseconds, dense and pruned, and the fastest engines' ratio, per network."""
    found = results.load(results.files("runtimes")[-1])["networks"]
    head = ["network", *ENGINES, "fastest over fastest", "largest residual"]
    return markdown.table(head, [_row(name, each["rows"]) for name, each in found.items()])


def _row(name: str, rows: dict[str, Any]) -> list[str]:
    times = {
        (model, engine): rows[f"{model}, {engine}"].get("milliseconds")
        for model in ("dense", "pruned")
        for engine in ENGINES
    }
    best = [min(filter(None, (times[m, e] for e in ENGINES))) for m in ("dense", "pruned")]
    cells = [f"{_ms(times['dense', e])} → {_ms(times['pruned', e])}" for e in ENGINES]
    residual = max(row["residual"] for row in rows.values() if "residual" in row)
    return [name, *cells, f"{best[0] / best[1]:.2f} x", f"{residual:.1e}"]


def _ms(found: float | None) -> str:
    return "refused" if found is None else f"{found:.3g}"


def searched(at: Path) -> str:
    """Returns what was asked of searches in each engine, and measured there."""
    own, _ = study.tables(results.load(results.files("runtimes_search")[-1])["networks"])
    return markdown.from_rich(own)
