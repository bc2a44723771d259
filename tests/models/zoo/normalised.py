"""Rows 12 to 18: normalisation, reuse and tying."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.models.zoo.common import Model, drawn, entry, filled, floats, linen, rms, tokens
from tests.models.zoo.convolutional import IMAGE, batch_norm, conv, convolve


@entry(12, prunable={"a:3": (2, 3), "b:2": (2, 3)})
def group_norm_by_hand() -> Model:
    def fn(p, x):
        x = convolve(x, p["a"]) + p["bias"]
        groups = x.reshape(*x.shape[:-1], 2, -1)
        mean = groups.mean((1, 2, 4), keepdims=True)
        variance = groups.var((1, 2, 4), keepdims=True)
        x = ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
        return convolve(jax.nn.silu(x * p["scale"] + p["shift"]), p["b"])

    shapes = {"a": (3, 3, 3, 6), "bias": (6,), "scale": (6,), "shift": (6,), "b": (3, 3, 6, 2)}
    return fn, drawn(**shapes), (floats(2, 4, 4, 3),)


class InstanceNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.InstanceNorm()(conv(6)(x)))
        return nn.Dense(5)(nn.relu(conv(4)(x)).mean((1, 2)))


@entry(12, prunable={"params/Conv_0/kernel:3": (6,)})
def instance_norm() -> Model:
    return linen(InstanceNormed(), IMAGE)


class Embedded(nn.Module):
    """A residual stream between an embedding and logits, so that its width can shrink."""

    norm: Any

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8)(ids)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(self.norm()(x))))
        return nn.Dense(5)(self.norm()(x))


EMBEDDED = {"params/Embed_0/embedding:1": (8,), "params/Dense_1/kernel:1": (12,)}


@entry(13, prunable=EMBEDDED)
def layer_norm_fast() -> Model:
    return linen(Embedded(nn.LayerNorm), tokens(2, 4))


@entry(13, prunable=EMBEDDED)
def layer_norm_slow() -> Model:
    return linen(Embedded(lambda: nn.LayerNorm(use_fast_variance=False)), tokens(2, 4))


@entry(13, prunable=EMBEDDED)
def rms_norm() -> Model:
    return linen(Embedded(nn.RMSNorm), tokens(2, 4))


@entry(13, prunable={"embed:1": (8,), "up:1": (6,)})
def layer_norm_by_var() -> Model:
    def norm(x, scale):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale

    def fn(p, ids):
        x = p["embed"][ids] + p["position"]
        x = x + jax.nn.gelu(norm(x, p["scale"]) @ p["up"]) @ p["down"]
        return norm(x, p["last_scale"]) @ p["out"]

    shapes = {"embed": (7, 8), "position": (4, 8), "scale": (8,), "up": (8, 6), "down": (6, 8)}
    return fn, drawn(**shapes, last_scale=(8,), out=(8, 5)), (tokens(2, 4),)


@entry(13, prunable={"layers/0/weight:0": (6,)})
def equinox_layer_norm() -> Model:
    net = eqx.nn.Sequential(
        [
            eqx.nn.Linear(3, 6, key=jax.random.key(0)),
            eqx.nn.LayerNorm(6),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Linear(6, 2, key=jax.random.key(1)),
        ]
    )
    params, static = eqx.partition(net, eqx.is_array)
    return (lambda p, x: jax.vmap(eqx.combine(p, static))(x)), filled(params), (floats(4, 3),)


class BatchNormed(nn.Module):
    """Zero kernels leave beta behind, and zero padding makes it differ at the border."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm()(conv(6, use_bias=False)(x)))
        x = nn.sigmoid(batch_norm()(conv(8, padding="SAME")(x)))
        return nn.Dense(5)(conv(4)(x).mean((1, 2)))


@entry(14, prunable={"params/Conv_0/kernel:3": (6,), "batch_stats/BatchNorm_0/mean:0": (6,)})
def batch_norm_with_beta() -> Model:
    return linen(BatchNormed(), IMAGE)


@entry(15, prunable={"up:1": (8,)})
def softmax_over_units() -> Model:
    def fn(p, x):
        return jax.nn.softmax(x @ p["up"] + p["bias"]) @ p["down"]

    return fn, drawn(up=(3, 8), bias=(8,), down=(8, 4)), (floats(5, 3),)


@entry(15, prunable={"key:1": (6,), "value:1": (4,)})
def softmax_over_features() -> Model:
    def fn(p, x):  # linear attention: the keys are normalised over features
        q = jax.nn.softmax(x @ p["query"], -1)
        context = jnp.einsum("btd,bte->bde", jax.nn.softmax(x @ p["key"], 1), x @ p["value"])
        return jnp.einsum("btd,bde->bte", q, context) @ p["out"]

    shapes = {"query": (3, 6), "key": (3, 6), "value": (3, 4), "out": (4, 2)}
    return fn, drawn(**shapes), (floats(2, 4, 3),)


@entry(15, prunable={"up:1": (8,)})
def log_sum_exp() -> Model:
    def fn(p, x):
        x = x @ p["up"]
        return jax.nn.log_softmax(x) @ p["down"] + jax.nn.logsumexp(x, -1, keepdims=True)

    return fn, drawn(up=(3, 8), down=(8, 4)), (floats(5, 3),)


@entry(16, prunable={"v:1": (8,), "w:1": (6,)})
def weight_norm() -> Model:
    def normed(v, g):  # eps: a removed column is 0 and must not divide by 0
        return g * v / jnp.sqrt(jnp.sum(v * v, 0) + 1e-12)

    def fn(p, x):
        x = jax.nn.relu(x @ normed(p["v"], p["g"]))
        return jax.nn.relu(x @ normed(p["w"], p["h"])) @ p["out"]

    shapes = {"v": (3, 8), "g": (8,), "w": (8, 6), "h": (6,), "out": (6, 4)}
    return fn, drawn(**shapes), (floats(5, 3),)


@entry(16, prunable={"params/Conv_0/kernel:3": (6,)})
def linen_weight_norm() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.WeightNorm(conv(6), epsilon=1e-6)(x))
            return nn.Dense(5)(nn.relu(nn.WeightNorm(nn.Dense(8))(x)).mean((1, 2)))

    return linen(Net(), IMAGE)


@entry(16, prunable={"w:1": (8,), "u:0": (8,)})
def spectral_norm() -> Model:
    def fn(p, x):
        v = p["w"] @ p["u"]
        v = v / jnp.sqrt(jnp.sum(v * v) + 1e-12)
        u = v @ p["w"]
        u = u / jnp.sqrt(jnp.sum(u * u) + 1e-12)
        sigma = v @ p["w"] @ u
        return jax.nn.relu(x @ (p["w"] / sigma)) @ p["out"]

    return fn, drawn(w=(3, 8), u=(8,), out=(8, 4)), (floats(5, 3),)


@entry(16, prunable={"a:3": (6,), "b:3": (8,)})
def weight_standardisation() -> Model:
    def standard(w):
        mean, variance = w.mean((0, 1, 2)), w.var((0, 1, 2))
        return (w - mean) * jax.lax.rsqrt(variance + 1e-4)

    def fn(p, x):
        x = jax.nn.relu(convolve(x, standard(p["a"])) * p["gain"])
        return jax.nn.relu(convolve(x, standard(p["b"]))).mean((1, 2)) @ p["out"]

    shapes = {"a": (3, 3, 3, 6), "gain": (6,), "b": (3, 3, 6, 8), "out": (8, 5)}
    return fn, drawn(**shapes), (floats(2, 4, 4, 3),)


@entry(17, prunable={"w:0": (6,), "w:1": (6,)})
def one_layer_twice() -> Model:
    def fn(p, x):
        x = x @ p["in"]
        for _ in range(3):
            x = jnp.tanh(x @ p["w"] + p["bias"])
        return x @ p["out"]

    return fn, drawn(**{"in": (3, 6)}, w=(6, 6), bias=(6,), out=(6, 4)), (floats(5, 3),)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 8)
        x = embed(ids) * 8**0.5
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


@entry(18, prunable={"params/Embed_0/embedding:0": (), **EMBEDDED})
def tied_embedding() -> Model:
    return linen(Tied(), tokens(2, 4))


@entry(18, prunable={"embed:0": (), "embed:1": (6,), "factor:0": (6,), "factor:1": (8,)})
def tied_factorised_embedding() -> Model:
    def fn(p, ids):
        x = rms(p["embed"][ids] @ p["factor"], p["norm"])
        return jax.nn.relu(x) @ p["factor"].T @ p["embed"].T

    return fn, drawn(embed=(7, 6), factor=(6, 8), norm=(8,)), (tokens(2, 4),)
