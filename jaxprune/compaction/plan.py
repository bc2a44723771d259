"""Deciding, per unit, whether the masked model can be had without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction.blocks import Split
from jaxprune.compaction.constants import Constants, leftover, leftovers_of
from jaxprune.compaction.demand import Demand
from jaxprune.compaction.masked import Masked
from jaxprune.compaction.orders import Apart, find_apart, find_orders
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step, Value, concrete
from jaxprune.rules import zeros
from jaxprune.rules.registry import KEPT
from jaxprune.rules.zero_flow import ZeroFlow
from jaxprune.rules.zeros import Zeros
from jaxprune.sharding import freely, host, layout
from jaxprune.structure.dimensions import Dimension, Structure
from jaxprune.structure.infer import KEPT_ONLY, MASKED, Program
from jaxprune.structure.parents import Order

EMPTY = "all units are masked; one (of zeros) stays so that none is empty"
FOLDED = "constants that it leaves are folded into what reads them"
FEWER = "the choice is among those that are left, as with logits of minus infinity"
GONE = "all units are masked; what they feed is gone from the program"


# (parameter, names of the dimensions at removed units) -> the slices
Leftovers = dict[tuple[int, frozenset[str]], Any]


@dataclass
class Draft:
    """What is to happen to one dimension, while that is being decided."""

    dim: Dimension
    candidates: np.ndarray  # units that some slot has masked away
    kept: np.ndarray  # units that stay in the compact model
    carried: np.ndarray  # removed units whose values are evaluated beside the kept ones
    reasons: list[str] = field(default_factory=list)  # why candidates stay


Drafts = dict[str, Draft]


@dataclass(frozen=True, eq=False)
class Decision:
    """What happens to one dimension; the vectors are those of :class:`Draft`, read-only."""

    dim: Dimension
    candidates: np.ndarray
    kept: np.ndarray
    carried: np.ndarray
    reasons: tuple[str, ...]
    evaluations: int  # equations that are evaluated for carried units


@dataclass(frozen=True, eq=False)
class Plan:
    """What a compact model is made by: decisions by dimension name, and what evaluation needs."""

    decisions: Mapping[str, Decision]
    split: Split
    zero_slices: Sequence[Sequence[np.ndarray]]  # per leaf and axis: slices that are zero in params
    semantics: str  # "masked", or "kept": as if the removed units had never been there
    orders: Mapping[str, Order]  # of units that differ under a parent
    apart: Mapping[str, Apart]  # dimension -> what stays of such units
    leftovers: Leftovers
    hazards: tuple[str, ...]  # where the masked model may not be finite

    def kept(self, name: str) -> np.ndarray:
        """Units in, as a vector, or as a matrix with a row for each unit of the parent."""
        kept = self.decisions[name].kept
        if name not in self.orders:
            return kept
        return np.take_along_axis(kept[None], np.argsort(self.orders[name].order, axis=1), 1)


def made_of(
    drafts: Drafts,
    demand: Demand,
    zero_slices: Sequence[Sequence[np.ndarray]],
    semantics: str,
    orders: Mapping[str, Order],
    leftovers: Leftovers,
    apart: Mapping[str, Apart] = MappingProxyType({}),
) -> Plan:
    """The plan that drafts and the evaluation that they lead to are; nothing of it changes."""
    decisions = {name: _decided(draft, demand) for name, draft in drafts.items()}
    hazards = () if semantics == KEPT_ONLY else tuple(demand.flow.hazards)
    split = Split(demand.split.kept, demand.split.removed)  # one that remembers no program
    return Plan(
        decisions, split, zero_slices, semantics, dict(orders), dict(apart), leftovers,
        hazards,
    )  # fmt: skip


def _decided(draft: Draft, demand: Demand) -> Decision:
    carried = (draft.carried & ~draft.kept).any()
    return Decision(
        dim=draft.dim,
        candidates=_fixed(draft.candidates),
        kept=_fixed(draft.kept),
        carried=_fixed(draft.carried),
        reasons=tuple(draft.reasons),
        evaluations=demand.evaluations(axes.find(draft.dim.axis)) if carried else 0,
    )


def _fixed(vector: np.ndarray) -> np.ndarray:
    """A copy that nobody can write to."""
    copy = vector.copy()
    copy.flags.writeable = False
    return copy


def decide(
    program: Program,
    masked: Masked,
    semantics: str = MASKED,
    idle: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Plan, Demand]:
    """Removes candidates, then takes back those that a result would miss, until none is left.

    Returns the plan, and the evaluation of the program that it leads to. ``idle`` names dimensions
    of which nothing can go under an order for each parent, and why.
    """
    orders = find_orders(program, masked, idle)
    moved = masked.in_order(orders)
    zero_slices = _zero_slices(moved)
    drafts, demand = _draft(program, moved, semantics, orders, zero_slices)
    more = {n: "; ".join(d.reasons) for n in orders if (d := drafts[n]).kept.all()}
    if more:  # an order without a removal would only move what the user knows at its place
        return decide(program, masked, semantics, {**idle, **more})
    kept = {name: draft.kept for name, draft in drafts.items()}
    apart = find_apart(program, moved, kept, orders, idle)
    leftovers = _leftovers(demand, program, moved)
    planned = made_of(drafts, demand, zero_slices, semantics, orders, leftovers, apart)
    return planned, demand


def _draft(
    program: Program,
    masked: Masked,
    semantics: str,
    orders: Mapping[str, Order],
    zero_slices: Sequence[Sequence[np.ndarray]],
) -> tuple[Drafts, Demand]:
    """As :func:`decide`, once units are in order."""
    structure = masked.structure
    whole = structure.kept_by(masked.masks, "all")
    drafts = {
        name: Draft(dim, ~whole[name], whole[name].copy(), ~whole[name])
        for name, dim in structure.dims.items()
        if name in orders or not whole[name].all()
    }
    for draft in drafts.values():
        if draft.dim.frozen:
            _stay(draft, np.ones(draft.dim.size, bool), draft.dim.frozen)
    while True:
        demand = evaluation(program, _split(drafts), zero_slices, structure.paths, semantics)
        if not _take_back(drafts, demand):
            break
    for draft in drafts.values():
        _explain(draft, demand)
        _check_least(draft)
    return drafts, evaluation(program, _split(drafts), zero_slices, structure.paths, semantics)


def _check_least(draft: Draft) -> None:
    """Raises where fewer units are left than are chosen of them at a time."""
    dim, left = draft.dim, int(draft.kept.sum())
    if left < dim.least:
        where = max(axes.find(dim.axis).chosen, key=lambda one: one[1])[0]
        raise ValueError(
            f"the masks leave {left} of {dim.size} units of {dim.name!r}, and {where} chooses "
            f"{dim.least} of them; keep at least so many"
        )


def _explain(draft: Draft, demand: Demand) -> None:
    """Says what becomes of the removed units' values."""
    leaf, none = axes.find(draft.dim.axis), np.zeros(draft.dim.size, bool)
    draft.carried = demand.carried.get(leaf, none) & ~draft.kept
    if not draft.kept.any():
        draft.reasons.append(GONE)
    if leaf.chosen and not draft.kept.all():
        draft.reasons.append(FEWER)
    if any(leaf in block for _, block in demand.constants.leftovers):
        draft.reasons.append(FOLDED)


def _leftovers(demand: Demand, program: Program, masked: Masked) -> Leftovers:
    """The removed slices that are folded, of the masked parameters."""
    found = folds(demand, program, masked.structure) if demand.constants.leftovers else {}
    return {
        (i, names): leftover(demand, value, block, masked.value(i))
        for (i, names), (value, block) in found.items()
    }


def folds(demand: Demand, program: Program, structure: Structure) -> dict[Any, Any]:
    """(parameter, names of the dimensions) -> (value, block), of all slices that are folded."""
    names = {axes.find(d.axis): n for n, d in structure.dims.items()}
    places = {value: i for i, value in enumerate(program.param_values)}
    return {
        (places[value], frozenset(names[d] for d in block)): (value, block)
        for value, block in demand.constants.leftovers
        if value in places
    }


def redo(
    program: Program,
    paths: Sequence[str],
    drafts: Drafts,
    zero_slices: Sequence[Sequence[np.ndarray]],
    semantics: str,
) -> Demand:
    """The evaluation of drafts of which only what is kept is known: nothing is taken back.

    What doesn't hold any more stands in its refusals.
    """
    for draft in drafts.values():
        draft.carried = ~draft.kept
    demand = evaluation(program, _split(drafts), zero_slices, paths, semantics)
    for draft in drafts.values():
        none = np.zeros(draft.dim.size, bool)
        draft.carried = demand.carried.get(axes.find(draft.dim.axis), none) & ~draft.kept
    if demand.refusals:
        return demand
    return evaluation(program, _split(drafts), zero_slices, paths, semantics)


def _split(drafts: Drafts) -> Split:
    pruned = [d for d in drafts.values() if not d.kept.all()]
    return Split(
        {axes.find(d.dim.axis): np.flatnonzero(d.kept) for d in pruned},
        {axes.find(d.dim.axis): np.flatnonzero(d.carried & ~d.kept) for d in pruned},
    )


def _take_back(drafts: Drafts, demand: Demand) -> bool:
    """Units that can't go after all; False when there is none."""
    by_leaf = {axes.find(d.dim.axis): d for d in drafts.values()}
    for dimension, units, why in demand.refusals:
        draft = by_leaf[dimension]
        _stay(draft, np.isin(np.arange(draft.dim.size), units), why)
    if demand.refusals:
        return True
    emptied = [d for leaf, d in by_leaf.items() if not d.kept.any() and demand.evaluates(leaf)]
    for draft in emptied:
        _stay(draft, np.arange(draft.dim.size) == 0, EMPTY)
    return bool(emptied)


def _stay(draft: Draft, units: np.ndarray, why: str) -> None:
    back = units & ~draft.kept
    if back.any():
        draft.kept |= back
        if why not in draft.reasons:
            draft.reasons.append(why)


def evaluation(
    program: Program,
    split: Split,
    zero_slices: Sequence[Sequence[np.ndarray]],
    paths: Sequence[str],
    semantics: str = MASKED,
    doubted: frozenset[Step] = frozenset(),
) -> Demand:
    """What has to be evaluated so that the outputs are those of the masked model.

    With the semantics "kept" nothing is carried, and means divide by what is left.
    """
    flow = ZeroFlow(doubted)
    pairs = zip(program.param_values, zero_slices, strict=True)
    known = [_known(split, value, slices) for value, slices in pairs]
    others = [zeros.unknown(v.shape) for v in program.tape.inputs[len(known) :]]
    flow.run(program.tape, [*known, *others])
    _keep_own_hazards(flow, program)
    demand = Demand(split, flow, absent=semantics == KEPT_ONLY)
    needed = demand.through(program.tape, [{KEPT} for _ in program.tape.outputs])
    if not demand.doubted <= doubted:
        return evaluation(program, split, zero_slices, paths, semantics, doubted | demand.doubted)
    leftovers = leftovers_of(demand, program.param_values, needed)
    demand.constants = Constants(demand, program.tape, leftovers)
    for path, value, zero in zip(paths, program.param_values, known):
        misread = [block for v, block in demand.constants.misread if v is value]
        for dimension in frozenset().union(*misread):
            _refuse_nonzero(demand, path, value, zero, dimension)
    return demand


def _keep_own_hazards(flow: ZeroFlow, program: Program) -> None:
    """Takes back those that the program has without masks: of zeros that it is written with."""
    if flow.hazards:
        unmasked = ZeroFlow(flow.doubted)
        unmasked.run(program.tape, [zeros.unknown(v.shape) for v in program.tape.inputs])
        flow.forget_hazards(unmasked)


def _known(split: Split, value: Value, slices: Sequence[np.ndarray]) -> Zeros:
    """Only what is removed counts as zero: kept entries may be trained again."""
    vectors = []
    for axis, zero in zip(value.axes, slices, strict=True):
        removed = np.zeros(axis.size, bool)
        if split.pruned(axis):
            removed[:] = True
            removed[split.view(KEPT).index(axis)] = False
        vectors.append(removed & zero)
    return zeros.of_axes(vectors)


def _refuse_nonzero(demand: Demand, path: str, value: Value, known: Zeros, dimension: Axis) -> None:
    """Removed slices of a parameter that are needed and not zero: their units stay."""
    site = demand.sites.get(dimension, "a result")
    why = f"its masked value is not zero where {site} reads it, for {path} is not masked there"
    for axis, zero in zip(value.axes, known.axes, strict=True):
        for units in demand.split.numbers.units(axis, dimension):
            dirty = np.unique(units[(units >= 0) & ~zero])
            demand.refuse(dimension, why, np.intersect1d(dirty, demand.removed(dimension)))


def _zero_slices(masked: Masked) -> list[list[np.ndarray]]:
    """Zero slices of the masked parameters, by mask and by value where the value is at hand."""
    found = []
    for mask, leaf, shape in zip(masked.masks, masked.params, masked.structure.shapes, strict=True):
        alive = np.broadcast_to(mask, shape)
        if layout(leaf) and not isinstance(leaf, jax.core.Tracer) and not alive.all():
            found.append([~host(line) for line in _alive(leaf, mask)])
            continue
        array = concrete(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else None
        if not alive.all() and array is not None:
            alive = alive & (array != 0)
        others = [tuple(i for i in range(len(shape)) if i != k) for k in range(len(shape))]
        found.append([~np.asarray(alive.any(axis=rest), bool) for rest in others])
    return found


@jax.jit
def _alive(leaf: jax.Array, mask: np.ndarray) -> list[jax.Array]:
    """Along each axis whether a slice holds anything, of a leaf that lies on several devices."""

    def lines(leaf: jax.Array, mask: jax.Array) -> list[jax.Array]:
        there = mask & (leaf != 0)
        return [jnp.any(there, [i for i in range(leaf.ndim) if i != k]) for k in range(leaf.ndim)]

    return freely(lines, leaf, mask)
