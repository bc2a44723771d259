"""Elementwise primitives: axes pass through, zeros follow what the primitive does to a zero."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxprune.ir import axes, compat, primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.content import content
from jaxprune.ir.positions import COMPARISONS, compared
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, concrete
from jaxprune.rules import zeros
from jaxprune.rules.registry import View, register
from jaxprune.rules.zeros import Zeros
from jaxprune.sharding import fitting


def couple_pointwise(step: Step) -> list[list[Axis]]:
    """Axis by axis; rank 0 and size 1 broadcast in the primitive itself (jax 0.10 and later)."""
    shape = step.eqn.outvars[0].aval.shape
    result = []
    for k, size in enumerate(shape):
        same = [v.axes[k] for v in step.ins if v.shape and v.shape[k] == size]
        for other in same[1:]:
            step.unify(same[0], other)
        result.append(same[0] if same else axes.leaf(size))
    return [result] * len(step.eqn.outvars)


def _aligned(known: Zeros, shape: tuple[int, ...]) -> Zeros:
    """An operand's zeros at the result's shape."""
    if known.all:
        return zeros.everywhere(shape)
    if not known.axes:
        return zeros.unknown(shape)
    return Zeros(False, tuple(np.broadcast_to(v, n) for v, n in zip(known.axes, shape)))


def knows_any(known: Zeros) -> bool:
    return known.all or any(v.any() for v in known.axes)


@functools.lru_cache(maxsize=4096)
def _zero_to_zero(primitive: Any, params: tuple[Any, ...], operands: tuple[Any, ...]) -> bool:
    """Runs the primitive on scalars: does it map these constants to zero?"""
    with jax.ensure_compile_time_eval():
        args = [jnp.asarray(value, dtype) for value, dtype in operands]
        out = primitive.bind(*args, **dict(params))
        return bool(np.all(np.asarray(out) == 0))


def plain_params(step: Step) -> tuple[Any, ...]:
    """The parameters of an equation as a key, without what says where its result lies."""
    params = {k: None if k == "sharding" else v for k, v in step.params.items()}
    return tuple(sorted(params.items()))


def _maps_to_zero(step: Step, constants: list[Any]) -> bool:
    operands = tuple((c, v.aval.dtype) for c, v in zip(constants, step.ins, strict=True))
    try:
        return _zero_to_zero(step.eqn.primitive, plain_params(step), operands)
    except Exception:  # an exotic dtype or parameter: then nothing is known
        return False


def zeros_pointwise(step: Step, known: list[Zeros]) -> list[Zeros]:
    shape = step.eqn.outvars[0].aval.shape
    if not shape and not any(z.all for z in known):
        return [zeros.unknown(shape)]
    args = [_aligned(z, shape) for z in known]
    rule = primitives.of(step).zeros
    if rule == "any":
        vectors = [functools.reduce(np.logical_or, vs) for vs in zip(*(z.axes for z in args))]
        return [Zeros(any(z.all for z in args), tuple(vectors))]
    if rule == "quotient":
        return [zeros.unknown(shape) if knows_any(known[1]) else args[0]]
    if rule == "first":
        return [args[0]]
    if step.name == "select_n":
        return [functools.reduce(zeros.both, _chosen(step, args[1:]))]
    scalars = [None if v.shape else concrete(v.const) for v in step.ins]
    varying = [z for z, s in zip(args, scalars, strict=True) if s is None]
    merged = functools.reduce(zeros.both, varying) if varying else zeros.everywhere(shape)
    if not knows_any(merged):
        return [zeros.unknown(shape)]
    if not _maps_to_zero(step, [0 if s is None else s.item() for s in scalars]):
        return [zeros.unknown(shape)]
    return [merged]


def _chosen(step: Step, cases: list[Zeros]) -> list[Zeros]:
    """The cases that may be chosen: one, where a constant always chooses it."""
    which = content(step.ins[0])
    if which is None or not which.size or (which != which.flat[0]).any():
        return cases
    return [cases[int(which.flat[0])]]


def couple_compared(step: Step) -> list[list[Axis]]:
    """Chosen positions that are compared with 0, 1, 2, ...: these count what is chosen along."""
    (result,) = couple_pointwise(step)
    found = compared(step)
    if found is not None:
        along, k = found
        step.chosen.append((along, result[k]))
    return [result]


register(
    *(n for n in primitives.names(Kind.ELEMENTWISE, Kind.TYPE) if n not in COMPARISONS),
    couple=couple_pointwise, zeros=zeros_pointwise,
)  # fmt: skip
register(*COMPARISONS, couple=couple_compared, zeros=zeros_pointwise)


def evaluate_resharding(view: View, step: Step, xs: list[Any]) -> list[Any]:
    """To the same mesh axes, where they divide the sizes that are left."""
    named = {k: s for k, s in step.params.items() if isinstance(s, NamedSharding)}
    return compat.bind(step.eqn, xs, **{k: fitting(s, np.shape(xs[0])) for k, s in named.items()})


register(
    *primitives.names(Kind.RESHARDING), couple=couple_pointwise,
    zeros=lambda step, known: known, evaluate=evaluate_resharding,
)  # fmt: skip


def couple_each(step: Step) -> list[list[Axis]]:
    """Operands pass one by one and are not tied to each other."""
    return [list(v.axes) for v in step.ins]


register(*primitives.names(Kind.EACH), couple=couple_each, zeros=lambda step, known: known)


# The second operand only carries an order of evaluation.
register("tie", couple=lambda step: [list(step.ins[1].axes)], zeros=lambda step, known: [known[1]])


def couple_bitcast(step: Step) -> list[list[Axis]]:
    """A cast to another width adds or takes the last axis, the entry's words."""
    source, rank = step.ins[0].axes, len(step.eqn.outvars[0].aval.shape)
    if rank < len(source):
        step.freeze(source[-1], "words of an entry")
        return [list(source[:-1])]
    words = [axes.leaf(n) for n in step.eqn.outvars[0].aval.shape[len(source) :]]
    for axis in words:
        step.freeze(axis, "words of an entry")
    return [[*source, *words]]


# No zeros: what counts as zero may be -0.0, whose bits are not.
register("bitcast_convert_type", couple=couple_bitcast)


def couple_effect(step: Step) -> list[list[Axis]]:
    """What only looks at values ties nothing; in the compact program it sees the small arrays."""
    return []


register(
    *primitives.names(Kind.EFFECT),
    couple=couple_effect, zeros=lambda step, known: [],
)  # fmt: skip
