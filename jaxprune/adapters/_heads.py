"""Attention of the user's own code: the root of the head size that it divides by, folded.

A program that divides by the root of the head size that it sees divides by less once heads are
smaller, while the compact function keeps the number. The query takes the rest: it is multiplied by
sqrt(small / full), in whichever leaves it is made. (The key would do as well.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction.blocks import View
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.structure.dimensions import Dimension
from jaxprune.structure.labels import module_of
from jaxprune.typing import Compact

HEAD_SIZE = ("head size", "head size (pairs)")  # how labels of such dimensions end


def folded(small: Compact, scaling: Sequence[str]) -> Any:
    """The small parameters with the scales of all head sizes folded; None where there are none.

    ``scaling``: paths of the layers whose rows do that already.
    """
    factors: dict[int, Any] = {}
    for name, dim in small._structure.dims.items():
        inside = any(
            slot.path.startswith(f"{p}/" if p else "") for p in scaling for slot in dim.slots
        )
        if dim.label.endswith(HEAD_SIZE) and not small.keep[name].all() and not inside:
            factors |= _factors(small, dim, int(small.keep[name].sum(-1).max()))
    if not factors:
        return None
    leaves, treedef = jax.tree.flatten(small.params)
    for i, factor in factors.items():
        leaves[i] = (leaves[i] * jnp.asarray(factor, leaves[i].dtype)).astype(leaves[i].dtype)
    return jax.tree.unflatten(treedef, leaves)


def _factors(small: Compact, dim: Dimension, left: int) -> dict[int, Any]:
    """Leaf -> what multiplies it, of one of the two projections that a head size is matched in.

    That is a part of a fused kernel where there is one, else the one of the fewest axes: the scale
    of a norm of the query rather than the kernel before it.
    """
    structure, view = small._structure, small._cut.view
    groups: dict[str, dict[int, np.ndarray]] = {}
    for i in structure.owners(dim.name):
        axs = structure.param_axes[i]
        for k, axis in enumerate(axs):
            if axes.find(dim.axis) in axes.leaves(axis):
                marks = _query(axis, axes.find(dim.axis), view)
                line = marks.reshape([-1 if k == j else 1 for j in range(len(axs))])
                groups.setdefault(module_of(structure.paths[i]), {})[i] = line
    fused = {m: not all(line.all() for line in group.values()) for m, group in groups.items()}
    rank = {m: max(line.ndim for line in group.values()) for m, group in groups.items()}
    chosen = min(groups, key=lambda m: (not fused[m], rank[m]))
    scale = math.sqrt(left / dim.size)
    return {i: np.where(line, scale, 1.0) for i, line in groups[chosen].items()}


def _query(axis: Axis, dim: Axis, view: View) -> np.ndarray:
    """Which positions are the query's: the first of the parts, or of three, that hold a head."""
    axis = axes.find(axis)
    if axis.kind is axes.SUM:
        parts, found = [], False
        for part in axes.parts(axis):
            holds = not found and dim in axes.leaves(part)
            parts.append(_query(part, dim, view) if holds else np.zeros(view.size(part), bool))
            found = found or holds
        return np.concatenate(parts)
    if axis.kind is not axes.PROD:
        return np.ones(view.size(axis), bool)
    marks = np.ones(1, bool)
    for factor in axes.factors(axis):
        if dim in axes.leaves(factor):
            line = _query(factor, dim, view)
        else:
            line = np.ones(view.size(factor), bool)
            line[1:] = factor.size != 3  # query, key and value side by side
        marks = (marks[:, None] & line).reshape(-1)
    return marks
