"""Deciding, per unit, whether the masked model can be had without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction.blocks import Split
from jaxprune.compaction.constants import Constants, leftover, leftovers_of
from jaxprune.compaction.demand import Demand
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step, Value, concrete
from jaxprune.masks import apply_masks
from jaxprune.rules import zeros
from jaxprune.rules.registry import KEPT
from jaxprune.rules.zero_flow import ZeroFlow
from jaxprune.rules.zeros import Zeros
from jaxprune.sharding import freely, host, layout, reshaped
from jaxprune.structure.infer import Program
from jaxprune.structure.parents import Order, OwnedMask, kept_under, obstacle, order_of
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
    apart: dict[str, Apart] = field(default_factory=dict)  # dimension -> what stays of such units
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


class Apart(NamedTuple):
    """Units that are masked under some units of a parent only, and stay."""

    masked: int  # the most that are masked under one unit of the parent
    reason: str


def find_orders(
    program: Program, structure: Structure, masks: Any, idle: Mapping[str, str]
) -> dict[str, Order]:
    """Dimensions of which the masks remove other units under each unit of a parent, provably.

    Each order is looked for among masks that those before it have moved.
    """
    leaves, found = _full_masks(structure, masks), dict[str, Order]()
    for name, above in _under(structure):
        if name in found or name in idle:
            continue
        own, parent = _leaves_of(structure, name, above)
        kept = kept_under(_owned(structure, leaves, name), own, parent)
        order = order_of(kept, own, parent)
        if order and obstacle(program.tape, own, parent) is None:
            found[name] = order
            leaves = in_order(structure, {name: order}, leaves)
    return found


def _full_masks(structure: Structure, masks: Any) -> list[np.ndarray]:
    shapes = zip(structure.mask_leaves(masks), structure.shapes, strict=True)
    return [np.broadcast_to(mask, shape) for mask, shape in shapes]


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
    structure: Structure,
    masks: Any,
    decisions: Mapping[str, Decision],
    orders: Mapping[str, Order],
    idle: Mapping[str, str],
) -> dict[str, Apart]:
    """What is masked under some units of a parent and is left, although units are in order.

    A unit under a parent is more than one entry: what masks an entry masks no unit.
    """
    leaves, found = structure.mask_leaves(masks), dict[str, Apart]()
    for name, above in sorted(_under(structure), key=lambda pair: pair[0] not in orders):
        own, parent = _leaves_of(structure, name, above)
        units = kept_under(_owned(structure, leaves, name), own, parent, entries=2)
        rows, columns = (d.kept if (d := decisions.get(n)) else slice(None) for n in (above, name))
        left = units[rows][:, columns]
        whole = left.any(axis=1, keepdims=True) & left.any(axis=0, keepdims=True)
        if above not in found and name not in found and (whole & ~left).any():
            masked = (~units[units.any(axis=1)]).sum(axis=1)
            why = idle.get(name) or obstacle(program.tape, own, parent)
            found[name] = Apart(int(masked.max()), _why_apart(above, masked, why))
    return found


def _why_apart(above: str, masked: np.ndarray, why: str | None) -> str:
    if why is not None:
        return f"its units differ under {above}, and must not: {why}"
    return (
        f"between {masked.min()} and {masked.max()} units are masked under each of {above}: "
        "equally many go"
    )


def in_order(structure: Structure, orders: dict[str, Order], leaves: list[Any]) -> list[Any]:
    """Leaves at full shapes, with what is to be removed last under each parent."""
    for order in orders.values():
        pairs = zip(leaves, structure.param_axes, strict=True)
        leaves = [reshaped(lambda x: order.apply(x, axs), leaf) for leaf, axs in pairs]  # noqa: B023
    return leaves


def decide(
    program: Program,
    structure: Structure,
    params: Any,
    masks: Any,
    semantics: str = MASKED,
    idle: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Removes candidates, then takes back those that a result would miss, until none is left.

    ``idle`` names dimensions of which nothing can go under an order for each parent, and why.
    """
    orders = find_orders(program, structure, masks, idle)
    moved = params, masks
    if orders:
        full = _full_masks(structure, masks)
        trees = (in_order(structure, orders, x) for x in (jax.tree.leaves(params), full))
        moved = tuple(jax.tree.unflatten(structure.treedef, leaves) for leaves in trees)
    planned = _decide(program, structure, *moved, semantics, orders)
    more = {n: "; ".join(d.reasons) for n in orders if (d := planned.decisions[n]).kept.all()}
    if more:  # an order without a removal would only move what the user knows at its place
        return decide(program, structure, params, masks, semantics, {**idle, **more})
    planned.apart = find_apart(program, structure, moved[1], planned.decisions, orders, idle)
    return planned


def _decide(
    program: Program,
    structure: Structure,
    params: Any,
    masks: Any,
    semantics: str,
    orders: dict[str, Order],
) -> Plan:
    """As :func:`decide`, once units are in order."""
    whole = structure.fully_kept(masks)
    decisions = {
        name: Decision(dim, ~whole[name], whole[name].copy(), ~whole[name])
        for name, dim in structure.dims.items()
        if name in orders or not whole[name].all()
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
        _explain(decision, demand)
    planned = again(program, structure.paths, decisions, zero_slices, semantics, orders)
    planned.leftovers = _leftovers(planned.demand, program, structure, masks, params)
    return planned


def _explain(decision: Decision, demand: Demand) -> None:
    """Says what becomes of the removed units' values."""
    leaf, none = axes.find(decision.dim.axis), np.zeros(decision.dim.size, bool)
    decision.carried = demand.carried.get(leaf, none) & ~decision.kept
    if not decision.kept.any():
        decision.reasons.append(GONE)
    if any(leaf in block for _, block in demand.constants.leftovers):
        decision.reasons.append(FOLDED)


def _leftovers(
    demand: Demand, program: Program, structure: Structure, masks: Any, params: Any
) -> Leftovers:
    """The removed slices that are folded, of the masked parameters."""
    leaves = jax.tree.leaves(apply_masks(params, masks)) if demand.constants.leftovers else []
    return {
        (i, names): leftover(demand, value, block, leaves[i])
        for (i, names), (value, block) in folds(demand, program, structure).items()
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


def redo(
    program: Program,
    paths: Sequence[str],
    decisions: dict[str, Decision],
    zero_slices: list[list[np.ndarray]],
    semantics: str,
    orders: dict[str, Order],
) -> Plan:
    """As :func:`again`, for decisions of which only what is kept is known: nothing is taken back.

    What doesn't hold any more stands in the plan's refusals.
    """
    for decision in decisions.values():
        decision.carried = ~decision.kept
    demand = evaluation(program, _split(decisions), zero_slices, paths, semantics)
    for decision in decisions.values():
        none = np.zeros(decision.dim.size, bool)
        decision.carried = demand.carried.get(axes.find(decision.dim.axis), none) & ~decision.kept
    if demand.refusals:
        return Plan(decisions, zero_slices, semantics, demand, orders)
    return again(program, paths, decisions, zero_slices, semantics, orders)


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
