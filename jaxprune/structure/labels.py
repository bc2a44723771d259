"""Labels: what a person would call a dimension, from what the programs do with it."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxprune.structure import usage

# The first row whose facts all hold, and none of the others, gives the label. ``{module}`` is the
# path common to a dimension's slots, ``{maker}`` that of the leaves that make it.
RULES: tuple[tuple[str, set[str], set[str]], ...] = (
    # label, facts that hold, facts that don't
    ("{module} layers", {usage.LAYER}, set()),
    ("{module} experts", {usage.CHOSEN, usage.EXPERT}, set()),
    ("{module} heads", {usage.HEADS}, set()),
    ("{module} queries per head", {usage.SHARING}, set()),
    ("{module} head size (pairs)", {usage.MATCHED, usage.PAIRED}, set()),
    ("{module} head size", {usage.MATCHED}, set()),
    ("{module} value size", {usage.CARRIED}, {usage.RESIDUAL}),
    ("{module} experts", {usage.STACKED, usage.MADE}, {usage.RESIDUAL}),
    ("{module} stacked copies", {usage.STACKED}, set()),
    ("windows of {maker}", {usage.WINDOW}, set()),
    ("image positions in {maker}", {usage.PLACE}, set()),
    ("residual channels of {makers}", {usage.RESIDUAL, usage.CHANNEL}, {usage.DENSE}),
    ("{module} residual width", {usage.RESIDUAL}, set()),
    ("vocabulary", {usage.ROW, usage.MADE}, set()),
    ("vocabulary", {usage.ROW, usage.READ}, set()),
    ("rows of {maker}", {usage.ROW}, set()),
    ("inputs of {reader}", {usage.READ}, {usage.MADE, usage.LOOKED_UP}),
    ("outputs of {maker}", {usage.MADE}, {usage.READ}),
    ("channels of {maker}", {usage.CHANNEL}, set()),
    ("{module} hidden", {usage.MADE, usage.READ, usage.EXPERT, usage.LOOKED_UP}, set()),
    ("{maker} width", {usage.LOOKED_UP}, set()),
    ("{module} hidden", {usage.MADE, usage.READ}, set()),
)


class Place(NamedTuple):
    """A slot as labels see it."""

    path: str
    last: bool  # the last axis of a leaf of several: kernels are (..., in, out)
    rows: bool  # another axis of such a leaf
    factor: tuple[int, int] | None  # (position, count) where it is a factor of that axis


def tell_queries(facts: Sequence[set[str]], places: Sequence[Sequence[Place]]) -> None:
    """Of two dimensions of heads, that of fewer slots counts the queries that share a head.

    Where keys are repeated for grouped queries, both are batch axes of the attention.
    """
    heads = [k for k, held in enumerate(facts) if usage.HEADS in held]
    paths = {k: {place.path for place in places[k]} for k in heads}
    holding: dict[str, list[int]] = {}
    for k in heads:
        for path in paths[k]:
            holding.setdefault(path, []).append(k)
    for k in heads:
        beside = holding[places[k][0].path]
        wider = [other for other in beside if len(places[k]) < len(places[other])]
        if any(paths[k] <= paths[other] for other in wider):
            facts[k] -= {usage.HEADS}
            facts[k] |= {usage.SHARING}


def label_of(facts: set[str], places: Sequence[Place]) -> str:
    """The template that fits, with ``{module}`` and the like still to be filled in."""
    for template, held, absent in RULES:
        if held <= facts and not absent & facts:
            return _of_groups(template, places)
    return "rows of {maker}" if places[0].rows else "{module} width"


def _of_groups(template: str, places: Sequence[Place]) -> str:
    """Grouped convolutions and norms make channels a product of two, routers experts."""
    factors = {place.factor for place in places if place.last}
    factor = factors.pop() if len(factors) == 1 else None
    return template if factor is None else _FACTORS.get((template, factor), template)


_FACTORS = {
    ("channels of {maker}", (0, 2)): "groups of {maker}",
    ("channels of {maker}", (1, 2)): "channels per group of {maker}",
    ("{module} experts", (0, 2)): "{module} groups of experts",
    ("{module} experts", (1, 2)): "{module} experts per group",
}


def fill(templates: Sequence[str], places: Sequence[Sequence[Place]]) -> list[str]:
    """Labels for all dimensions, told apart by their makers where modules don't suffice."""
    module = functools.cache(module_of)
    names = [_names(of_dim, [module(place.path) for place in of_dim]) for of_dim in places]
    kinds = Counter(templates)
    plain = [
        t.replace("{module} ", "") if kinds[t] == 1 and not n["common"] else t
        for t, n in zip(templates, names)
    ]
    labels = [t.format_map(n) for t, n in zip(plain, names)]
    count = Counter(labels)
    return [
        t.replace("{module}", "{maker}").format_map(n) if count[label] > 1 else label
        for t, n, label in zip(plain, names, labels)
    ]


def numbered(labels: Sequence[str], free: Sequence[bool]) -> list[str]:
    """Labels of which no two prunable ones are alike: pieces of one axis are counted."""
    count = Counter(label for label, is_free in zip(labels, free) if is_free)
    seen = Counter[str]()
    found = []
    for label, is_free in zip(labels, free):
        several = is_free and count[label] > 1
        seen[label] += several
        found.append(f"{label} ({seen[label]} of {count[label]})" if several else label)
    return found


def _names(places: Sequence[Place], modules: Sequence[str]) -> dict[str, str]:
    makers = [m for m, p in zip(modules, places) if p.last] or modules
    readers = [m for m, p in zip(modules, places) if p.rows] or modules
    common = _common(modules)
    below = common.count("/") + 1 + bool(common)
    several = list(dict.fromkeys("/".join(m.split("/")[:below]) for m in makers))
    return {
        "common": common,
        "module": common or _common(makers) or makers[0],
        "maker": makers[0],
        "makers": ", ".join(several[:3]) + (", ..." if len(several) > 3 else ""),
        "reader": readers[0],
    }


_COLLECTIONS = {"params", "batch_stats"}
_ENTRIES = {"kernel", "bias", "scale", "embedding", "weight", "w", "b", "mean", "var", "value"}


def module_of(path: str) -> str:
    """``Block_0/Dense_0`` of ``params/Block_0/Dense_0/kernel``; a plain leaf is its own module."""
    keys = path.split("/")
    keys = keys[1:] if len(keys) > 1 and keys[0] in _COLLECTIONS else keys
    while len(keys) > 1 and keys[-1].strip(".") in _ENTRIES:
        keys = keys[:-1]
    return "/".join(keys)


def _common(modules: Sequence[str]) -> str:
    split = [m.split("/") for m in modules]
    same = os.path.commonprefix(split)  # of lists: whole keys
    return "/".join(same)
