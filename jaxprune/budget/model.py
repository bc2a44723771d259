"""What counts of dimensions cost and keep, as tables for the solver."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxprune._progress import Progress
from jaxprune.budget.candidates import aligned_step, candidates, fastest_steps
from jaxprune.budget.groups import Group, groups
from jaxprune.budget.latency import LatencyTable
from jaxprune.budget.roofline import Device
from jaxprune.budget.solver import Largest, Problem, Term, Total, merged
from jaxprune.budget.times import Times
from jaxprune.costs import memory, operations, routing
from jaxprune.costs.api import handed_back
from jaxprune.costs.operations import Operation, grid
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Tape, Value
from jaxprune.structure import infer
from jaxprune.structure.dimensions import Structure

MOMENTS = 16  # So many moments of most memory are looked at, of the dense and the least network.
Cost = Callable[[Any], Any]  # of counts of dimensions


@dataclass(eq=False)
class Model:
    """A program's costs over the counts of its chosen dimensions.

    Attributes:
      names: the chosen dimensions.
      axes: their axes in the program.
      counts: for each the counts that may be kept, ascending; last all that is there.
      tables: cost by name; "latency" is the time of the operations, uncorrected, in seconds.
      times: where these times come from, or None where they are estimates.
      scale: what the dense network takes over the sum of its groups.
    """

    names: list[str]
    axes: list[Axis]
    counts: list[np.ndarray]
    ops: list[Operation]
    groups: list[Group]
    tables: dict[str, Total]
    times: Times | None = None
    scale: float = 1.0

    @property
    def order(self) -> dict[Axis, int]:
        return {axis: i for i, axis in enumerate(self.axes)}

    @property
    def counts_of(self) -> dict[Axis, np.ndarray]:
        return dict(zip(self.axes, self.counts))

    def problem(
        self, score: Total, budgets: Mapping[str, float], most: Mapping[str, int] | None = None
    ) -> Problem:
        """What the solver gets; ``most``: the largest counts that it may choose."""
        inside = [
            int((c <= (most or {}).get(n, c[-1])).sum()) for n, c in zip(self.names, self.counts)
        ]
        candidates = [slice(k) for k in inside]
        costs = {name: self.tables[name].only(candidates) for name in budgets}
        return Problem(inside, score.only(candidates), costs, budgets)

    def chosen(self, choice: np.ndarray) -> dict[str, int]:
        """Candidate indices -> counts by name."""
        return {n: int(c[i]) for n, c, i in zip(self.names, self.counts, choice)}

    def chosen_of(self, choice: np.ndarray) -> dict[Axis, int]:
        """Candidate indices -> counts by axis."""
        return {axis: int(c[i]) for axis, c, i in zip(self.axes, self.counts, choice)}

    def refine(self, choice: np.ndarray) -> bool:
        """Times what dominates a choice at that choice; False where all of that is known."""
        if self.times is None or not self.times.refine(self.chosen_of(choice)):
            return False
        total = Total(merged(_timed_terms(self)), len(self.axes))
        self.tables["latency"] = _scaled(total, self.scale)
        return True

    def at_least(self, least: Mapping[str, int]) -> Model:
        """Without the candidates below some counts; what was timed stays."""
        cut = [int((c < least.get(n, 0)).sum()) for n, c in zip(self.names, self.counts)]
        above = [slice(k, None) for k in cut]
        tables = {name: total.only(above) for name, total in self.tables.items()}
        counts = [c[k:] for c, k in zip(self.counts, cut)]
        return dataclasses.replace(self, counts=counts, tables=tables)


def build(
    fn: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    structure: Structure,
    names: list[str],
    round_to: int | LatencyTable,
    limits: Mapping[str, tuple[int, int]],
    progress: Progress = False,
) -> Model:
    """The model with everything that is counted; times are added by :func:`add_latency`.

    ``round_to``: the alignment, or a table by which each dimension's own is found.
    """
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    param_axes, fresh = infer.copy_axes(structure.param_axes)
    program = infer.couple(closed, out_shape, params, args, param_axes, structure.semantics)
    dims = [axes.find(fresh[axes.find(structure.dims[n].axis)]) for n in names]
    found, timed = (
        operations.read(program.tape, dims),
        groups(program.tape, dims, program.param_values),
    )
    ops = found.operations
    if isinstance(round_to, LatencyTable):
        steps = fastest_steps(timed, dims, round_to, progress)
    else:
        steps = [aligned_step(ops, d, round_to) for d in dims]
    each = [
        candidates(program, d, step, limits.get(n, (0, d.size)))
        for n, d, step in zip(names, dims, steps)
    ]
    model = Model(names, dims, each, ops, timed, {})
    for name in ("flops", "bytes"):
        terms = [_term(model, op.dims, getattr(op, name)) for op in ops]
        terms += [_moved_alone(model, v) for v in found.alone if name == "bytes"]
        model.tables[name] = Total(merged(terms), len(dims))
    kept = handed_back(program.tape, (params, *args), out_shape)
    chosen = routing.routing(program.tape)
    weights = [v for v in program.param_values if _is_float(v)]
    sums: dict[str, list[tuple[Value, Cost]]] = {
        "params": [(v, functools.partial(_size, v.axes)) for v in weights],
        "active_params": [(v, functools.partial(chosen.active, v)) for v in weights],
        "kv_cache": [(v, functools.partial(operations.nbytes, v)) for v in kept],
    }
    model.tables |= {name: _sum(model, terms) for name, terms in sums.items() if terms}
    model.tables["peak_memory"] = _peak(model, program.tape)
    return model


def _sum(model: Model, costs: Sequence[tuple[Value, Cost]]) -> Total:
    """What depends on one array each, added up."""
    terms = [_term(model, dims_in(value.axes, model.order), cost) for value, cost in costs]
    return Total(merged(terms), len(model.axes))


def _peak(model: Model, tape: Tape) -> Total:
    """The memory of the moments that may be the peak: those of the dense and the least network."""
    least = {axis: int(counts[0]) for axis, counts in model.counts_of.items()}
    ends = [memory.moments(tape, sizes, MOMENTS) for sizes in ({}, least)]
    sets = dict.fromkeys(m.arrays for found in ends for m in found)
    size = {v: functools.partial(operations.nbytes, v) for arrays in sets for v in arrays}
    known = {v: _term(model, dims_in(v.axes, model.order), cost) for v, cost in size.items()}
    count = len(model.axes)
    return Largest([Total(merged([known[v] for v in arrays]), count) for arrays in sets])


def _moved_alone(model: Model, value: Value) -> Term:
    """The bytes of an input or output that moves outside all operations."""
    nbytes = functools.partial(operations.nbytes, value)
    return _term(model, dims_in(value.axes, model.order), nbytes)


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


def _is_float(value: Value) -> bool:
    return jax.dtypes.issubdtype(value.aval.dtype, np.inexact)


def _size(axs: Sequence[Axis], sizes: Any) -> Any:
    return math.prod(axes.size_of(a, sizes) for a in axs)


def dims_in(axs: Sequence[Axis], order: Mapping[Axis, int]) -> tuple[Axis, ...]:
    """The chosen dimensions in some axes, in order."""
    found = {leaf for a in axs for leaf in axes.leaves(a) if leaf in order}
    return tuple(sorted(found, key=order.__getitem__))


# ------------------------------------------------------------------------------------ latency


def add_latency(
    model: Model, source: LatencyTable | Device, dense: float | None, progress: Progress
) -> None:
    """Adds the table "latency".

    Groups of operations are timed (:class:`Times`), or operations that move memory are estimated.
    What the dense network takes beyond its groups (or less) is shared out among them by their
    times; without ``dense``, the time of a network that is not at hand, nothing is.
    """
    if isinstance(source, Device):
        anchors = [op for op in model.ops if op.anchor]
        terms = [_term(model, op.dims, functools.partial(source.seconds, op)) for op in anchors]
    else:
        timed = [g for g in model.groups if g.runs]
        model.times = Times(timed, model.counts_of, source, progress)
        terms = _timed_terms(model)
    total = Total(merged(terms), len(model.axes))
    inside = _at_full(total)
    model.scale = dense / inside if dense is not None and inside else 1.0
    model.tables["latency"] = _scaled(total, model.scale)


def _timed_terms(model: Model) -> list[Term]:
    times, counts, order = model.times, model.counts_of, model.order
    assert times is not None
    return [
        Term(tuple(order[d] for d in g.dims), times.over(i, counts))
        for i, g in enumerate(times.groups)
    ]


def _scaled(total: Total, scale: float) -> Total:
    return Total([Term(t.dims, t.table * scale) for t in total.terms], total.count)
