"""Layers with kernels: dense in many spellings, normalised weights, experts, outer products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import ACTIVATIONS


def _dot(x: Any, kernel: Any, how: str) -> Any:
    if how == "einsum":
        return jnp.einsum("...c,cd->...d", x, kernel)
    if how == "transposed kernel":
        return lax.dot_general(x, kernel.T, (((x.ndim - 1,), (1,)), ((), ())))
    if how == "kernel first":
        return jnp.moveaxis(jnp.tensordot(kernel, x, ((0,), (x.ndim - 1,))), 0, -1)
    return x @ kernel


def dense_to(draw: Draw, shape: Shape, width: int) -> Layer:
    how = draw.one(["@", "@", "einsum", "transposed kernel", "kernel first"])
    params = {"kernel": draw.weights(shape[-1], width)}
    if draw.maybe(0.7):
        params["bias"] = draw.weights(width)

    def apply(p: Params, x: Any) -> Any:
        y = _dot(x, p["kernel"], how)
        return y + p["bias"] if "bias" in p else y

    text = f"dense {shape[-1]} -> {width} by {how}{', bias' if 'bias' in params else ''}"
    return Layer(text, params, apply, (*shape[:-1], width))


@layer()
def dense(draw: Draw, shape: Shape) -> Layer:
    return dense_to(draw, shape, draw.width())


@layer()
def dense_activated(draw: Draw, shape: Shape) -> Layer:
    inner, name = dense_to(draw, shape, draw.width()), draw.one(list(ACTIVATIONS))
    return inner._replace(
        text=f"{inner.text}, {name}", apply=lambda p, x: ACTIVATIONS[name](inner.apply(p, x))
    )


@layer(keeps=True)
def bottleneck(draw: Draw, shape: Shape) -> Layer:
    """Up, an activation, and down to the width it had: a transformer's or a mixer's MLP."""
    up = dense_to(draw, shape, draw.width())
    down = dense_to(draw, up.shape, shape[-1])
    name = draw.one(list(ACTIVATIONS))

    def apply(p: Params, x: Any) -> Any:
        return down.apply(p["down"], ACTIVATIONS[name](up.apply(p["up"], x)))

    params = {"up": up.params, "down": down.params}
    return Layer(f"bottleneck {up.shape[-1]} wide, {name}", params, apply, shape)


@layer(keeps=True)
def gated_mlp(draw: Draw, shape: Shape) -> Layer:
    """SwiGLU and its relatives, fused into one kernel or of two."""
    c, width, name = shape[-1], draw.width(), draw.one(["silu", "gelu", "sigmoid", "relu"])
    if draw.maybe():
        params = {"gate_up": draw.weights(c, 2 * width), "down": draw.weights(width, c)}
    else:
        params = {
            "gate": draw.weights(c, width),
            "up": draw.weights(c, width),
            "down": draw.weights(width, c),
        }

    def apply(p: Params, x: Any) -> Any:
        if "gate_up" in p:
            gate, up = jnp.split(x @ p["gate_up"], 2, -1)
        else:
            gate, up = x @ p["gate"], x @ p["up"]
        return (ACTIVATIONS[name](gate) * up) @ p["down"]

    return Layer(
        f"gated_mlp {name}{', fused' if 'gate_up' in params else ''}", params, apply, shape
    )


@layer()
def shared_dense(draw: Draw, shape: Shape) -> Layer:
    """One kernel there and back (a tied embedding)."""
    width, name = draw.width(), draw.one(list(ACTIVATIONS))
    params = {"kernel": draw.weights(shape[-1], width)}

    def apply(p: Params, x: Any) -> Any:
        return ACTIVATIONS[name](x @ p["kernel"]) @ p["kernel"].T

    return Layer(f"shared_dense tied, {name}", params, apply, shape)


@layer(keeps=True)
def applied_twice(draw: Draw, shape: Shape) -> Layer:
    """The same square kernel twice: input and output width are one."""
    params, name = {"kernel": draw.weights(shape[-1], shape[-1])}, draw.one(list(ACTIVATIONS))

    def apply(p: Params, x: Any) -> Any:
        return ACTIVATIONS[name](x @ p["kernel"]) @ p["kernel"]

    return Layer(f"applied_twice {name}", params, apply, shape)


@layer()
def low_rank(draw: Draw, shape: Shape) -> Layer:
    """A kernel plus the product of two thin ones."""
    c, width, rank = shape[-1], draw.width(), draw.one([2, 3, 4])
    params = {
        "kernel": draw.weights(c, width),
        "a": draw.weights(c, rank),
        "b": draw.weights(rank, width),
    }
    merged = draw.maybe()

    def apply(p: Params, x: Any) -> Any:
        if merged:
            return x @ (p["kernel"] + p["a"] @ p["b"])
        return x @ p["kernel"] + (x @ p["a"]) @ p["b"]

    return Layer(
        f"low_rank {rank}{', merged' if merged else ''}", params, apply, (*shape[:-1], width)
    )


def _weight_norm(kernel: Any, gain: Any) -> Any:
    return gain * kernel / jnp.linalg.norm(kernel, axis=0)


def _weight_norm_safe(kernel: Any, gain: Any) -> Any:
    return gain * kernel * lax.rsqrt((kernel * kernel).sum(0, keepdims=True) + 1e-2)


def _standardised(kernel: Any, gain: Any) -> Any:
    centred = kernel - kernel.mean(0, keepdims=True)
    return gain * centred / jnp.sqrt(jnp.var(kernel, 0) + 1e-2)


def _scaled_by_channel(kernel: Any, gain: Any) -> Any:
    return kernel * jnp.exp(gain)[None]


NORMALISED = {
    "weight norm": _weight_norm,
    "weight norm with eps": _weight_norm_safe,
    "weight standardised": _standardised,
    "scaled by channel": _scaled_by_channel,
}


@layer()
def normalised_dense(draw: Draw, shape: Shape) -> Layer:
    width, name = draw.width(), draw.one(list(NORMALISED))
    params = {"kernel": draw.weights(shape[-1], width), "gain": draw.positive(width)}

    def apply(p: Params, x: Any) -> Any:
        return x @ NORMALISED[name](p["kernel"], p["gain"])

    return Layer(f"normalised_dense {name}", params, apply, (*shape[:-1], width))


@layer()
def outer_product(draw: Draw, shape: Shape) -> Layer:
    """Every channel of one projection times every channel of another, flattened."""
    m, n = draw.one([2, 3, 4]), draw.one([2, 3, 4])
    params = {"left": draw.weights(shape[-1], m), "right": draw.weights(shape[-1], n)}

    def apply(p: Params, x: Any) -> Any:
        both = (x @ p["left"])[..., :, None] * (x @ p["right"])[..., None, :]
        return both.reshape(*x.shape[:-1], -1)

    return Layer(f"outer_product {m} x {n}", params, apply, (*shape[:-1], m * n))


@layer()
def bilinear(draw: Draw, shape: Shape) -> Layer:
    c, width = shape[-1], draw.width()
    params = {"kernel": draw.weights(c, width, c)}

    def apply(p: Params, x: Any) -> Any:
        return jnp.einsum("...a,adb,...b->...d", x, p["kernel"], jnp.tanh(x))

    return Layer("bilinear", params, apply, (*shape[:-1], width))


@layer()
def block_dense(draw: Draw, shape: Shape) -> Layer | None:
    """A kernel of its own for each group of channels (batched over groups)."""
    groups, width = draw.factor(shape[-1]), draw.one([2, 3, 4])
    if groups is None:
        return None
    params = {"kernel": draw.weights(groups, shape[-1] // groups, width)}

    def apply(p: Params, x: Any) -> Any:
        split = x.reshape(*x.shape[:-1], groups, -1)
        return jnp.einsum("...gi,gio->...go", split, p["kernel"]).reshape(*x.shape[:-1], -1)

    return Layer(f"block_dense {groups} groups", params, apply, (*shape[:-1], groups * width))


@layer()
def experts(draw: Draw, shape: Shape) -> Layer:
    """A mixture of stacked experts, by softmax or by the two best."""
    c, count, inner, width = shape[-1], draw.one([3, 4]), draw.one([3, 5]), draw.width()
    params = {
        "router": draw.weights(c, count),
        "up": draw.weights(count, c, inner),
        "down": draw.weights(count, inner, width),
    }
    best = draw.maybe(0.3)

    def apply(p: Params, x: Any) -> Any:
        logits = x @ p["router"]
        if best:
            logits = jnp.where(logits >= lax.top_k(logits, 2)[0][..., -1:], logits, -1e9)
        h = jax.nn.gelu(jnp.einsum("...c,ech->...eh", x, p["up"]))
        y = jnp.einsum("...eh,ehd->...ed", h, p["down"])
        return jnp.einsum("...ed,...e->...d", y, jax.nn.softmax(logits))

    text = f"experts {count}{', the two best' if best else ''}"
    return Layer(text, params, apply, (*shape[:-1], width))


@layer()
def by_expert_loop(draw: Draw, shape: Shape) -> Layer:
    """Kernels stacked on a first axis, used one by one in Python and summed."""
    c, count, width = shape[-1], 3, draw.width()
    params = {"kernel": draw.weights(count, c, width)}

    def apply(p: Params, x: Any) -> Any:
        return sum(jnp.tanh(x @ p["kernel"][i]) for i in range(count))

    return Layer("by_expert_loop", params, apply, (*shape[:-1], width))


@layer(keeps=True)
def film(draw: Draw, shape: Shape) -> Layer:
    """A pooled view of the input scales and shifts its channels (adaLN, squeeze-excitation)."""
    c, inner = shape[-1], draw.one([3, 5])
    parts, name = draw.one([1, 2, 3]), draw.one(["relu", "silu", "sigmoid"])
    params = {"down": draw.weights(c, inner), "up": draw.weights(inner, parts * c)}

    def apply(p: Params, x: Any) -> Any:
        pooled = x.mean(tuple(range(1, x.ndim - 1)), keepdims=True) if x.ndim > 2 else x
        made = jnp.split(ACTIVATIONS[name](pooled @ p["down"]) @ p["up"], parts, -1)
        if parts == 1:
            return x * jax.nn.sigmoid(made[0])
        y = x * (1 + made[0]) + made[1]
        return y if parts == 2 else x + made[2] * y

    return Layer(f"film of {parts} parts, {name}", params, apply, shape)
