"""The dimensions of a network as a table that a person wants to read."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxprune._tables import Part, Table
from jaxprune.structure.state import ADVICE, MARK

if TYPE_CHECKING:
    from jaxprune.structure.dimensions import Dimension, Structure

# A better rule could lift these reasons; all others are inherent in the network.
_BLOCKS = ("no rule for this primitive", "layouts that do not nest")
_WIDEST = 100  # A reason is cut after so many letters.


@dataclass(frozen=True)
class Row:
    """Dimensions of one kind and size, ``layers/0/mlp hidden`` to ``layers/11/mlp hidden``."""

    label: str
    dims: tuple[Dimension, ...]

    @property
    def blocked(self) -> bool:
        return any(block in (self.dims[0].frozen or "") for block in _BLOCKS)

    @property
    def params(self) -> int:
        return max(d.params for d in self.dims)


def rows(structure: Structure) -> list[Row]:
    """Siblings of equal size in one row; prunable ones first, then what blocks, then the rest."""
    groups: dict[Hashable, list[Dimension]] = {}
    for dim in structure.dims.values():
        key = (pattern_of(dim.label), dim.size, pattern_of(dim.frozen or ""))
        groups.setdefault(key, []).append(dim)
    found = [Row(together(d.label for d in dims), tuple(dims)) for dims in groups.values()]
    return sorted(found, key=lambda r: (r.dims[0].frozen is not None, not r.blocked, -r.params))


def pattern_of(text: str) -> str:
    """The text with every number as ``*``."""
    return re.sub(r"\d+", "*", text)


def together(texts: Iterable[str]) -> str:
    """One text for several that differ in numbers: ``layers/0-3/mlp``."""
    split = [re.split(r"(\d+)", text) for text in texts]
    if len({len(pieces) for pieces in split}) > 1:
        return pattern_of("".join(split[0]))
    return "".join(
        _span({int(n) for n in column}) if k % 2 else column[0]
        for k, column in enumerate(zip(*split))
    )


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    if low == high:
        return str(low)
    whole = len(numbers) == high - low + 1
    return f"{low}-{high}" if whole else ",".join(map(str, sorted(numbers)))


def parts(structure: Structure) -> Iterator[Part]:
    """The lines and tables that ``print`` and notebooks show."""
    every = rows(structure)
    free = [row for row in every if not row.dims[0].frozen]
    blocked = [row for row in every if row.blocked]
    fixed = [row for row in every if row.dims[0].frozen and not row.blocked]
    yield _headline(structure)
    yield from (f"note: {note}" for note in hints(structure))
    yield from _section("can be pruned", free)
    count = governed(structure, (d for row in blocked for d in row.dims))
    yield from _section(
        f"blocked: what it would take to prune these ({count:,} parameters)", blocked
    )
    yield from _section("fixed", fixed)


def hints(structure: Structure) -> list[str]:
    """What would let more be pruned, a line each."""
    frozen = [d for d in structure.dims.values() if MARK in (d.frozen or "")]
    return [ADVICE] if frozen else []


def _headline(structure: Structure) -> str:
    dims = structure.dims.values()
    free = [d for d in dims if not d.frozen]
    total = sum(_sizes(structure).values())
    share = 100 * governed(structure, free) / max(total, 1)
    return (
        f"{len(free)} of {len(dims)} dimensions can be pruned; they govern {share:.3g} % of "
        f"{total:,} parameters"
    )


def _sizes(structure: Structure) -> dict[str, int]:
    return dict(zip(structure.paths, map(math.prod, structure.shapes)))


def governed(structure: Structure, dims: Iterable[Dimension]) -> int:
    """The number of entries in all leaves that carry one of the dimensions."""
    sizes = _sizes(structure)
    return sum(sizes[path] for path in {slot.path for d in dims for slot in d.slots})


def _section(title: str, found: Sequence[Row]) -> Iterator[Part]:
    if found:
        last = "why" if found[0].dims[0].frozen else "name"
        yield ""
        yield Table((title, "size", "", "params each", last), [_cells(r) for r in found], (1, 3))


def _cells(row: Row) -> list[str]:
    first = row.dims[0]
    same = len({d.params for d in row.dims}) == 1
    return [
        f"  {row.label}",
        f"{first.size:,}",
        f"x{len(row.dims)}" if len(row.dims) > 1 else "",
        ("" if same else "<= ") + f"{row.params:,}",
        _why(row) if first.frozen else together(d.name for d in row.dims),
    ]


def _why(row: Row) -> str:
    """The first reason, in full where it is short."""
    reasons = (row.dims[0].frozen or "").split("; ")
    first = reasons[0] if len(reasons[0]) <= _WIDEST else reasons[0][: _WIDEST - 3] + "..."
    return first + (f" (+{len(reasons) - 1} more)" if len(reasons) > 1 else "")


def full(structure: Structure, pattern: str) -> str:
    """A block per dimension: its name, label, size, parameters, reasons and every slot."""
    chosen = [d for d in structure.dims.values() if d.matches(pattern)]
    blocks = []
    for d in chosen:
        head = f"{d.name}  ({d.label}): {d.size:,} units, {d.params:,} parameters"
        why = [f"  frozen: {reason}" for reason in (d.frozen or "").split("; ") if reason]
        blocks.append("\n".join([head, *why, *(f"  {slot}" for slot in d.slots)]))
    return "\n".join(blocks) or f"no dimension matches {pattern!r}"
