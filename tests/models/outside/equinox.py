"""Equinox: its own layers, composed as its documentation does."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.models.outside.model import (
    KEY,
    Model,
    Models,
    equinox_model,
    floats,
    stateful_equinox,
    tokens,
)

MODELS = Models()

CHW, IMAGES, SERIES = floats(2, 3, 32, 32), floats(2, 32, 32, 3), floats(2, 6, 5)


def equinox_mlp() -> Model:
    return equinox_model(eqx.nn.MLP(6, 3, 16, 3, key=KEY), floats(4, 6))


def equinox_attention() -> Model:
    keys = jax.random.split(KEY, 6)
    parts = [
        eqx.nn.Embedding(30, 16, key=keys[0]),
        eqx.nn.MultiheadAttention(4, 16, key=keys[1]),
        eqx.nn.LayerNorm(16),
        eqx.nn.MLP(16, 16, 32, 1, key=keys[2]),
        eqx.nn.RMSNorm(16),
        eqx.nn.Linear(16, 30, key=keys[3]),
        eqx.nn.RotaryPositionalEmbedding(4),
    ]

    def call(parts: Any, ids: Any) -> Any:
        embed, attention, norm, mlp, rms, head, rope = parts

        def turn(q: Any, k: Any, v: Any) -> Any:
            return jax.vmap(rope, 1, 1)(q), jax.vmap(rope, 1, 1)(k), v

        x = jax.vmap(embed)(ids)
        n = jax.vmap(norm)(x)
        mask = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
        x = x + attention(n, n, n, mask=mask, process_heads=turn)
        x = x + jax.vmap(mlp)(jax.vmap(rms)(x))
        return jax.vmap(head)(x)

    return equinox_model(parts, tokens(2, 6, high=30), call=call)


def equinox_rnn(cell: str) -> Model:
    keys = jax.random.split(KEY, 2)
    parts = (getattr(eqx.nn, cell)(5, 12, key=keys[0]), eqx.nn.Linear(12, 3, key=keys[1]))

    def call(parts: Any, xs: Any) -> Any:
        core, head = parts
        zero = jnp.zeros(12)
        start = (zero, zero) if cell == "LSTMCell" else zero

        def step(carry: Any, x: Any) -> Any:
            new = core(x, carry)
            return new, new[0] if cell == "LSTMCell" else new

        return jax.vmap(head)(jax.lax.scan(step, start, xs)[1])

    return equinox_model(parts, SERIES, call=call)


def equinox_cnn() -> Model:
    k = jax.random.split(KEY, 5)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 8, 3, key=k[0]),
            eqx.nn.Lambda(eqx.nn.PReLU()),
            eqx.nn.GroupNorm(4, 8),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(8, 12, 3, groups=4, key=k[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.AdaptiveAvgPool2d(3),
            eqx.nn.ConvTranspose2d(12, 6, 2, stride=2, key=k[2]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(6 * 36, 4, key=k[3]),
        ]
    )
    return equinox_model(net, CHW)


def equinox_norms(norm: str) -> Model:
    k = jax.random.split(KEY, 3)
    hidden = eqx.nn.Linear(12, 16, key=k[1])
    wrapped = {"WeightNorm": lambda: eqx.nn.WeightNorm(hidden)}[norm]()
    parts = (eqx.nn.Linear(6, 12, key=k[0]), wrapped, eqx.nn.Linear(16, 3, key=k[2]))

    def call(parts: Any, x: Any) -> Any:
        first, second, last = parts
        return last(jax.nn.gelu(second(jax.nn.gelu(first(x)))))

    return equinox_model(parts, floats(4, 6), call=call)


MODELS.add("equinox/MLP", equinox_mlp)
MODELS.add("equinox/Transformer block", equinox_attention)
MODELS.add("equinox/LSTMCell", equinox_rnn, "LSTMCell")
MODELS.add("equinox/GRUCell", equinox_rnn, "GRUCell")
MODELS.add("equinox/CNN", equinox_cnn)
MODELS.add("equinox/WeightNorm", equinox_norms, "WeightNorm")


class _Block(NamedTuple):
    """Parts of a layer; a plain pytree of modules."""

    norm: Any
    up: Any
    down: Any


@MODELS("equinox/Layers by filter_vmap, scanned and checkpointed")
def stacked() -> Model:
    """As the documentation compiles deep networks: stacked modules, one scan."""

    def build(key: Any) -> _Block:
        one, two = jax.random.split(key)
        return _Block(
            eqx.nn.LayerNorm(12), eqx.nn.Linear(12, 20, key=one), eqx.nn.Linear(20, 12, key=two)
        )

    blocks = eqx.filter_vmap(build)(jax.random.split(KEY, 3))
    parts = (eqx.nn.Linear(6, 12, key=KEY), blocks, eqx.nn.Linear(12, 3, key=KEY))

    def call(parts: Any, x: Any) -> Any:
        first, blocks, last = parts
        arrays, static = eqx.partition(blocks, eqx.is_array)

        @eqx.filter_checkpoint
        def step(x: Any, arrays: Any) -> Any:
            block = eqx.combine(arrays, static)
            return x + block.down(jax.nn.gelu(block.up(block.norm(x)))), None

        return last(jax.lax.scan(step, first(x), arrays)[0])

    return equinox_model(parts, floats(4, 6), call=call)


@MODELS("equinox/Gradient under filter_jit")
def gradient() -> Model:
    def call(module: Any, x: Any, y: Any) -> Any:
        @eqx.filter_jit
        def loss(module: Any) -> Any:
            return jnp.mean((jax.vmap(module)(x) - y) ** 2)

        return eqx.filter_value_and_grad(loss)(module)

    module = eqx.nn.MLP(6, 3, 16, 2, activation=jax.nn.silu, key=KEY)
    return equinox_model(module, floats(4, 6), floats(4, 3, seed=1), call=call, batch=False)


@MODELS("equinox/BatchNorm and SpectralNorm, evaluation")
def stateful() -> Model:
    class Net(eqx.Module):
        conv: Any
        norm: Any
        dense: Any

        def __init__(self) -> None:
            self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=KEY)
            self.norm = eqx.nn.BatchNorm(8, "batch", mode="ema")
            self.dense = eqx.nn.SpectralNorm(eqx.nn.Linear(8, 4, key=KEY), "weight", key=KEY)

        def __call__(self, x: Any, state: Any) -> Any:
            x, state = self.norm(self.conv(x), state)
            return self.dense(jax.nn.relu(x).mean((1, 2)), state)

    return stateful_equinox(Net, floats(2, 3, 8, 8))


@MODELS("equinox/Ensemble by filter_vmap")
def ensemble() -> Model:
    build = eqx.filter_vmap(lambda key: eqx.nn.MLP(6, 3, 12, 2, key=key))
    members = build(jax.random.split(KEY, 3))

    def call(members: Any, x: Any) -> Any:
        return eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(members, x)

    return equinox_model(members, floats(4, 6), call=call)


@MODELS("equinox/U-Net of one dimension")
def unet() -> Model:
    keys = jax.random.split(KEY, 6)
    parts = {
        "in": eqx.nn.Conv1d(2, 8, 3, padding=1, key=keys[0]),
        "norm": eqx.nn.GroupNorm(2, 8),
        "down": eqx.nn.Conv1d(8, 12, 3, stride=2, padding=1, key=keys[1]),
        "mid": eqx.nn.Conv1d(12, 12, 3, padding=1, key=keys[2]),
        "up": eqx.nn.ConvTranspose1d(12, 8, 4, stride=2, padding=1, key=keys[3]),
        "out": eqx.nn.Conv1d(16, 2, 3, padding=1, key=keys[4]),
    }

    def call(p: Any, x: Any) -> Any:
        skip = jax.nn.silu(p["norm"](p["in"](x)))
        h = jax.nn.silu(p["mid"](jax.nn.silu(p["down"](skip))))
        return p["out"](jnp.concatenate([jax.nn.silu(p["up"](h)), skip]))

    return equinox_model(parts, floats(2, 2, 16), call=call)


@MODELS("equinox/Neural CDE, tensor of a vector field")
def cde() -> Model:
    keys = jax.random.split(KEY, 3)
    parts = (
        eqx.nn.Linear(5, 8, key=keys[0]),
        eqx.nn.MLP(8, 40, 16, 1, jax.nn.softplus, jnp.tanh, key=keys[1]),
        eqx.nn.Linear(8, 1, key=keys[2]),
    )

    def call(parts: Any, xs: Any) -> Any:
        first, field, head = parts

        def step(z: Any, change: Any) -> Any:
            return z + field(z).reshape(8, 5) @ change, None

        z, _ = jax.lax.scan(step, first(xs[0]), jnp.diff(xs, axis=0))
        return jax.nn.sigmoid(head(z))

    return equinox_model(parts, SERIES, call=call)


@MODELS("equinox/Vision transformer with a class token")
def vit() -> Model:
    keys = jax.random.split(KEY, 6)
    parts = {
        "patch": eqx.nn.Conv2d(3, 16, 4, 4, key=keys[0]),
        "cls": jax.random.normal(keys[1], (1, 16)),
        "pos": jax.random.normal(keys[2], (5, 16)),
        "norm": eqx.nn.LayerNorm(16),
        "attention": eqx.nn.MultiheadAttention(4, 16, use_query_bias=True, key=keys[3]),
        "mlp": eqx.nn.MLP(16, 16, 32, 1, jax.nn.gelu, key=keys[4]),
        "head": eqx.nn.Linear(16, 3, key=keys[5]),
    }

    def call(p: Any, image: Any) -> Any:
        x = p["patch"](image).reshape(16, -1).T
        x = jnp.concatenate([p["cls"], x]) + p["pos"]
        y = jax.vmap(p["norm"])(x)
        x = x + p["attention"](y, y, y)
        return p["head"]((x + jax.vmap(p["mlp"])(x))[0])

    return equinox_model(parts, floats(2, 3, 8, 8), call=call)
