"""The small function: traced at full size for the arguments that it is given, then walked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune._calls import tracing
from jaxprune._trees import difference
from jaxprune.compaction import counts as _counts
from jaxprune.compaction import plan, symbolic
from jaxprune.compaction.blocks import Split, View
from jaxprune.compaction.demand import Demand
from jaxprune.compaction.evaluate import Evaluator
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import holds_tracers
from jaxprune.rules.registry import KEPT
from jaxprune.sharding import at_full_size, explicit_mesh
from jaxprune.structure import infer as _infer
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.parents import obstacle

MOST_TRACES = 64  # Eager calls remember so many traces, the latest ones.


class SmallFunction:
    """``fn`` at small sizes; it holds no parameters."""

    def __init__(self, fn: Callable[..., Any], structure: Structure, planned: plan.Plan):
        self.fn, self._structure, self._plan = fn, structure, planned
        self._known: OrderedDict[Any, _Traced] = OrderedDict()  # latest last
        self.traced_for: Any = None  # types of (params, args) that compact was given
        self.__name__ = getattr(fn, "__name__", "compact")

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the traces, which are made again when they are needed."""
        return vars(self) | {"_known": OrderedDict()}

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
            if len(self._known) > MOST_TRACES:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _trace(self, leaves: list[Any], args: Any) -> _Traced:
        full = self._full(leaves)
        with tracing(self.fn, full, args):
            closed, out_shape = jax.make_jaxpr(self.fn, return_shape=True)(full, *args)
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
            "the compact function got params of another structure: the tree "
            f"{difference(treedef, structure.treedef)}; pass small.params, or small.restrict(tree)"
        )
    for path, axs, leaf in zip(structure.paths, structure.param_axes, leaves, strict=True):
        if np.shape(leaf) != view.shape(axs):
            raise ValueError(
                f"the compact function got shape {np.shape(leaf)} for {path}, wanted "
                f"{view.shape(axs)}; pass small.params, or small.restrict(tree)"
            )
