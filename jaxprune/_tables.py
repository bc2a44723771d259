"""Lines and tables of results, once: as text for ``print``, as HTML for notebooks."""

from __future__ import annotations

import html as _html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# A page in quirks mode gives tables a color and a size of their own.
_TABLE = "border-collapse:collapse;margin:0.3em 0;color:inherit;font-size:inherit"
_CELL = "padding:0.1em 0.8em 0.1em 0;vertical-align:top;white-space:pre-wrap"
_HEAD = "border-bottom:1px solid currentColor;font-weight:bold;"


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      heads: one of each column.
      rows: texts of each row, as many as heads.
      numbers: the columns that stand to the right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


Part = str | Table


class Shown:
    """What is shown as its parts: ``print`` gives text, a notebook a table.

    Example:
      >>> class Result(Shown):
      ...     def _parts(self):
      ...         return ["two rows", Table(("name", "n"), [("a", "1"), ("b", "22")], (1,))]
      >>> print(Result())
      two rows
      name   n
      a      1
      b     22
    """

    def _parts(self) -> Iterable[Part]:
        raise NotImplementedError

    def __str__(self) -> str:
        return text(self._parts())

    def _repr_html_(self) -> str:
        return html(self._parts())


def text(parts: Iterable[Part]) -> str:
    """Lines as they are, tables in columns; those of as many columns stand below each other."""
    parts = list(parts)
    tables = [part for part in parts if isinstance(part, Table)]
    blocks = [
        "\n".join(_aligned(part, [t for t in tables if len(t.heads) == len(part.heads)]))
        if isinstance(part, Table)
        else part
        for part in parts
    ]
    return "\n".join(blocks)


def _aligned(table: Table, alike: Sequence[Table]) -> list[str]:
    every = [row for t in alike for row in (t.heads, *t.rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if k in table.numbers else cell.ljust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (table.heads, *table.rows)
    ]


def html(parts: Iterable[Part]) -> str:
    """The same as HTML without colors of its own, so that it suits light and dark pages."""
    shown = [_table(part) if isinstance(part, Table) else _line(part) for part in parts if part]
    return f"<div>{''.join(shown)}</div>"


def _line(line: str) -> str:
    return f'<div style="white-space:pre-wrap">{_html.escape(line)}</div>'


def _table(table: Table) -> str:
    head = _row("th", table.heads, table.numbers, _HEAD)
    body = "".join(_row("td", row, table.numbers) for row in table.rows)
    return f'<table style="{_TABLE}"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _row(tag: str, cells: Sequence[str], numbers: Sequence[int], style: str = "") -> str:
    def cell(k: int, content: str) -> str:
        side = "right" if k in numbers else "left"
        style_of = f"{style}{_CELL};text-align:{side}"
        return f'<{tag} style="{style_of}">{_html.escape(content.strip())}</{tag}>'

    return f"<tr>{''.join(map(cell, range(len(cells)), cells))}</tr>"
