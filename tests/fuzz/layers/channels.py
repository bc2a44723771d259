"""Layers that act on channels: activations, norms, layout, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "relu by maximum": lambda x: jnp.maximum(x, 0),
    "relu6": jax.nn.relu6,
    "leaky relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "hard swish": jax.nn.hard_swish,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "soft sign": jax.nn.soft_sign,
    "x |x|": lambda x: x * jnp.abs(x),
    "cube": lambda x: 0.1 * x**3,
    # at 0 these are not 0
    "sigmoid": jax.nn.sigmoid,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "exp": lambda x: jnp.exp(0.3 * jnp.clip(x, -9, 9)),
    "cos": jnp.cos,
    "softplus": jax.nn.softplus,
    "log sigmoid": jax.nn.log_sigmoid,
    "1 / (1 + x^2)": lambda x: 1 / (1 + x * x),
    "rsqrt(1 + x^2)": lambda x: lax.rsqrt(1 + jnp.square(x)),
    "x + 0.5": lambda x: x + 0.5,
    "1 - x": lambda x: 1 - x,
    "where x > 0": lambda x: jnp.where(x > 0, x, 0.3),
}


def plain(shape: Shape, text: str, function: Callable[[Any], Any]) -> Layer:
    """A layer without parameters that keeps the shape."""
    return Layer(text, {}, lambda p, x: function(x), shape)


@layer(keeps=True)
def activation(draw: Draw, shape: Shape) -> Layer:
    name = draw.one(list(ACTIVATIONS))
    return plain(shape, f"activation {name}", ACTIVATIONS[name])


@layer(keeps=True)
def bias(draw: Draw, shape: Shape) -> Layer:
    return Layer("bias", {"bias": draw.weights(shape[-1])}, lambda p, x: x + p["bias"], shape)


@layer(keeps=True)
def scale(draw: Draw, shape: Shape) -> Layer:
    return Layer("scale", {"scale": draw.positive(shape[-1])}, lambda p, x: x * p["scale"], shape)


@layer(keeps=True)
def table(draw: Draw, shape: Shape) -> Layer | None:
    """A table of its own for each position, or a constant one that is no parameter."""
    inner = shape[1:]
    if draw.maybe():
        longer = (inner[0] + 2, *inner[1:]) if len(inner) > 1 else inner
        values = draw.weights(*longer)
        return Layer("table", {"table": values}, lambda p, x: x + p["table"][: inner[0]], shape)
    constant = draw.rng.normal(size=inner)
    return plain(shape, "table constant", lambda x: x + constant)


# ---------------------------------------------------------------------------------------- norms


def _statistics(x: Any, axis: Any, way: str) -> tuple[Any, Any]:
    mean = x.mean(axis, keepdims=True)
    if way == "var":
        return mean, jnp.var(x, axis, keepdims=True)
    if way == "slow":
        return mean, jnp.square(x - mean).mean(axis, keepdims=True)
    return mean, jnp.maximum(jnp.square(x).mean(axis, keepdims=True) - jnp.square(mean), 0)


def _affine(draw: Draw, width: int) -> Params:
    return {"scale": draw.positive(width), "bias": draw.weights(width)}


@layer(keeps=True)
def layer_norm(draw: Draw, shape: Shape) -> Layer:
    way = draw.one(["fast", "slow", "var"])

    def apply(p: Params, x: Any) -> Any:
        mean, var = _statistics(x, -1, way)
        return (x - mean) * lax.rsqrt(var + 1e-2) * p["scale"] + p["bias"]

    return Layer(f"layer_norm {way}", _affine(draw, shape[-1]), apply, shape)


@layer(keeps=True)
def rms_norm(draw: Draw, shape: Shape) -> Layer:
    def apply(p: Params, x: Any) -> Any:
        return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-2) * (1 + p["scale"])

    return Layer("rms_norm", {"scale": draw.positive(shape[-1])}, apply, shape)


@layer(keeps=True)
def unit_norm(draw: Draw, shape: Shape) -> Layer:
    return plain(shape, "unit_norm", lambda x: x / jnp.sqrt(1e-2 + (x * x).sum(-1, keepdims=True)))


@layer(keeps=True)
def group_norm(draw: Draw, shape: Shape) -> Layer | None:
    groups, way = draw.factor(shape[-1]), draw.one(["fast", "var"])
    if groups is None:
        return None

    def apply(p: Params, x: Any) -> Any:
        split = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        mean, var = _statistics(split, (*range(1, x.ndim - 1), -1), way)
        flat = ((split - mean) * lax.rsqrt(var + 1e-2)).reshape(x.shape)
        return flat * p["scale"] + p["bias"]

    return Layer(f"group_norm {groups} groups, {way}", _affine(draw, shape[-1]), apply, shape)


@layer(keeps=True)
def batch_norm(draw: Draw, shape: Shape) -> Layer:
    """With given statistics, or with those of the batch."""
    params = _affine(draw, shape[-1])
    if draw.maybe(0.3):

        def train(p: Params, x: Any) -> Any:
            mean, var = _statistics(x, tuple(range(x.ndim - 1)), "fast")
            return (x - mean) * lax.rsqrt(var + 1e-2) * p["scale"] + p["bias"]

        return Layer("batch_norm train", params, train, shape)

    def apply(p: Params, x: Any) -> Any:
        return (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-2) * p["scale"] + p["bias"]

    params |= {"mean": draw.weights(shape[-1]), "var": draw.positive(shape[-1])}
    return Layer("batch_norm", params, apply, shape)


# ---------------------------------------------------------------------------- mixing of channels

MIXED: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "log softmax": lambda x: jax.nn.log_softmax(x, -1),
    "less the mean": lambda x: x - x.mean(-1, keepdims=True),
    "less the max": lambda x: x - x.max(-1, keepdims=True),
    "less the min": lambda x: x - x.min(-1, keepdims=True),
    "less the log of summed exp": lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True),
    "times the sum": lambda x: 0.1 * x * jnp.sum(x, -1, keepdims=True),
    "over the std": lambda x: x / (0.1 + jnp.std(x, -1, keepdims=True)),
    "times the product": lambda x: x * jnp.prod(jnp.tanh(x) + 1, -1, keepdims=True),
    "cumulative sum": lambda x: jnp.cumsum(x, -1),
    "cumulative max": lambda x: lax.cummax(x, x.ndim - 1),
    "sum of squares added": lambda x: x + 0.1 * jnp.einsum("...c,...c->...", x, x)[..., None],
}


@layer(keeps=True)
def mixed(draw: Draw, shape: Shape) -> Layer:
    name = draw.one(list(MIXED))
    return plain(shape, f"mixed {name}", MIXED[name])


@layer()
def reduced(draw: Draw, shape: Shape) -> Layer:
    """Channels become one number, and that becomes channels again."""
    how = draw.one(["mean", "max", "min", "sum"])
    width = draw.width()

    def apply(p: Params, x: Any) -> Any:
        return getattr(x, how)(-1)[..., None] * p["kernel"]

    return Layer(
        f"reduced {how} of channels", {"kernel": draw.weights(width)}, apply, (*shape[:-1], width)
    )


# --------------------------------------------------------------------------------------- layout


@layer()
def padded(draw: Draw, shape: Shape) -> Layer:
    low, high = draw.one([(0, 2), (2, 2), (1, 0)])
    value = draw.one([0.0, 0.0, 0.5])
    edges = [(0, 0)] * (len(shape) - 1) + [(low, high)]
    result = (*shape[:-1], shape[-1] + low + high)

    def apply(p: Params, x: Any) -> Any:
        return jnp.pad(x, edges, constant_values=value)

    return Layer(f"padded {low}, {high} with {value}", {}, apply, result)


@layer()
def cut(draw: Draw, shape: Shape) -> Layer | None:
    """A slice of the channels, contiguous or strided."""
    if shape[-1] < 4:
        return None
    start, stop, step = draw.one(
        [(0, shape[-1] // 2, 1), (1, shape[-1] - 1, 1), (0, shape[-1], 2), (1, shape[-1], 2)]
    )
    width = len(range(start, stop, step))

    def apply(p: Params, x: Any) -> Any:
        return x[..., start:stop:step]

    return Layer(f"cut {start}:{stop}:{step}", {}, apply, (*shape[:-1], width))


@layer(keeps=True)
def halves(draw: Draw, shape: Shape) -> Layer | None:
    """Split, treated differently, and put together, perhaps in another order."""
    if shape[-1] < 4:
        return None
    at = draw.one([shape[-1] // 2, shape[-1] // 3, shape[-1] - 1])
    names = [draw.one(list(ACTIVATIONS)) for _ in range(2)]
    turn = draw.maybe()

    def apply(p: Params, x: Any) -> Any:
        parts = [ACTIVATIONS[n](part) for n, part in zip(names, jnp.split(x, [at], -1))]
        return jnp.concatenate(parts[::-1] if turn else parts, -1)

    text = f"halves at {at}: {names[0]} | {names[1]}{', swapped' if turn else ''}"
    return Layer(text, {}, apply, shape)


@layer()
def glu(draw: Draw, shape: Shape) -> Layer | None:
    """One half of the channels gates the other."""
    if shape[-1] % 2:
        return None
    name = draw.one(["sigmoid", "silu", "gelu", "relu", "cos"])
    strided = draw.maybe(0.3)

    def apply(p: Params, x: Any) -> Any:
        a, b = (x[..., ::2], x[..., 1::2]) if strided else jnp.split(x, 2, -1)
        return ACTIVATIONS[name](a) * b

    text = f"glu {name}{', interleaved' if strided else ''}"
    return Layer(text, {}, apply, (*shape[:-1], shape[-1] // 2))


@layer(keeps=True)
def shuffle(draw: Draw, shape: Shape) -> Layer | None:
    """Channel shuffle: (g, c / g) turned round."""
    groups = draw.factor(shape[-1])
    if groups is None:
        return None

    def apply(p: Params, x: Any) -> Any:
        split = x.reshape(*x.shape[:-1], groups, -1)
        return jnp.swapaxes(split, -1, -2).reshape(x.shape)

    return Layer(f"shuffle {groups} groups", {}, apply, shape)


@layer()
def maxout(draw: Draw, shape: Shape) -> Layer | None:
    pieces = draw.factor(shape[-1])
    if pieces is None:
        return None
    first, how = draw.maybe(), draw.one(["max", "sum", "mean"])

    def apply(p: Params, x: Any) -> Any:
        sizes = (pieces, -1) if first else (-1, pieces)
        return getattr(x.reshape(*x.shape[:-1], *sizes), how)(-2 if first else -1)

    text = f"maxout {how} of {pieces}{', strided' if first else ''}"
    return Layer(text, {}, apply, (*shape[:-1], shape[-1] // pieces))


@layer()
def repeated(draw: Draw, shape: Shape) -> Layer:
    """Each channel twice in a row (repeat), or all of them twice (tile)."""
    how = draw.one(["repeat", "tile", "concatenate"])

    def apply(p: Params, x: Any) -> Any:
        if how == "repeat":
            return jnp.repeat(x, 2, -1)
        return jnp.tile(x, 2) if how == "tile" else jnp.concatenate([x, x], -1)

    return Layer(f"repeated by {how}", {}, apply, (*shape[:-1], 2 * shape[-1]))


@layer(keeps=True)
def permuted(draw: Draw, shape: Shape) -> Layer:
    """Channels in another fixed order: reversed, rolled, or by a table of positions."""
    how = draw.one(["reversed", "rolled", "by a table"])
    order = draw.rng.permutation(shape[-1])

    def apply(p: Params, x: Any) -> Any:
        if how == "reversed":
            return x[..., ::-1]
        return jnp.roll(x, 1, -1) if how == "rolled" else x[..., order]

    return Layer(f"permuted {how}", {}, apply, shape)


@layer(keeps=True)
def masked_channels(draw: Draw, shape: Shape) -> Layer:
    """A constant pattern over the channels, from positions or from a table."""
    if draw.maybe():
        return plain(
            shape,
            "masked_channels by position",
            lambda x: jnp.where(jnp.arange(x.shape[-1]) % 3 == 0, 0.2, x),
        )
    table = draw.rng.normal(size=shape[-1])
    return plain(shape, "masked_channels by a constant", lambda x: x * table)


@layer()
def flatten(draw: Draw, shape: Shape) -> Layer | None:
    if len(shape) == 2:
        return None
    result = (shape[0], int(np.prod(shape[1:])))
    order = draw.one(["channels last", "channels first"])

    def apply(p: Params, x: Any) -> Any:
        turned = x if order == "channels last" else jnp.moveaxis(x, -1, 1)
        return turned.reshape(x.shape[0], -1)

    return Layer(f"flatten {order}", {}, apply, result)


@layer()
def pooled(draw: Draw, shape: Shape) -> Layer | None:
    """Everything but batch and channels is reduced away."""
    if len(shape) == 2:
        return None
    how = draw.one(["mean", "max", "sum"])
    inner = tuple(range(1, len(shape) - 1))
    return Layer(f"pooled by {how}", {}, lambda p, x: getattr(x, how)(inner), (shape[0], shape[-1]))
