"""Why a module can't be had at the small sizes: which dimension, where, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from jaxprune.compaction import counts, plan
from jaxprune.compaction.api import compact
from jaxprune.compaction.blocks import Split
from jaxprune.ir import axes
from jaxprune.structure.infer import infer
from jaxprune.structure.labels import module_of
from jaxprune.structure.naming import from_program
from jaxprune.typing import Compact

MOST_MODULES = 3  # so many are named in a message
LEAVE_OUT = "leave the dimension out of the masks (dims=)"
KEPT = 'jp.compact(..., semantics="kept"), which normalizes over what is left, and tune'

Types = dict[str, str]  # path of a module -> its type


class Unequal(ValueError):
    """A module that can't be had at the small sizes as it is written."""


def refusal(small: Compact, name: str, types: Types, why: str, instead: str) -> Unequal:
    """Names the dimension, its modules, the reason and the choice."""
    dim, left = small._structure.dims[name], int(small.keep[name].sum(-1).max())
    held = dict.fromkeys(_holder(slot.path, types) for slot in dim.slots)
    found = [f"{path} ({types[path]})" if path in types else path for path in held]
    found.sort(key=lambda text: "Norm" not in text)  # what normalizes is to blame more often
    more = ", ..." if len(found) > MOST_MODULES else ""
    return Unequal(
        f"no plain module equals small.fn: of {dim.label or name!r} ({name}) {left} of {dim.size} "
        f"units are left, in {', '.join(found[:MOST_MODULES])}{more}; {why}; {instead}"
    )


def _holder(path: str, types: Types) -> str:
    """The module that a leaf lies in."""
    keys = path.split("/")
    above = ("/".join(keys[:k]) for k in range(len(keys) - 1, 0, -1))
    return next((p for p in above if p in types), module_of(path))


def carried(small: Compact, types: Types) -> Unequal | None:
    """Units that are evaluated beside the kept ones: what is left of them is not zero."""
    for entry in small.certificate.entries:
        if entry.carried:
            why = f"{entry.carried} removed units are carried beside them, for they are not zero"
            return refusal(small, entry.name, types, why, f"{LEAVE_OUT}, or {KEPT}")
    return None


def counted(small: Compact, types: Types) -> Unequal | None:
    """Means that divide by the full count of an axis that is cut."""
    function: Any = small.fn
    if small._plan.semantics != plan.MASKED:
        return None
    params, args = function.traced_for
    (program,) = infer([(function.fn, args)], params)
    dims = from_program(program, params).dims
    kept = {n: np.flatnonzero(small.keep[n]) for n in _cut(small) if small.keep[n].ndim == 1}
    split = Split({axes.find(dims[n].axis): index for n, index in kept.items()}, {})
    names = {axes.find(dims[n].axis): n for n in kept}
    for step, count in counts.find(program.tape, split).items():
        cut = [leaf for axis in count.summed for leaf in axes.leaves(axis) if leaf in names]
        full = prod(axes.find(axis).size for axis in count.summed)
        why = f"small.fn divides by the full count {full} at {step.where}, as the masked model does"
        return refusal(small, names[cut[0]], types, why, f"{LEAVE_OUT}, or {KEPT}")
    return None


def _cut(small: Compact) -> list[str]:
    return [name for name, kept in small.keep.items() if not kept.all()]


def alone(small: Compact) -> Iterator[tuple[str, Compact]]:
    """Compact models that lose one dimension each, of those that the given one loses."""
    function: Any = small.fn
    full, args = small.expand(small.params), small.certificate._checker.args
    for name in _cut(small):
        kept: Any = small.keep[name]
        if kept.ndim > 1:
            kept = {_parent(small, name): kept}
        masks = small._structure.masks_of({name: kept})
        yield name, compact(function.fn, full, masks, *args, semantics=small._plan.semantics)


def _parent(small: Compact, name: str) -> str:
    above = axes.find(small._plan.orders[name].parent)
    return next(n for n, d in small._structure.dims.items() if axes.find(d.axis) is above)
