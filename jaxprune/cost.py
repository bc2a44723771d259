"""FLOPs, bytes and parameters, counted from the jaxpr.

XLA's own figures are not used: they miss convolutions that a library call computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import numpy as np

from jaxprune.jaxpr import compat
from jaxprune.rules.pointwise import POINTWISE
from jaxprune.rules.reduction import REDUCTIONS

_WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
_NO_ARITHMETIC = {"convert_element_type", "copy", "copy_p", "name", "stop_gradient", "real", "imag",
                  "sharding_constraint", "reduce_precision"}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
      flops: floating-point operations; a multiply-add counts 2, any elementwise function 1.
      bytes: operands read plus results written by contractions and convolutions, with the
        program's inputs and outputs where there is none: what must move at least.
      params: entries of the float leaves of the first argument.
      by_primitive: FLOPs per primitive.
      notes: what could not be counted, and why.
    """

    flops: int
    bytes: int
    params: int
    by_primitive: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _size(v: Any) -> int:
    return prod(v.aval.shape)


def _bytes(v: Any) -> int:
    return _size(v) * getattr(v.aval.dtype, "itemsize", 4)


def _flops_dot(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * prod(shape[k] for k in contract)


def _flops_conv(eqn: Any) -> int:
    """Every output entry reads the whole kernel window; padding is counted like data."""
    spec = eqn.params["dimension_numbers"].rhs_spec
    shape = eqn.invars[1].aval.shape
    return 2 * _size(eqn.outvars[0]) * prod(shape[k] for k in spec[1:])


def _flops_window(eqn: Any) -> int:
    return _size(eqn.outvars[0]) * prod(eqn.params["window_dimensions"])


FLOPS: dict[str, Callable[[Any], int]] = {
    **{name: lambda eqn: _size(eqn.outvars[0]) for name in POINTWISE if name not in _NO_ARITHMETIC},
    **{name: lambda eqn: _size(eqn.invars[0]) for name in REDUCTIONS},
    **dict.fromkeys(_WINDOWS, _flops_window),
    **{n: lambda eqn: _size(eqn.invars[0]) for n in ("cumsum", "cumprod", "cummax", "cummin")},
    "dot_general": _flops_dot,
    "conv_general_dilated": _flops_conv,
}
_LAYOUT = (
    set(
        [
            "broadcast_in_dim",
            "reshape",
            "transpose",
            "squeeze",
            "concatenate",
            "split",
            "slice",
            "pad",
            "stack",
            "tile",
            "rev",
            "iota",
            "gather",
            "scatter",
            "scatter-add",
            "dynamic_slice",
            "dynamic_update_slice",
            "device_put",
            "optimization_barrier",
            "random_bits",
            "random_seed",
            "random_wrap",
            "random_unwrap",
            "random_fold_in",
            "argmax",
            "argmin",
            "sort",
            "top_k",
            "select_and_gather_add",
            "bitcast_convert_type",
        ]
    )
    | _NO_ARITHMETIC
)


def _walk(
    jaxpr: Any, times: int, flops: Counter[str], moved: Counter[str], notes: set[str]
) -> None:
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        name, subs = eqn.primitive.name, compat.sub_jaxprs(eqn)
        if name in FLOPS:
            flops[name] += times * FLOPS[name](eqn)
            if name in ("dot_general", "conv_general_dilated"):
                moved[name] += times * sum(map(_bytes, [*eqn.invars, *eqn.outvars]))
        elif name == "cond":
            _walk_dearest(subs, times, flops, moved, notes)
        elif subs:
            if name == "while":
                notes.add("while: the number of rounds is unknown, counted once")
            rounds = compat.scan_parts(eqn).length if name == "scan" else 1
            inner = subs[:1] if name.startswith("custom") else subs
            for sub in inner:
                _walk(sub, times * rounds, flops, moved, notes)
        elif name not in _LAYOUT:
            notes.add(f"{name}: not counted")


def _walk_dearest(subs: Any, times: int, flops: Any, moved: Any, notes: set[str]) -> None:
    """Of a cond's branches only the one of most FLOPs counts."""
    tried = []
    for sub in subs:
        f: Counter[str] = Counter()
        m: Counter[str] = Counter()
        _walk(sub, times, f, m, notes)
        tried.append((f, m))
    best = max(tried, key=lambda pair: pair[0].total())
    flops.update(best[0])
    moved.update(best[1])


def cost(fn: Callable[..., Any], *args: Any) -> Cost:
    """Counts what ``fn(*args)`` costs; nothing is computed.

    Args:
      fn: a function; by convention its first argument is the params tree.
      *args: arrays or ``jax.ShapeDtypeStruct``.

    Raises:
      TypeError: when fn is not callable.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> c = jp.cost(lambda w, x: x @ w, jnp.ones((3, 4)), jnp.ones((2, 3)))
      >>> c.flops, c.bytes, c.params
      (48, 104, 12)
    """
    if not callable(fn):
        raise TypeError(f"cost wants a function and its arguments, got {type(fn).__name__} first")
    closed = jax.make_jaxpr(fn)(*args)
    flops: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    notes: set[str] = set()
    _walk(closed, 1, flops, moved, notes)
    total_bytes = moved.total() or _ends(closed)
    leaves = jax.tree.leaves(args[0]) if args else []
    params = sum(int(np.prod(np.shape(x))) for x in leaves if _is_float(x))
    return Cost(flops.total(), total_bytes, params, dict(flops), tuple(sorted(notes)))


def _ends(closed: Any) -> int:
    return sum(map(_bytes, [*closed.jaxpr.invars, *closed.jaxpr.outvars]))


def _is_float(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) if hasattr(x, "dtype") else False
