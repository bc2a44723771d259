"""Mixtures of experts with the structures of public ones, tiny and random.

Mixtral: softmax over the router, two experts, gates renormalised, rows sorted by expert for
``ragged_dot``. DeepSeek-V3: sigmoid scores, a bias that takes part in the choice alone, groups of
which a token may use some, a shared expert, a first layer without experts. Qwen-MoE: softmax before
the choice, gates as they are, a shared expert with a gate of its own, layers in a scan.

Each maker gives ``(fn, params, ids)``; ``fn`` reads every number of experts from its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
Network = tuple[Callable[..., Any], Params, np.ndarray]
WIDTH, HEADS, HEAD, HIDDEN, VOCABULARY, LAYERS = 16, 4, 4, 12, 32, 2
EXPERTS, TOP_K = 16, 2
GROUPS, GROUPS_USED, SCALE = 4, 2, 2.5
IDS = np.random.default_rng(1).integers(0, VOCABULARY, (2, 9)).astype(np.int32)

ATTENTION = {"norms": (2, WIDTH), "query": (WIDTH, HEADS, HEAD), "key": (WIDTH, HEADS // 2, HEAD),
             "value": (WIDTH, HEADS // 2, HEAD), "out": (HEADS, HEAD, WIDTH)}  # fmt: skip
MLP = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
STACK = {name: (EXPERTS, *shape) for name, shape in MLP.items()}
ROUTER = (WIDTH, EXPERTS)


def _drawn(shapes: Any, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    made = [np.asarray(rng.normal(size=s) / max(s[-2:][0], 1) ** 0.5, np.float32) for s in leaves]
    return jax.tree.unflatten(treedef, made)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return (1 + scale) * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _attention(p: Params, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in ("query", "key", "value"))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jnp.einsum("bthe,hed->btd", mixed, p["out"])


def _mlp(p: Params, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def _by_groups_of_rows(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Rows sorted by expert, one for each expert of each token."""
    flat, count = chosen.reshape(-1), chosen.shape[-1]
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=p["gate"].shape[0]).astype(jnp.int32)
    rows = x[order // count]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, p["gate"], sizes))
    hidden = hidden * jax.lax.ragged_dot(rows, p["up"], sizes)
    y = jax.lax.ragged_dot(hidden, p["down"], sizes)[jnp.argsort(order)]
    return jnp.einsum("tk,tkd->td", gates, y.reshape(-1, count, y.shape[-1]))


def _by_gathered_weights(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    gate, up = (jnp.einsum("td,tkdf->tkf", x, p[name][chosen]) for name in ("gate", "up"))
    return jnp.einsum("tk,tkf,tkfd->td", gates, jax.nn.silu(gate) * up, p["down"][chosen])


def _by_one_hot(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Every expert computes every token; most of it is multiplied by zero."""
    hot = jax.nn.one_hot(chosen, p["gate"].shape[0], dtype=gates.dtype)
    gate, up = (jnp.einsum("td,edf->etf", x, p[name]) for name in ("gate", "up"))
    y = jnp.einsum("etf,efd->etd", jax.nn.silu(gate) * up, p["down"])
    return jnp.einsum("tk,tke,etd->td", gates, hot, y)


def mixtral_block(p: Params, x: jax.Array) -> jax.Array:
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), TOP_K)
    gates = gates / gates.sum(-1, keepdims=True)
    return _by_groups_of_rows(p["experts"], x, gates, chosen)


def deepseek_block(p: Params, x: jax.Array) -> jax.Array:
    scores = jax.nn.sigmoid(x @ p["router"])
    biased = scores + p["bias"]
    grouped = biased.reshape(len(x), GROUPS, -1)
    of_groups = jax.lax.top_k(grouped, 2)[0].sum(-1)
    used = jax.nn.one_hot(jax.lax.top_k(of_groups, GROUPS_USED)[1], GROUPS).sum(1) > 0
    allowed = jnp.where(used[..., None], grouped, -jnp.inf).reshape(scores.shape)
    chosen = jax.lax.top_k(allowed, TOP_K)[1]
    gates = jnp.take_along_axis(scores, chosen, -1)
    gates = SCALE * gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return _by_gathered_weights(p["experts"], x, gates, chosen) + _mlp(p["shared"], x)


def qwen_block(p: Params, x: jax.Array) -> jax.Array:
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), TOP_K)
    shared = jax.nn.sigmoid(x @ p["shared_gate"]) * _mlp(p["shared"], x)
    return _by_one_hot(p["experts"], x, gates, chosen) + shared


def _layer(block: Callable[..., Any], p: Params, x: jax.Array) -> jax.Array:
    x = x + _attention(p, _norm(x, p["norms"][0]))
    rows = _norm(x, p["norms"][1]).reshape(-1, x.shape[-1])
    return x + block(p["mlp"], rows).reshape(x.shape)


def _unrolled(blocks: Mapping[str, tuple[Callable[..., Any], Any]]) -> Network:
    layers = {name: {**ATTENTION, "mlp": shapes} for name, (_, shapes) in blocks.items()}
    params = _drawn({"embed": (VOCABULARY, WIDTH), "layers": layers, "head": (WIDTH, VOCABULARY)})

    def fn(p: Params, ids: jax.Array) -> jax.Array:
        x = p["embed"][ids]
        for name, (block, _) in blocks.items():
            x = _layer(block, p["layers"][name], x)
        return _norm(x, jnp.zeros(WIDTH)) @ p["head"]

    return fn, params, IDS


def mixtral() -> Network:
    shapes = {"router": ROUTER, "experts": STACK}
    return _unrolled({str(k): (mixtral_block, shapes) for k in range(LAYERS)})


def deepseek() -> Network:
    shapes = {"router": ROUTER, "bias": (EXPERTS,), "experts": STACK, "shared": MLP}
    return _unrolled({"0": (_mlp, MLP), "1": (deepseek_block, shapes)})


def qwen_moe() -> Network:
    mlp = {"router": ROUTER, "experts": STACK, "shared": MLP, "shared_gate": (WIDTH, 1)}
    layer = jax.tree.map(
        lambda s: (LAYERS, *s), {**ATTENTION, "mlp": mlp}, is_leaf=lambda x: isinstance(x, tuple)
    )
    params = _drawn({"embed": (VOCABULARY, WIDTH), "layers": layer, "head": (WIDTH, VOCABULARY)})

    def fn(p: Params, ids: jax.Array) -> jax.Array:
        def step(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
            return _layer(qwen_block, layer, x), None

        x = jax.lax.scan(step, p["embed"][ids], p["layers"])[0]
        return _norm(x, jnp.zeros(WIDTH)) @ p["head"]

    return fn, params, IDS


NETWORKS: dict[str, Callable[[], Network]] = {
    "Mixtral": mixtral,
    "DeepSeek": deepseek,
    "Qwen-MoE": qwen_moe,
}
