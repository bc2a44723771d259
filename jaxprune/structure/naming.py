"""Names, labels and slots of what traces have found, as a :class:`Structure`."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.sharding import declared_layout
from jaxprune.structure import infer as _infer
from jaxprune.structure import labels, usage
from jaxprune.structure.dimensions import Dimension, Slot, Structure
from jaxprune.structure.statistics import statistics

# A unit that a slice or a padding sets apart is no dimension: its axis would be gone with it.
APART = "a single unit that a slice sets apart: one (of zeros) stays so that none is empty"


def from_program(program: _infer.Program, params: Any) -> Structure:
    """Names what a trace found."""
    return from_programs([program], params)


def from_programs(programs: Sequence[_infer.Program], params: Any) -> Structure:
    """Names what all traces of the same parameters found together."""
    paths = tuple(_infer.paths_of(params))
    param_axes = tuple(tuple(v.axes) for v in programs[0].param_values)
    shapes = tuple(v.shape for v in programs[0].param_values)
    slots = _slots(paths, param_axes, _first_use(programs))
    used = set().union(*(_infer.used_leaves(p.tape) for p in programs))
    sizes = dict(zip(paths, map(math.prod, shapes)))
    semantics = programs[0].semantics
    whys = [_why(leaf, used, semantics) for leaf in slots]
    names = labels.numbered(_labels(programs, slots, paths), [why is None for why in whys])
    dims = {}
    for (leaf, found), why, label in zip(slots.items(), whys, names, strict=True):
        governed = sum(map(sizes.__getitem__, {s.path for s in found}))
        name = str(found[0])
        least = max((n for _, n in leaf.chosen), default=0)
        dims[name] = Dimension(name, leaf.size, found, why, governed, leaf, label, least)
    layouts = tuple(map(declared_layout, jax.tree.leaves(params)))
    still = set[int]().union(*(statistics(p.tape, p.param_values) for p in programs))
    told = tuple(paths[i] for i in sorted(still))
    treedef = jax.tree.structure(params)
    return Structure(dims, paths, shapes, param_axes, treedef, layouts, told, semantics)


def _why(leaf: Axis, used: set[Axis], semantics: str) -> str | None:
    """Why a dimension can't be pruned; None: it can."""
    why = _infer.blocked(leaf, semantics)
    if why is not None:
        return why
    if leaf.size == 1:
        return APART
    return None if leaf in used else "nothing in this trace reads it"


def _slots(
    paths: Sequence[str], param_axes: Sequence[Sequence[Axis]], first_use: Sequence[int]
) -> dict[Axis, tuple[Slot, ...]]:
    """The slots of each leaf dimension: makers first, in order of use; dimensions likewise."""
    found: dict[Axis, list[tuple[Any, Slot]]] = {}
    known: dict[Axis, _Pieces] = {}
    for path, axs, when in zip(paths, param_axes, first_use, strict=True):
        for k, axis in enumerate(axs):
            for leaf, piece in axes.fold(axis, _pieces, known):
                if leaf.size > 1 or (leaf.size == 1 and piece):
                    makes = len(axs) > 1 and k == len(axs) - 1  # kernels are (..., in, out)
                    found.setdefault(leaf, []).append(((not makes, when), Slot(path, k, piece)))
    in_order = [(leaf, sorted(pairs)) for leaf, pairs in found.items()]
    in_order.sort(key=lambda item: item[1][0])
    return {leaf: tuple(map(operator.itemgetter(1), pairs)) for leaf, pairs in in_order}


def _labels(
    programs: Sequence[_infer.Program], slots: Mapping[Axis, Sequence[Slot]], paths: Sequence[str]
) -> list[str]:
    """What each dimension is called, see :mod:`jaxprune.structure.labels`."""
    alone = {leaf: found for leaf, found in slots.items() if leaf.size == 1}
    if alone:
        wide = {leaf: found for leaf, found in slots.items() if leaf not in alone}
        known = dict(zip(wide, _labels(programs, wide, paths)))
        one = {x: f"one unit of {labels.module_of(found[0].path)}" for x, found in alone.items()}
        return [(known | one)[leaf] for leaf in slots]
    facts = [usage.facts_of(p.tape, p.num_params, slots) for p in programs]
    axes_of = dict(zip(paths, programs[0].param_values))
    places = [[_place(s, axes_of[s.path].axes) for s in found] for found in slots.values()]
    together = [set().union(*(f[leaf] for f in facts)) for leaf in slots]
    labels.tell_queries(together, places)
    templates = [labels.label_of(*pair) for pair in zip(together, places)]
    return labels.fill(templates, places)


_Pieces = list[tuple[Axis, tuple[int, ...]]]


def _pieces(node: Axis, of_kids: list[_Pieces]) -> _Pieces:
    """The leaves of an axis, each with the way down to it."""
    if node.kind is axes.LEAF:
        return [(node, ())]
    if node.kind is axes.PERM:
        return of_kids[0]
    return [(leaf, (i, *way)) for i, pieces in enumerate(of_kids) for leaf, way in pieces]


def _place(slot: Slot, axs: Sequence[Axis]) -> labels.Place:
    """A slot as labels see it."""
    axis, last = axes.find(axs[slot.axis]), slot.axis == len(axs) - 1
    factor = (slot.piece[0], len(axis.kids)) if axis.kind == axes.PROD else None
    return labels.Place(slot.path, len(axs) > 1 and last, not last, factor)


def _first_use(programs: Sequence[_infer.Program]) -> list[int]:
    """When each parameter is read first, in the first of the programs that reads it."""
    steps = [step for program in programs for step in program.tape.steps]
    seen: dict[Any, int] = {}
    for i, step in enumerate(steps):
        for value in step.ins:
            seen.setdefault(value, i)
    same = zip(*(program.param_values for program in programs))
    return [min(seen.get(value, len(steps)) for value in values) for values in same]
