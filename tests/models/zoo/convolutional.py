"""Rows 1 to 11, 29 to 32, 45, 49: images."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.models.zoo.common import Model, attend, drawn, entry, floats, heads, linen

IMAGE = floats(2, 8, 8, 3)


def conv(features: int, size: int = 3, **options: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), **options)


def batch_norm() -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True)


def convolve(x: jax.Array, kernel: jax.Array, groups: int = 1, layout: str = "NHWC") -> jax.Array:
    numbers = (layout, "HWIO", layout)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm()(conv(8)(x)))
        for _ in range(2):
            y = nn.relu(batch_norm()(conv(6)(x)))
            x = nn.relu(x + batch_norm()(conv(8)(y)))
        y = batch_norm()(conv(10, strides=2)(x))
        x = nn.relu(y + conv(10, 1, strides=2)(x))
        return nn.Dense(5)(x.mean((1, 2)))


@entry(
    1,
    prunable={
        "params/Conv_0/kernel:3": (8,),
        "params/Conv_1/kernel:3": (6,),
        "params/Conv_5/kernel:3": (10,),
    },
)
def resnet() -> Model:
    return linen(ResNet(), IMAGE)


@entry(2, prunable={"up:1": (8,), "down:1": ()})
def residual_from_input_to_output() -> Model:
    def fn(p, x):
        return x + jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"] + p["shift"]

    return fn, drawn(up=(4, 8), bias=(8,), down=(8, 4), shift=(4,)), (floats(3, 4),)


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(4)(x)
        for _ in range(2):
            y = nn.relu(batch_norm()(x))
            x = jnp.concatenate([x, conv(6)(y)], -1)
        x = nn.avg_pool(conv(8, 1)(x), (2, 2), (2, 2))
        return nn.Dense(5)(x.mean((1, 2)))


@entry(3, prunable={"params/Conv_3/kernel:2": (4, 6, 6), "params/Conv_3/kernel:3": (8,)})
def densenet() -> Model:
    return linen(DenseNet(), IMAGE)


class UNet(nn.Module):
    """Two levels; the normalisation is a function of the width."""

    groups: int = 0

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.GroupNorm(self.groups) if self.groups else batch_norm()  # noqa: E731
        high = nn.relu(norm()(conv(4)(x)))
        low = nn.max_pool(high, (2, 2), (2, 2))
        low = nn.relu(norm()(conv(8)(low)))
        up = nn.ConvTranspose(4, (2, 2), (2, 2))(low)
        x = nn.relu(norm()(conv(6)(jnp.concatenate([high, up], -1))))
        low = jax.image.resize(low, (*x.shape[:3], low.shape[-1]), "bilinear")
        return conv(2, 1)(jnp.concatenate([x, low], -1))


@entry(4, prunable={"params/Conv_2/kernel:2": (4, 4), "params/ConvTranspose_0/kernel:2": (8,)})
def unet() -> Model:
    return linen(UNet(), IMAGE)


@entry(12, prunable={"params/Conv_0/kernel:3": (2, 2), "params/Conv_1/kernel:3": (2, 4)})
def unet_with_group_norm() -> Model:
    return linen(UNet(groups=2), IMAGE)


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b, c = jnp.split(nn.relu(conv(10)(x)), [2, 5], -1)
        x = jnp.concatenate([conv(4)(a), b, nn.relu(conv(6, 1)(c))], -1)
        return nn.Dense(5)(x.mean((1, 2)))


@entry(5, prunable={"params/Conv_0/kernel:3": (2, 3, 5), "params/Dense_0/kernel:0": (4, 3, 6)})
def split_branches_concat() -> Model:
    return linen(Inception(), IMAGE)


def shuffled(x: jax.Array, groups: int) -> jax.Array:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return jnp.swapaxes(parts, -1, -2).reshape(x.shape)


class ShuffleNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(16, 1)(x)
        y = nn.relu(batch_norm()(conv(16, 1, feature_group_count=2)(x)))
        y = conv(16, feature_group_count=16)(shuffled(y, 2))
        y = batch_norm()(conv(16, 1, feature_group_count=2)(y))
        return nn.Dense(5)(nn.relu(jnp.concatenate([x, y], -1)).mean((1, 2)))


@entry(6, prunable={"params/Conv_0/kernel:3": (2, 8)})
def shufflenet() -> Model:
    return linen(ShuffleNet(), IMAGE)


@entry(6, prunable={"a:3": (2, 6), "b:3": (6, 2)})
def channel_shuffle_alone() -> Model:
    def fn(p, x):
        x = shuffled(jax.nn.relu(convolve(x, p["a"])), 2)
        x = jax.nn.relu(convolve(x, p["b"], groups=6))
        return x.mean((1, 2)) @ p["out"]

    shapes = {"a": (3, 3, 3, 12), "b": (3, 3, 2, 12), "out": (12, 5)}
    return fn, drawn(**shapes), (IMAGE,)


class MobileNet(nn.Module):
    multiplier: int = 1

    @nn.compact
    def __call__(self, x):
        x = conv(4)(x)
        y = nn.hard_swish(batch_norm()(conv(8, 1)(x)))
        y = conv(8 * self.multiplier, feature_group_count=8, strides=2)(y)
        y = nn.relu6(batch_norm()(y))
        return nn.Dense(5)(nn.elu(conv(6, 1)(y)).mean((1, 2)))


@entry(7, prunable={"params/Conv_2/kernel:3": (8,), "params/Conv_0/kernel:3": (4,)})
def depthwise() -> Model:
    return linen(MobileNet(), IMAGE)


@entry(7, prunable={"params/Conv_2/kernel:3": (8, 3)})
def depth_multiplier() -> Model:
    return linen(MobileNet(multiplier=3), IMAGE)


class ResNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(6)(x))
        y = nn.relu(batch_norm()(conv(8, 1)(x)))
        y = nn.relu(batch_norm()(conv(12, feature_group_count=4)(y)))
        x = nn.relu(x + conv(6, 1)(y))
        return nn.Dense(5)(x.mean((1, 2)))


@entry(8, prunable={"params/Conv_1/kernel:3": (4, 2), "params/Conv_2/kernel:3": (4, 3)})
def grouped_convolution() -> Model:
    return linen(ResNeXt(), IMAGE)


class SqueezeExcite(nn.Module):
    """The gate is dense, or a 1x1 convolution of the pooled image."""

    dense: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense if self.dense else lambda n: conv(n, 1)
        x = nn.relu(batch_norm()(conv(8)(x)))
        pooled = x.mean((1, 2)) if self.dense else x.mean((1, 2), keepdims=True)
        gate = nn.sigmoid(layer(8)(nn.relu(layer(4)(pooled))))
        x = x * (gate[:, None, None] if self.dense else gate)
        return nn.Dense(5)(x.mean((1, 2)))


@entry(9, prunable={"params/Conv_0/kernel:3": (8,), "params/Dense_1/kernel:1": (4,)})
def squeeze_excite_dense() -> Model:
    return linen(SqueezeExcite(dense=True), IMAGE)


@entry(9, prunable={"params/Conv_0/kernel:3": (8,), "params/Conv_2/kernel:3": (4,)})
def squeeze_excite_convolution() -> Model:
    return linen(SqueezeExcite(dense=False), IMAGE)


class Flattened(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(conv(6)(x)), (4, 4), (4, 4))
        return nn.Dense(5)(nn.gelu(nn.Dense(8)(x.reshape(x.shape[0], -1))))


@entry(10, prunable={"params/Conv_0/kernel:3": (6,), "params/Dense_1/kernel:0": (6,)})
def flatten_channels_last() -> Model:
    return linen(Flattened(), IMAGE)


@entry(10, prunable={"a:3": (6,), "b:0": (6,)})
def flatten_channels_first() -> Model:
    def fn(p, x):
        x = jax.nn.relu(convolve(x, p["a"], layout="NCHW") + p["bias"][:, None, None])
        return jax.nn.tanh(x.reshape(x.shape[0], -1) @ p["b"]) @ p["c"]

    shapes = {"a": (3, 3, 3, 6), "bias": (6,), "b": (6 * 16, 8), "c": (8, 5)}
    return fn, drawn(**shapes), (floats(2, 3, 4, 4),)


@entry(11, prunable={"a:3": (6,), "b:3": (3,), "c:2": (3,)})
def pixel_shuffle() -> Model:
    def fn(p, x):
        x = convolve(jax.nn.relu(convolve(x, p["a"])), p["b"])
        n, h, w, _ = x.shape
        x = x.reshape(n, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, -1)
        return convolve(jax.nn.relu(x), p["c"])

    shapes = {"a": (3, 3, 3, 6), "b": (3, 3, 6, 12), "c": (3, 3, 3, 2)}
    return fn, drawn(**shapes), (floats(2, 4, 4, 3),)


@entry(11, prunable={"a:3": (4,), "b:2": (4,), "b:3": (6,)})
def space_to_depth() -> Model:
    def fn(p, x):
        x = jax.nn.relu(convolve(x, p["a"]))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        x = convolve(x.reshape(n, h // 2, w // 2, 4 * c), p["b"])
        return jax.nn.relu(x).mean((1, 2)) @ p["out"]

    shapes = {"a": (3, 3, 3, 4), "b": (3, 3, 16, 6), "out": (6, 5)}
    return fn, drawn(**shapes), (floats(2, 4, 4, 3),)


def layer_norm(p: Any, name: str, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-6)
    return x * p[f"{name}_scale"] + p[f"{name}_bias"]


def windows(x: Any, size: int) -> Any:
    n, h, w, c = x.shape
    x = x.reshape(n, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, size * size, c)


def unwindowed(x: jax.Array, size: int, n: int, h: int, w: int) -> jax.Array:
    x = x.reshape(n, h // size, w // size, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h, w, -1)


def shift_mask(side: int, size: int, shift: int) -> np.ndarray:
    """Additive mask: a shifted window must not mix what the roll brought together."""
    region = np.zeros((side, side))
    edges = [(0, side - size), (side - size, side - shift), (side - shift, side)]
    for i, (top, bottom) in enumerate(edges):
        for j, (left, right) in enumerate(edges):
            region[top:bottom, left:right] = 3 * i + j
    flat = windows(region[None, :, :, None], size)[..., 0]
    return np.where(flat[:, :, None] == flat[:, None, :], 0.0, -100.0).astype(np.float32)


def swin_block(p: Any, x: jax.Array, shift: int, size: int = 2) -> jax.Array:
    n, h, w, _ = x.shape
    y = jnp.roll(layer_norm(p, "norm", x), (-shift, -shift), (1, 2))
    q, k, v = (heads(z, 2) for z in jnp.split(windows(y, size) @ p["qkv"] + p["qkv_bias"], 3, -1))
    bias = p["relative"][np.arange(size**4) % 9].reshape(size**2, size**2, 2).transpose(2, 0, 1)
    if shift:
        mask = jnp.asarray(shift_mask(h, size, shift))
        bias = bias + jnp.tile(mask, (n, 1, 1))[:, None].astype(bias.dtype)
    y = unwindowed(attend(q, k, v, bias) @ p["proj"], size, n, h, w)
    x = x + jnp.roll(y, (shift, shift), (1, 2))
    hidden = jax.nn.gelu(layer_norm(p, "mlp", x) @ p["up"] + p["up_bias"])
    return x + hidden @ p["down"]


def swin_shapes(width: int) -> dict[str, tuple[int, ...]]:
    inner = {"qkv": (width, 24), "qkv_bias": (24,), "relative": (9, 2), "proj": (8, width)}
    norms = {f"{n}_{k}": (width,) for n in ("norm", "mlp") for k in ("scale", "bias")}
    return {**inner, **norms, "up": (width, 10), "up_bias": (10,), "down": (10, width)}


@entry(29, prunable={"block/qkv:1": (2, 4, 4), "embed:3": (4,), "block/up:1": (10,)})
def swin_with_shifted_windows() -> Model:
    def fn(p, x):
        x = convolve(x, p["embed"])
        x = swin_block(p["block"], x, 0)
        x = swin_block(p["block2"], x, 1)
        return x.mean((1, 2)) @ p["out"]

    params = drawn(embed=(1, 1, 3, 4), out=(4, 5))
    params |= {"block": drawn(**swin_shapes(4)), "block2": drawn(**swin_shapes(4))}
    return fn, params, (floats(2, 4, 4, 3),)


@entry(11, prunable={"embed:3": (4,), "merge:0": (4,), "merge:1": (8,)})
def swin_patch_merging() -> Model:
    def fn(p, x):
        x = swin_block(p["block"], convolve(x, p["embed"]), 1)
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = layer_norm(p, "merge", jnp.concatenate(corners, -1)) @ p["merge"]
        return jax.nn.gelu(x).mean((1, 2)) @ p["out"]

    params = drawn(
        embed=(1, 1, 3, 4), merge_scale=(16,), merge_bias=(16,), merge=(16, 8), out=(8, 5)
    )
    params["block"] = drawn(**swin_shapes(4))
    return fn, params, (floats(2, 4, 4, 3),)


class ConvNeXt(nn.Module):
    """A block with global response normalisation, or with layer scale."""

    response: bool

    @nn.compact
    def __call__(self, x):
        x = conv(6, 2, strides=2)(x)
        y = nn.LayerNorm()(conv(6, 3, feature_group_count=6)(x))
        y = nn.gelu(nn.Dense(12)(y))
        if self.response:
            norm = jnp.sqrt(jnp.sum(y * y, (1, 2), keepdims=True) + 1e-6)
            norm = norm / (norm.mean(-1, keepdims=True) + 1e-6)
            gamma = self.param("grn_gamma", nn.initializers.zeros, (12,))
            y = y + y * norm * gamma + self.param("grn_beta", nn.initializers.zeros, (12,))
        y = nn.Dense(6)(y)
        if not self.response:
            y = y * self.param("layer_scale", nn.initializers.ones, (6,))
        return nn.Dense(5)((x + y).mean((1, 2)))


@entry(30, prunable={"params/Conv_0/kernel:3": (6,), "params/grn_gamma:0": (12,)})
def convnext_with_response_norm() -> Model:
    return linen(ConvNeXt(response=True), IMAGE)


@entry(30, prunable={"params/layer_scale:0": (6,), "params/Dense_0/kernel:1": (12,)})
def convnext_with_layer_scale() -> Model:
    return linen(ConvNeXt(response=False), IMAGE)


@entry(30, prunable={"embed:3": (6,), "up:1": (12,), "gamma:0": (6,)})
def convnext_channels_first() -> Model:
    def fn(p, x):
        x = convolve(x, p["embed"], layout="NCHW")
        y = convolve(x, p["depthwise"], groups=6, layout="NCHW").transpose(0, 2, 3, 1)
        y = layer_norm(p, "norm", y)
        y = p["gamma"] * (jax.nn.gelu(y @ p["up"]) @ p["down"])
        return (x + y.transpose(0, 3, 1, 2)).mean((2, 3)) @ p["out"]

    shapes = {"embed": (1, 1, 3, 6), "depthwise": (3, 3, 1, 6), "norm_scale": (6,)}
    shapes |= {"norm_bias": (6,), "up": (6, 12), "down": (12, 6), "gamma": (6,), "out": (6, 5)}
    return fn, drawn(**shapes), (floats(2, 3, 4, 4),)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(8, 4, strides=4)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], 1)
        x = x + self.param("pos", nn.initializers.zeros, (1, x.shape[1], 8))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x)[:, 0])


@entry(31, prunable={"params/cls:2": (8,), "params/pos:2": (8,), "params/Dense_1/kernel:1": (12,)})
def vit_with_class_token() -> Model:
    return linen(ViT(), IMAGE)


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(6, 4, strides=4)(x).reshape(x.shape[0], -1, 6)
        for _ in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(8)(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


@entry(
    32,
    prunable={
        "params/Conv_0/kernel:3": (6,),
        "params/Dense_1/kernel:1": (8,),
        "params/Dense_3/kernel:1": (10,),
    },
)
def mlp_mixer() -> Model:
    return linen(Mixer(), IMAGE)


class OptionA(nn.Module):
    """A shortcut that strides and pads with zero channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm()(conv(4)(x)))
        y = nn.relu(batch_norm()(conv(8, strides=2)(x)))
        y = batch_norm()(conv(8)(y))
        x = nn.relu(y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2))))
        return nn.Dense(5)(x.mean((1, 2)))


@entry(45, prunable={"params/Conv_0/kernel:3": (4,), "params/Conv_2/kernel:3": (2, 4, 2)})
def zero_padded_shortcut() -> Model:
    return linen(OptionA(), IMAGE)


@entry(45, prunable={"up:1": (6,), "down:0": (2, 6)})
def concatenated_constants() -> Model:
    def fn(p, x):
        x = jnp.tanh(x @ p["up"])
        ones = jnp.full((*x.shape[:-1], 2), 0.5, x.dtype)
        return jnp.concatenate([ones, x], -1) @ p["down"]

    return fn, drawn(up=(3, 6), down=(8, 5)), (floats(4, 3),)


@entry(45, prunable={"up:1": (6,), "null:1": (6,), "kv:1": (2, 6)})
def learned_null_token() -> Model:
    def fn(p, x):
        x = jnp.tanh(x @ p["up"])
        null = jnp.broadcast_to(p["null"], (x.shape[0], 1, x.shape[-1]))
        context = jnp.concatenate([null, x], 1)
        k, v = jnp.split(context @ p["kv"], [2], -1)
        logits = jnp.einsum("bqd,bkd->bqk", x @ p["q"], k) / math.sqrt(2)
        return jax.nn.softmax(logits, -1) @ v @ p["out"]

    shapes = {"up": (3, 6), "null": (1, 6), "q": (6, 2), "kv": (6, 8), "out": (6, 5)}
    return fn, drawn(**shapes), (floats(2, 4, 3),)


class Pyramid(nn.Module):
    """A feature pyramid: one width for all levels, an output for each, an auxiliary head."""

    @nn.compact
    def __call__(self, x):
        high = nn.relu(batch_norm()(conv(6)(x)))
        low = nn.relu(batch_norm()(conv(8, strides=2)(high)))
        top = conv(4, 1)(low)
        n, h, w, c = top.shape
        merged = conv(4, 1)(high) + jax.image.resize(top, (n, 2 * h, 2 * w, c), "nearest")
        head = conv(3)
        outputs = [head(nn.relu(merged)), head(nn.relu(top))]
        return outputs, nn.Dense(5)(low.mean((1, 2)))


@entry(49, prunable={"params/Conv_0/kernel:3": (6,), "params/Conv_2/kernel:3": (4,)})
def feature_pyramid() -> Model:
    return linen(Pyramid(), IMAGE)
