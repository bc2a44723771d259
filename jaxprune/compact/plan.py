"""Deciding, per unit, whether its removal is provably the masked model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.jaxpr.tape import concrete
from jaxprune.rules import calls, zeros
from jaxprune.rules.zeros import Zeros
from jaxprune.structure.infer import Program
from jaxprune.structure.structure import Dimension, Structure


@dataclass
class Decision:
    """What happens to one dimension."""

    dim: Dimension
    candidates: np.ndarray  # units that some slot has masked away
    kept: np.ndarray  # units that stay in the compact model
    reasons: list[str] = field(default_factory=list)  # why candidates stay


def decide(program: Program, structure: Structure, params: Any, masks: Any) -> dict[str, Decision]:
    """Removes the candidates that contribute nothing wherever their dimension is mixed."""
    whole = structure.fully_kept(masks)
    decisions = {
        name: Decision(dim, ~whole[name], whole[name].copy())
        for name, dim in structure.dims.items()
        if not whole[name].all()
    }
    for decision in decisions.values():
        if decision.dim.frozen:
            _stay(decision, np.ones(decision.dim.size, bool), decision.dim.frozen)
    _refuse_contributors(program, decisions, _known_params(structure, params, masks))
    for decision in decisions.values():
        if not decision.kept.any():
            first = np.arange(decision.dim.size) == 0
            _stay(
                decision, first, "all units are masked; one (of zeros) stays so that none is empty"
            )
    return decisions


def _stay(decision: Decision, units: np.ndarray, why: str) -> None:
    back = units & ~decision.kept
    if back.any():
        decision.kept |= back
        if why not in decision.reasons:
            decision.reasons.append(why)


def _known_params(structure: Structure, params: Any, masks: Any) -> list[Zeros]:
    """Zero slices of the masked parameters, by mask and by value where the value is at hand."""
    known = []
    for mask, leaf, shape in zip(
        structure.mask_leaves(masks), jax.tree.leaves(params), structure.shapes, strict=True
    ):
        alive = np.broadcast_to(mask, shape)
        array = concrete(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else None
        known.append(zeros.of_array(alive if array is None else alive & (array != 0)))
    return known


def _refuse_contributors(
    program: Program, decisions: dict[str, Decision], known: list[Zeros]
) -> None:
    """Keeps units whose removed values would reach a result."""
    by_leaf: dict[Axis, Decision] = {d.dim.axis: d for d in decisions.values()}
    inputs = program.tape.inputs
    others = [zeros.unknown(value.shape) for value in inputs[len(known) :]]
    for step, mix in calls.run_zeros(program.tape, [*known, *others])[1]:
        for leaf in {leaf for leaf in axes.leaves(mix.axis) if leaf in by_leaf}:
            for units in axes.units_along(mix.axis, leaf):
                dirty = np.zeros(leaf.size, bool)
                dirty[units[(units >= 0) & ~mix.zero]] = True
                why = f"its masked value is not zero where {step.name} at {step.where} reads it"
                _stay(by_leaf[leaf], dirty, why)
