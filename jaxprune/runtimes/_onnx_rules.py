"""What is written otherwise before jax2onnx sees it: what ONNX Runtime or the converter lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.ir import compat
from jaxprune.runtimes.rewriting import Rules, known, run, without_dead


def _select(eqn: Any, ins: list[Any], rules: Rules) -> list[Any]:
    """Booleans by ``and`` and ``or``: ONNX Runtime has no ``Where`` for them."""
    which, *cases = ins
    if len(cases) != 2 or eqn.outvars[0].aval.dtype != bool:
        return compat.bind(eqn, ins)
    which = jnp.broadcast_to(which, eqn.outvars[0].aval.shape)
    no, yes = cases
    return [(which & yes) | (~which & no)]


def _scan(eqn: Any, ins: list[Any], rules: Rules) -> list[Any]:
    """Loops forward, with the constants that they read in each turn in their body.

    Where those are handed on from turn to turn, no quantiser takes them for weights.
    """
    parts = compat.scan_parts(eqn)
    n, k = parts.num_consts, parts.num_carry
    turned = _turned if parts.reverse else list
    consts, rest = ins[:n], [*ins[n : n + k], *turned(ins[n + k :])]
    loop = _with_constants if "num_consts" in eqn.params else _anew
    outs = loop(eqn, consts, rest, rules)
    return [*outs[:k], *turned(outs[k:])]


def _turned(rows: Sequence[Any]) -> list[Any]:
    return [lax.rev(x, (0,)) for x in rows]


def _with_constants(eqn: Any, consts: Any, rest: Any, rules: Rules) -> list[Any]:
    free = [i for i, x in enumerate(consts) if not known(x)]

    def body(*xs: Any) -> list[Any]:
        given = dict(zip(free, xs))
        every = [given.get(i, x) for i, x in enumerate(consts)]
        return run(eqn.params["jaxpr"], [*every, *xs[len(free) :]], rules)

    invars: list[Any] = compat.open_jaxpr(eqn.params["jaxpr"])[0].invars
    taken = [*(invars[i] for i in free), *invars[len(consts) :]]
    types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in taken]
    closed = without_dead(jax.make_jaxpr(body)(*types))
    params = eqn.params | {"jaxpr": closed, "num_consts": len(free), "reverse": False}
    return list(eqn.primitive.bind(*(consts[i] for i in free), *rest, **params))


def _anew(eqn: Any, consts: Any, rest: Any, rules: Rules) -> list[Any]:
    """In JAX 0.12, whose equations say otherwise what is a constant: all are operands."""
    parts = compat.scan_parts(eqn)
    k = parts.num_carry

    def step(carry: Any, rows: Any) -> Any:
        outs = run(parts.jaxpr, [*consts, *carry, *rows], rules)
        return outs[:k], outs[k:]

    last, rows = lax.scan(step, rest[:k], rest[k:], parts.length)
    return [*last, *rows]


def _window_sum(eqn: Any, ins: list[Any], rules: Rules) -> list[Any]:
    """A sum over windows of images, channels last, as a convolution of each channel with ones."""
    p, (x,) = eqn.params, ins
    window = p["window_dimensions"]
    plain = (window[0], window[-1]) == (p["window_strides"][0], p["window_strides"][-1]) == (1, 1)
    is_image = x.ndim in (3, 4, 5) and not any(p["padding"][0] + p["padding"][-1]) and plain
    if not is_image or not jnp.issubdtype(x.dtype, jnp.floating):
        return compat.bind(eqn, ins)
    axes = "DHW"[5 - x.ndim :]
    ones = jnp.ones((*window[1:-1], 1, x.shape[-1]), x.dtype)
    names = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    return [
        lax.conv_general_dilated(
            x, ones, p["window_strides"][1:-1], p["padding"][1:-1],
            lhs_dilation=p["base_dilation"][1:-1], rhs_dilation=p["window_dilation"][1:-1],
            dimension_numbers=names, feature_group_count=x.shape[-1],
        )
    ]  # fmt: skip


def _dot(eqn: Any, ins: list[Any], rules: Rules) -> list[Any]:
    """Products as jax2onnx writes them right.

    It reads a matrix on the left as (free, summed), whatever is summed; takes the result to be of
    the operands' type; and names the batches of an outer product twice.
    """
    x, y = ins
    (left, right), (batch, other) = eqn.params["dimension_numbers"]
    result = eqn.outvars[0].aval.dtype
    if not left:
        ranks = x.ndim - len(batch), y.ndim - len(other)
        x, y = jnp.moveaxis(x, batch, range(len(batch))), jnp.moveaxis(y, other, range(len(batch)))
        x = jnp.expand_dims(x, [*range(x.ndim, x.ndim + ranks[1])])
        y = jnp.expand_dims(y, [*range(len(batch), len(batch) + ranks[0])])
        return [x.astype(result) * y.astype(result)]
    if x.dtype == y.dtype == result and (x.ndim, tuple(left)) != (2, (0,)):
        return compat.bind(eqn, ins)
    if (x.ndim, tuple(left)) == (2, (0,)) and not batch:
        x, left = x.T, (1,)
    numbers = (left, right), (batch, other)
    return [lax.dot_general(x.astype(result), y.astype(result), numbers)]


RULES: Rules = {
    "dot_general": _dot,
    "select_n": _select,
    "scan": _scan,
    "reduce_window_sum": _window_sum,
}
