"""What is written otherwise before jax2onnx sees it: what ONNX Runtime or the converter lacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.ir import compat
from jaxprune.runtimes.rewriting import Rules, inner, known, run, without_dead


def _select(eqn: Any, ins: list[Any], rules: Rules) -> list[Any]:
    """Booleans by ``and`` and ``or``: ONNX Runtime has no ``Where`` for them."""
    which, *cases = ins
    if len(cases) != 2 or eqn.outvars[0].aval.dtype != bool:
        return compat.bind(eqn, ins)
    which = jnp.broadcast_to(which, eqn.outvars[0].aval.shape)
    no, yes = cases
    return [(which & yes) | (~which & no)]


def _scan(eqn: Any, ins: list[Any], rules: Rules) -> list[Any]:
    """Loops forward, with what they read in each turn as constants of the body.

    Where it is handed on from turn to turn, no quantiser takes it for weights.
    """
    if "num_consts" not in eqn.params:  # JAX 0.12
        return compat.bind_plain(eqn, ins, lambda param: inner(param, rules))
    p = eqn.params
    n, carried = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts, rows = ins[:n], ins[carried:]
    free = [x for x in consts if not known(x)]

    def body(*xs: Any) -> list[Any]:
        given = iter(xs)
        every = [x if known(x) else next(given) for x in consts]
        return run(p["jaxpr"], [*every, *given], rules)

    invars = compat.open_jaxpr(p["jaxpr"])[0].invars
    taken: list[Any] = [v for v, x in zip(invars, consts) if not known(x)] + invars[n:]
    types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in taken]
    closed = without_dead(jax.make_jaxpr(body)(*types))
    params = p | {"jaxpr": closed, "num_consts": len(free), "reverse": False}
    if "linear" in p:
        linear = [w for w, x in zip(p["linear"], consts) if not known(x)]
        params["linear"] = (*linear, *p["linear"][n:])
    turned = [lax.rev(x, (0,)) for x in rows] if p["reverse"] else rows
    outs = eqn.primitive.bind(*free, *ins[n:carried], *turned, **params)
    last, rows = outs[: p["num_carry"]], outs[p["num_carry"] :]
    return [*last, *((lax.rev(y, (0,)) for y in rows) if p["reverse"] else rows)]


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


RULES: Rules = {"select_n": _select, "scan": _scan, "reduce_window_sum": _window_sum}
