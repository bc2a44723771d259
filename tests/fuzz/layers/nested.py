"""Layers that hold layers: residuals, branches, control flow, functions with own derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.layers.catalogue import ANY, BOTH, FORWARD, Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.contractions import dense_to


def _around(inner: Layer, text: str, apply: Any, shape: Shape | None = None) -> Layer:
    """``apply(params, x)`` where ``params`` are those of the inner layer."""
    return Layer(f"{text} ({inner.text})", inner.params, apply, shape or inner.shape)


@layer(keeps=True, nests=True)
def residual(draw: Draw, shape: Shape) -> Layer:
    inner = draw.branch(shape)
    return _around(inner, "residual", lambda p, x: x + inner.apply(p, x))


@layer(keeps=True, nests=True)
def gated(draw: Draw, shape: Shape) -> Layer:
    a, b = draw.branch(shape), draw.branch(shape)

    def apply(p: Params, x: Any) -> Any:
        return a.apply(p.get("a", {}), x) * jax.nn.sigmoid(b.apply(p.get("b", {}), x))

    params = {"a": a.params, "b": b.params}
    return Layer(f"gated ({a.text} | {b.text})", params, apply, shape)


@layer(keeps=True, nests=True)
def layer_scale(draw: Draw, shape: Shape) -> Layer:
    """A residual whose branch is scaled by a learned vector."""
    inner = draw.branch(shape)

    def apply(p: Params, x: Any) -> Any:
        return x + p["gamma"] * inner.apply(p.get("inner", {}), x)

    params = {"gamma": draw.weights(shape[-1]), "inner": inner.params}
    return Layer(f"layer_scale ({inner.text})", params, apply, shape)


@layer(nests=True)
def concatenated(draw: Draw, shape: Shape) -> Layer:
    """x beside what a branch makes of it (DenseNet, U-Net), equal or unequal."""
    inner = draw.branch(shape)
    wide = dense_to(draw, shape, draw.width()) if draw.maybe() else inner
    first = draw.maybe()

    def apply(p: Params, x: Any) -> Any:
        parts = [x, wide.apply(p.get("inner", {}), x)]
        return jnp.concatenate(parts if first else parts[::-1], -1)

    width = shape[-1] + wide.shape[-1]
    return Layer(f"concatenated ({wide.text})", {"inner": wide.params}, apply, (*shape[:-1], width))


@layer(keeps=True, nests=True)
def checkpointed(draw: Draw, shape: Shape) -> Layer:
    inner = draw.branch(shape)
    policy = draw.one([None, jax.checkpoint_policies.dots_saveable])
    run = jax.checkpoint(inner.apply, policy=policy)
    return _around(inner, "checkpointed", lambda p, x: run(p, x))


@layer(keeps=True, nests=True)
def jitted(draw: Draw, shape: Shape) -> Layer:
    """One jitted function called twice, so that its jaxpr stands at two places."""
    inner = draw.branch(shape)

    def apply(p: Params, x: Any) -> Any:
        run = jax.jit(inner.apply)
        return run(p, jnp.tanh(run(p, x)))

    return _around(inner, "jitted twice", apply)


@layer(keeps=True, nests=True)
def conditional(draw: Draw, shape: Shape) -> Layer:
    """lax.cond, or lax.switch over three."""
    count = draw.one([2, 3])
    inner = [draw.branch(shape) for _ in range(count)]

    def apply(p: Params, x: Any) -> Any:
        branches = [partial(one.apply, p.get(f"b{i}", {})) for i, one in enumerate(inner)]
        if count == 2:
            return lax.cond(x.sum() > 0, *branches, x)
        return lax.switch((x.sum() > 0) + (x.sum() > 3).astype(int), branches, x)

    params = {f"b{i}": one.params for i, one in enumerate(inner)}
    return Layer(f"conditional ({' | '.join(i.text for i in inner)})", params, apply, shape)


@layer(keeps=True, nests=True)
def looped(draw: Draw, shape: Shape) -> Layer:
    """A loop that applies one branch again: fori, while, or fori with a bound of its own."""
    inner, how = draw.branch(shape), "fori"
    if draw.derivative in (ANY, FORWARD):
        how = draw.one(["fori", "while", "traced fori"])

    def apply(p: Params, x: Any) -> Any:
        again = lambda i, h: jnp.tanh(0.5 * h + inner.apply(p, h))  # noqa: E731
        if how == "fori":
            return lax.fori_loop(0, 2, again, x)
        if how == "traced fori":
            return lax.fori_loop(0, 1 + (x.sum() > 0).astype(int), again, x)
        go = lambda state: state[0] < 2  # noqa: E731
        return lax.while_loop(go, lambda s: (s[0] + 1, again(*s)), (0, x))[1]

    return _around(inner, f"looped by {how}", apply)


def _stack(count: int, draw: Draw, params: Any) -> Any:
    """Parameters of several layers of one form, on a new first axis."""

    def stacked(a: Any) -> Any:
        scales = draw.rng.uniform(0.7, 1.3, count) if jnp.issubdtype(a.dtype, jnp.inexact) else None
        rows = [a] * count if scales is None else [(a * s).astype(a.dtype) for s in scales]
        return np.stack(rows)

    return jax.tree.map(stacked, params)


@layer(keeps=True, nests=True)
def scanned(draw: Draw, shape: Shape) -> Layer:
    """A scan over layers with stacked parameters, perhaps with checkpointed bodies."""
    inner, count = draw.branch(shape), draw.one([2, 3])
    how = draw.one(["plain", "residual", "checkpointed", "reversed"])

    def apply(p: Params, x: Any) -> Any:
        def body(h: Any, layer_params: Any) -> Any:
            y = inner.apply(layer_params, h)
            return (h + y if how == "residual" else y), None

        run = jax.checkpoint(body) if how == "checkpointed" else body
        return lax.scan(run, x, p, length=count, reverse=how == "reversed")[0]

    params = _stack(count, draw, inner.params)
    return Layer(f"scanned {how} {count} ({inner.text})", params, apply, shape)


@layer(keeps=True, nests=True)
def scanned_collecting(draw: Draw, shape: Shape) -> Layer:
    """A scan whose results of every layer are used: their mean, or the largest."""
    inner, how = draw.branch(shape), draw.one(["mean", "max"])

    def apply(p: Params, x: Any) -> Any:
        def body(h: Any, layer_params: Any) -> Any:
            y = inner.apply(layer_params, h)
            return y, y * y

        last, rows = lax.scan(body, x, p, length=2)
        return last + getattr(rows, how)(0)

    params = _stack(2, draw, inner.params)
    return Layer(f"scanned_collecting {how} ({inner.text})", params, apply, shape)


@layer(keeps=True, nests=True)
def unrolled(draw: Draw, shape: Shape) -> Layer:
    """The same stacked parameters taken apart in Python."""
    inner = draw.branch(shape)

    def apply(p: Params, x: Any) -> Any:
        for i in range(2):
            x = inner.apply(jax.tree.map(lambda a, i=i: a[i], p), x)
        return x

    return Layer(f"unrolled 2 ({inner.text})", _stack(2, draw, inner.params), apply, shape)


@layer(keeps=True, nests=True)
def mapped(draw: Draw, shape: Shape) -> Layer:
    """vmap over an ensemble's members, then their mean."""
    inner = draw.branch(shape)

    def apply(p: Params, x: Any) -> Any:
        return jax.vmap(inner.apply, (0 if p else None, None), axis_size=2)(p, x).mean(0)

    return Layer(f"mapped 2 ({inner.text})", _stack(2, draw, inner.params), apply, shape)


@layer(keeps=True, nests=True)
def mapped_rows(draw: Draw, shape: Shape) -> Layer:
    """lax.map over the batch."""
    inner = draw.branch(shape)

    def apply(p: Params, x: Any) -> Any:
        return lax.map(lambda row: inner.apply(p, row[None])[0], x)

    return _around(inner, "mapped_rows", apply)


@layer(keeps=True, nests=True)
def own_vjp(draw: Draw, shape: Shape) -> Layer | None:
    """A custom_vjp: the gradient of its input is clipped, or passed straight through."""
    if draw.derivative in (FORWARD, BOTH):
        return None
    inner, how = draw.differentiated().branch(shape), draw.one(["scaled", "straight through"])
    function = jax.custom_vjp(inner.apply)

    def forward(p: Params, x: Any) -> Any:
        return inner.apply(p, x), (p, x)

    def backward(saved: Any, cotangent: Any) -> Any:
        gp, gx = jax.vjp(inner.apply, *saved)[1](cotangent)
        return gp, 0.5 * gx if how == "scaled" else cotangent

    function.defvjp(forward, backward)
    return _around(inner, f"own_vjp {how}", lambda p, x: function(p, x))


@layer(keeps=True)
def own_jvp(draw: Draw, shape: Shape) -> Layer:
    """A custom_jvp with a gradient that differs from its function's."""

    @jax.custom_jvp
    def clipped(x: Any) -> Any:
        return jnp.clip(x, -1.0, 1.0)

    @clipped.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return clipped(primals[0]), 0.7 * tangents[0] * jnp.cos(primals[0])

    return Layer("own_jvp clip", {}, lambda p, x: clipped(x), shape)


@layer(keeps=True, nests=True)
def gradient_inside(draw: Draw, shape: Shape) -> Layer:
    """The gradient of a branch's energy with respect to its input (a score network)."""
    inner = draw.differentiated().branch(shape)

    def apply(p: Params, x: Any) -> Any:
        return jax.grad(lambda h: jnp.sum(jnp.tanh(inner.apply(p, h))))(x)

    return _around(inner, "gradient_inside", apply)


@layer(keeps=True, nests=True)
def stopped(draw: Draw, shape: Shape) -> Layer:
    inner = draw.branch(shape)
    return _around(inner, "stopped", lambda p, x: x + lax.stop_gradient(inner.apply(p, x)))
