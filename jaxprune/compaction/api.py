"""The same function at smaller dense shapes, equal to the masked model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction import certificate as _certificate
from jaxprune.compaction import counts as _counts
from jaxprune.compaction import placing, plan, symbolic
from jaxprune.compaction.blocks import Split, View
from jaxprune.compaction.certificate import Certificate
from jaxprune.compaction.demand import Demand
from jaxprune.compaction.evaluate import Evaluator
from jaxprune.costs.api import cost
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import holds_tracers
from jaxprune.masks import apply_masks
from jaxprune.rules.registry import KEPT
from jaxprune.sharding import at_full_size, explicit_mesh, reshaped
from jaxprune.structure import infer as _infer
from jaxprune.structure.parents import obstacle
from jaxprune.structure.structure import Structure, from_program
from jaxprune.typing import path_str


@dataclass(frozen=True, eq=False)
class Compact:
    """A smaller function and its parameters.

    Attributes:
      fn: ``fn(params, *args)`` at the small sizes; jit, grad and vmap work on it.
      params: the kept slices of the masked parameters, in the same tree.
      certificate: why it equals the masked model, or which units had to stay.
      keep: dimension name -> which units are in: a vector, or a matrix with a row for each unit
        of a parent where they differ (per scanned layer, per head).
    """

    fn: Callable[..., Any]
    params: Any
    certificate: Certificate
    keep: dict[str, np.ndarray]
    _structure: Structure = field(repr=False)
    _plan: plan.Plan = field(repr=False)

    @property
    def _view(self) -> View:
        return self._plan.split.view(KEPT)

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
        small = [x if i is None else self._slice(x, i) for x, i in zip(leaves, places, strict=True)]
        return jax.tree.unflatten(treedef, small)

    def restrict_masked(self, params: Any, masks: Any) -> Any:
        """``restrict(apply_masks(params, masks))`` without a masked copy at full size."""
        small = jax.tree.leaves(self.restrict(params))
        shapes = zip(self._structure.mask_leaves(masks), self._structure.shapes, strict=True)
        rest = [self._slice(np.broadcast_to(m, shape), i) for i, (m, shape) in enumerate(shapes)]
        leaves = [x if m.all() else _masked(x, m) for x, m in zip(small, rest, strict=True)]
        return jax.tree.unflatten(self._structure.treedef, leaves)

    def restrict_outputs(self, outputs: Any) -> Any:
        """Slices the results that are updated parameters; others are full size already."""
        leaves, treedef = jax.tree.flatten(outputs)
        known = list(zip(self._structure.paths, self._structure.shapes, strict=True))
        given = list(zip(_infer.paths_of(outputs), map(np.shape, leaves), strict=True))
        index = self._structure.paths.index
        small = [
            leaf if name is None else self._slice(leaf, index(name))
            for leaf, name in zip(leaves, _infer.followed(given, known), strict=True)
        ]
        return jax.tree.unflatten(treedef, small)

    def _slice(self, leaf: Any, i: int) -> Any:
        """The kept slices; axes along which the leaf repeats stay as they are."""
        axs, shape = self._structure.param_axes[i], self._structure.shapes[i]

        def cut(leaf: Any) -> Any:
            if np.shape(leaf) != shape and self._plan.orders:
                leaf = jnp.broadcast_to(leaf, shape)
            for order in self._plan.orders.values():
                leaf = order.apply(leaf, axs)
            for k, axis in enumerate(axs):
                if self._view.size(axis) != axis.size and np.shape(leaf)[k] == axis.size:
                    leaf = leaf.take(self._view.index(axis), axis=k)
            return leaf

        return reshaped(cut, leaf)

    def expand(self, params: Any) -> Any:
        """Scatters small parameters back to full shapes, zeros where units were removed.

        Raises:
          ValueError: for a tree of another structure or a leaf of another shape.
        """
        leaves, treedef = jax.tree.flatten(params)
        if treedef != self._structure.treedef:
            raise ValueError(
                f"expand got the structure {treedef}, wanted {self._structure.treedef}: a tree "
                "like small.params"
            )
        return jax.tree.unflatten(treedef, [self._grow(x, i) for i, x in enumerate(leaves)])

    def _grow(self, leaf: Any, i: int) -> Any:
        axs = self._structure.param_axes[i]
        if np.shape(leaf) != self._view.shape(axs):
            raise ValueError(
                f"expand got shape {np.shape(leaf)} for {self._structure.paths[i]}, wanted "
                f"{self._view.shape(axs)}"
            )
        if self._view.shape(axs) == self._structure.shapes[i]:
            return leaf
        index = np.ix_(*(self._view.index(a) for a in axs))

        def grow(leaf: Any) -> Any:
            full = jnp.zeros(self._structure.shapes[i], leaf.dtype).at[index].set(leaf)
            for order in reversed(self._plan.orders.values()):
                full = order.apply(full, axs, back=True)
            return full

        return reshaped(grow, leaf, self._structure.layouts[i])


def compact(
    fn: Callable[..., Any], params: Any, masks: Any, *args: Any, semantics: str = plan.MASKED
) -> Compact:
    """Evaluates ``fn`` at the smaller dense shapes that the masks leave, provably equal.

    The reference is the masked model ``fn(apply_masks(params, masks), *args)``. A unit of a
    dimension is a candidate when some slot masks all of it; it is removed when its masked value
    is zero, or meets masked weights, wherever the program mixes its dimension. Other candidates
    stay dense, and the certificate says why.

    Args:
      fn: a pure function of ``(params, *args)``.
      params: any pytree of arrays.
      masks: a tree like params, True = kept.
      *args: example arguments, arrays or ``jax.ShapeDtypeStruct``. The result works for every
        batch size and length that ``fn`` takes.
      semantics: "masked" equals the masked model. "kept" is for models that will be trained on:
        removed units count as not there, whatever their values, and means and variances over a
        cut axis divide by what is left, as in a module written at the small size. Other constants
        stay, the square root of the head size in attention among them.

    Returns:
      A :class:`Compact` with ``fn``, ``params``, ``certificate``, ``restrict`` and ``expand``.

    Raises:
      TypeError: for params that are shapes only.
      ValueError: for masks that do not fit params, or semantics of another name.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> masks = structure.masks({"up:1": jnp.arange(8) < 2})
      >>> small = jp.compact(fn, params, masks, x)
      >>> small.params["up"].shape, small.params["down"].shape
      ((3, 2), (2, 2))
      >>> bool(jnp.allclose(small.fn(small.params, x), fn(jp.apply_masks(params, masks), x)))
      True
    """
    if semantics not in (plan.MASKED, plan.KEPT_ONLY):
        raise ValueError(f'semantics is {semantics!r}; wanted "masked" or "kept"')
    _check_arrays(params)
    (program,) = _infer.infer([(fn, args)], params)
    structure = from_program(program, params)
    structure.mask_leaves(masks)  # errors first
    planned = plan.decide(program, structure, params, masks, semantics)
    return assemble(fn, structure, planned, args, (params, masks))


def _check_arrays(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"compact slices arrays, and {path_str(path)} is a shape only, {leaf}; pass "
                "arrays, where values don't matter zeros: "
                "jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)"
            )


def assemble(
    fn: Callable[..., Any],
    structure: Structure,
    planned: plan.Plan,
    args: Any,
    source: tuple[Any, Any] | None = None,
    params: Any = None,
    full: Any = None,
) -> Compact:
    """A compact model from its plan and from what its parameters are cut of: (params, masks).

    Without a source, ``params`` are small already, ``full`` has the types of the full ones, and
    the masked model is the expansion.
    """

    def masked() -> Any:
        return apply_masks(*source) if source else small.expand(small.params)

    def compare(seed: int, i: int) -> float:
        if planned.semantics == plan.KEPT_ONLY:
            raise ValueError(_certificate.NOT_COMPARABLE)
        return _certificate.compare(fn, masked(), small, args, seed, i)

    def overhead() -> float:
        without = dataclasses.replace(planned, semantics=plan.KEPT_ONLY)
        functions = small.fn, _SmallFunction(fn, structure, without)
        ours, bare = (cost(f, small.params, *args).flops for f in functions)
        return ours / max(bare, 1)

    decisions = planned.decisions
    keep = {
        name: planned.kept(name) if name in decisions else np.ones(dim.size, bool)
        for name, dim in structure.dims.items()
    }
    certificate = _certificate.of_plan(planned, structure, compare, overhead)
    function = _SmallFunction(fn, structure, planned)
    function._traced_for = jax.eval_shape(lambda *tree: tree, source[0] if source else full, args)
    small = Compact(function, params, certificate, keep, structure, planned)
    if source:
        object.__setattr__(small, "params", small.restrict_masked(*source))
    return small


def _masked(leaf: Any, mask: np.ndarray) -> Any:
    """Zeros where the mask is False; an array of the kind that it was given."""
    if isinstance(leaf, np.ndarray):
        return np.where(mask, leaf, np.zeros_like(leaf))
    return apply_masks(leaf, mask)


class _SmallFunction:
    """The function at small sizes: traced at full size for the arguments' shapes, then walked."""

    def __init__(self, fn: Callable[..., Any], structure: Structure, planned: plan.Plan):
        self._fn, self._structure, self._plan = fn, structure, planned
        self._known: dict[Any, _Traced] = {}
        self._traced_for: Any = None  # types of (params, args) that compact was given
        self.__name__ = getattr(fn, "__name__", "compact")

    def __call__(self, small_params: Any, *args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(small_params)
        _check_params(self._structure, self._plan.split.view(KEPT), leaves, treedef)
        program, demand, counts, leftovers = self._traced(leaves, args)
        xs = [*leaves, *jax.tree.leaves(args)]
        ins = [(i, KEPT) for i in range(len(xs))]
        outs = [(i, KEPT) for i in range(len(program.tape.outputs))]
        results = Evaluator(demand, counts, leftovers).run(program.tape, ins, xs, outs)
        return jax.tree.unflatten(program.out_tree, results)

    def _traced(self, leaves: list[Any], args: Any) -> _Traced:
        """Eager calls remember their traces; a trace inside a trace may hold its tracers."""
        inputs, treedef = jax.tree.flatten((leaves, args))
        if any(isinstance(x, jax.core.Tracer) for x in inputs):
            return self._trace(leaves, args)
        key = treedef, tuple(map(_signature, inputs))
        if key not in self._known:
            traced = self._trace(leaves, args)
            if holds_tracers(traced[0].tape):
                return traced
            self._known[key] = traced
        return self._known[key]

    def _trace(self, leaves: list[Any], args: Any) -> _Traced:
        full = self._full(leaves)
        closed, out_shape = jax.make_jaxpr(self._fn, return_shape=True)(full, *args)
        if not symbolic.has_names(jax.tree.leaves(args)):
            return self._decide(closed, out_shape, full, args)
        numbers = symbolic.Numbers(closed, args)
        traced = self._decide(numbers.closed, out_shape, full, numbers.args)
        numbers.give_names(traced[0].tape)
        return traced

    def _full(self, leaves: list[Any]) -> Any:
        """The types of the parameters at their full shapes."""
        rows = zip(self._structure.shapes, self._structure.layouts, leaves, strict=True)
        full = [
            jax.ShapeDtypeStruct(shape, jax.typeof(x).dtype, sharding=at_full_size(x, was, shape))
            for shape, was, x in rows
        ]
        return jax.tree.unflatten(self._structure.treedef, full)

    def _decide(self, closed: Any, out_shape: Any, full: Any, args: Any) -> _Traced:
        param_axes, fresh = _infer.copy_axes(self._structure.param_axes)
        program = _infer.couple(closed, out_shape, full, args, param_axes)
        split = self._plan.split
        for old in split.kept:
            _check_still_free(fresh[axes.find(old)])
        for order in self._plan.orders.values():
            pair = (fresh[axes.find(axis)] for axis in (order.dimension, order.parent))
            where = obstacle(program.tape, *pair)
            if where is not None:
                why = f"its units differ under a parent: {where}"
                raise ValueError(_NEW_ARGUMENTS.format(why=why))
        demand = plan.evaluation(
            program,
            Split(
                {fresh[axes.find(old)]: index for old, index in split.kept.items()},
                {fresh[axes.find(old)]: index for old, index in split.removed.items()},
            ),
            self._plan.zero_slices,
            self._structure.paths,
            self._plan.semantics,
        )
        for dimension, _, why in demand.refusals:
            raise ValueError(_NEW_ARGUMENTS.format(why=f"dimension of {dimension.size}: {why}"))
        absent = self._plan.semantics == plan.KEPT_ONLY
        counts = _counts.find(program.tape, demand.split) if absent else {}
        axis = {name: fresh[axes.find(d.axis)] for name, d in self._structure.dims.items()}
        leftovers = {
            (program.param_values[i], frozenset(axis[name] for name in names)): array
            for (i, names), array in self._plan.leftovers.items()
        }
        return program, demand, counts, leftovers


_Traced = tuple[_infer.Program, Demand, _counts.Counts, dict[Any, Any]]
_NEW_ARGUMENTS = (
    "these arguments tie or freeze a pruned dimension that the arguments given to compact left "
    "free ({why}); call compact with arguments like these"
)


def _check_still_free(leaf: Axis) -> None:
    if axes.find(leaf) is not leaf or leaf.reasons:
        raise ValueError(_NEW_ARGUMENTS.format(why="; ".join(map(str, leaf.reasons)) or "tied"))


def _signature(x: Any) -> Any:
    aval = jax.typeof(x)
    lies = getattr(aval, "sharding", None) if explicit_mesh(x) else None
    return aval.shape, aval.dtype, getattr(aval, "weak_type", False), lies


def _check_params(structure: Structure, view: View, leaves: list[Any], treedef: Any) -> None:
    if treedef != structure.treedef:
        raise ValueError(
            f"the compact function got params of structure {treedef}, wanted {structure.treedef}; "
            "pass small.params, or small.restrict(tree)"
        )
    for path, axs, leaf in zip(structure.paths, structure.param_axes, leaves, strict=True):
        if np.shape(leaf) != view.shape(axs):
            raise ValueError(
                f"the compact function got shape {np.shape(leaf)} for {path}, wanted "
                f"{view.shape(axs)}; pass small.params, or small.restrict(tree)"
            )
