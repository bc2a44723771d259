"""Layers over tokens: attention, recurrences, mixing along tokens, reshapes to other ranks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import plain

# ------------------------------------------------------------------------------------- attention


def rotated(x: Any, how: str) -> Any:
    """Rotary positions on (batch, tokens, heads, size): halves, neighbours, or complex numbers."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 10.0 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    if how == "halves":
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    if how == "complex":
        a, b = jnp.split(x, 2, -1)
        turned = (a + 1j * b) * jnp.exp(1j * angle)[:, None]
        return jnp.concatenate([turned.real, turned.imag], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def attend(q: Any, k: Any, v: Any, causal: bool, how: str) -> Any:
    """(batch, tokens, heads, size); the heads of k and v divide those of q."""
    if how == "jax.nn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    group = q.shape[2] // k.shape[2]
    if group > 1 and how == "repeat":
        k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        lower = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(lower, scores, -1e9)
    mixed = jnp.einsum("bhgqk,bkhd->bqhgd", jax.nn.softmax(scores, -1), v)
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


def _split_then_heads(y: Any, sizes: tuple[int, int, int], d: int) -> list[Any]:
    parts = jnp.split(y, np.cumsum([s * d for s in sizes])[:2], -1)
    return [p.reshape(*p.shape[:2], -1, d) for p in parts]


def _heads_then_split(y: Any, sizes: tuple[int, int, int], d: int) -> list[Any]:
    heads = y.reshape(*y.shape[:2], -1, d)
    return jnp.split(heads, np.cumsum(sizes)[:2], 2)


def _qkv_params(draw: Draw, c: int, sizes: tuple[int, int, int], d: int, form: str) -> Params:
    if form.startswith("fused"):
        return {"qkv": draw.weights(c, sum(sizes) * d)}
    kernels = {n: draw.weights(c, s * d) for n, s in zip("qkv", sizes)}
    if form == "kernels of three axes":
        kernels = {n: k.reshape(c, -1, d) for n, k in kernels.items()}
        return kernels | {"v_bias": draw.weights(sizes[2], d)}
    return kernels | {"q_bias": draw.weights(sizes[0] * d)}


def _qkv(p: Params, x: Any, sizes: tuple[int, int, int], d: int, form: str) -> list[Any]:
    if form == "fused, split first":
        return _split_then_heads(x @ p["qkv"], sizes, d)
    if form == "fused, heads first":
        return _heads_then_split(x @ p["qkv"], sizes, d)
    if form == "kernels of three axes":
        q, k, v = (jnp.einsum("btc,chd->bthd", x, p[n]) for n in "qkv")
        return [q, k, v + p["v_bias"]]
    flat = [x @ p["q"] + p["q_bias"], x @ p["k"], x @ p["v"]]
    return [y.reshape(*y.shape[:2], -1, d) for y in flat]


FORMS = ("fused, split first", "fused, heads first", "kernels of three axes", "flat kernels")


@layer(3, keeps=True)
def attention(draw: Draw, shape: Shape) -> Layer:
    c, d, form = shape[-1], draw.one([2, 4]), draw.one(FORMS)
    heads, group = draw.one([1, 2, 3]), draw.one([1, 1, 2])
    sizes = (heads * group, heads, heads)
    turn, how = (
        draw.one([None, None, "halves", "neighbours", "complex"]),
        draw.one(["einsum", "repeat", "jax.nn"]),
    )
    causal = draw.maybe(0.4)
    params = _qkv_params(draw, c, sizes, d, form)
    params["out"] = draw.weights(heads * group * d, c)

    def apply(p: Params, x: Any) -> Any:
        q, k, v = _qkv(p, x, sizes, d, form)
        if turn:
            q, k = rotated(q, turn), rotated(k, turn)
        return attend(q, k, v, causal, how).reshape(*x.shape[:2], -1) @ p["out"]

    text = f"attention {heads} x {group} heads of {d}, {form}, {how}"
    text += f"{', causal' if causal else ''}{f', rotary by {turn}' if turn else ''}"
    return Layer(text, params, apply, shape)


@layer(3, keeps=True)
def fused_three(draw: Draw, shape: Shape) -> Layer:
    """The kernel (c, 3, heads, size), and the out kernel with two axes contracted."""
    c, heads, d = shape[-1], draw.one([1, 2, 3]), draw.one([2, 3])
    params = {"qkv": draw.weights(c, 3, heads, d), "out": draw.weights(heads, d, c)}

    def apply(p: Params, x: Any) -> Any:
        q, k, v = jnp.einsum("btc,cshd->sbthd", x, p["qkv"])
        return jnp.einsum("bthd,hdc->btc", attend(q, k, v, False, "einsum"), p["out"])

    return Layer(f"fused_three {heads} heads of {d}", params, apply, shape)


@layer(3, keeps=True)
def linear_attention(draw: Draw, shape: Shape) -> Layer:
    c, d = shape[-1], draw.one([2, 3, 4])
    params = {n: draw.weights(c, d) for n in "qkv"} | {"out": draw.weights(d, c)}

    def apply(p: Params, x: Any) -> Any:
        q, k, v = (x @ p[n] for n in "qkv")
        state = jnp.einsum("btd,bte->bde", jax.nn.elu(k) + 1, v)
        return jnp.einsum("btd,bde->bte", jax.nn.elu(q) + 1, state) @ p["out"]

    return Layer("linear_attention", params, apply, shape)


@layer(3)
def cross_attention(draw: Draw, shape: Shape) -> Layer:
    """Learned queries read the tokens; their number becomes the length."""
    c, queries, d = shape[-1], draw.one([2, 3]), 4
    params = {
        "queries": draw.weights(queries, d),
        "k": draw.weights(c, d),
        "v": draw.weights(c, draw.width()),
    }

    def apply(p: Params, x: Any) -> Any:
        scores = jnp.einsum("qd,btd->bqt", p["queries"], x @ p["k"])
        return jax.nn.softmax(scores, -1) @ (x @ p["v"])

    result = (shape[0], queries, params["v"].shape[1])
    return Layer(f"cross_attention {queries} queries", params, apply, result)


# -------------------------------------------------------------------------- recurrences over time


def _along_time(step: Any, x: Any, carry: Any, reverse: bool) -> Any:
    rows = lax.scan(step, carry, jnp.swapaxes(x, 0, 1), reverse=reverse)[1]
    return jnp.swapaxes(rows, 0, 1)


@layer(3)
def rnn(draw: Draw, shape: Shape) -> Layer:
    c, width, name = shape[-1], draw.width(), draw.one(["tanh", "relu", "sigmoid"])
    act = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}[name]
    params = {
        "in": draw.weights(c, width),
        "state": 0.5 * draw.weights(width, width),
        "bias": draw.weights(width),
    }
    reverse, learned = draw.maybe(0.3), draw.maybe(0.3)
    if learned:
        params["first"] = draw.weights(width)

    def apply(p: Params, x: Any) -> Any:
        def step(h: Any, row: Any) -> Any:
            h = act(row @ p["in"] + h @ p["state"] + p["bias"])
            return h, h

        first = (
            jnp.broadcast_to(p["first"], (len(x), width)) if learned else jnp.zeros((len(x), width))
        )
        return _along_time(step, x, first, reverse)

    text = f"rnn {name}{', reversed' if reverse else ''}{', learned start' if learned else ''}"
    return Layer(text, params, apply, (*shape[:-1], width))


@layer(3)
def lstm(draw: Draw, shape: Shape) -> Layer:
    """Fused gates, split inside the scan; the carry is a pair."""
    c, width = shape[-1], draw.one([3, 4, 6])
    params = {
        "in": draw.weights(c, 4 * width),
        "state": draw.weights(width, 4 * width),
        "bias": draw.weights(4 * width),
    }

    def apply(p: Params, x: Any) -> Any:
        def step(carry: Any, row: Any) -> Any:
            h, cell = carry
            i, f, g, o = jnp.split(row @ p["in"] + h @ p["state"] + p["bias"], 4, -1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (h, cell), h

        zero = jnp.zeros((len(x), width))
        return _along_time(step, x, (zero, zero), False)

    return Layer("lstm", params, apply, (*shape[:-1], width))


@layer(3)
def gru(draw: Draw, shape: Shape) -> Layer:
    """The last state only."""
    c, width = shape[-1], draw.one([3, 4, 6])
    params = {n: draw.weights(c, width) for n in ("in_r", "in_z", "in_n")}
    params |= {n: draw.weights(width, width) for n in ("state_r", "state_z", "state_n")}

    def apply(p: Params, x: Any) -> Any:
        def step(h: Any, row: Any) -> Any:
            r, z = (jax.nn.sigmoid(row @ p[f"in_{g}"] + h @ p[f"state_{g}"]) for g in "rz")
            n = jnp.tanh(row @ p["in_n"] + r * (h @ p["state_n"]))
            return (1 - z) * n + z * h, None

        return lax.scan(step, jnp.zeros((len(x), width)), jnp.swapaxes(x, 0, 1))[0]

    return Layer("gru last state", params, apply, (shape[0], width))


@layer(3)
def state_space(draw: Draw, shape: Shape) -> Layer:
    """Selective state space, by an associative scan over tokens."""
    c, n = shape[-1], draw.one([2, 3])
    params = {
        "step": draw.weights(c, c),
        "b": draw.weights(c, n),
        "c": draw.weights(c, n),
        "decay": draw.positive(c, n),
    }

    def apply(p: Params, x: Any) -> Any:
        dt = jax.nn.softplus(x @ p["step"])[..., None]
        gate = jnp.exp(-dt * p["decay"])
        drive = dt * (x @ p["b"])[:, :, None] * x[..., None]
        combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
        state = lax.associative_scan(combine, (gate, drive), axis=1)[1]
        return jnp.einsum("btcn,btn->btc", state, x @ p["c"])

    return Layer("state_space", params, apply, shape)


# ---------------------------------------------------------------------------- along and to tokens

ALONG = {
    "cumulative sum": lambda x: jnp.cumsum(x, 1),
    "sorted": lambda x: jnp.sort(x, 1),
    "softmax": lambda x: jax.nn.softmax(x, 1),
    "reversed": lambda x: x[:, ::-1],
    "shifted": lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))),
    "differences": lambda x: x - jnp.roll(x, 1, 1),
    "largest first": lambda x: jnp.take_along_axis(x, jnp.argsort(-x, 1), 1),
    "gated by the mean": lambda x: x * jax.nn.sigmoid(x.mean(1, keepdims=True)),
    "from a place": lambda x: lax.dynamic_slice_in_dim(jnp.tile(x, (1, 2, 1)), 1, x.shape[1], 1),
    "one updated": lambda x: x.at[:, 0].add(x[:, -1]),
    "last written": lambda x: lax.dynamic_update_slice(x, 2 * x[:, :1], (0, 1, 0)),
}


@layer(3, keeps=True)
def along_tokens(draw: Draw, shape: Shape) -> Layer:
    name = draw.one(list(ALONG))
    return plain(shape, f"along_tokens {name}", ALONG[name])


@layer(3, keeps=True)
def token_mlp(draw: Draw, shape: Shape) -> Layer:
    """An MLP over tokens, as in MLP-Mixer; its bias reaches every channel."""
    t, width = shape[1], draw.width()
    params = {
        "up": draw.weights(t, width),
        "bias": draw.weights(width),
        "down": draw.weights(width, t),
    }

    def apply(p: Params, x: Any) -> Any:
        turned = jnp.swapaxes(x, 1, 2)
        return jnp.swapaxes(jax.nn.gelu(turned @ p["up"] + p["bias"]) @ p["down"], 1, 2)

    return Layer("token_mlp", params, apply, shape)


@layer(3)
def class_token(draw: Draw, shape: Shape) -> Layer:
    params = {"token": draw.weights(shape[-1])}

    def apply(p: Params, x: Any) -> Any:
        token = jnp.broadcast_to(p["token"], (len(x), 1, x.shape[-1]))
        return jnp.concatenate([token, x], 1)

    return Layer("class_token", params, apply, (shape[0], shape[1] + 1, shape[2]))


@layer(3)
def first_token(draw: Draw, shape: Shape) -> Layer:
    return Layer("first_token", {}, lambda p, x: x[:, 0], (shape[0], shape[2]))


@layer(3)
def causal_conv(draw: Draw, shape: Shape) -> Layer:
    """A depthwise convolution along tokens, padded on the left, as in Mamba."""
    c = shape[-1]
    params = {"kernel": draw.weights(3, 1, c), "bias": draw.weights(c)}

    def apply(p: Params, x: Any) -> Any:
        y = lax.conv_general_dilated(
            x, p["kernel"], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=c,
        )  # fmt: skip
        return jax.nn.silu(y + p["bias"])

    return Layer("causal_conv depthwise", params, apply, shape)


@layer(2)
def to_tokens(draw: Draw, shape: Shape) -> Layer | None:
    """Channels become tokens of fewer channels."""
    count = draw.factor(shape[-1])
    if count is None or shape[-1] // count < 2:
        return None

    def apply(p: Params, x: Any) -> Any:
        return x.reshape(x.shape[0], count, -1)

    return Layer(f"to_tokens {count}", {}, apply, (shape[0], count, shape[-1] // count))


@layer(3)
def turned(draw: Draw, shape: Shape) -> Layer:
    """Tokens and channels change places."""
    return Layer("turned", {}, lambda p, x: jnp.swapaxes(x, 1, 2), (shape[0], shape[2], shape[1]))


@layer(3)
def merged_tokens(draw: Draw, shape: Shape) -> Layer | None:
    """Neighbouring tokens become one of twice the channels."""
    if shape[1] % 2:
        return None

    def apply(p: Params, x: Any) -> Any:
        return x.reshape(x.shape[0], x.shape[1] // 2, -1)

    return Layer("merged_tokens", {}, apply, (shape[0], shape[1] // 2, 2 * shape[2]))


@layer(4)
def image_to_tokens(draw: Draw, shape: Shape) -> Layer:
    def apply(p: Params, x: Any) -> Any:
        return x.reshape(x.shape[0], -1, x.shape[-1])

    return Layer("image_to_tokens", {}, apply, (shape[0], shape[1] * shape[2], shape[3]))
