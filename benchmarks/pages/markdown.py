"""Tables and links in Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.common import results


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Returns a table whose first ``left`` columns are flush left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = [list(head), rule, *map(list, rows)]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def from_rich(shown: Table) -> str:
    """Returns a table that is made for terminals, its title above it."""
    head = [_plain(column.header) for column in shown.columns]
    columns = [[_plain(cell) for cell in column.cells] for column in shown.columns]
    found = table(head, zip(*columns, strict=True))
    return f"**{_plain(shown.title)}**\n\n{found}" if shown.title else found


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def relative(path: Path, at: Path) -> str:
    return os.path.relpath(path, at)


def link(path: Path, at: Path, text: str | None = None) -> str:
    """Returns a link to a file from a page in the folder ``at``."""
    return f"[{text or path.name}]({relative(path, at)})"


def picture(path: Path, at: Path, text: str) -> str:
    return f"![{text}]({relative(path, at)})"


def device(found: dict[str, Any]) -> str:
    """Returns what was measured on, in words: ``Intel Xeon, 2 cores``, or a GPU's name."""
    about = found.get("device")
    if about is None:
        return "a device that the file does not name"
    if about["platform"] != "cpu":
        return str(about["kind"])
    name = about["processor"].replace("(R)", "").replace(" Processor", "")
    return f"{name}, {about['cores']} core{'s' * (about['cores'] > 1)}"


def versions(found: dict[str, Any]) -> str:
    """Returns the versions that a reader asks for first."""
    known = found.get("versions", {})
    names = [n for n in ("jax", "torch", "torch-pruning") if n in known]
    return ", ".join(f"{name} {known[name]}" for name in names)


def days(found: dict[str, Any]) -> str:
    """Returns when the rows of a file were measured."""
    rows: Any = next((found[k] for k in ("networks", "rows") if k in found), {})
    each = rows.values() if isinstance(rows, dict) else rows
    return results.days(found, [row for row in each if isinstance(row, dict)] or [found])
