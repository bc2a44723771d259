"""Equinox: its own layers, composed as its documentation does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.outside_models.model import (
    KEY,
    Model,
    Models,
    equinox_model,
    floats,
    tokens,
)

MODELS = Models()

CHW, IMAGES, SERIES = floats(2, 3, 32, 32), floats(2, 32, 32, 3), floats(2, 6, 5)


def equinox_mlp() -> Model:
    import equinox as eqx

    return equinox_model(eqx.nn.MLP(6, 3, 16, 3, key=KEY), floats(4, 6))


def equinox_attention() -> Model:
    import equinox as eqx

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
    import equinox as eqx

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
    import equinox as eqx

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
    import equinox as eqx

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
