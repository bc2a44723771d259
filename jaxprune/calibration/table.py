"""Statistics as a table: what was counted of which leaves, and why not of others."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune._tables import Part, Table
from jaxprune.selection import known
from jaxprune.sharding import host
from jaxprune.structure.table import pattern_of, together
from jaxprune.typing import named_leaves

if TYPE_CHECKING:
    from jaxprune.calibration.api import Stats


def parts(stats: Stats) -> Iterator[Part]:
    """The lines and tables that ``print`` and notebooks show; siblings stand in one row."""
    means, grams, counts = (
        dict(named_leaves(tree)) for tree in (stats.means, stats.grams, stats.count)
    )
    rows = [
        (path, _inputs(means[path], counts[path]), _tokens(counts[path]), _gram(grams.get(path)))
        for path in stats.layouts
        if path in means
    ]
    without = [(path, why) for path, why in stats.reasons.items() if path not in stats.layouts]
    yield f"statistics of the inputs of {len(rows)} leaves"
    if rows:
        yield Table(("leaf", "inputs", "tokens", "Gram matrix"), _grouped(rows), (1, 2))
    partly = [(path, stats.reasons[path]) for path, *_ in rows if path in stats.reasons]
    for title, found in (("without statistics", without), ("of some uses only", partly)):
        if found:
            yield ""
            yield Table((title, "why"), _grouped(found))


def _grouped(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Leaves whose paths differ in numbers, and whose other cells don't, in one row."""
    groups: dict[Hashable, list[tuple[str, ...]]] = {}
    for path, *cells in rows:
        groups.setdefault((pattern_of(path), *cells), []).append((path, *cells))
    return [(together(p for p, *_ in same), *same[0][1:]) for same in groups.values()]


def _inputs(mean: Any, count: Any) -> str:
    """``768``; ``12 x 768`` where a leaf holds a stack."""
    stack = int(np.prod(np.shape(count)))
    each = f"{np.size(mean) // max(stack, 1):,}"
    return f"{stack} x {each}" if np.shape(count) else each


def _tokens(count: Any) -> str:
    if not known(count):
        return "traced"
    low, high = (f"{float(f(host(count))):,.0f}" for f in (np.min, np.max))
    return low if low == high else f"{low} - {high}"


def _gram(gram: Any) -> str:
    return "-" if gram is None else " x ".join(map(str, np.shape(gram)))
