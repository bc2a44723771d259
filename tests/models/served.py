"""Small networks of the kinds that are served, for engines and artefacts."""

import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np


def floats(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


class Residual(nn.Module):
    """Convolutions with BatchNorm as it is served, strides, pooling of both kinds."""

    @nn.compact
    def __call__(self, x):
        def norm(x):
            return nn.BatchNorm(use_running_average=True)(x)

        for stride in (1, 2):
            x = nn.relu(norm(nn.Conv(16, (3, 3), strides=stride, use_bias=False)(x)))
            y = nn.relu(norm(nn.Conv(32, (3, 3))(x)))
            x = nn.relu(x + norm(nn.Conv(16, (3, 3))(y)))
        x = nn.avg_pool(nn.max_pool(x, (3, 3), (2, 2), "SAME"), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        y = nn.silu(nn.Conv(32, (1, 1))(x))
        y = nn.silu(nn.Conv(32, (3, 3), feature_group_count=32)(y))
        gate = nn.sigmoid(nn.Dense(32)(nn.relu(nn.Dense(8)(y.mean((1, 2), keepdims=True)))))
        return nn.Dense(10)((x + nn.Conv(16, (1, 1))(y * gate)).mean((1, 2)))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(50, 32)(ids) + nn.Embed(64, 32)(jnp.arange(ids.shape[1]))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(16))(x)
        return nn.Dense(5)(x[:, -1])


class BothWays(nn.Module):
    @nn.compact
    def __call__(self, x):
        cells = (nn.RNN(nn.GRUCell(16)) for _ in range(2))
        return nn.Dense(5)(nn.Bidirectional(*cells)(x).mean(1))


class Images(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.out(nnx.relu(self.second(x)).mean((1, 2)))


def of_linen(net, x):
    params = jax.jit(net.init)(jax.random.key(0), x)
    moved = jax.tree.map(lambda w: w + 0.1 * jnp.abs(floats(*w.shape)), params)
    return net.apply, moved, x


def of_nnx():
    graph, state = nnx.split(Images(nnx.Rngs(0)))
    return (lambda p, x: nnx.merge(graph, p)(x)), state, floats(2, 12, 12, 3)


def of_equinox():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [
        eqx.nn.Conv2d(3, 16, 3, padding=1, key=keys[0]), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(16, 32, 3, stride=2, key=keys[1]), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Lambda(lambda x: x.mean((1, 2))), eqx.nn.Linear(32, 10, key=keys[2]),
    ]  # fmt: skip
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_inexact_array)
    fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    return fn, params, floats(2, 3, 12, 12)


def causal():
    """A block of a language model: RMSNorm, rotary, grouped queries, a causal mask, a gated MLP."""
    width, heads, groups, size, hidden = 32, 4, 2, 8, 64
    p = {
        "norm1": jnp.ones(width), "norm2": jnp.ones(width), "q": floats(width, heads, size),
        "k": floats(width, groups, size), "v": floats(width, groups, size),
        "o": floats(heads, size, width), "gate": floats(width, hidden),
        "up": floats(width, hidden), "down": floats(hidden, width),
    }  # fmt: skip
    return _causal, jax.tree.map(lambda w: w / np.sqrt(w.shape[0]), p), floats(2, 6, width)


def _causal(p, x):
    y = _norm(x, p["norm1"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[n]) for n in "qkv")
    q, k = _rotated(q), _rotated(k)
    q = q.reshape(*q.shape[:2], p["k"].shape[1], -1, q.shape[-1])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) / np.sqrt(q.shape[-1])
    at = jnp.arange(x.shape[1])
    keep = jnp.where(at[None] < 64, at[:, None] >= at[None], False)  # a Where of booleans
    weights = jax.nn.softmax(jnp.where(keep, scores, -1e9))
    z = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
    x = x + jnp.einsum("bthk,hkd->btd", z.reshape(*z.shape[:2], -1, z.shape[-1]), p["o"])
    y = _norm(x, p["norm2"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def _norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight


def _rotated(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 1e4 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


# name -> (fn, params, x)
NETWORKS = {
    "cnn": lambda: of_linen(Residual(), floats(2, 16, 16, 3)),
    "depthwise": lambda: of_linen(Depthwise(), floats(2, 16, 16, 3)),
    "nnx": of_nnx,
    "equinox": of_equinox,
    "encoder": lambda: of_linen(Encoder(), jnp.arange(24).reshape(2, 12) * 7 % 50),
    "lstm": lambda: of_linen(Lstm(), floats(2, 6, 8)),
    "gru": lambda: of_linen(BothWays(), floats(2, 6, 8)),
    "causal": causal,
}
