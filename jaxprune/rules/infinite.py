"""Which equations make infinities or NaN of a zero, in their value or in their derivative.

The answer comes from the primitive itself: it is evaluated at zero, and its derivative there, once
for each set of parameters. Primitives that are known to be harmless are not evaluated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.ir import primitives
from jaxprune.ir.content import content
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step, Value
from jaxprune.rules.pointwise import knows_any, plain_params
from jaxprune.rules.zeros import Zeros

VALUE, GRADIENT = "value", "gradient"

_OTHERS = {"pow": -0.5}  # Unknown operands are taken to be these: an exponent may be negative.
_MOST_VALUES = 64  # So many values of a closed-over operand are tried.
_LARGEST = 3  # Matrices of at most this size are tried.

Operand = tuple[tuple[complex, ...], Any]  # its values, its type


def at_zero(step: Step, known: Sequence[Zeros]) -> str | None:
    """VALUE or GRADIENT when that is not finite somewhere, given what is zero; else None."""
    if _is_harmless(step) or not _inexact(step.eqn.outvars[0].aval.dtype):
        return None
    zero = [i for i, (v, z) in enumerate(zip(step.ins, known)) if _is_number(v) and _zero_in(v, z)]
    found: set[str | None] = set()
    if primitives.of(step).core:
        found = {_of_matrices(step, i) for i in zero if _whole_problem(step, known[i])}
    else:
        found = {_of_numbers(step, places) for places in _places(step, zero)}
    return next((kind for kind in (VALUE, GRADIENT) if kind in found), None)


def _is_harmless(step: Step) -> bool:
    row = primitives.of(step)
    if row.finite or (step.name == "integer_pow" and step.params["y"] >= 0):
        return not any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in step.ins)
    return row.kind not in (Kind.ELEMENTWISE, Kind.TYPE) and not row.core


def _inexact(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _is_number(value: Value) -> bool:
    return _inexact(value.aval.dtype)


def _zero_in(value: Value, known: Zeros) -> bool:
    return bool(knows_any(known)) and 0 not in value.shape


def _places(step: Step, zero: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The operands that are set to zero together: each one, and all."""
    only = primitives.of(step).poles
    alone = [(i,) for i in zero if only in (None, i)]
    yield from alone
    if len(zero) > 1 and only is None:
        yield tuple(zero)


def _of_numbers(step: Step, zero: tuple[int, ...]) -> str | None:
    operands = tuple(
        ((0.0,) if i in zero else _values(step, v), v.aval.dtype) for i, v in enumerate(step.ins)
    )
    try:
        return _evaluated(step.eqn.primitive, plain_params(step), operands, zero)
    except Exception:  # an exotic parameter: then nothing is known
        return None


def _values(step: Step, value: Value) -> tuple[complex, ...]:
    array = content(value)
    if array is None or not array.size:
        return (_OTHERS.get(step.name, 0.5) if _is_number(value) else 0,)
    return tuple(np.unique(array)[:_MOST_VALUES].tolist())


@functools.lru_cache(maxsize=4096)
def _evaluated(
    primitive: Any, params: tuple[Any, ...], operands: tuple[Operand, ...], zero: tuple[int, ...]
) -> str | None:
    count = max(len(values) for values, _ in operands)
    arrays = [np.resize(np.asarray(values), count).astype(dtype) for values, dtype in operands]
    return _judged(lambda *xs: primitive.bind(*xs, **dict(params)), arrays, zero)


def _of_matrices(step: Step, zero: int) -> str | None:
    core = primitives.of(step).core
    shapes = tuple(tuple(min(n, _LARGEST) for n in v.shape[-core:]) for v in step.ins)
    dtypes = tuple(v.aval.dtype for v in step.ins)
    try:
        return _solved(step.eqn.primitive, plain_params(step), shapes, dtypes, zero)
    except Exception:  # an exotic parameter: then nothing is known
        return None


@functools.lru_cache(maxsize=1024)
def _solved(
    primitive: Any, params: tuple[Any, ...], shapes: Any, dtypes: Sequence[Any], zero: int
) -> str | None:
    arrays = [np.ones(s, t) + np.eye(*s[-2:], dtype=t) if len(s) > 1 else np.ones(s, t)
              for s, t in zip(shapes, dtypes)]  # fmt: skip
    arrays[zero] = np.zeros_like(arrays[zero])
    return _judged(lambda *xs: primitive.bind(*xs, **dict(params)), arrays, (zero,))


def _whole_problem(step: Step, known: Zeros) -> bool:
    """Whether some problem of a batch is zero as a whole."""
    batch = known.axes[: len(known.axes) - primitives.of(step).core]
    return known.all or any(v.any() for v in batch)


def _judged(function: Any, arrays: Sequence[Any], zero: tuple[int, ...]) -> str | None:
    """Evaluates a function and its derivative along the operands that are zero."""

    def along(*moving: Any) -> Any:
        given = dict(zip(zero, moving))
        return function(*(given.get(i, jnp.asarray(x)) for i, x in enumerate(arrays)))

    points = [jnp.asarray(arrays[i]) for i in zero]
    with jax.ensure_compile_time_eval():
        if not _finite(along(*points)):
            return VALUE
        try:
            slopes = jax.jvp(along, points, [jnp.ones_like(x) for x in points])[1]
        except Exception:  # it has no derivative
            return None
        return None if _finite(slopes) else GRADIENT


def _finite(results: Any) -> bool:
    floats = [x for x in jax.tree.leaves(results) if _inexact(x.dtype)]
    return all(bool(jnp.isfinite(x).all()) for x in floats)
