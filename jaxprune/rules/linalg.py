"""Linear algebra and Fourier transforms: axes outside the matrices or lines pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxprune.ir import axes, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.registry import register
from jaxprune.rules.zeros import Zeros


def _frozen(step: Step, sizes: Sequence[int], why: str) -> list[Axis]:
    fresh = [axes.leaf(n) for n in sizes]
    for axis in fresh:
        step.freeze(axis, why)
    return fresh


def couple_batch(step: Step) -> list[list[Axis]]:
    """Leading axes of all operands and results are one; those of a single problem are frozen."""
    batch = step.ins[0].axes[: len(step.ins[0].shape) - primitives.of(step).core]
    for v in step.ins:
        for a, b in zip(batch, v.axes):
            step.unify(a, b)
        for axis in v.axes[len(batch) :]:
            step.freeze(axis, "axis of a matrix")
    shapes = [v.aval.shape[len(batch) :] for v in step.eqn.outvars]
    return [[*batch, *_frozen(step, shape, "axis of a matrix")] for shape in shapes]


register(*primitives.names(Kind.MATRIX), couple=couple_batch)


def couple_triangular(step: Step) -> list[list[Axis]]:
    """Columns of the right-hand side (rows, when the matrix stands right of it) pass."""
    matrix, side = step.ins
    batch = len(matrix.shape) - 2
    for a, b in zip(matrix.axes[:batch], side.axes[:batch], strict=True):
        step.unify(a, b)
    solved = side.axes[-2] if step.params["left_side"] else side.axes[-1]
    for axis in (*matrix.axes[batch:], solved):
        step.freeze(axis, "axis of a matrix")
    return [list(side.axes)]


def zeros_triangular(step: Step, known: list[Zeros]) -> list[Zeros]:
    """A right-hand side of zeros has the solution zero, unless the matrix may be singular there."""
    vectors, solved = list(known[1].axes), -2 if step.params["left_side"] else -1
    vectors[solved] = np.zeros_like(vectors[solved])
    if known[0].all or any(v.any() for v in known[0].axes):
        return [zeros.unknown(step.ins[1].shape)]
    return [zeros.everywhere(step.ins[1].shape) if known[1].all else Zeros(False, tuple(vectors))]


register("triangular_solve", couple=couple_triangular, zeros=zeros_triangular)

# --------------------------------------------------------------------------------- transforms


def couple_fft(step: Step) -> list[list[Axis]]:
    passing = len(step.ins[0].shape) - len(views.fft_lengths(step))
    for axis in step.ins[0].axes[passing:]:
        step.freeze(axis, "transformed")
    sizes = step.eqn.outvars[0].aval.shape[passing:]
    return [[*step.ins[0].axes[:passing], *_frozen(step, sizes, "transformed")]]


def zeros_fft(step: Step, known: list[Zeros]) -> list[Zeros]:
    """The transform is linear and works line by line."""
    passing = len(step.ins[0].shape) - len(views.fft_lengths(step))
    sizes = step.eqn.outvars[0].aval.shape[passing:]
    tail = [np.full(n, known[0].all) for n in sizes]
    return [Zeros(known[0].all, (*known[0].axes[:passing], *tail))]


register("fft", couple=couple_fft, zeros=zeros_fft)
