"""Checkpoints by the names that Hugging Face gives their tensors, for ``jp.oneshot.stream``.

Llama-like ones (Llama, Mistral, Qwen without biases, SmolLM2) store kernels as (out, in), GPT-2 as
(in, out). Blocks take hidden states in float32 whatever the weights are stored in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.streaming import shards

LLAMA = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
LLAMA_OTHERS = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight"}
GPT = {
    f"{ours}{kind}": f"{theirs}.{kind[1:]}"
    for ours, theirs in {
        "attention_norm": "ln_1",
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }.items()
    for kind in ("_weight", "_bias")
}
GPT_OTHERS = {"tokens": "wte.weight", "positions": "wpe.weight"}

Block = Callable[[Any, jax.Array], jax.Array]


def llama_names(layers: int) -> list[dict[str, Any]]:
    """The tensors of each block; kernels as (in, out)."""
    return [
        {
            ours: name if "norm" in ours else jp.oneshot.Transposed(name)
            for ours, name in ((k, f"model.layers.{i}.{v}") for k, v in LLAMA.items())
        }
        for i in range(layers)
    ]


def gpt_names(layers: int) -> list[dict[str, str]]:
    """The tensors of each block."""
    return [{ours: f"h.{i}.{theirs}" for ours, theirs in GPT.items()} for i in range(layers)]


def llama_embed(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    return params["embedding"][tokens].astype(jnp.float32)


def gpt_embed(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = params["tokens"][tokens] + params["positions"][: tokens.shape[1]]
    return x.astype(jnp.float32)


def llama_block(head: int, theta: float, epsilon: float) -> Block:
    """One layer on hidden states (batch, tokens, width); ``head``: the size of a head."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon) * scale

    def rotate(x: jax.Array) -> jax.Array:
        frequency = theta ** (-jnp.arange(0, head, 2) / head)
        angle = jnp.arange(x.shape[1])[:, None, None] * frequency
        a, b = jnp.split(x, 2, -1)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def block(p: dict[str, Any], x: jax.Array) -> jax.Array:
        h = norm(x, p["attention_norm"])
        q, k, v = ((h @ p[n]).reshape(*h.shape[:2], -1, head) for n in "qkv")
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + mixed.reshape(*h.shape[:2], -1) @ p["o"]
        h = norm(x, p["mlp_norm"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return x + p["down_bias"] if "down_bias" in p else x  # the mean of units that went

    return block


def gpt_block(head: int, epsilon: float = 1e-5) -> Block:
    """One layer of GPT-2 on hidden states (batch, tokens, width)."""

    def norm(x: jax.Array, p: dict[str, Any], name: str) -> jax.Array:
        z = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + epsilon)
        return z * p[f"{name}_weight"] + p[f"{name}_bias"]

    def block(p: dict[str, Any], x: jax.Array) -> jax.Array:
        def dense(h: jax.Array, name: str) -> jax.Array:
            return h @ p[f"{name}_weight"] + p[f"{name}_bias"]

        qkv = dense(norm(x, p, "attention_norm"), "qkv")
        q, k, v = (a.reshape(*x.shape[:2], -1, head) for a in jnp.split(qkv, 3, -1))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(mixed.reshape(*x.shape[:2], -1), "o")
        return x + dense(jax.nn.gelu(dense(norm(x, p, "mlp_norm"), "up")), "down")

    return block


def save_llama(params: dict[str, Any], folder: Path, shard_bytes: int = 10**8) -> None:
    """Writes blocks, embedding and last norm as Hugging Face does, in shards of about that size."""
    tensors = {
        name: np.asarray(params[ours]) for ours, name in LLAMA_OTHERS.items()
    } | {
        f"model.layers.{i}.{LLAMA[ours]}": np.asarray(w).T if w.ndim > 1 else np.asarray(w)
        for i, p in enumerate(params["blocks"])
        for ours, w in p.items()
    }  # fmt: skip
    save(tensors, folder, shard_bytes)


def save(tensors: dict[str, np.ndarray], folder: Path, shard_bytes: int) -> None:
    """Writes tensors in shards of about that many bytes, with an index."""
    groups: list[list[str]] = [[]]
    for name, x in tensors.items():
        if groups[-1] and sum(tensors[n].nbytes for n in groups[-1]) + x.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(name)
    folder.mkdir(parents=True, exist_ok=True)
    placed: dict[str, str] = {}
    for k, names in enumerate(groups):
        file = f"model-{k + 1:05}-of-{len(groups):05}.safetensors"
        shards.write(folder / file, [_row(n, tensors[n]) for n in names], {"format": "pt"})
        placed |= dict.fromkeys(names, file)
    told = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}}
    (folder / shards.INDEX).write_text(json.dumps(told | {"weight_map": placed}))


def _row(name: str, x: np.ndarray) -> tuple[Any, ...]:
    return name, shards.CODES[x.dtype.name], x.shape, x.nbytes, [shards.raw(x)]
