"""A study's JSON as tables, for studies that have no table of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.pages import markdown

# What opens each file, and settings: they stand elsewhere, or are not a result.
LEFT_OUT = {
    "job", "date", "device", "versions", "settings", "load_average", "samples", "samples_seconds",
    "samples_ms", "calls_per_round", "arguments", "units", "environment", "command", "note",
    "passed_over", "date of rows", "kept", "runtime", "start_MB", "user agent",
}  # fmt: skip
DEPTH = 3  # of headings; what lies deeper is in the JSON alone


def tables(found: dict[str, Any]) -> str:
    """Returns the numbers of a file: what is single in one table, then one for each set of rows."""
    return "\n\n".join(_parts({k: v for k, v in found.items() if k not in LEFT_OUT}, ()))


def _parts(found: dict[str, Any], at: tuple[str, ...]) -> Iterator[str]:
    single = {k: v for k, v in found.items() if not isinstance(v, dict | list) or _short(v)}
    if single:
        heading = [f"**{', '.join(at)}**"] if at else []
        lines = [[name, _said(value)] for name, value in single.items()]
        yield "\n\n".join([*heading, markdown.table(["", "value"], lines)])
    for name, value in found.items():
        if name in single or name in LEFT_OUT:
            continue
        rows = _rows(value)
        if rows is not None:
            yield "\n\n".join([f"**{', '.join((*at, name))}**", _table(rows)])
        elif isinstance(value, dict) and len(at) < DEPTH:
            yield from _parts(value, (*at, name))


def _rows(value: Any) -> dict[str, dict[str, Any]] | None:
    """Rows of one kind, by name: dictionaries that are flat once their own are written out."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        value = {str(k + 1): row for k, row in enumerate(value)}
    if not isinstance(value, dict) or len(value) < 2:
        return None
    if not all(isinstance(row, dict) for row in value.values()):
        return None
    flat = {name: dict(_flat(row)) for name, row in value.items()}
    columns = {column for row in flat.values() for column in row}
    return flat if 0 < len(columns) <= 16 else None


def _flat(row: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{name}, ")
        elif not isinstance(value, list) or _short(value):
            yield at + name, value


def _table(rows: dict[str, dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [[name, *(_said(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    return markdown.table(["", *(c.replace("_", " ") for c in columns)], body)


def _short(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 4
        and not any(isinstance(each, dict | list) for each in value)
    )


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
