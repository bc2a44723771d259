"""What counts of dimensions cost and keep, as tables for the solver."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.budget import operations
from jaxprune.budget.latency import LatencyTable, Progress, name_of, time_operation
from jaxprune.budget.operations import Operation, bypassed, grid
from jaxprune.budget.roofline import Device
from jaxprune.budget.solver import Problem, Term, Total, merged
from jaxprune.cost import cost
from jaxprune.jaxpr.tape import Step
from jaxprune.structure import infer
from jaxprune.structure.structure import Structure

CANDIDATES = 24  # of one dimension, at most
TIMED = {0: 1, 1: 5, 2: 5, 3: 3}  # widths per dimension at which an operation of so many is timed
TIMED_MANY = 2


@dataclass(eq=False)
class Model:
    """A program's costs over the counts of its chosen dimensions.

    Attributes:
      names: the chosen dimensions.
      axes: their axes in the program.
      counts: for each the counts that may be kept, ascending, the most last.
      tables: cost by name; "latency" is the time of the operations, uncorrected, in seconds.
    """

    names: list[str]
    axes: list[Axis]
    counts: list[np.ndarray]
    ops: list[Operation]
    tables: dict[str, Total]

    @property
    def order(self) -> dict[Axis, int]:
        return {axis: i for i, axis in enumerate(self.axes)}

    @property
    def counts_of(self) -> dict[Axis, np.ndarray]:
        return dict(zip(self.axes, self.counts))

    def problem(self, score: Total, budgets: Mapping[str, float]) -> Problem:
        costs = {name: self.tables[name] for name in budgets}
        return Problem([len(c) for c in self.counts], score, costs, budgets)

    def chosen(self, choice: np.ndarray) -> dict[str, int]:
        """Candidate indices -> counts by name."""
        return {n: int(c[i]) for n, c, i in zip(self.names, self.counts, choice)}

    def at_least(self, least: Mapping[str, int]) -> Model:
        """Without the candidates below some counts; what was timed stays."""
        cut = [int((c < least.get(n, 0)).sum()) for n, c in zip(self.names, self.counts)]
        tables = {name: total.without(cut) for name, total in self.tables.items()}
        counts = [c[k:] for c, k in zip(self.counts, cut)]
        return Model(self.names, self.axes, counts, self.ops, tables)


def build(
    fn: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    structure: Structure,
    names: list[str],
    alignment: int,
    limits: Mapping[str, tuple[int, int]],
) -> Model:
    """The model with everything that is counted; times are added by :func:`add_latency`."""
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    param_axes, fresh = infer.copy_axes(structure.param_axes)
    program = infer.couple(closed, out_shape, params, args, param_axes)
    dims = [axes.find(fresh[axes.find(structure.dims[n].axis)]) for n in names]
    ops = operations.operations(program.tape, dims)
    each = [
        candidates(program, ops, d, alignment, limits.get(n, (0, d.size)))
        for n, d in zip(names, dims)
    ]
    model = Model(names, dims, each, ops, {})
    total = cost(fn, params, *args)
    for name in ("flops", "bytes"):
        terms = [_term(model, op.dims, getattr(op, name)) for op in ops]
        table = Total(merged(terms), len(dims))
        # What stands outside single operations (inputs and outputs that move alone) is constant.
        table.constant = getattr(total, name) - _at_full(table)
        model.tables[name] = table
    model.tables["params"] = _params_total(model, program)
    return model


def _at_full(total: Total) -> float:
    return sum(float(t.table[(-1,) * len(t.dims)]) for t in total.terms)


def _term(model: Model, dims: tuple[Axis, ...], cost_of: Callable[[Any], Any]) -> Term:
    """A cost as a table over the candidates of some dimensions."""
    counts, order = model.counts_of, model.order
    shape = tuple(len(counts[d]) for d in dims)
    try:
        values = cost_of(grid(dims, counts))
    except TypeError:  # a rule that computes with single numbers
        values = np.empty(shape)
        for at in np.ndindex(shape):
            values[at] = cost_of({d: int(counts[d][i]) for d, i in zip(dims, at)})
    table = np.broadcast_to(np.asarray(values, float), shape)
    return Term(tuple(order[d] for d in dims), table)


def _params_total(model: Model, program: infer.Program) -> Total:
    terms = []
    for value in program.param_values:
        if jax.dtypes.issubdtype(value.aval.dtype, np.inexact):
            size = functools.partial(_size, value.axes)
            terms.append(_term(model, dims_in(value.axes, model.order), size))
    return Total(merged(terms), len(model.axes))


def _size(axs: Sequence[Axis], sizes: Any) -> Any:
    return math.prod(axes.size_of(a, sizes) for a in axs)


def dims_in(axs: Sequence[Axis], order: Mapping[Axis, int]) -> tuple[Axis, ...]:
    """The chosen dimensions in some axes, in order."""
    found = {leaf for a in axs for leaf in axes.leaves(a) if leaf in order}
    return tuple(sorted(found, key=order.__getitem__))


# ------------------------------------------------------------------------------------ latency


def add_latency(
    model: Model, source: LatencyTable | Device, dense: float | None, progress: Progress | None
) -> None:
    """Adds the table "latency".

    Operations that move memory are timed (or estimated). What the dense network takes beyond
    them is spread over all merged operations, by their numbers of results. Without ``dense``,
    the time of a network that is not at hand, they cost nothing.
    """
    anchors = [op for op in model.ops if op.anchor]
    if isinstance(source, Device):
        terms = [_term(model, op.dims, functools.partial(source.seconds, op)) for op in anchors]
    else:
        terms = _timed(model, anchors, source, progress)
    total = Total(merged(terms), len(model.axes))
    model.tables["latency"] = total if dense is None else _with_merged(model, total, dense)


def _with_merged(model: Model, total: Total, dense: float) -> Total:
    """The rest of the dense network's time, spread over merged operations."""
    inside = _at_full(total)
    scale = min(1.0, dense / inside) if inside else 1.0
    rest = dense - scale * inside
    terms = [Term(t.dims, t.table * scale) for t in total.terms]
    passes = [_term(model, op.dims, op.flops) for op in model.ops if not op.anchor]
    elements = sum(float(t.table[(-1,) * len(t.dims)]) for t in passes)
    if rest and elements:
        terms += [Term(t.dims, t.table * (rest / elements)) for t in passes]
    return Total(merged(terms), total.count)


def _timed(
    model: Model, ops: Sequence[Operation], table: LatencyTable, progress: Progress | None
) -> list[Term]:
    counts, order = model.counts_of, model.order
    grids = [
        [_spread(counts[d], TIMED.get(len(op.dims), TIMED_MANY)) for d in op.dims] for op in ops
    ]
    points = [_points(op, g) for op, g in zip(ops, grids)]
    wanted = {
        name: functools.partial(time_operation, op, at)
        for op, found in zip(ops, points)
        for name, at in found
    }
    table.measure(wanted, progress)
    terms = []
    for op, g, found in zip(ops, grids, points):
        known = np.array([table.seconds[name] for name, _ in found]).reshape([len(x) for x in g])
        full = _interpolated(known, g, [counts[d] for d in op.dims])
        sizes = grid(op.dims, counts)
        full = np.where(op.empty(sizes), 0, full) * op.times(sizes)
        terms.append(Term(tuple(order[d] for d in op.dims), full))
    return terms


def _points(op: Operation, widths: Sequence[np.ndarray]) -> list[tuple[str, dict[Axis, int]]]:
    shape = [len(w) for w in widths]
    every = [{d: int(w[i]) for d, w, i in zip(op.dims, widths, at)} for at in np.ndindex(*shape)]
    return [(name_of(op, counts), counts) for counts in every]


def _spread(counts: np.ndarray, number: int) -> np.ndarray:
    """Some of the counts, the ends among them; none is 0, which costs nothing."""
    there = counts[counts > 0]
    at = np.unique(np.rint(np.linspace(0, len(there) - 1, number)).astype(int))
    return there[at] if number > 1 else there[-1:]


def _interpolated(
    known: np.ndarray, at: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
) -> np.ndarray:
    """Linear along each dimension in turn."""
    for k, (xs, new) in enumerate(zip(at, wanted)):
        known = np.apply_along_axis(lambda line: np.interp(new, xs, line), k, known)  # noqa: B023
    return known


# --------------------------------------------------------------------------------- candidates


def candidates(
    program: infer.Program,
    ops: Sequence[Operation],
    dim: Axis,
    alignment: int,
    limits: tuple[int, int],
) -> np.ndarray:
    """The counts that a dimension may keep: aligned where it stands, within limits.

    0 is among them where the rest of the network goes on without the dimension.
    """
    low, high = limits
    step = aligned_step(ops, dim, alignment)
    counts = np.union1d(np.arange(step, dim.size + 1, step), [dim.size])
    if bypassed(program.tape, dim, program.tape.inputs[program.num_params :]):
        counts = np.union1d([0], counts)
    counts = counts[(counts >= low) & (counts <= high)]
    return _thinned(np.union1d(counts, [high]))


def _thinned(counts: np.ndarray) -> np.ndarray:
    if len(counts) <= CANDIDATES:
        return counts
    at = np.rint(np.linspace(0, len(counts) - 1, CANDIDATES)).astype(int)
    return counts[np.unique(at)]


def aligned_step(ops: Sequence[Operation], dim: Axis, alignment: int) -> int:
    """The least step of a dimension with which every matrix product stays aligned.

    Heads of 64 features are aligned whatever their number. A dimension of less than two steps has
    a step of a quarter of it.
    """
    step = 1
    for op in ops:
        for group in _GROUPS.get(op.step.name, lambda step: [])(op.step) if dim in op.dims else []:
            inside = [leaf for axis in group for leaf in axes.leaves(axis)]
            if dim in inside:
                beside = math.prod(axis.size for axis in group) // dim.size
                step = max(step, alignment // math.gcd(alignment, max(beside, 1)))
    return step if 2 * step <= dim.size else max(1, dim.size // 4)


def _sides(step: Step) -> list[list[Axis]]:
    """The sides of the matrices that are multiplied: axes that are contracted or free together."""
    (lc, rc), (lb, rb) = step.params["dimension_numbers"]
    sides = [[step.ins[0].axes[k] for k in lc]]
    for value, used in ((step.ins[0], (*lc, *lb)), (step.ins[1], (*rc, *rb))):
        sides.append([a for k, a in enumerate(value.axes) if k not in used])
    return sides


def _features(step: Step) -> list[list[Axis]]:
    numbers = step.params["dimension_numbers"]
    return [[step.ins[0].axes[numbers.lhs_spec[1]]], [step.outs[0].axes[numbers.out_spec[1]]]]


_GROUPS: dict[str, Callable[[Step], list[list[Axis]]]] = {
    "dot_general": _sides,
    "conv_general_dilated": _features,
}
