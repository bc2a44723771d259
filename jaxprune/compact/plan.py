"""Deciding, per unit, whether the masked model can be had without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.compact.blocks import Split
from jaxprune.compact.constants import Constants, leftover, leftovers_of
from jaxprune.compact.demand import Demand
from jaxprune.jaxpr.tape import Step, Value, concrete
from jaxprune.masks import apply_masks
from jaxprune.rules import zeros
from jaxprune.rules.flow import ZeroFlow
from jaxprune.rules.registry import KEPT
from jaxprune.rules.zeros import Zeros
from jaxprune.structure.infer import Program
from jaxprune.structure.parents import Order, independent, kept_under, order_of
from jaxprune.structure.structure import Dimension, Structure

EMPTY = "all units are masked; one (of zeros) stays so that none is empty"
MASKED, KEPT_ONLY = "masked", "kept"  # semantics
FOLDED = "constants that it leaves are folded into what reads them"
GONE = "all units are masked; what they feed is gone from the program"


# (parameter, names of the dimensions at removed units) -> the slices
Leftovers = dict[tuple[int, frozenset[str]], Any]


@dataclass
class Decision:
    """What happens to one dimension."""

    dim: Dimension
    candidates: np.ndarray  # units that some slot has masked away
    kept: np.ndarray  # units that stay in the compact model
    carried: np.ndarray  # removed units whose values are evaluated beside the kept ones
    reasons: list[str] = field(default_factory=list)  # why candidates stay


@dataclass
class Plan:
    """Decisions by dimension name, and the evaluation that they lead to."""

    decisions: dict[str, Decision]
    zero_slices: list[list[np.ndarray]]  # per leaf and axis: slices that are zero in params
    semantics: str  # "masked", or "kept": as if the removed units had never been there
    demand: Demand
    orders: dict[str, Order] = field(default_factory=dict)  # of units that differ under a parent
    leftovers: Leftovers = field(default_factory=dict)

    def kept(self, name: str) -> np.ndarray:
        """Units in, as a vector, or as a matrix with a row for each unit of the parent."""
        kept = self.decisions[name].kept
        if name not in self.orders:
            return kept
        return np.take_along_axis(kept[None], np.argsort(self.orders[name].order, axis=1), 1)

    @property
    def split(self) -> Split:
        return self.demand.split


def find_orders(program: Program, structure: Structure, masks: Any) -> dict[str, Order]:
    """Dimensions of which the masks remove other units under each unit of a parent, provably."""
    leaves = structure.mask_leaves(masks)
    found: dict[str, Order] = {}
    for name in (n for n, d in structure.dims.items() if not d.frozen):
        for above in structure.parents(name):
            own, parent = (axes.find(structure.dims[n].axis) for n in (name, above))
            kept = kept_under(leaves, structure.shapes, structure.param_axes, own, parent)
            order = order_of(kept, own, parent)
            if name not in found and order and independent(program.tape, own, parent):
                found[name] = order
    return found


def in_order(structure: Structure, orders: dict[str, Order], leaves: list[Any]) -> list[Any]:
    """Leaves at full shapes, with what is to be removed last under each parent."""
    for order in orders.values():
        pairs = zip(leaves, structure.param_axes, strict=True)
        leaves = [order.apply(leaf, axs) for leaf, axs in pairs]
    return leaves


def decide(
    program: Program, structure: Structure, params: Any, masks: Any, semantics: str = MASKED
) -> Plan:
    """Removes candidates, then takes back those that a result would miss, until none is left."""
    orders = find_orders(program, structure, masks)
    if orders:
        shapes = zip(structure.mask_leaves(masks), structure.shapes, strict=True)
        full = [np.broadcast_to(mask, shape) for mask, shape in shapes]
        masks = jax.tree.unflatten(structure.treedef, in_order(structure, orders, full))
        moved = in_order(structure, orders, jax.tree.leaves(params))
        params = jax.tree.unflatten(structure.treedef, moved)
    whole = structure.fully_kept(masks)
    decisions = {
        name: Decision(dim, ~whole[name], whole[name].copy(), ~whole[name])
        for name, dim in structure.dims.items()
        if not whole[name].all()
    }
    for decision in decisions.values():
        if decision.dim.frozen:
            _stay(decision, np.ones(decision.dim.size, bool), decision.dim.frozen)
    zero_slices = _zero_slices(structure, params, masks)
    while True:
        demand = evaluation(program, _split(decisions), zero_slices, structure.paths, semantics)
        if not _take_back(decisions, demand):
            break
    for decision in decisions.values():
        none = np.zeros(decision.dim.size, bool)
        decision.carried = demand.carried.get(axes.find(decision.dim.axis), none) & ~decision.kept
        if not decision.kept.any():
            decision.reasons.append(GONE)
        if any(axes.find(decision.dim.axis) in block for _, block in demand.constants.leftovers):
            decision.reasons.append(FOLDED)
    planned = again(program, structure.paths, decisions, zero_slices, semantics, orders)
    planned.leftovers = _leftovers(planned.demand, program, structure, masks, params)
    return planned


def _leftovers(
    demand: Demand, program: Program, structure: Structure, masks: Any, params: Any
) -> Leftovers:
    """The removed slices that are folded, of the masked parameters."""
    names = {axes.find(d.axis): n for n, d in structure.dims.items()}
    leaves = jax.tree.leaves(apply_masks(params, masks)) if demand.constants.leftovers else []
    return {
        (i, frozenset(names[d] for d in block)): leftover(demand, value, block, leaves[i])
        for i, value in enumerate(program.param_values)
        for v, block in demand.constants.leftovers
        if v is value
    }


def again(
    program: Program,
    paths: Sequence[str],
    decisions: dict[str, Decision],
    zero_slices: list[list[np.ndarray]],
    semantics: str,
    orders: dict[str, Order],
) -> Plan:
    """The evaluation that decisions lead to, made now or read from a file."""
    demand = evaluation(program, _split(decisions), zero_slices, paths, semantics)
    return Plan(decisions, zero_slices, semantics, demand, orders)


def _split(decisions: dict[str, Decision]) -> Split:
    pruned = [d for d in decisions.values() if not d.kept.all()]
    return Split(
        {axes.find(d.dim.axis): np.flatnonzero(d.kept) for d in pruned},
        {axes.find(d.dim.axis): np.flatnonzero(d.carried & ~d.kept) for d in pruned},
    )


def _take_back(decisions: dict[str, Decision], demand: Demand) -> bool:
    """Units that can't go after all; False when there is none."""
    by_leaf = {axes.find(d.dim.axis): d for d in decisions.values()}
    for dimension, units, why in demand.refusals:
        decision = by_leaf[dimension]
        _stay(decision, np.isin(np.arange(decision.dim.size), units), why)
    if demand.refusals:
        return True
    emptied = [d for leaf, d in by_leaf.items() if not d.kept.any() and demand.evaluates(leaf)]
    for decision in emptied:
        _stay(decision, np.arange(decision.dim.size) == 0, EMPTY)
    return bool(emptied)


def _stay(decision: Decision, units: np.ndarray, why: str) -> None:
    back = units & ~decision.kept
    if back.any():
        decision.kept |= back
        if why not in decision.reasons:
            decision.reasons.append(why)


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
        for units in axes.units_along(axis, dimension):
            dirty = np.unique(units[(units >= 0) & ~zero])
            demand.refuse(dimension, why, np.intersect1d(dirty, demand.removed(dimension)))


def _zero_slices(structure: Structure, params: Any, masks: Any) -> list[list[np.ndarray]]:
    """Zero slices of the masked parameters, by mask and by value where the value is at hand."""
    found = []
    for mask, leaf, shape in zip(
        structure.mask_leaves(masks), jax.tree.leaves(params), structure.shapes, strict=True
    ):
        alive = np.broadcast_to(mask, shape)
        array = concrete(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else None
        if not alive.all() and array is not None:
            alive = alive & (array != 0)
        others = [tuple(i for i in range(len(shape)) if i != k) for k in range(len(shape))]
        found.append([~np.asarray(alive.any(axis=rest), bool) for rest in others])
    return found
