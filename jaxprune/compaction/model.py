"""A compact model: the small function, its parameters, and how trees are cut like them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxprune._trees import difference
from jaxprune.compaction import placing
from jaxprune.compaction.certificate import Certificate
from jaxprune.compaction.cut import Cut
from jaxprune.compaction.masked import Masked
from jaxprune.compaction.plan import Plan
from jaxprune.compaction.small_function import OTHER_FUNCTION, SmallFunction, check_params
from jaxprune.ir import axes
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
      recovery: what ``jp.recover`` did, or None.

    It holds no parameters of the full size. ``copy`` and ``pickle`` take it, as far as they take
    ``fn``: what was traced is left out, and made again when it is needed.
    """

    fn: Callable[..., Any]
    params: Any
    certificate: Certificate
    keep: dict[str, np.ndarray]
    _structure: Structure = field(repr=False)
    _plan: Plan = field(repr=False)
    recovery: Any = None

    @property
    def _cut(self) -> Cut:
        return Cut(self._structure, self._plan)

    @property
    def masks(self) -> Any:
        """Masks at the full shapes, True for what is in the small parameters; a tree like params.

        They are of whole units: entries that were masked within a kept unit are True.
        """
        names = {axes.find(dim.axis): name for name, dim in self._structure.dims.items()}
        orders = self._plan.orders
        above = {name: names[axes.find(order.parent)] for name, order in orders.items()}
        return self._structure.masks_of(
            {name: {above[name]: kept} if name in above else kept for name, kept in self._cuts()}
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Label of each dimension -> units that are in, for a configuration of the model.

        A dimension goes by its name where others have the same label.
        """
        dims = self._structure.dims
        often = Counter(dim.label for dim in dims.values())
        return {
            dim.label if dim.label and often[dim.label] == 1 else name: self._size(name)
            for name, dim in dims.items()
        }

    def _size(self, name: str) -> int:
        return int(self.keep[name].sum(-1).max())

    def _cuts(self) -> Iterator[tuple[str, np.ndarray]]:
        """The dimensions that lose units."""
        return ((name, kept) for name, kept in self.keep.items() if not kept.all())

    def cut(self, fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        """Another function of the same parameters at the same cut.

        For a training step of the small model: the loss, train mode with dropout and mutable
        statistics, a decode step with its cache. It is traced once for ``args``, without computing
        anything, so that what can't be had is told here.

        Args:
          fn: a pure function of ``(params, *args)``, where params are those of the full size.
          *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.

        Returns:
          A function of ``(small.params, *args)``. It equals ``fn`` at the masked parameters, by
          the semantics that the model was compacted with. Results that are updated parameters
          (running statistics) have the small shapes.

        Raises:
          ValueError: where ``fn`` ties or freezes a dimension that was cut, or needs values of
            removed units; it says which and why.

        Example:
          >>> import jax, jax.numpy as jnp, jaxprune as jp
          >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
          >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
          >>> x, y = jnp.ones((1, 3)), jnp.ones((1, 2))
          >>> structure = jp.infer_structure(fn, params, x)
          >>> small = jp.compact(fn, params, structure.masks({"up:1": jnp.arange(8) < 2}), x)
          >>> loss = small.cut(lambda p, x, y: jnp.mean((fn(p, x) - y) ** 2), x, y)
          >>> jax.grad(loss)(small.params, x, y)["up"].shape
          (3, 2)
        """
        function = SmallFunction(fn, self._structure, self._plan, OTHER_FUNCTION)
        function.check(self.params, args)
        return function

    def replace(self, params: Any) -> Compact:
        """The same model with other parameters of the small shapes, tuned ones.

        The certificate stays: it tells why the function equals the masked one at this cut, and its
        ``check`` compares both at the parameters that ``jp.compact`` was given.

        Args:
          params: a tree like ``small.params``; types may differ.

        Raises:
          ValueError: for a tree of another structure or a leaf of another shape.

        Example:
          >>> import jax, jax.numpy as jnp, jaxprune as jp
          >>> params = {"w": jnp.ones((3, 8)), "v": jnp.ones((8, 2))}
          >>> fn = lambda p, x: x @ p["w"] @ p["v"]
          >>> masks = {"w": jnp.arange(8) < 2, "v": True}
          >>> small = jp.compact(fn, params, masks, jnp.ones((1, 3)))
          >>> tuned = small.replace(jax.tree.map(lambda w: w / 2, small.params))
          >>> tuned.fn(tuned.params, jnp.ones((1, 3)))
          Array([[1.5, 1.5]], dtype=float32)
        """
        leaves, treedef = jax.tree.flatten(params)
        check_params(self._structure, self._cut.view, leaves, treedef)
        return replace(self, params=params)

    def restrict(self, tree: Any) -> Any:
        """Slices any tree shaped like params, or one that holds such trees (optimizer states).

        A leaf is sliced when it stands where a parameter does: in a tree of params' structure, or
        under a path that ends with the parameter's. Its shape is then the parameter's, with 1 for
        axes that it lacks. Single numbers pass, and so do leaves that belong to no parameter.

        Raises:
          ValueError: for a leaf that belongs to a parameter and has another shape, such as
            factored moments, accumulators per axis, or all parameters in one vector; names it.
        """
        structure, cut = self._structure, self._cut
        places = placing.places(tree, structure.treedef, structure.paths, structure.shapes)
        leaves, treedef = jax.tree.flatten(tree)
        small = [x if i is None else cut.slice(x, i) for x, i in zip(leaves, places, strict=True)]
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
        cut = self._cut
        small = [cut.grow(x, i) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(treedef, small)
