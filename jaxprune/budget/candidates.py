"""The counts that a dimension may keep: as many of them as are worth timing, aligned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxprune._progress import Progress
from jaxprune.budget import clock
from jaxprune.budget.groups import Group
from jaxprune.budget.latency import LatencyTable
from jaxprune.costs.operations import Operation, bypassed
from jaxprune.ir import axes, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step
from jaxprune.structure import infer

CANDIDATES = 32  # A dimension has at most so many candidates.
STEPS = (64, 32, 16, 8, 4, 2, 1)
LEAST = 8  # A dimension is cut into at least so many steps.
ENOUGH = 0.05  # A coarser step counts when it is faster by more than this share.

Measured = tuple[str, Callable[[], clock.Timer], float]


def candidates(program: infer.Program, dim: Axis, step: int, limits: tuple[int, int]) -> np.ndarray:
    """Multiples of a step within limits, and the limit; twice the step where they are many.

    So what is wide is aligned to more. 0 is among them where the rest of the network goes on
    without the dimension. All that is there comes last, whatever the limit: what is known of the
    dense network holds there.
    """
    low, high = limits
    while dim.size > CANDIDATES * step:
        step *= 2
    counts = np.union1d(np.arange(step, dim.size + 1, step), [dim.size])
    if bypassed(program.tape, dim, program.tape.inputs[program.num_params :]):
        counts = np.union1d([0], counts)
    counts = counts[(counts >= low) & (counts <= high)]
    return np.union1d(counts, [high, dim.size])


# ------------------------------------------------------------------------------ found by timing


def fastest_steps(
    groups: Sequence[Group], dims: Sequence[Axis], table: LatencyTable, progress: Progress
) -> list[int]:
    """For each dimension the step that this device wants.

    The group with most work in which a dimension is, is timed at widths that are multiples of 64,
    of 32 but not of 64, and so on, just below the full one.
    """
    full = {d: d.size for d in dims}
    largest = [_largest(groups, d, full) for d in dims]
    found = [{} if g is None else _widths(g, d, full, table) for d, g in zip(dims, largest)]
    table.measure({n: make for each in found for n, make, _ in each.values()}, progress)
    costs = [{a: table.entries[n].seconds / work for a, (n, _, work) in e.items()} for e in found]
    return [coarsest_worth(cost) if cost else 1 for cost in costs]


def _largest(groups: Sequence[Group], dim: Axis, full: dict[Axis, int]) -> Group | None:
    inside = [g for g in groups if dim in g.dims and g.runs]
    return max(inside, key=lambda g: float(g.work(full)), default=None)


def _widths(
    group: Group, dim: Axis, full: dict[Axis, int], table: LatencyTable
) -> dict[int, Measured]:
    """Step -> (name of a time, its measurement, the work that is done in it)."""
    found: dict[int, Measured] = {}
    # Finer steps than that would make too many candidates.
    steps = [step for step in STEPS if LEAST * step <= dim.size <= CANDIDATES * step]
    for step in steps if len(steps) > 1 else []:
        counts = {d: full[d] for d in group.dims} | {dim: largest_odd_multiple(step, dim.size)}
        name, measured = table.timed(group, counts)
        work = float(group.work(counts)) / float(group.times(counts))
        found[step] = (name, measured, max(work, 1.0))
    return found


def largest_odd_multiple(step: int, size: int) -> int:
    """The largest count below ``size`` that the step divides, and twice the step doesn't."""
    number = (size - 1) // step
    return step * (number if number % 2 else number - 1)


def coarsest_worth(cost: Mapping[int, float]) -> int:
    """The finest step for which no coarser one is cheaper by more than ``ENOUGH``."""
    for a in sorted(cost):
        if all(cost[a] <= (1 + ENOUGH) * cost[b] for b in cost if b > a):
            return a
    return max(cost)


# ------------------------------------------------------------------------------------- counted


def aligned_step(ops: Sequence[Operation], dim: Axis, alignment: int) -> int:
    """The least step of a dimension with which every matrix product stays aligned.

    Heads of 64 features are aligned whatever their number. A dimension of less than two steps has
    a step of a quarter of it.
    """
    step = 1
    for op in ops:
        for group in _multiplied(op.step) if dim in op.dims else []:
            inside = [leaf for axis in group for leaf in axes.leaves(axis)]
            if dim in inside:
                beside = math.prod(axis.size for axis in group) // dim.size
                step = max(step, alignment // math.gcd(alignment, max(beside, 1)))
    return step if 2 * step <= dim.size else max(1, dim.size // 4)


def _sides(step: Step) -> list[list[Axis]]:
    """The sides of the matrices that are multiplied: axes that are contracted or free together."""
    dims = views.contraction(step)
    free = [dims.free(side, len(v.axes)) for side, v in enumerate(step.ins)]
    contracted = [step.ins[0].axes[k] for k in dims.lhs_contract]
    return [contracted, *([v.axes[k] for k in ks] for v, ks in zip(step.ins, free))]


def _features(step: Step) -> list[list[Axis]]:
    conv = views.convolution(step)
    return [[step.ins[0].axes[conv.lhs[1]]], [step.outs[0].axes[conv.out[1]]]]


_GROUPS: dict[Kind, Callable[[Step], list[list[Axis]]]] = {
    Kind.CONTRACTION: _sides,
    Kind.CONVOLUTION: _features,
}


def _multiplied(step: Step) -> list[list[Axis]]:
    """The axes that make up each side of a matrix product, none for other steps."""
    return _GROUPS.get(primitives.kind(step), lambda step: [])(step)
