"""Layers over images: convolutions of all sorts, pooling, resampling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer

LAST = ("NHWC", "HWIO", "NHWC")
FIRST = ("NCHW", "OIHW", "NCHW")


def _made_shape(shape: Shape, kernel: int, stride: int, padding: str, width: int) -> Shape | None:
    sizes = [
        -(-n // stride) if padding == "SAME" else (n - kernel) // stride + 1 for n in shape[1:3]
    ]
    return (shape[0], *sizes, width) if min(sizes) > 0 else None


def _conv(x: Any, kernel: Any, stride: int, padding: str, groups: int, first: bool) -> Any:
    """Channels last, or turned to channels first and back."""
    if not first:
        return lax.conv_general_dilated(
            x, kernel, (stride,) * 2, padding, dimension_numbers=LAST, feature_group_count=groups
        )
    y = lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (stride,) * 2, padding,
        dimension_numbers=FIRST, feature_group_count=groups,
    )  # fmt: skip
    return y.transpose(0, 2, 3, 1)


def _conv_layer(draw: Draw, shape: Shape, groups: int, width: int, stride: int) -> Layer | None:
    kernel, padding, first = draw.one([1, 2, 3]), draw.one(["SAME", "VALID"]), draw.maybe(0.2)
    result = _made_shape(shape, kernel, stride, padding, width)
    if result is None:
        return None
    params = {"kernel": draw.weights(kernel, kernel, shape[-1] // groups, width)}
    if draw.maybe(0.6):
        params["bias"] = draw.weights(width)

    def apply(p: Params, x: Any) -> Any:
        y = _conv(x, p["kernel"], stride, padding, groups, first)
        return y + p["bias"] if "bias" in p else y

    text = f"conv {kernel} x {kernel}, {shape[-1]} -> {width}, {padding}, stride {stride}"
    text += f"{f', {groups} groups' if groups > 1 else ''}{', channels first' if first else ''}"
    return Layer(text, params, apply, result)


@layer(4)
def conv(draw: Draw, shape: Shape) -> Layer | None:
    return _conv_layer(draw, shape, 1, draw.width(), draw.one([1, 1, 2]))


@layer(4)
def grouped_conv(draw: Draw, shape: Shape) -> Layer | None:
    groups = draw.factor(shape[-1])
    if groups is None:
        return None
    return _conv_layer(draw, shape, groups, groups * draw.one([1, 2, 3]), 1)


@layer(4)
def depthwise_conv(draw: Draw, shape: Shape) -> Layer | None:
    multiplier = draw.one([1, 1, 2])
    return _conv_layer(draw, shape, shape[-1], multiplier * shape[-1], draw.one([1, 2]))


@layer(4)
def conv_transpose(draw: Draw, shape: Shape) -> Layer:
    width = draw.width()
    params = {"kernel": draw.weights(2, 2, shape[-1], width)}

    def apply(p: Params, x: Any) -> Any:
        return lax.conv_transpose(x, p["kernel"], (2, 2), "SAME", dimension_numbers=LAST)

    return Layer("conv_transpose", params, apply, (shape[0], 2 * shape[1], 2 * shape[2], width))


@layer(4)
def dilated_conv(draw: Draw, shape: Shape) -> Layer:
    width = draw.width()
    params = {"kernel": draw.weights(3, 3, shape[-1], width)}

    def apply(p: Params, x: Any) -> Any:
        return lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=LAST
        )

    return Layer("dilated_conv", params, apply, (*shape[:3], width))


@layer(4)
def window_pool(draw: Draw, shape: Shape) -> Layer | None:
    how, padding = draw.one(["max", "mean"]), draw.one(["SAME", "VALID"])
    size, stride = draw.one([2, 3]), draw.one([1, 2])
    result = _made_shape(shape, size, stride, padding, shape[-1])
    if result is None:
        return None
    window, strides = (1, size, size, 1), (1, stride, stride, 1)

    def apply(p: Params, x: Any) -> Any:
        if how == "max":
            return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
        return lax.reduce_window(x, 0.0, lax.add, window, strides, padding) / size**2

    return Layer(f"window_pool {how} {size}, stride {stride}, {padding}", {}, apply, result)


@layer(4)
def space_to_depth(draw: Draw, shape: Shape) -> Layer | None:
    b, h, w, c = shape
    if h % 2 or w % 2:
        return None

    def apply(p: Params, x: Any) -> Any:
        x = x.reshape(x.shape[0], h // 2, 2, w // 2, 2, c)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], h // 2, w // 2, 4 * c)

    return Layer("space_to_depth", {}, apply, (b, h // 2, w // 2, 4 * c))


@layer(4)
def depth_to_space(draw: Draw, shape: Shape) -> Layer | None:
    b, h, w, c = shape
    if c % 4:
        return None

    def apply(p: Params, x: Any) -> Any:
        x = x.reshape(x.shape[0], h, w, 2, 2, c // 4)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], 2 * h, 2 * w, c // 4)

    return Layer("depth_to_space", {}, apply, (b, 2 * h, 2 * w, c // 4))


@layer(4)
def upsampled(draw: Draw, shape: Shape) -> Layer:
    b, h, w, c = shape
    how = draw.one(["repeat", "nearest", "bilinear"])

    def apply(p: Params, x: Any) -> Any:
        if how == "repeat":
            return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        return jax.image.resize(x, (x.shape[0], 2 * h, 2 * w, c), how)

    return Layer(f"upsampled by {how}", {}, apply, (b, 2 * h, 2 * w, c))


@layer(4, keeps=True)
def response_norm(draw: Draw, shape: Shape) -> Layer:
    """Global response normalisation of ConvNeXt V2."""
    c = shape[-1]
    params = {"gamma": draw.weights(c), "beta": draw.weights(c)}

    def apply(p: Params, x: Any) -> Any:
        size = jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True) + 1e-3)
        share = size / (size.mean(-1, keepdims=True) + 1e-2)
        return p["gamma"] * x * share + p["beta"] + x

    return Layer("response_norm", params, apply, shape)


@layer(4, keeps=True)
def windows(draw: Draw, shape: Shape) -> Layer | None:
    """Cut into windows, rolled first as Swin does, mixed inside each, and put back."""
    b, h, w, c = shape
    if h % 2 or w % 2:
        return None
    params, roll = {"kernel": draw.weights(4, 4)}, draw.maybe()

    def apply(p: Params, x: Any) -> Any:
        x = jnp.roll(x, (1, 1), (1, 2)) if roll else x
        cut = x.reshape(-1, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        mixed = jnp.einsum("nsc,st->ntc", cut.reshape(-1, 4, c), p["kernel"])
        back = mixed.reshape(-1, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return back.reshape(x.shape)

    return Layer(f"windows{' rolled' if roll else ''}", params, apply, shape)
