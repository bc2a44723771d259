"""Rows 33, 35 and 39: recurrence over time."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.models.zoo.common import Model, drawn, entry, filled, floats, linen

SERIES = floats(2, 5, 3)
HIDDEN = 6


class Recurrent(nn.Module):
    """One cell over time from a carry of zeros, then a dense layer."""

    cell: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.RNN(self.cell(HIDDEN, param_dtype=x.dtype))(x))


@entry(33, prunable={"params/LSTMCell_0/hi/kernel:1": (6,), "params/LSTMCell_0/hf/bias:0": (6,)})
def linen_lstm() -> Model:
    return linen(Recurrent(nn.LSTMCell), SERIES)


@entry(33, prunable={"params/OptimizedLSTMCell_0/hi/kernel:0": (6,)})
def linen_optimised_lstm() -> Model:
    return linen(Recurrent(nn.OptimizedLSTMCell), SERIES)


@entry(33, prunable={"params/GRUCell_0/hn/kernel:0": (6,), "params/GRUCell_0/in/kernel:1": (6,)})
def linen_gru() -> Model:
    return linen(Recurrent(nn.GRUCell), SERIES)


class Bidirectional(nn.Module):
    @nn.compact
    def __call__(self, x):
        there, back = (nn.RNN(nn.GRUCell(n, param_dtype=x.dtype)) for n in (6, 4))
        x = nn.Bidirectional(there, back)(x)
        return nn.Dense(5)(nn.RNN(nn.SimpleCell(4, param_dtype=x.dtype))(x))


@entry(33, prunable={"params/Dense_0/kernel:0": (4,)})
def linen_bidirectional() -> Model:
    return linen(Bidirectional(), SERIES)


class NnxRecurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.lstm = nnx.RNN(nnx.LSTMCell(3, 6, rngs=rngs), rngs=rngs)
        self.gru = nnx.RNN(nnx.GRUCell(6, 4, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        carries = [
            tuple(jnp.zeros((x.shape[0], 6), x.dtype) for _ in range(2)),
            jnp.zeros((x.shape[0], 4), x.dtype),
        ]
        x = self.lstm(x, initial_carry=carries[0])
        return self.head(self.gru(x, initial_carry=carries[1]))


def nnx_model(make: Any, *args: Any) -> Model:
    """An NNX module as a function of its state."""
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return (lambda state, *xs: nnx.merge(graph, state)(*xs)), filled(shapes), args


@entry(33, prunable={"head/kernel/value:0": (4,), "lstm/cell/hf/kernel/value:0": (6,)})
def nnx_lstm_and_gru() -> Model:
    return nnx_model(lambda: NnxRecurrent(nnx.Rngs(0)), SERIES)


@entry(33, prunable={"cell/weight_hh:1": (6,), "cell/weight_hh:0": (6,)})
def equinox_lstm() -> Model:
    keys = jax.random.split(jax.random.key(0))
    cell, head = eqx.nn.LSTMCell(3, 6, key=keys[0]), eqx.nn.Linear(6, 5, key=keys[1])
    params, static = eqx.partition({"cell": cell, "head": head}, eqx.is_array)

    def fn(p, x):
        net = eqx.combine(p, static)

        def one(series):
            carry = (jnp.zeros(6, x.dtype), jnp.zeros(6, x.dtype))
            last, _ = jax.lax.scan(lambda c, row: (net["cell"](row, c), None), carry, series)
            return net["head"](last[0])

        return jax.vmap(one)(x)

    return fn, filled(params), (SERIES,)


@entry(33, prunable={"cell/weight_hh:1": (6,), "cell/bias_n:0": (6,)})
def equinox_gru() -> Model:
    keys = jax.random.split(jax.random.key(0))
    cell, head = eqx.nn.GRUCell(3, 6, key=keys[0]), eqx.nn.Linear(6, 5, key=keys[1])
    params, static = eqx.partition({"cell": cell, "head": head}, eqx.is_array)

    def fn(p, x):
        net = eqx.combine(p, static)

        def one(series):
            step = lambda c, row: (net["cell"](row, c), None)  # noqa: E731
            return net["head"](jax.lax.scan(step, jnp.zeros(6, x.dtype), series)[0])

        return jax.vmap(one)(x)

    return fn, filled(params), (SERIES,)


@entry(33, prunable={"kernel:0": (6,), "kernel:1": (6,), "bias:0": (6,)})
def fused_lstm_kernel() -> Model:
    def fn(p, x):
        def step(carry, row):
            h, c = carry
            gates = jnp.concatenate([row, h], -1) @ p["kernel"] + p["bias"]
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x.shape[0], HIDDEN), x.dtype)
        _, ys = jax.lax.scan(step, (zero, zero), x.swapaxes(0, 1))
        return ys @ p["out"]

    return fn, drawn(kernel=(9, 24), bias=(24,), out=(6, 5)), (SERIES,)


@entry(35, prunable={"a:0": (6,), "a:1": (6,), "up:1": (6,), "start:0": (6,)})
def scan_over_time() -> Model:
    def fn(p, x):
        def step(h, row):
            h = jnp.tanh(row @ p["up"] + h @ p["a"])
            return h, h @ p["out"]

        start = jnp.broadcast_to(p["start"], (x.shape[0], HIDDEN))
        return jax.lax.scan(step, start, x.swapaxes(0, 1), reverse=True)[1]

    return fn, drawn(up=(3, 6), a=(6, 6), start=(6,), out=(6, 5)), (SERIES,)


@entry(35, prunable={"up:1": (6,), "decay:0": (6,)})
def linear_recurrence_by_associative_scan() -> Model:
    def fn(p, x):
        inputs = x @ p["up"]
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), inputs.shape)

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = jax.lax.associative_scan(combine, (decay, inputs), axis=1)
        return jax.nn.gelu(h) @ p["out"]

    return fn, drawn(up=(3, 6), decay=(6,), out=(6, 5)), (SERIES,)


@entry(35, prunable={"up:1": (2, 3), "k:1": (2, 3), "v:1": (2, 2)})
def linear_attention_state() -> Model:
    def fn(p, x):
        q, k, v = ((x @ p[n]).reshape(*x.shape[:2], 2, -1).swapaxes(0, 1) for n in ("up", "k", "v"))

        def step(state, qkv):
            q, k, v = qkv
            state = 0.9 * state + jnp.einsum("bhk,bhv->bhkv", k, v)
            return state, jnp.einsum("bhk,bhkv->bhv", q, state)

        start = jnp.zeros((x.shape[0], 2, 3, 2), x.dtype)
        ys = jax.lax.scan(step, start, (q, k, v))[1]
        return ys.reshape(*ys.shape[:2], -1) @ p["out"]

    return fn, drawn(up=(3, 6), k=(3, 6), v=(3, 4), out=(4, 5)), (SERIES,)


INNER, STATE, RANK = 8, 4, 3
MAMBA = {
    "in": (4, 2 * INNER),
    "conv": (3, INNER),
    "conv_bias": (INNER,),
    "x": (INNER, RANK + 2 * STATE),
    "dt": (RANK, INNER),
    "dt_bias": (INNER,),
    "a_log": (INNER, STATE),
    "d": (INNER,),
    "out": (INNER, 5),
}


def causal_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, None],
        (1,),
        [(kernel.shape[0] - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[-1],
    )


def mamba(p: Any, x: jax.Array, recur: Any) -> jax.Array:
    x, gate = jnp.split(x @ p["in"], 2, -1)
    x = jax.nn.silu(causal_depthwise(x, p["conv"]) + p["conv_bias"])
    dt, b, c = jnp.split(x @ p["x"], [RANK, RANK + STATE], -1)
    dt = jax.nn.softplus(dt @ p["dt"] + p["dt_bias"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["a_log"]))
    h = recur(decay, dt[..., None] * b[:, :, None] * x[..., None])
    y = jnp.einsum("btds,bts->btd", h, c) + p["d"] * x
    return (y * jax.nn.silu(gate)) @ p["out"]


def by_scan(decay: jax.Array, inputs: jax.Array) -> jax.Array:
    def step(h, now):
        h = now[0] * h + now[1]
        return h, h

    over = (decay.swapaxes(0, 1), inputs.swapaxes(0, 1))
    return jax.lax.scan(step, jnp.zeros_like(inputs[:, 0]), over)[1].swapaxes(0, 1)


def by_associative_scan(decay: jax.Array, inputs: jax.Array) -> jax.Array:
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (decay, inputs), axis=1)[1]


SLOTS = {"a_log:0": (INNER,), "a_log:1": (STATE,), "dt:0": (RANK,), "in:1": (INNER, INNER)}
MIXED = {**SLOTS, "in:1": (INNER,), "x:1": (RANK, STATE)}


@entry(39, prunable=MIXED)
def mamba_by_scan() -> Model:
    return (lambda p, x: mamba(p, x, by_scan)), drawn(**MAMBA), (floats(2, 5, 4),)


@entry(39, prunable=MIXED)
def mamba_by_associative_scan() -> Model:
    return (lambda p, x: mamba(p, x, by_associative_scan)), drawn(**MAMBA), (floats(2, 5, 4),)


@entry(39, prunable={"in:1": (2, 4, 3), "a_log:0": (2,), "d:0": (2,)})
def mamba_two_heads() -> Model:
    """One projection makes gate, inputs, B, C and a step per head; D and A are per head."""

    def fn(p, x):
        gate, x, b, c, dt = jnp.split(x @ p["in"] + p["bias"], [8, 16, 19, 22], -1)
        x = x.reshape(*x.shape[:2], 2, 4)
        dt = jax.nn.softplus(dt + p["dt_bias"])
        decay = jnp.exp(-dt * jnp.exp(p["a_log"]))[..., None, None]
        h = by_scan(
            jnp.broadcast_to(decay, (*x.shape, 3)),
            jnp.einsum("bth,bthp,bts->bthps", dt, x, b),
        )
        y = jnp.einsum("bthps,bts->bthp", h, c) + p["d"][:, None] * x
        y = y.reshape(*y.shape[:2], -1) * jax.nn.silu(gate)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6) * p["norm"]
        return y @ p["out"]

    shapes = {"in": (4, 24), "bias": (24,), "dt_bias": (2,), "a_log": (2,), "d": (2,)}
    return fn, drawn(**shapes, norm=(8,), out=(8, 5)), (floats(2, 5, 4),)


@entry(39, prunable={"a:0": (6,), "a:1": (4,), "up:1": (6,)})
def diagonal_state_space() -> Model:
    """S4D: complex states, whose convolution kernel is made from the parameters."""

    def fn(p, x):
        u = x @ p["up"]
        a = -jnp.exp(p["a"]) + 1j * p["frequency"]
        steps = jnp.arange(u.shape[1], dtype=u.dtype)
        powers = jnp.exp(a[..., None] * steps)
        kernel = jnp.einsum("ds,dst->dt", jax.lax.complex(p["c"], p["c_imag"]), powers).real
        shift = jnp.arange(u.shape[1])[:, None] - jnp.arange(u.shape[1])
        toeplitz = jnp.where(shift >= 0, kernel[:, jnp.maximum(shift, 0)], 0)
        y = jnp.einsum("dts,bsd->btd", toeplitz, u) + p["d"] * u
        return jax.nn.gelu(y) @ p["out"]

    shapes = dict.fromkeys(("a", "frequency", "c", "c_imag"), (6, 4))
    return fn, drawn(**shapes, up=(3, 6), d=(6,), out=(6, 5)), (SERIES,)
