"""Attention of the user's own code: the root of the head size that it divides by, folded.

A program that divides by the root of the head size that it sees divides by less once heads are
smaller, while the compact function keeps the number. The query takes the rest: it is multiplied by
sqrt(small / full), in whichever leaves it is made. (The key would do as well.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction.blocks import View
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.structure.dimensions import Dimension
from jaxprune.structure.labels import module_of
from jaxprune.typing import Compact

PAIRS = "head size (pairs)"
HEAD_SIZE = ("head size", PAIRS)  # how labels of such dimensions end


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
    of a norm of the query rather than the kernel before it. Tables of positions, which have no
    heads, come last; where they make several attentions share a head size, each has its factors.
    """
    structure, view, own = small._structure, small._cut.view, axes.find(dim.axis)
    free = {axes.find(d.axis) for d in structure.dims.values() if not d.frozen}
    query = _Query(own, view, dim.label.endswith(PAIRS), free)
    groups: dict[str, dict[int, np.ndarray]] = {}
    heads: dict[str, set[Axis]] = {}  # what stands beside the head size
    for i in structure.owners(dim.name):
        axs = structure.param_axes[i]
        for k, axis in enumerate(axs):
            if own in (inside := {axes.find(leaf) for leaf in axes.leaves(axis)}):
                line = query.marks(axis).reshape([-1 if k == j else 1 for j in range(len(axs))])
                module = module_of(structure.paths[i])
                groups.setdefault(module, {})[i] = line
                heads.setdefault(module, set()).update(inside - {own})
    fused = {m: not all(line.all() for line in group.values()) for m, group in groups.items()}
    rank = {m: max(line.ndim for line in group.values()) for m, group in groups.items()}
    several = _sharing(heads)
    chosen = [
        min(modules, key=lambda m: (not fused[m], rank[m], not heads[m]))
        for modules in (several if len(several) > 1 else [list(groups)])
    ]
    scale = math.sqrt(left / dim.size)
    return {i: np.where(line, scale, 1.0) for m in chosen for i, line in groups[m].items()}


def _sharing(heads: dict[str, set[Axis]]) -> list[list[str]]:
    """The modules that have heads, together where they share some: one list for each attention."""
    found: list[list[str]] = []
    for module, own in heads.items():
        joined = [ms for ms in found if any(heads[m] & own for m in ms)]
        rest = [ms for ms in found if ms not in joined]
        found = [*rest, [*(m for ms in joined for m in ms), module]] if own else found
    return found


class _Query(NamedTuple):
    """Tells which positions of an axis are the query's, where it holds a head size.

    Attributes:
      dim: the head size.
      view: sizes before and after.
      paired: whether rotary positions pair two parts that make up one head.
      free: dimensions that may be pruned, such as three heads: they are no query, key and value.
    """

    dim: Axis
    view: View
    paired: bool
    free: set[Axis]

    def marks(self, axis: Axis) -> np.ndarray:
        """The first of the parts, or of three, that hold a head."""
        axis = axes.find(axis)
        if axis.kind is axes.SUM:
            return np.concatenate(self._of_parts([axes.find(p) for p in axes.parts(axis)]))
        if axis.kind is not axes.PROD:
            return np.ones(self.view.size(axis), bool)
        marks = np.ones(1, bool)
        for factor in map(axes.find, axes.factors(axis)):
            if self.dim in axes.leaves(factor):
                line = self.marks(factor)
            else:
                line = np.ones(self.view.size(factor), bool)
                line[1:] = factor.size != 3 or factor in self.free  # else query, key and value
            marks = (marks[:, None] & line).reshape(-1)
        return marks

    def _of_parts(self, parts: list[Axis]) -> list[np.ndarray]:
        if self.paired and parts == [self.dim, self.dim]:
            return [np.ones(self.view.size(part), bool) for part in parts]
        first = next((k for k, p in enumerate(parts) if self.dim in axes.leaves(p)), None)
        return [self.marks(p) if k == first else self._none(p) for k, p in enumerate(parts)]

    def _none(self, axis: Axis) -> np.ndarray:
        return np.zeros(self.view.size(axis), bool)
