"""The small function: traced at full size for the arguments that it is given, then walked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
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
from jaxprune.ir.tape import Value
from jaxprune.rules.registry import KEPT
from jaxprune.sharding import at_full_size
from jaxprune.structure import infer as _infer
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.parents import Obstacles

NEW_ARGUMENTS = (
    "these arguments tie or freeze a pruned dimension that the arguments given to compact left "
    "free ({why}); call compact with arguments like these"
)
OTHER_FUNCTION = (
    "this function can't be had at the cut of the compact model ({why}); leave that dimension out "
    "of the masks, or compact this function itself: jp.compact(other_fn, params, masks, *args)"
)


class SmallFunction:
    """``fn`` at small sizes; it holds no parameters.

    JAX remembers what it has traced: a later trace of the same types costs what its equations do.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        structure: Structure,
        planned: plan.Plan,
        refusal: str = NEW_ARGUMENTS,
    ):
        self.fn, self._structure, self._plan = fn, structure, planned
        self._staged = _Staged(fn, structure, planned, refusal)
        self.__name__ = getattr(fn, "__name__", "compact")

    @property
    def traced_for(self) -> Any:
        """Types of (params, args) that compact was given."""
        return self._staged.traced_for

    @traced_for.setter
    def traced_for(self, types: Any) -> None:
        self._staged.traced_for = types

    def __call__(self, small_params: Any, *args: Any) -> Any:
        closed, shape = self._stage(small_params, args)
        xs = jax.tree.leaves((small_params, args))
        results = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *xs)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    def _stage(self, params: Any, args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        check_params(self._structure, self._plan.split.view(KEPT), leaves, treedef)
        with tracing(self.fn, params, args):
            return jax.make_jaxpr(self._staged, return_shape=True)(leaves, *args)

    def check(self, params: Any, args: Any) -> None:
        """Raises what a call would raise, without computing anything."""
        self._stage(params, args)

    def stage(self, params: Any, args: Any, program: _infer.Program, demand: Demand) -> None:
        """Traces it for the arguments that it was decided for, from what that has found."""
        with self._staged.known(program, demand):
            self._stage(params, args)


class _Staged:
    """The function that JAX traces: leaves of the small parameters and the arguments -> results."""

    def __init__(
        self, fn: Callable[..., Any], structure: Structure, planned: plan.Plan, refusal: str
    ):
        self.fn, self._structure, self._plan, self._refusal = fn, structure, planned, refusal
        self.traced_for: Any = None
        self._known: _Traced | None = None  # while it is traced for what it was decided for

    def __call__(self, leaves: list[Any], *args: Any) -> Any:
        program, demand, counts, leftovers = self._known or self._trace(leaves, args)
        xs = [*leaves, *jax.tree.leaves(args)]
        ins = [(i, KEPT) for i in range(len(xs))]
        outs = [(i, KEPT) for i in range(len(program.tape.outputs))]
        results = Evaluator(demand, counts, leftovers).run(program.tape, ins, xs, outs)
        return jax.tree.unflatten(program.out_tree, results)

    @contextlib.contextmanager
    def known(self, program: _infer.Program, demand: Demand) -> Iterator[None]:
        """While a trace for the arguments of the plan may use what the plan was made by."""
        own = {leaf: leaf for leaf in (axes.find(d.axis) for d in self._structure.dims.values())}
        self._known = self._completed(program, demand, own)
        try:
            yield
        finally:
            self._known = None

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
        semantics = self._plan.semantics
        program = _infer.couple(closed, out_shape, full, args, param_axes, semantics)
        self._check_cut(program, fresh)
        demand = self._evaluation(program, self._parts(program, args, fresh))
        for dimension, index in demand.split.kept.items():
            if not len(index) and demand.evaluates(dimension):
                self._refuse(f"dimension of {dimension.size}: all of its units are gone")
        return self._completed(program, demand, fresh)

    def _completed(
        self, program: _infer.Program, demand: Demand, fresh: Mapping[Axis, Axis]
    ) -> _Traced:
        absent = self._plan.semantics == plan.KEPT_ONLY
        counts = _counts.find(program.tape, demand.split) if absent else {}
        return program, demand, counts, self._leftovers(program, demand, fresh)

    def _check_cut(self, program: _infer.Program, fresh: Mapping[Axis, Axis]) -> None:
        """Raises unless the program leaves all that was cut as free as the plan's did."""
        for old in self._plan.split.kept:
            leaf = fresh[axes.find(old)]
            why = _infer.blocked(leaf, self._plan.semantics)
            if axes.find(leaf) is not leaf or why is not None:
                self._refuse(why or "tied")
        obstacles = Obstacles(program.tape)
        for order in self._plan.orders.values():
            pair = (fresh[axes.find(axis)] for axis in (order.dimension, order.parent))
            where = obstacles.between(*pair)
            if where is not None:
                self._refuse(f"its units differ under a parent: {where}")

    def _parts(self, program: _infer.Program, args: Any, fresh: Mapping[Axis, Axis]) -> Split:
        """What is kept, and what is carried of the rest."""
        split = self._plan.split
        kept = {fresh[axes.find(old)]: index for old, index in split.kept.items()}
        if not self._is_planned(args):
            return self._needed(program, kept)
        return Split(kept, {fresh[axes.find(old)]: i for old, i in split.removed.items()})

    def _leftovers(
        self, program: _infer.Program, demand: Demand, fresh: Mapping[Axis, Axis]
    ) -> dict[Any, Any]:
        """The removed slices that this program folds, of those that the plan holds."""
        places = {value: i for i, value in enumerate(program.param_values)}
        old = {fresh[axes.find(d.axis)]: d for d in self._structure.dims.values()}
        found = {}
        for value, block in demand.constants.leftovers:
            if value not in places:
                continue
            held = self._plan.leftovers.get((places[value], frozenset(old[d].name for d in block)))
            there = self._plan.split.view(frozenset(axes.find(old[d].axis) for d in block))
            now = demand.split.view(block)
            found[value, block] = self._moved(places[value], value, held, there, now)
        return found

    def _moved(self, i: int, value: Value, held: Any, there: View, now: View) -> Any:
        """Removed slices of a leaf, where a program carries other units than the plan's did."""
        for k, (old, new) in enumerate(zip(self._structure.param_axes[i], value.axes)):
            has, needs = there.index(old), now.index(new)
            unknown = needs[~np.isin(needs, has)]
            if held is None or not self._plan.zero_slices[i][k][unknown].all():
                path = self._structure.paths[i]
                self._refuse(f"it needs the removed part of {path}, which is not zero")
            if not np.array_equal(has, needs):
                held = _placed(held, k, has, needs, old.size)
        return held

    def _is_planned(self, args: Any) -> bool:
        """Whether the plan was made for a program of these arguments: it knows what is carried."""
        if self.traced_for is None:
            return False
        return _types(args) == _types(self.traced_for[1])

    def _needed(self, program: _infer.Program, kept: dict[Axis, np.ndarray]) -> Split:
        """What this program needs of removed units, which may be more than the planned one did."""
        gone = {dim: np.setdiff1d(np.arange(dim.size), index) for dim, index in kept.items()}
        found = self._evaluation(program, Split(kept, gone)).carried
        none = np.zeros(0, int)
        carried = {d: np.flatnonzero(found[d]) if d in found else none for d in kept}
        return Split(kept, {d: np.intersect1d(carried[d], gone[d]) for d in kept})

    def _evaluation(self, program: _infer.Program, split: Split) -> Demand:
        """What has to be evaluated; an error where units can't be removed after all."""
        demand = plan.evaluation(
            program, split, self._plan.zero_slices, self._structure.paths, self._plan.semantics
        )
        for dimension, _, why in demand.refusals:
            self._refuse(f"dimension of {dimension.size}: {why}")
        return demand

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(self._refusal.format(why=why))


_Traced = tuple[_infer.Program, Demand, _counts.Counts, dict[Any, Any]]


def _placed(array: Any, k: int, has: np.ndarray, needs: np.ndarray, size: int) -> Any:
    """The slices at the positions ``needs`` along an axis, zeros where the array has none."""
    at = np.full(size, len(has))
    at[has] = np.arange(len(has))
    return jnp.take(array, at[needs], axis=k, mode="fill", fill_value=0)


def _types(args: Any) -> Any:
    leaves = jax.tree.leaves(args)
    return jax.tree.structure(args), [(np.shape(x), jnp.result_type(x)) for x in leaves]


def check_params(structure: Structure, view: View, leaves: list[Any], treedef: Any) -> None:
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
