"""Constants that removed units leave behind, folded into what reads them.

Where only the weights that make a unit are masked, its bias remains: the unit is the same for all
inputs, as is the sigmoid of a zero. Its removed slices of parameters become constants of the
compact program, and all that depends on nothing else is computed while it is traced, with every
axis along which it does not vary at size 1. What is left of a unit is then a vector that is added
to what reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.compaction.blocks import View
from jaxprune.compaction.demand import Demand, Part
from jaxprune.ir import compat, primitives, views
from jaxprune.ir.primitives import CALLS, Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules.registry import KEPT, Block, Wire
from jaxprune.sharding import host, layout, reshaped

Key = tuple[Value, Block]


class Folded(NamedTuple):
    """A constant; axes along which it does not vary have size 1."""

    array: Any

    def whole(self, shape: Sequence[Any]) -> Any:
        return jnp.broadcast_to(self.array, shape)


class Constants:
    """Which removed blocks depend on nothing but removed slices of parameters, and zeros.

    Attributes:
      known: the blocks that do.
      leftovers: the removed slices of parameters themselves.
      misread: removed slices that some equation reads together with what varies.
    """

    def __init__(self, demand: Demand, tape: Tape, leftovers: set[Key]):
        self._demand, self.leftovers = demand, leftovers
        self.known: set[Key] = set(leftovers)
        self.misread: set[Key] = set()
        self._walk(tape)

    def is_constant(self, step: Step, part: Part) -> bool:
        """Whether an evaluation at removed units reads nothing but constants and zeros."""
        how = _fold_of(step)
        if how is None or not part.block or not how.fits(step):
            return False
        return all(
            v.const is not None or (v, b) in self.known or self._demand.is_zero(v, b)
            for v, b in self._operands(step, part.block)
        )

    def _operands(self, step: Step, block: Block) -> list[Key]:
        return [(v, block & self._demand.split.dims(v)) for v in step.ins]

    def _walk(self, tape: Tape) -> None:
        for step in tape.steps:
            if step in self._demand.wires:
                self._nested(step)
                continue
            for block, parts in self._demand.parts.get(step, {}).items():
                constant = [self.is_constant(step, part) for part in parts]
                self._note(step, [p for p, c in zip(parts, constant) if not c])
                if parts and all(constant):
                    mine = (out for out in step.outs if block <= self._demand.split.dims(out))
                    self.known |= {(out, block) for out in mine}
            self.known |= {(step.outs[0], b) for b, key in self._passed(step) if key in self.known}

    def _note(self, step: Step, varying: Sequence[Part]) -> None:
        for part in varying:
            self.misread |= self.leftovers & set(self._operands(step, part.block))

    def _nested(self, step: Step) -> None:
        ins, outs = self._demand.wires[step]
        if primitives.kind(step) not in CALLS:
            self.misread |= self.leftovers & {(step.ins[i], block) for i, block in ins}
            return
        before = set(self.known)
        self._walk(step.subs[0])
        inner = step.subs[0].outputs
        constant = [(j, b) for j, b in outs if (inner[j], b) in self.known]
        varying = [(i, b) for i, b in ins if (step.ins[i], b) not in self.known]
        if self._moves(step, varying, constant):
            self.known = before
            self.misread |= self.leftovers & {(step.ins[i], block) for i, block in ins}
        else:
            self.known |= {(step.outs[j], b) for j, b in constant}

    def _moves(self, step: Step, varying: Sequence[Wire], constant: Sequence[Wire]) -> bool:
        """Whether a gradient rule ties constant results to operands that vary.

        A rule need not be the derivative: the cotangent of a constant may be passed straight on.
        """
        ends = DERIVATIVES.get(primitives.kind(step))
        if ends is None or len(step.subs) == 1 or not constant:
            return False
        rule, sources, targets = ends(step, varying, constant)
        return bool(targets & self._reached(rule, sources))

    def _reached(self, tape: Tape, sources: set[Key]) -> set[Key]:
        """What is computed from blocks of a program's inputs."""
        reached = set(sources)
        for step in tape.steps:
            if step in self._demand.wires:
                ins, outs = self._demand.wires[step]
                if any((step.ins[i], b) in reached for i, b in ins):
                    reached |= {(step.outs[j], b) for j, b in outs}
                continue
            for block, parts in self._demand.parts.get(step, {}).items():
                if any(reached & set(self._operands(step, part.block)) for part in parts):
                    reached |= {(out, block) for out in step.outs}
            reached |= {(step.outs[0], b) for b, key in self._passed(step) if key in reached}
        return reached

    def _passed(self, step: Step) -> list[tuple[Block, Key]]:
        """Blocks of the result that are a block of an operand."""
        passed = self._demand.passed.get(step, {}).items()
        return [(block, (v, block & self._demand.split.dims(v))) for block, v in passed]


Ends = tuple[Tape, set[Key], set[Key]]  # a rule, what goes in, and what it may come out as


def _forward_ends(step: Step, varying: Sequence[Wire], constant: Sequence[Wire]) -> Ends:
    """Tangents of operands that vary, tangents of constant results."""
    rule = step.subs[1]
    moving, still = rule.inputs[len(step.ins) :], compat.custom_jvp_jaxpr(step.eqn)[2]
    moved = dict(zip((j for j, s in enumerate(still) if not s), rule.outputs[len(step.outs) :]))
    sources = {(moving[i], block) for i, block in varying}
    return rule, sources, {(moved[j], block) for j, block in constant if j in moved}


def _backward_ends(step: Step, varying: Sequence[Wire], constant: Sequence[Wire]) -> Ends:
    """Cotangents of constant results, cotangents of operands that vary."""
    rule = step.subs[2]
    grads = dict(zip(compat.rule_operands(step.eqn, range(len(step.ins))), rule.outputs))
    sources = {(rule.inputs[j - len(step.outs)], block) for j, block in constant}
    return rule, sources, {(grads[i], block) for i, block in varying if i in grads}


DERIVATIVES: dict[Kind, Callable[[Step, Sequence[Wire], Sequence[Wire]], Ends]] = {
    Kind.CUSTOM_JVP: _forward_ends,
    Kind.CUSTOM_VJP: _backward_ends,
}


# ---------------------------------------------------------------------------------- computing


def now(function: Callable[..., Any], *args: Any) -> Any:
    """Computes while tracing, where the arguments are known."""
    known = not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        return function(*args)


Size = Callable[[int, int], Any]  # (operand, axis) -> how many positions are meant


def fold(step: Step, view: View, part: Part, xs: Sequence[Any]) -> Folded:
    """One equation on constants."""
    picked = {(i, k): len(positions) for i, k, positions in part.picks}
    how = _fold_of(step)
    assert how is not None
    compute = how.compute

    def size(i: int, k: int) -> Any:
        return picked[i, k] if (i, k) in picked else view.size(step.ins[i].axes[k])

    return Folded(now(lambda xs: compute(step, size, [jnp.asarray(x) for x in xs]), list(xs)))


def _always(step: Step) -> bool:
    return True


class Fold(NamedTuple):
    """How a primitive acts on constants whose unvarying axes have size 1."""

    compute: Callable[[Step, Size, list[Any]], Any]
    fits: Callable[[Step], bool] = _always


def _pointwise(step: Step, size: Size, xs: list[Any]) -> Any:
    shape = np.broadcast_shapes(*(x.shape for x in xs))
    return compat.bind(step.eqn, [jnp.broadcast_to(x, shape) for x in xs])[0]


def _broadcast(step: Step, size: Size, xs: list[Any]) -> Any:
    places, rank = views.broadcast(step).places, len(step.outs[0].axes)
    sizes = dict(zip(places, xs[0].shape))
    return lax.broadcast_in_dim(xs[0], [sizes.get(k, 1) for k in range(rank)], places)


def _same(step: Step, size: Size, xs: list[Any]) -> Any:
    return compat.bind(step.eqn, xs)[0]


def _dot(step: Step, size: Size, xs: list[Any]) -> Any:
    dims = views.contraction(step)
    shapes = [list(x.shape) for x in xs]
    left, right = ((*c, *b) for c, b in zip(dims.contract, dims.batch))
    for i, j in zip(left, right):
        shapes[0][i] = shapes[1][j] = size(0, i)
    return compat.bind(step.eqn, [jnp.broadcast_to(x, s) for x, s in zip(xs, shapes)])[0]


def _reduce(step: Step, size: Size, xs: list[Any]) -> Any:
    over, combine = views.reduction(step)
    folded = [k for k in over if xs[0].shape[k] == 1]
    count = prod(size(0, k) for k in folded) if combine == "sum" else 1
    return compat.bind(step.eqn, xs)[0] * np.asarray(count, xs[0].dtype)


def _folds_reduction(step: Step) -> bool:
    """Whether a reduction of equal entries is known: an extreme, or a sum of a known number."""
    over, combine = views.reduction(step)
    numbers = all(isinstance(step.ins[0].axes[k].size, int) for k in over)
    return combine in ("max", "min") or combine == "sum" and numbers


def _folds_convolution(step: Step) -> bool:
    """At a border that is padded with zeros, a constant image gives another value."""
    conv, taps = views.convolution(step), views.taps(step)
    whole = conv.groups == conv.batch_groups == 1 and all(d == 1 for d in taps.lhs_dilation)
    return whole and all(pad == (0, 0) for pad in taps.padding)


def _convolve(step: Step, size: Size, xs: list[Any]) -> Any:
    """One position of the result, from as much of the image as the window covers."""
    conv, (image, kernel) = views.convolution(step), xs
    shape = list(image.shape)
    for k, j, d in zip(conv.lhs[2:], conv.rhs[2:], views.taps(step).rhs_dilation):
        if shape[k] == 1:
            shape[k] = (kernel.shape[j] - 1) * d + 1
    features = conv.lhs[1]
    shape[features] = size(0, features)
    return compat.bind(step.eqn, [jnp.broadcast_to(image, shape), kernel])[0]


FOLD: dict[Kind, Fold] = {
    Kind.ELEMENTWISE: Fold(_pointwise),
    Kind.RESHARDING: Fold(_pointwise),
    Kind.TYPE: Fold(lambda step, size, xs: xs[0]),
    Kind.BROADCAST: Fold(_broadcast),
    Kind.TRANSPOSE: Fold(_same),
    Kind.CONTRACTION: Fold(_dot),
    Kind.REDUCTION: Fold(_reduce, _folds_reduction),
    Kind.CONVOLUTION: Fold(_convolve, _folds_convolution),
}


def _fold_of(step: Step) -> Fold | None:
    """How a step acts on constants; None where it has to be run."""
    return FOLD.get(primitives.kind(step))


def leftover(demand: Demand, value: Value, block: Block, leaf: Any) -> Any:
    """The removed slices of a parameter that a block holds."""
    view = demand.split.view(block)

    def cut(leaf: Any) -> Any:
        for k, axis in enumerate(value.axes):
            if view.size(axis) != axis.size:
                leaf = leaf.take(view.index(axis), axis=k)
        return leaf

    found = reshaped(cut, leaf)
    at_hand = layout(found) and not isinstance(found, jax.core.Tracer)
    return jnp.asarray(host(found)) if at_hand else found


def leftovers_of(demand: Demand, values: Sequence[Value], needed: Sequence[set[Block]]) -> set[Key]:
    return {(v, b) for v, blocks in zip(values, needed) for b in blocks if b != KEPT}
