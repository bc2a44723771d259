"""The networks of ``structure_speed``: a long transformer, and two that PyTorch users know.

Nothing here is ever computed: parameters and arguments are shapes. The two in Flax have the layers
of ResNet-18 and ViT-S/16 in ``structure_speed_torch``, and as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH, LENGTH, VOCAB, HEADS, GROUPS, HEAD, HIDDEN = 1024, 512, 32000, 4, 4, 64, 2816
Case = tuple[Callable[..., Any], Any, Any]  # fn, params, argument


def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# ----------------------------------------------------------------- a transformer in plain JAX


def of_transformer(layers: int) -> Case:
    return gpt, gpt_params(layers), spec(1, LENGTH, dtype=jnp.int32)


def gpt_params(layers: int) -> dict[str, Any]:
    """Shapes only: fused QKV with grouped queries, a fused gate, tied embeddings."""
    queries = HEADS * GROUPS * HEAD
    layer = {
        "norm1": spec(WIDTH),
        "qkv": spec(WIDTH, queries + 2 * HEADS * HEAD),
        "out": spec(queries, WIDTH),
        "norm2": spec(WIDTH),
        "gate_up": spec(WIDTH, 2 * HIDDEN),
        "down": spec(HIDDEN, WIDTH),
    }
    return {"embed": spec(VOCAB, WIDTH), "layers": [dict(layer)] * layers, "norm": spec(WIDTH)}


def gpt(params: Any, tokens: Any) -> Any:
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = x + _attend(layer, _rms(x, layer["norm1"]))
        gate, up = jnp.split(_rms(x, layer["norm2"]) @ layer["gate_up"], 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ layer["down"]
    return _rms(x, params["norm"]) @ params["embed"].T


def _rms(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _rotate(x: Any) -> Any:
    angle = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _attend(layer: Any, x: Any) -> Any:
    batch, length, _ = x.shape
    queries = HEADS * GROUPS * HEAD
    q, k, v = jnp.split(x @ layer["qkv"], [queries, queries + HEADS * HEAD], -1)
    q = _rotate(q.reshape(batch, length, HEADS * GROUPS, HEAD))
    q = q.reshape(batch, length, HEADS, GROUPS, HEAD)
    k = _rotate(k.reshape(batch, length, HEADS, HEAD))
    v = v.reshape(batch, length, HEADS, HEAD)
    logits = jnp.einsum("btkgd,bskd->bkgts", q, k) / HEAD**0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -1e9), -1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(batch, length, queries) @ layer["out"]


# ------------------------------------------------- the two networks that PyTorch has, too


class Block(nn.Module):
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def conv(x: Any, size: int, strides: int) -> Any:
            x = nn.Conv(self.features, (size, size), (strides, strides), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        y = conv(nn.relu(conv(x, 3, self.strides)), 3, 1)
        return nn.relu(y + (x if x.shape == y.shape else conv(x, 1, self.strides)))


class ResNet18(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for k in range(8):
            x = Block(64 * 2 ** (k // 2), 2 if k in (2, 4, 6) else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class ViTSmall(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(384, (16, 16), (16, 16), "VALID")(x).reshape(x.shape[0], -1, 384)
        token = self.param("token", nn.initializers.zeros, (1, 1, 384))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], 384))
        for _ in range(12):
            x = x + nn.MultiHeadDotProductAttention(6)(nn.LayerNorm()(x))
            x = x + nn.Dense(384)(nn.gelu(nn.Dense(1536)(nn.LayerNorm()(x))))
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


def of_flax(module: nn.Module) -> Case:
    image = spec(1, 224, 224, 3)
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), image), image


NETWORKS = {"resnet18": ResNet18, "vit_small": ViTSmall}
