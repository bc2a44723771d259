"""Units that the masks remove under some units of a parent only: which orders help, what stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.compaction.masked import Masked, in_order
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.infer import Program
from jaxprune.structure.parents import Obstacles, Order, OwnedMask, kept_under, order_of


class Apart(NamedTuple):
    """Units that are masked under some units of a parent only, and stay."""

    masked: int  # the most that are masked under one unit of the parent
    reason: str


def find_orders(program: Program, masked: Masked, idle: Mapping[str, str]) -> dict[str, Order]:
    """Dimensions of which the masks remove other units under each unit of a parent, provably.

    Each order is looked for among masks that those before it have moved.
    """
    structure, leaves, found = masked.structure, masked.full_masks(), dict[str, Order]()
    obstacles = Obstacles(program.tape)
    for name, above in _under(structure):
        if name in found or name in idle:
            continue
        own, parent = _leaves_of(structure, name, above)
        kept = kept_under(_owned(structure, leaves, name), own, parent)
        order = order_of(kept, own, parent)
        if order and obstacles.between(own, parent) is None:
            found[name] = order
            leaves = in_order(structure, {name: order}, leaves)
    return found


def _under(structure: Structure) -> Iterator[tuple[str, str]]:
    """Each dimension that may be cut, with each of its parents."""
    for name in (n for n, d in structure.dims.items() if not d.frozen):
        for above in structure.parents(name):
            yield name, above


def _leaves_of(structure: Structure, *names: str) -> list[Axis]:
    return [axes.find(structure.dims[name].axis) for name in names]


def _owned(structure: Structure, leaves: Sequence[Any], name: str) -> list[OwnedMask]:
    """What the masks say of the leaves that hold a dimension."""
    return [
        OwnedMask(leaves[i], structure.shapes[i], structure.param_axes[i])
        for i in structure.owners(name)
    ]


def find_apart(
    program: Program,
    masked: Masked,
    kept: Mapping[str, np.ndarray],
    orders: Mapping[str, Order],
    idle: Mapping[str, str],
) -> dict[str, Apart]:
    """What is masked under some units of a parent and is left, although units are in order.

    A unit under a parent is more than one entry: what masks an entry masks no unit.
    """
    structure, leaves, found = masked.structure, masked.masks, dict[str, Apart]()
    obstacles = Obstacles(program.tape)
    for name, above in sorted(_under(structure), key=lambda pair: pair[0] not in orders):
        own, parent = _leaves_of(structure, name, above)
        units = kept_under(_owned(structure, leaves, name), own, parent, entries=2)
        rows, columns = (kept.get(n, slice(None)) for n in (above, name))
        left = units[rows][:, columns]
        whole = left.any(axis=1, keepdims=True) & left.any(axis=0, keepdims=True)
        if above not in found and name not in found and (whole & ~left).any():
            gone = (~units[units.any(axis=1)]).sum(axis=1)
            why = idle.get(name) or obstacles.between(own, parent)
            found[name] = Apart(int(gone.max()), _why_apart(above, gone, why))
    return found


def _why_apart(above: str, masked: np.ndarray, why: str | None) -> str:
    if why is not None:
        return f"its units differ under {above}, and must not: {why}"
    return (
        f"between {masked.min()} and {masked.max()} units are masked under each of {above}: "
        "equally many go"
    )
