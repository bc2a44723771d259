"""Numbers that a program is written with: what depends on nothing but literals and small arrays.

``h[:, order]`` reaches the program as comparisons, additions and selections of a constant before
the gather; a mean's divisor as the difference of two literals. These are computed when a rule asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from jaxprune.ir.tape import Step, Value, concrete

LARGEST = 1 << 16  # An array of more entries is not computed.
_LONGEST = 64  # A chain of more equations is not followed.

Compute = Callable[..., np.ndarray]


def _iota(p: dict[str, Any]) -> np.ndarray:
    k, shape = p["dimension"], p["shape"]
    line = np.arange(shape[k]).reshape([-1 if j == k else 1 for j in range(len(shape))])
    return np.broadcast_to(line, shape)


def _broadcast(p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    sizes = dict(zip(p["broadcast_dimensions"], x.shape))
    return np.broadcast_to(x.reshape([sizes.get(k, 1) for k in range(len(p["shape"]))]), p["shape"])


def _slice(p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    strides = p["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _select(p: dict[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(*(c.shape for c in cases))
    number = np.broadcast_to(which.astype(int), shape)
    return np.choose(number, [np.broadcast_to(c, shape) for c in cases])


def _reshape(p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    order = p.get("dimensions")
    return (x if order is None else x.transpose(order)).reshape(p["new_sizes"])


def _plain(function: Callable[..., Any]) -> Compute:
    return lambda p, *xs: function(*xs)


# primitive -> its result from (parameters, operands); the type is that of the equation
COMPUTE: dict[str, Compute] = {
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "select_n": _select,
    "reshape": _reshape,
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "clamp": lambda p, low, x, high: np.clip(x, low, high),
    "convert_element_type": _plain(np.asarray),
    "copy": _plain(np.asarray),
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": _plain(np.multiply),
    "neg": _plain(np.negative),
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "rem": _plain(np.fmod),
    "lt": _plain(np.less),
    "le": _plain(np.less_equal),
    "gt": _plain(np.greater),
    "ge": _plain(np.greater_equal),
    "eq": _plain(np.equal),
    "ne": _plain(np.not_equal),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "not": _plain(np.invert),
}


def content(value: Value, depth: int = _LONGEST) -> np.ndarray | None:
    """The numbers in a value, when they are known and few; else None."""
    if value.const is not None:
        array = concrete(value.const)
        return array if array is not None and array.size <= LARGEST else None
    if value.known is None and value.maker is not None:
        value.known = (_computed(value.maker, depth),)
    return value.known[0] if value.known else None


def counted(value: Value, numbers_there: Sequence[int] | None = None) -> int | None:
    """The axis along which a value counts 0, 1, 2, ..., or these numbers; None: it doesn't."""
    numbers = content(value) if value.shape else None
    if numbers is None or not np.issubdtype(numbers.dtype, np.integer):
        return None
    for k, n in enumerate(value.shape):
        wanted = np.arange(n) if numbers_there is None else np.asarray(numbers_there)
        line = wanted.reshape([-1 if j == k else 1 for j in range(len(value.shape))])
        if n > 1 and len(wanted) == n and (numbers == line).all():
            return k
    return None


def _computed(step: Step, depth: int) -> np.ndarray | None:
    compute, aval = COMPUTE.get(step.name), step.eqn.outvars[0].aval
    if compute is None or not depth or not _is_small(aval.shape):
        return None
    xs: list[np.ndarray] = []
    for value in step.ins:
        x = content(value, depth - 1)
        if x is None:
            return None
        xs.append(x.astype(value.aval.dtype))
    with np.errstate(all="ignore"):
        return _typed(compute(step.params, *xs), aval)


def _typed(array: np.ndarray, aval: Any) -> np.ndarray | None:
    fits = array.shape == tuple(aval.shape)
    return array.astype(aval.dtype) if fits else None


def _is_small(shape: Sequence[Any]) -> bool:
    return all(isinstance(n, int) for n in shape) and prod(shape) <= LARGEST
