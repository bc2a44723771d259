"""Rows 27 and 50 to 52: states, adapters, quantised leaves, several functions of one tree."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tests.models.zoo.attention import rotate_half
from tests.models.zoo.common import Model, drawn, entry, filled, floats, heads, rms, tokens

HEADS, KV, SIZE, WIDTH, LENGTH = 4, 2, 4, 6, 6
DECODER = {
    "embed": (7, WIDTH),
    "norm": (WIDTH,),
    "q": (WIDTH, HEADS * SIZE),
    "k": (WIDTH, KV * SIZE),
    "v": (WIDTH, KV * SIZE),
    "proj": (HEADS * SIZE, WIDTH),
    "out": (WIDTH, 5),
}


def decode(p: Any, ids: jax.Array, position: jax.Array) -> Any:
    """One token: the cache is read, written at ``position`` and handed back."""
    w, cache = p["weights"], p["cache"]
    x = w["embed"][ids][:, None]
    y = rms(x, w["norm"])
    new = {"k": heads(y @ w["k"], KV), "v": heads(y @ w["v"], KV)}
    zero = jnp.zeros_like(position)
    start = (zero, position, zero, zero)
    cache = {n: jax.lax.dynamic_update_slice(cache[n], new[n], start) for n in ("k", "v")}
    q = (y @ w["q"]).reshape(ids.shape[0], KV, -1, SIZE)
    logits = jnp.einsum("bkgd,bskd->bkgs", q, cache["k"]) / math.sqrt(SIZE)
    logits = jnp.where(jnp.arange(LENGTH) <= position, logits, -1e9)
    y = jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(logits), cache["v"])
    x = x[:, 0] + y.reshape(ids.shape[0], -1) @ w["proj"]
    return {"logits": x @ w["out"], "cache": cache}


@entry(
    27,
    prunable={
        "cache/k:2": (KV,),
        "cache/k:3": (SIZE,),
        "cache/v:3": (SIZE,),
        "weights/q:1": (KV, 2, SIZE),
    },
)
def decode_with_cache() -> Model:
    shape = (2, LENGTH, KV, SIZE)
    params = {"weights": drawn(**DECODER), "cache": drawn(k=shape, v=shape)}
    return decode, params, (tokens(2), jnp.int32(3))


@entry(27, prunable={"cache/k:2": (KV,), "cache/v:3": (SIZE,)})
def decode_with_rotated_cache() -> Model:
    def fn(p, ids, position):
        turned = rotate_half(p["cache"]["k"])
        result = decode({**p, "cache": {**p["cache"], "k": turned}}, ids, position)
        return {**result, "cache": {**result["cache"], "k": rotate_half(result["cache"]["k"])}}

    shape = (2, LENGTH, KV, SIZE)
    params = {"weights": drawn(**DECODER), "cache": drawn(k=shape, v=shape)}
    return fn, params, (tokens(2), jnp.int32(3))


class LinenDecoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8)(ids)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
        return nn.Dense(5)(x + attention(nn.LayerNorm()(x)))


LINEN = "MultiHeadDotProductAttention_0"


@entry(27, prunable={f"cache/{LINEN}/cached_key:2": (2,), f"cache/{LINEN}/cached_value:3": (4,)})
def linen_decode() -> Model:
    net = LinenDecoder()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((2, LENGTH), jnp.int32))

    def fn(variables, ids):
        logits, updated = net.apply(variables, ids, mutable=["cache"])
        return {"logits": logits, **updated}

    return fn, filled(shapes), (tokens(2, 1),)


@entry(27, prunable={"state/h:1": (6,), "cell/w:0": (6,)})
def recurrent_state() -> Model:
    def fn(p, x):
        h = jnp.tanh(x @ p["cell"]["in"] + p["state"]["h"] @ p["cell"]["w"])
        return {"y": h @ p["out"], "state": {"h": h}}

    params = {"cell": drawn(**{"in": (3, 6)}, w=(6, 6)), "state": drawn(h=(4, 6))}
    return fn, params | drawn(out=(6, 5)), (floats(4, 3),)


def quantised(*shape: int, seed: int = 0) -> jax.Array:
    noise = jax.random.randint(jax.random.key(seed), shape, 1, 128)
    return jnp.where(noise % 2 == 0, noise, -noise).astype(jnp.int8)


@entry(50, prunable={"up:1": (8,), "up_scale:0": (8,), "down:0": (8,)})
def int8_with_channel_scales() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ (p["up"].astype(x.dtype) * p["up_scale"]))
        return x @ (p["down"].astype(x.dtype) * p["down_scale"])

    params = {"up": quantised(3, 8), "down": quantised(8, 5)}
    return fn, params | drawn(up_scale=(8,), down_scale=(5,)), (floats(4, 3),)


@entry(50, prunable={"up:1": (2, 4), "down:0": (2, 4), "down_scale:0": (2,)})
def int8_with_block_scales() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ (p["up"].astype(x.dtype) * p["up_scale"]))
        blocks = p["down"].astype(x.dtype).reshape(2, 4, 5) * p["down_scale"][:, None]
        return x @ blocks.reshape(8, 5)

    params = {"up": quantised(3, 8), "down": quantised(8, 5)}
    return fn, params | drawn(up_scale=(8,), down_scale=(2, 5)), (floats(4, 3),)


@entry(50, prunable={"up:1": (8,), "down:0": (8,)})
def int8_activations() -> Model:
    """The products are integers; the input's scale is the largest entry of each row."""

    def quantise(x):
        scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127 + 1e-6
        return jnp.round(x / scale).astype(jnp.int8), scale

    def product(x, w, w_scale):
        q, scale = quantise(x)
        y = jax.lax.dot(q, w, preferred_element_type=jnp.int32)
        return y.astype(x.dtype) * scale * w_scale

    def fn(p, x):
        x = jax.nn.relu(product(x, p["up"], p["up_scale"]))
        return product(x, p["down"], p["down_scale"])

    params = {"up": quantised(3, 8), "down": quantised(8, 5)}
    return fn, params | drawn(up_scale=(8,), down_scale=(5,)), (floats(4, 3),)


@entry(50, prunable={"w:1": (8,), "a:1": (4,), "b:1": (8,), "b:0": (4,)})
def low_rank_adapter() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ p["w"] + 2.0 * (x @ p["a"]) @ p["b"])
        return x @ (p["down"] + p["a2"] @ p["b2"])

    shapes = {"w": (3, 8), "a": (3, 4), "b": (4, 8), "down": (8, 5), "a2": (8, 2), "b2": (2, 5)}
    return fn, drawn(**shapes), (floats(4, 3),)


@entry(50, prunable={"w:1": (8,), "magnitude:0": (8,), "a:1": (4,)})
def weight_decomposed_adapter() -> Model:
    def fn(p, x):
        w = p["w"] + p["a"] @ p["b"]
        w = p["magnitude"] * w / jnp.sqrt(jnp.sum(w * w, 0) + 1e-12)
        return jax.nn.gelu(x @ w) @ p["down"]

    shapes = {"w": (3, 8), "a": (3, 4), "b": (4, 8), "magnitude": (8,), "down": (8, 5)}
    return fn, drawn(**shapes), (floats(4, 3),)


TARGET = floats(4, 5, seed=5)


def predict(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]


NET = {"up": (3, 8), "bias": (8,), "down": (8, 5)}
STEPPED = {"params/up:1": (8,), "params/down:0": (8,)}


def training_step(optimizer: optax.GradientTransformation, **more: Any) -> Model:
    """Parameters and optimizer state in and out."""

    def fn(state, x, y):
        def loss(p):
            return jnp.mean((predict(p, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "loss": value}

    params = drawn(**NET)
    opt = jax.tree.map(lambda a: abs(a), filled(optimizer.init(params), seed=3))
    return fn, {"params": params, "opt": opt}, (floats(4, 3), TARGET)


@entry(
    51,
    prunable={**STEPPED, "opt/0/mu/up:1": (8,), "opt/0/nu/bias:0": (8,)},
    differentiable=False,  # the root of a removed second moment has no derivative
)
def training_step_adamw() -> Model:
    return training_step(optax.adamw(1e-2))


@entry(51, prunable={**STEPPED, "opt/1/0/trace/up:1": (8,)})
def training_step_clipped_momentum() -> Model:
    return training_step(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)))


@entry(51, prunable={"params/up:1": (8,), "ema/up:1": (8,), "masks/up:1": (8,)})
def average_and_masks() -> Model:
    def fn(state, x, y):
        def loss(p):
            masked = {n: w * state["masks"][n] for n, w in p.items()}
            return jnp.mean((predict(masked, x) - y) ** 2)

        grads = jax.grad(loss)(state["params"])
        params = {n: w - 0.1 * grads[n] for n, w in state["params"].items()}
        ema = {n: 0.9 * state["ema"][n] + 0.1 * w for n, w in params.items()}
        return {**state, "params": params, "ema": ema}

    state = {"params": drawn(**NET), "ema": drawn(**NET), "masks": drawn(**NET)}
    return fn, state, (floats(4, 3), TARGET)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean((1, 2)))


@entry(51, prunable={"params/Conv_0/kernel:3": (6,), "batch_stats/BatchNorm_0/var:0": (6,)})
def linen_batch_statistics() -> Model:
    net, x = Normed(), floats(2, 4, 4, 3)
    shapes = jax.eval_shape(lambda k, x: net.init(k, x, train=True), jax.random.key(0), x)

    def fn(variables, x):
        logits, updated = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return {"logits": logits, **updated}

    return fn, filled(shapes), (x,)


class NnxNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.down = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


@entry(51, prunable={"up/kernel/value:1": (8,), "norm/mean/value:0": (8,)})
def nnx_batch_statistics() -> Model:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: NnxNormed(nnx.Rngs(0))))

    def fn(state, x):
        net = nnx.merge(graph, state)
        logits = net(x)
        return logits, nnx.state(net)

    return fn, filled(shapes), (floats(4, 3),)


@entry(52, prunable={"trunk:1": (8,), "actor:1": (6,), "critic:1": (4,)})
def actor_and_critic() -> Model:
    def fn(p, x):
        trunk = jnp.tanh(x @ p["trunk"])
        policy = jax.nn.relu(trunk @ p["actor"]) @ p["actor_out"]
        value = jax.nn.relu(trunk @ p["critic"]) @ p["critic_out"]
        return policy, value[..., 0]

    shapes = {"trunk": (3, 8), "actor": (8, 6), "actor_out": (6, 5)}
    return fn, drawn(**shapes, critic=(8, 4), critic_out=(4, 1)), (floats(4, 3),)


@entry(52, prunable={"up:1": (8,), "code:1": (4,), "auxiliary:1": (6,)})
def training_and_evaluation() -> Model:
    """Both functions of the tree in one: the evaluation alone would not tie ``auxiliary``."""

    def encode(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["code"]

    def evaluate(p, x):
        return encode(p, x) @ p["head"]

    def train(p, x):
        code = encode(p, x)
        return jax.nn.relu(code @ p["auxiliary"]) @ p["auxiliary_out"], code @ p["head"]

    shapes = {"up": (3, 8), "code": (8, 4), "head": (4, 5)}
    params = drawn(**shapes, auxiliary=(4, 6), auxiliary_out=(6, 2))
    return (lambda p, x: (evaluate(p, x), train(p, x))), params, (floats(4, 3),)


@entry(52, prunable={"online/up:1": (8,), "target/up:1": (8,)})
def target_network() -> Model:
    """The target's parameters follow the online ones, so that their units are the same."""

    def fn(p, x, y):
        error = lambda w: jnp.mean((predict(w, x) - y - predict(p["target"], x)) ** 2)  # noqa: E731
        grads = jax.grad(error)(p["online"])
        online = {n: w - 0.1 * grads[n] for n, w in p["online"].items()}
        target = {n: 0.9 * w + 0.1 * online[n] for n, w in p["target"].items()}
        return {"online": online, "target": target}

    return fn, {"online": drawn(**NET), "target": drawn(**NET)}, (floats(4, 3), TARGET)
