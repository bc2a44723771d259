"""Rows 34, 36 and 37: programs inside programs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from tests.models.zoo.attention import causal, rotate_half
from tests.models.zoo.common import Model, attend, drawn, entry, floats, heads, linen, rms, tokens

LAYERS, WIDTH, KV = 3, 6, 2
BLOCK = {
    "norm": (WIDTH,),
    "qkv": (WIDTH, 2 * 16),
    "proj": (16, WIDTH),
    "mlp_norm": (WIDTH,),
    "gate_up": (WIDTH, 2 * 10),
    "down": (10, WIDTH),
}


def block(p: Any, x: jax.Array) -> jax.Array:
    """Grouped queries with rotary positions, and a gated MLP."""
    q, k, v = jnp.split(rms(x, p["norm"]) @ p["qkv"], [16, 24], -1)
    q, k, v = heads(q, 4), heads(k, KV), heads(v, KV)
    k, v = (jnp.repeat(z, 2, 2) for z in (rotate_half(k), v))
    x = x + attend(rotate_half(q), k, v, causal(x.shape[1])) @ p["proj"]
    gate, up = jnp.split(rms(x, p["mlp_norm"]) @ p["gate_up"], 2, -1)
    return x + (jax.nn.silu(gate) * up) @ p["down"]


def stacked_layers(body: Any) -> Model:
    def fn(p, ids):
        x = jax.lax.scan(lambda x, layer: (body(layer, x), None), p["embed"][ids], p["layers"])[0]
        return rms(x, p["norm"]) @ p["embed"].T

    params: dict[str, Any] = drawn(embed=(7, WIDTH), norm=(WIDTH,))
    params["layers"] = drawn(**{n: (LAYERS, *s) for n, s in BLOCK.items()})
    return fn, params, (tokens(2, 5),)


LAYER_DIMS = {"layers/qkv:2": (KV, 2, 2, 4), "layers/gate_up:2": (10,), "embed:1": (WIDTH,)}


@entry(34, prunable=LAYER_DIMS)
def scan_over_layers() -> Model:
    return stacked_layers(block)


@entry(34, prunable=LAYER_DIMS)
def scan_over_rematerialised_layers() -> Model:
    return stacked_layers(jax.checkpoint(block))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 6)(ids)
        layers = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers()(x, None)
        return nn.Dense(5)(nn.LayerNorm()(x))


STACK = "params/ScanCheckpointLinenBlock_0"


@entry(34, prunable={f"{STACK}/Dense_1/kernel:2": (8,), "params/Dense_0/kernel:0": (6,)})
def linen_scan_of_remat() -> Model:
    return linen(Scanned(), tokens(2, 4))


@entry(36, prunable={"w:0": (6,), "in:1": (6,)}, differentiable=False)
def while_loop() -> Model:
    def fn(p, x):
        def step(state):
            i, h = state
            return i + 1, jnp.tanh(h @ p["w"] + p["bias"])

        count = jnp.where(x[0, 0] > 0, 3, 4)
        h = jax.lax.while_loop(lambda state: state[0] < count, step, (0, x @ p["in"]))[1]
        return h @ p["out"]

    return fn, drawn(**{"in": (3, 6)}, w=(6, 6), bias=(6,), out=(6, 5)), (floats(4, 3),)


@entry(36, prunable={"w:0": (6,), "in:1": (6,)})
def fori_loop() -> Model:
    def fn(p, x):
        h = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]) + i * h, x @ p["in"])
        return h @ p["out"]

    return fn, drawn(**{"in": (3, 6)}, w=(6, 6), out=(6, 5)), (floats(4, 3),)


@entry(36, prunable={"in:1": (6,), "a:1": (8,), "b:1": (4,)})
def cond_branches() -> Model:
    def fn(p, x):
        h = jax.nn.relu(x @ p["in"])
        h = jax.lax.cond(
            x[0, 0] > 0,
            lambda h: h + jax.nn.relu(h @ p["a"]) @ p["a2"],
            lambda h: h + jnp.tanh(h @ p["b"]) @ p["b2"],
            h,
        )
        return h @ p["out"]

    shapes = {"in": (3, 6), "a": (6, 8), "a2": (8, 6), "b": (6, 4), "b2": (4, 6), "out": (6, 5)}
    return fn, drawn(**shapes), (floats(4, 3),)


@entry(36, prunable={"in:1": (6,), "a:1": (6,), "b:1": (6,)})
def switch_between_adapters() -> Model:
    def fn(p, x, which):
        h = jax.nn.relu(x @ p["in"])
        branches = [
            lambda h: jax.nn.sigmoid(h @ p["a"]),
            lambda h: jax.nn.relu(h @ p["b"]),
            lambda h: 2.0 * h @ p["b"],
        ]
        return jax.lax.switch(which, branches, h) @ p["out"]

    params = drawn(**{"in": (3, 6)}, a=(6, 6), b=(6, 6), out=(6, 5))
    return fn, params, (floats(4, 3), jnp.int32(1))


DENSE = {"up": (3, 8), "bias": (8,), "mid": (8, 6), "down": (6, 5)}


def wrapped(wrap: Any) -> Model:
    """A hidden layer of units inside ``wrap``, which must hand them through."""

    def fn(p, x):
        h = wrap(lambda w, b, x: jax.nn.relu(x @ w + b))(p["up"], p["bias"], x)
        return jnp.tanh(h @ p["mid"]) @ p["down"]

    return fn, drawn(**DENSE), (floats(4, 3),)


HANDED = {"up:1": (8,), "mid:1": (6,)}


@entry(37, prunable=HANDED)
def checkpoint() -> Model:
    return wrapped(jax.checkpoint)


@entry(37, prunable=HANDED)
def checkpoint_with_policy() -> Model:
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return wrapped(lambda f: jax.jit(jax.checkpoint(f, policy=policy)))


@entry(37, prunable=HANDED)
def vmap_over_examples() -> Model:
    return wrapped(lambda f: jax.vmap(jax.jit(f), (None, None, 0)))


@jax.custom_vjp
def straight_through(x):
    return jnp.round(4 * x) / 4


straight_through.defvjp(lambda x: (straight_through(x), x), lambda x, g: (g * (abs(x) < 2),))


@jax.custom_jvp
def soft_sign(x):
    return x / (1 + jnp.abs(x))


@soft_sign.defjvp
def _soft_sign_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return soft_sign(x), 3.0 * t / (1 + jnp.abs(x)) ** 2  # 3: told apart from inlining


@entry(37, prunable=HANDED)
def custom_vjp() -> Model:
    return wrapped(lambda f: lambda *a: straight_through(f(*a)))


@entry(37, prunable=HANDED)
def custom_jvp() -> Model:
    return wrapped(lambda f: lambda *a: soft_sign(f(*a)))


@jax.custom_vjp
def fused_mlp(x, up, down):
    return jax.nn.relu(x @ up) @ down


def _fused_mlp_fwd(x, up, down):
    h = x @ up
    return jax.nn.relu(h) @ down, (x, up, down, h)


def _fused_mlp_bwd(saved, g):
    x, up, down, h = saved
    dh = jnp.where(h > 0, g @ down.T, 0)
    return dh @ up.T, x.T @ dh, jax.nn.relu(h).T @ g


fused_mlp.defvjp(_fused_mlp_fwd, _fused_mlp_bwd)


@entry(37, prunable={"up:1": (8,), "down:1": (6,)})
def custom_vjp_of_a_layer() -> Model:
    def fn(p, x):
        return jnp.tanh(fused_mlp(x, p["up"], p["down"])) @ p["out"]

    return fn, drawn(up=(3, 8), down=(8, 6), out=(6, 5)), (floats(4, 3),)


@entry(37, prunable={"mid:1": (6,)}, refused="pallas_call", differentiable=False)
def pallas_kernel() -> Model:
    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.maximum(x_ref[...], 0)

    def clipped(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)

    model = wrapped(lambda f: lambda w, b, x: clipped(x @ w + b))
    return model


@entry(37, prunable={"up:1": (), "mid:1": (6,)}, refused="shard_map")
def shard_map() -> Model:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def wrap(f):
        specs = (spec(), spec(), spec("data"))
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=spec("data"))

    return wrapped(wrap)


@entry(37, prunable={"up:1": (), "mid:1": (6,)}, refused="pure_callback", differentiable=False)
def host_callback() -> Model:
    def host(x):
        return np.maximum(x, 0)

    def wrap(f):
        def called(*a):
            y = f(*a)
            return jax.pure_callback(host, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

        return called

    return wrapped(wrap)
