"""A compact model: the small function, its parameters, and how trees are cut like them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxprune._trees import difference
from jaxprune.compaction import placing
from jaxprune.compaction.certificate import Certificate
from jaxprune.compaction.cut import Cut
from jaxprune.compaction.masked import Masked
from jaxprune.compaction.plan import Plan
from jaxprune.structure.dimensions import Structure


@dataclass(frozen=True, eq=False)
class Compact:
    """A smaller function and its parameters.

    Attributes:
      fn: ``fn(params, *args)`` at the small sizes; jit, grad and vmap work on it.
      params: the kept slices of the masked parameters, in the same tree.
      certificate: why it equals the masked model, or which units had to stay.
      keep: dimension name -> which units are in: a vector, or a matrix with a row for each unit
        of a parent where they differ (per scanned layer, per head).

    It holds no parameters of the full size. ``copy`` and ``pickle`` take it, as far as they take
    ``fn``: what was traced is left out, and made again when it is needed.
    """

    fn: Callable[..., Any]
    params: Any
    certificate: Certificate
    keep: dict[str, np.ndarray]
    _structure: Structure = field(repr=False)
    _plan: Plan = field(repr=False)

    @property
    def _cut(self) -> Cut:
        return Cut(self._structure, self._plan)

    def restrict(self, tree: Any) -> Any:
        """Slices any tree shaped like params, or one that holds such trees (optimizer states).

        A leaf is sliced when it stands where a parameter does: in a tree of params' structure, or
        under a path that ends with the parameter's. Its shape is then the parameter's, with 1 for
        axes that it lacks. Single numbers pass, and so do leaves that belong to no parameter.

        Raises:
          ValueError: for a leaf that belongs to a parameter and has another shape, such as
            factored moments, accumulators per axis, or all parameters in one vector; names it.
        """
        structure = self._structure
        places = placing.places(tree, structure.treedef, structure.paths, structure.shapes)
        leaves, treedef = jax.tree.flatten(tree)
        small = [
            x if i is None else self._cut.slice(x, i) for x, i in zip(leaves, places, strict=True)
        ]
        return jax.tree.unflatten(treedef, small)

    def restrict_masked(self, params: Any, masks: Any) -> Any:
        """``restrict(apply_masks(params, masks))`` without a masked copy at full size."""
        self._structure.check_params(params)
        return self._cut.masked(Masked.of(self._structure, params, masks))

    def restrict_outputs(self, outputs: Any) -> Any:
        """Slices the results that are updated parameters; others are full size already."""
        return self._cut.outputs(outputs)

    def expand(self, params: Any) -> Any:
        """Scatters small parameters back to full shapes, zeros where units were removed.

        Raises:
          ValueError: for a tree of another structure or a leaf of another shape.
        """
        leaves, treedef = jax.tree.flatten(params)
        if treedef != self._structure.treedef:
            raise ValueError(
                f"expand got another structure than small.params: the tree "
                f"{difference(treedef, self._structure.treedef)}"
            )
        return jax.tree.unflatten(treedef, [self._cut.grow(x, i) for i, x in enumerate(leaves)])
