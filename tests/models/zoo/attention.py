"""Rows 21 to 28: attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.models.zoo.common import Model, attend, drawn, entry, floats, heads, linen, rms, tokens

WIDTH, HEADS, SIZE = 6, 4, 4
FLAT = HEADS * SIZE
IDS = tokens(2, 5)


def decoder(mixer: Callable[[Any, jax.Array], jax.Array], **shapes: tuple[int, ...]) -> Model:
    """One pre-norm residual block around ``mixer``, between an embedding and logits."""

    def fn(p, ids):
        x = p["embed"][ids]
        x = x + mixer(p, rms(x, p["norm"])) @ p["proj"]
        return rms(x, p["last_norm"]) @ p["out"]

    base = {"embed": (7, WIDTH), "norm": (WIDTH,), "last_norm": (WIDTH,), "out": (WIDTH, 5)}
    return fn, drawn(**{"proj": (FLAT, WIDTH)} | base | shapes), (IDS,)


def causal(t: int) -> np.ndarray:
    return np.where(np.tri(t, dtype=bool), 0.0, -1e9).astype(np.float32)


@entry(21, prunable={"qkv:1": (HEADS, SIZE), "embed:1": (WIDTH,)})
def fused_qkv_stacked() -> Model:
    def mixer(p, x):
        z = (x @ p["qkv"] + p["bias"]).reshape(*x.shape[:2], 3, HEADS, SIZE)
        return attend(z[:, :, 0], z[:, :, 1], z[:, :, 2])

    return decoder(mixer, qkv=(WIDTH, 3 * FLAT), bias=(3 * FLAT,))


@entry(21, prunable={"qkv:1": (HEADS, SIZE)})
def fused_qkv_unpacked() -> Model:
    def mixer(p, x):
        z = (x @ p["qkv"]).reshape(*x.shape[:2], 3, HEADS, SIZE).transpose(2, 0, 1, 3, 4)
        q, k, v = z
        return attend(q, k, v)

    return decoder(mixer, qkv=(WIDTH, 3 * FLAT))


@entry(21, prunable={"qkv:1": (HEADS, SIZE, SIZE), "proj:0": (HEADS, SIZE)})
def fused_qkv_chunked() -> Model:
    def mixer(p, x):
        q, k, v = (heads(z, HEADS) for z in jnp.split(x @ p["qkv"] + p["bias"], 3, -1))
        return attend(q, k, v)

    return decoder(mixer, qkv=(WIDTH, 3 * FLAT), bias=(3 * FLAT,))


@entry(21, prunable={"qkv:1": (HEADS, SIZE, SIZE)})
def fused_qkv_interleaved() -> Model:
    def mixer(p, x):
        return attend(*jnp.split(heads(x @ p["qkv"] + p["bias"], HEADS), 3, -1))

    return decoder(mixer, qkv=(WIDTH, 3 * FLAT), bias=(3 * FLAT,))


SEPARATE = dict.fromkeys(("q", "k", "v"), (WIDTH, FLAT))


def projected(p: Any, x: jax.Array) -> list[jax.Array]:
    return [heads(x @ p[name], HEADS) for name in ("q", "k", "v")]


@entry(22, prunable={"q:1": (HEADS, SIZE), "v:1": (HEADS, SIZE), "proj:0": (HEADS, SIZE)})
def separate_flat_projections() -> Model:
    def mixer(p, x):
        q, k, v = projected(p, x)
        return attend(q + p["q_bias"], k, v, causal(x.shape[1]))

    return decoder(mixer, **SEPARATE, q_bias=(HEADS, SIZE))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8)(ids)
        mask = nn.make_causal_mask(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        return nn.Dense(5)(x)


LINEN = "params/MultiHeadDotProductAttention_0"


@entry(
    23,
    prunable={f"{LINEN}/query/kernel:1": (4,), f"{LINEN}/query/kernel:2": (2,)}
    | {f"{LINEN}/out/kernel:1": (2,), f"{LINEN}/out/kernel:2": (8,)},
)
def dense_general_heads() -> Model:
    return linen(Attention(), IDS)


@entry(23, prunable={"qkv:2": (HEADS,), "qkv:3": (SIZE,), "o:1": (SIZE,)})
def einsum_heads() -> Model:
    def mixer(p, x):
        q, k, v = jnp.einsum("bte,eshd->sbthd", x, p["qkv"])
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jnp.einsum("bthd,hde->bte", y, p["o"])

    shapes = {"qkv": (WIDTH, 3, HEADS, SIZE), "o": (HEADS, SIZE, WIDTH)}
    return decoder(mixer, **shapes, proj=(WIDTH, WIDTH))


GROUPED = {"q": (WIDTH, FLAT), "k": (WIDTH, FLAT // 2), "v": (WIDTH, FLAT // 2)}
KV = 2
GROUPS = {"q:1": (KV, 2, SIZE), "k:1": (KV, SIZE), "v:1": (KV, SIZE), "proj:0": (KV, 2, SIZE)}


@entry(24, prunable=GROUPS)
def grouped_queries_by_einsum() -> Model:
    def mixer(p, x):
        b, t, _ = x.shape
        q = (x @ p["q"]).reshape(b, t, KV, -1, SIZE)
        k, v = heads(x @ p["k"], KV), heads(x @ p["v"], KV)
        logits = jnp.einsum("bqkgd,bskd->bkgqs", q, k) / math.sqrt(SIZE)
        y = jnp.einsum("bkgqs,bskd->bqkgd", jax.nn.softmax(logits), v)
        return y.reshape(b, t, -1)

    return decoder(mixer, **GROUPED)


@entry(24, prunable=GROUPS)
def grouped_queries_by_repeat() -> Model:
    def mixer(p, x):
        k, v = (jnp.repeat(heads(x @ p[n], KV), 2, 2) for n in ("k", "v"))
        return attend(heads(x @ p["q"], HEADS), k, v)

    return decoder(mixer, **GROUPED)


@entry(24, prunable=GROUPS)
def grouped_queries_by_broadcast() -> Model:
    def repeated(x):
        b, t, _ = x.shape
        x = x.reshape(b, t, KV, 1, SIZE)
        return jnp.broadcast_to(x, (b, t, KV, 2, SIZE)).reshape(b, t, HEADS, SIZE)

    def mixer(p, x):
        return attend(heads(x @ p["q"], HEADS), repeated(x @ p["k"]), repeated(x @ p["v"]))

    return decoder(mixer, **GROUPED)


@entry(24, prunable={"qkv:1": (KV, 2, SIZE, SIZE)})
def grouped_queries_fused() -> Model:
    def mixer(p, x):
        q, k, v = jnp.split(x @ p["qkv"], [FLAT, FLAT + FLAT // 2], -1)
        q, k, v = heads(q, HEADS), heads(k, KV), heads(v, KV)
        y = jax.nn.dot_product_attention(q, k, v)
        return y.reshape(*x.shape[:2], -1)

    return decoder(mixer, qkv=(WIDTH, 2 * FLAT))


@entry(24, prunable={"q:1": (HEADS, SIZE), "kv:1": (SIZE, SIZE)})
def multi_query() -> Model:
    def mixer(p, x):
        k, v = jnp.split((x @ p["kv"])[:, :, None], 2, -1)
        return attend(heads(x @ p["q"], HEADS), *(jnp.repeat(z, HEADS, 2) for z in (k, v)))

    return decoder(mixer, q=(WIDTH, FLAT), kv=(WIDTH, 2 * SIZE))


def angles(x: jax.Array, rotated: int) -> jax.Array:
    """(time, 1, rotated / 2): positions times frequencies, computed in the program."""
    frequency = 100.0 ** (-jnp.arange(rotated // 2, dtype=x.dtype) / (rotated // 2))
    return (jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency)[:, None]


def rotate_half(x: jax.Array) -> jax.Array:
    angle = angles(x, x.shape[-1])
    angle = jnp.concatenate([angle, angle], -1)
    left, right = jnp.split(x, 2, -1)
    return x * jnp.cos(angle) + jnp.concatenate([-right, left], -1) * jnp.sin(angle)


def rotate_interleaved(x: jax.Array) -> jax.Array:
    even, odd, angle = x[..., 0::2], x[..., 1::2], angles(x, x.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def rotate_complex(x: jax.Array) -> jax.Array:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * jnp.exp(1j * angles(x, x.shape[-1]))
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rotate_partial(x: jax.Array) -> jax.Array:
    turned, rest = jnp.split(x, [4], -1)
    return jnp.concatenate([rotate_half(turned), rest], -1)


def rotary(rotate: Callable[[jax.Array], jax.Array], size: int = 8, kv: int = HEADS) -> Model:
    def mixer(p, x):
        q, k, v = heads(x @ p["q"], HEADS), heads(x @ p["k"], kv), heads(x @ p["v"], kv)
        q, k = rotate(q), rotate(k)
        k, v = (jnp.repeat(z, HEADS // kv, 2) for z in (k, v))
        return attend(q, k, v, causal(x.shape[1]))

    shapes = {"q": (WIDTH, HEADS * size), "k": (WIDTH, kv * size), "v": (WIDTH, kv * SIZE)}
    return decoder(mixer, **shapes)


@entry(25, prunable={"q:1": (HEADS, 4), "k:1": (HEADS, 4), "v:1": (HEADS, SIZE)})
def rope_split_half() -> Model:
    return rotary(rotate_half)


@entry(25, prunable={"q:1": (HEADS, 4), "k:1": (HEADS, 4)})
def rope_interleaved() -> Model:
    return rotary(rotate_interleaved)


@entry(25, prunable={"q:1": (HEADS, 4), "k:1": (HEADS, 4)})
def rope_complex() -> Model:
    return rotary(rotate_complex)


@entry(25, prunable={"q:1": (HEADS, 2, 4)})
def rope_partial() -> Model:
    return rotary(rotate_partial)


@entry(25, prunable={"q:1": (KV, 2, 4), "k:1": (KV, 4), "v:1": (KV, SIZE)})
def rope_with_grouped_queries() -> Model:
    return rotary(rotate_half, kv=KV)


@entry(25, prunable={"q:1": (KV, 2, 4), "k:1": (KV, 4)})
def rope_interleaved_with_grouped_queries() -> Model:
    return rotary(rotate_interleaved, kv=KV)


@entry(25, prunable={"q:1": (HEADS, 4)})
def rope_from_a_table() -> Model:
    table = np.asarray(angles(jnp.zeros((1, 16)), 8))  # a constant, longer than the sequence

    def rotate(x):
        angle = table[: x.shape[1]]
        left, right = jnp.split(x, 2, -1)
        cos, sin = np.cos(angle), np.sin(angle)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    return rotary(rotate)


@entry(26, prunable={"q:1": (HEADS, SIZE), "q_norm:0": (SIZE,), "v:1": (HEADS, SIZE)})
def query_key_norm() -> Model:
    def mixer(p, x):
        q, k, v = projected(p, x)
        return attend(rms(q, p["q_norm"]), rms(k, p["k_norm"]), v)

    return decoder(mixer, **SEPARATE, q_norm=(SIZE,), k_norm=(SIZE,))


@entry(26, prunable={"q:1": (HEADS, SIZE)})
def alibi() -> Model:
    slopes = 2.0 ** -np.arange(1, HEADS + 1, dtype=np.float32)

    def mixer(p, x):
        distance = jnp.abs(jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1]))
        return attend(*projected(p, x), -slopes[:, None, None] * distance)

    return decoder(mixer, **SEPARATE)


def relative_bias(table: jax.Array, t: int) -> jax.Array:
    distance = jnp.clip(jnp.arange(t)[:, None] - jnp.arange(t), -3, 3) + 3
    return table[distance].transpose(2, 0, 1)


@entry(26, prunable={"q:1": (HEADS, SIZE), "table:1": (HEADS,)})
def relative_bias_table() -> Model:
    def mixer(p, x):
        return attend(*projected(p, x), relative_bias(p["table"], x.shape[1]))

    return decoder(mixer, **SEPARATE, table=(7, HEADS))


@entry(26, prunable={"q:1": (HEADS, SIZE), "temperature:0": (HEADS,), "gain:0": (HEADS,)})
def scale_per_head() -> Model:
    def mixer(p, x):
        q, k, v = projected(p, x)
        y = attend(q * p["temperature"][:, None], k, v)
        return (heads(y, HEADS) * p["gain"][:, None]).reshape(y.shape)

    return decoder(mixer, **SEPARATE, temperature=(HEADS,), gain=(HEADS,))


@entry(26, prunable={"q:1": (HEADS, SIZE), "sink:0": (HEADS,)})
def attention_sinks() -> Model:
    def mixer(p, x):
        q, k, v = projected(p, x)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(SIZE)
        sink = jnp.broadcast_to(p["sink"][:, None, None], (*logits.shape[:3], 1))
        shares = jax.nn.softmax(jnp.concatenate([logits, sink], -1))[..., :-1]
        return jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(*x.shape[:2], -1)

    return decoder(mixer, **SEPARATE, sink=(HEADS,))


class Crossed(nn.Module):
    """An encoder's memory is read by every decoder layer."""

    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(7, 8)
        memory, x = embed(source), embed(target)
        memory = memory + nn.Dense(8)(nn.relu(nn.Dense(10)(nn.LayerNorm()(memory))))
        memory = nn.Dense(6)(memory)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, memory)
        return embed.attend(x)


@entry(28, prunable={"params/Dense_2/kernel:1": (6,), "params/Embed_0/embedding:1": (8,)})
def cross_attention() -> Model:
    return linen(Crossed(), tokens(2, 4), tokens(2, 3))


@entry(28, prunable={"q:1": (HEADS, SIZE), "table:1": (HEADS,), "q2:1": (HEADS, SIZE)})
def shared_relative_bias() -> Model:
    def fn(p, ids):
        x = p["embed"][ids]
        bias = relative_bias(p["table"], ids.shape[1])
        for i in ("", "2"):
            z = rms(x, p[f"norm{i}"])
            x = x + attend(*(heads(z @ p[n + i], HEADS) for n in "qkv"), bias) @ p[f"proj{i}"]
        return x @ p["out"]

    shapes = {"embed": (7, WIDTH), "out": (WIDTH, 5), "table": (7, HEADS)}
    for i in ("", "2"):
        shapes |= {n + i: (WIDTH, FLAT) for n in "qkv"}
        shapes |= {f"proj{i}": (FLAT, WIDTH), f"norm{i}": (WIDTH,)}
    return fn, drawn(**shapes), (IDS,)


@entry(28, prunable={"k:1": (HEADS, SIZE), "latents:1": (WIDTH,)})
def perceiver_latents() -> Model:
    def fn(p, x):
        latents = jnp.broadcast_to(p["latents"], (x.shape[0], *p["latents"].shape))
        q = heads(rms(latents, p["norm"]) @ p["q"], HEADS)
        y = latents + attend(q, heads(x @ p["k"], HEADS), heads(x @ p["v"], HEADS)) @ p["proj"]
        return y.mean(1) @ p["out"]

    shapes = {"latents": (3, WIDTH), "norm": (WIDTH,), "q": (WIDTH, FLAT), "k": (4, FLAT)}
    shapes |= {"v": (4, FLAT), "proj": (FLAT, WIDTH), "out": (WIDTH, 5)}
    return fn, drawn(**shapes), (floats(2, 5, 4),)
