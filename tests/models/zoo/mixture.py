"""Rows 19, 20 and 38: gated units and mixtures of experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.models.zoo.common import Model, drawn, entry, floats


@entry(19, prunable={"gate_up:1": (8,), "down:0": (8,)})
def gated_halves() -> Model:
    def fn(p, x):
        gate, up = jnp.split(x @ p["gate_up"] + p["bias"], 2, -1)
        return (jax.nn.silu(gate) * up) @ p["down"]

    return fn, drawn(gate_up=(3, 16), bias=(16,), down=(8, 5)), (floats(4, 3),)


@entry(19, prunable={"gate_up:1": (8,), "down:0": (8,)})
def gated_interleaved() -> Model:
    def fn(p, x):
        h = x @ p["gate_up"]
        return (jax.nn.sigmoid(h[..., ::2]) * h[..., 1::2]) @ p["down"]

    return fn, drawn(gate_up=(3, 16), down=(8, 5)), (floats(4, 3),)


@entry(19, prunable={"gate_up:1": (8,)})
def gated_by_library_call() -> Model:
    def fn(p, x):
        return jax.nn.glu(x @ p["gate_up"] + p["bias"]) @ p["down"]

    return fn, drawn(gate_up=(3, 16), bias=(16,), down=(8, 5)), (floats(4, 3),)


@entry(20, prunable={"gate:1": (8,), "up:1": (8,), "down:0": (8,)})
def gate_and_up_apart() -> Model:
    def fn(p, x):
        return (jax.nn.gelu(x @ p["gate"] + p["bias"]) * (x @ p["up"])) @ p["down"]

    return fn, drawn(gate=(3, 8), bias=(8,), up=(3, 8), down=(8, 5)), (floats(4, 3),)


EXPERTS, WIDTH, HIDDEN = 4, 6, 8
MOE = {
    "in": (3, WIDTH),
    "router": (WIDTH, EXPERTS),
    "up": (EXPERTS, WIDTH, HIDDEN),
    "up_bias": (EXPERTS, HIDDEN),
    "down": (EXPERTS, HIDDEN, WIDTH),
    "out": (WIDTH, 5),
}


def mixture(moe: Any) -> Model:
    """A mixture of experts between two dense layers; ``moe`` sees (tokens, width)."""

    def fn(p, x):
        x = x @ p["in"]
        return (x + moe(p, x)) @ p["out"]

    return fn, drawn(**MOE), (floats(6, 3),)


def hidden(p: Any, x: jax.Array, equation: str = "ecd,edf->ecf") -> jax.Array:
    bias = p["up_bias"] if x.ndim == 2 else p["up_bias"][:, None]
    return jax.nn.gelu(jnp.einsum(equation, x, p["up"]) + bias)


@entry(38, prunable={"router:1": (EXPERTS,), "up:2": (HIDDEN,), "in:1": (WIDTH,)})
def every_expert_softmax() -> Model:
    def moe(p, x):
        shares = jax.nn.softmax(x @ p["router"])
        y = jnp.einsum("tef,efd->ted", hidden(p, x, "td,edf->tef"), p["down"])
        return jnp.einsum("te,ted->td", shares, y)

    return mixture(moe)


@entry(38, prunable={"up:2": (HIDDEN,), "in:1": (WIDTH,), "router:1": ()})
def top_k_routing() -> Model:
    def moe(p, x):
        values, chosen = jax.lax.top_k(x @ p["router"], 2)
        shares = jax.nn.softmax(values)
        gate = jnp.einsum("tk,tke->te", shares, jax.nn.one_hot(chosen, EXPERTS, dtype=x.dtype))
        y = jnp.einsum("tef,efd->ted", hidden(p, x, "td,edf->tef"), p["down"])
        return jnp.einsum("te,ted->td", gate, y)

    return mixture(moe)


@entry(38, prunable={"up:2": (HIDDEN,), "in:1": (WIDTH,)})
def top_k_by_gathered_weights() -> Model:
    def moe(p, x):
        values, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        h = jnp.einsum("td,tkdf->tkf", x, p["up"][chosen]) + p["up_bias"][chosen]
        y = jnp.einsum("tkf,tkfd->tkd", jax.nn.gelu(h), p["down"][chosen])
        return jnp.einsum("tk,tkd->td", values, y)

    return mixture(moe)


@entry(38, prunable={"up:2": (HIDDEN,), "in:1": (WIDTH,)})
def capacity_dispatch() -> Model:
    def moe(p, x):
        shares = jax.nn.softmax(x @ p["router"])
        chosen = jax.nn.one_hot(jnp.argmax(shares, -1), EXPERTS, dtype=x.dtype)
        place = (jnp.cumsum(chosen, 0) - 1) * chosen
        slots = jax.nn.one_hot(place.sum(-1).astype(jnp.int32), 3, dtype=x.dtype)
        dispatch = chosen[:, :, None] * slots[:, None]
        y = hidden(p, jnp.einsum("tec,td->ecd", dispatch, x))
        y = jnp.einsum("ecf,efd->ecd", y, p["down"])
        combine = dispatch * jnp.sum(shares * chosen, -1)[:, None, None]
        return jnp.einsum("tec,ecd->td", combine, y)

    return mixture(moe)


@entry(38, prunable={"up:2": (HIDDEN,), "in:1": (WIDTH,)})
def sorted_ragged_dot() -> Model:
    def moe(p, x):
        shares = jax.nn.softmax(x @ p["router"])
        chosen = jnp.argmax(shares, -1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=EXPERTS).astype(jnp.int32)
        h = jax.lax.ragged_dot(x[order], p["up"], sizes) + p["up_bias"][chosen[order]]
        y = jax.lax.ragged_dot(jax.nn.gelu(h), p["down"], sizes)
        y = jnp.zeros_like(y).at[order].set(y)
        return y * jnp.max(shares, -1, keepdims=True)

    return mixture(moe)


@entry(38, prunable={"up:0": (EXPERTS,), "up:2": (HIDDEN,), "in:1": (WIDTH,)})
def experts_choose_tokens() -> Model:
    def moe(p, x):
        shares = jax.nn.softmax(x @ p["router"])
        gate, chosen = jax.lax.top_k(shares.T, 3)
        y = jnp.einsum("ecf,efd->ecd", hidden(p, x[chosen]), p["down"])
        return jnp.zeros_like(x).at[chosen].add(gate[..., None] * y)

    return mixture(moe)


@entry(38, prunable={"up:2": (HIDDEN,), "shared:1": (10,), "in:1": (WIDTH,)})
def shared_expert() -> Model:
    def fn(p, x):
        x = x @ p["in"]
        values, chosen = jax.lax.top_k(jax.nn.sigmoid(x @ p["router"]), 1)
        gate = jnp.sum(jax.nn.one_hot(chosen, EXPERTS, dtype=x.dtype) * values[..., None], 1)
        y = jnp.einsum("tef,efd,te->td", hidden(p, x, "td,edf->tef"), p["down"], gate)
        return (x + y + jax.nn.silu(x @ p["shared"]) @ p["shared_down"]) @ p["out"]

    return fn, drawn(**MOE, shared=(WIDTH, 10), shared_down=(10, WIDTH)), (floats(6, 3),)
