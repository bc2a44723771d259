"""Rows in which every pair of values meets: the table that a full product is too large for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

Value = tuple[str, str]  # a factor, and one of its values
Row = dict[str, str]  # factor -> value


def all_pairs(
    factors: Mapping[str, Sequence[str]], fit: Callable[[Value, Value], bool]
) -> list[tuple[Value, Value]]:
    """The pairs of values of two factors that ``fit`` each other, those of large factors first."""
    by_size = sorted(factors, key=lambda name: -len(factors[name]))
    return [
        ((f, a), (g, b))
        for f, g in itertools.combinations(by_size, 2)
        for a, b in itertools.product(factors[f], factors[g])
        if fit((f, a), (g, b))
    ]


def pairwise(
    factors: Mapping[str, Sequence[str]], fit: Callable[[Value, Value], bool]
) -> list[Row]:
    """Rows that hold all pairs: each begins with one that is missing, and takes in most others.

    ``fit`` is symmetric. Greedy (Cohen et al., The AETG System, 1997), with no chance in it.
    """
    missing = {frozenset(pair): None for pair in all_pairs(factors, fit)}  # keeps its order
    rows: list[Row] = []
    while missing:
        row = dict(sorted(next(iter(missing))))
        for name in sorted(factors, key=lambda name: -len(factors[name])):
            if name not in row:
                row[name] = _best(name, factors[name], row, missing, fit)
        for pair in itertools.combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append(row)
    return rows


def _best(
    name: str,
    values: Sequence[str],
    row: Row,
    missing: Mapping[frozenset[Value], None],
    fit: Callable[[Value, Value], bool],
) -> str:
    def new(value: str) -> int:
        return sum(frozenset({(name, value), other}) in missing for other in row.items())

    return max((v for v in values if all(fit((name, v), o) for o in row.items())), key=new)
