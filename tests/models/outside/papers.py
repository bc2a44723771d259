"""Less usual layers of papers, as plain functions: flows, routing, sorting, structured algebra."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.outside.model import Model, Models, floats, tokens, weights

MODELS = Models()
SERIES, ROWS, IMAGES, IDS = floats(2, 6, 8), floats(4, 6), floats(2, 8, 8, 3), tokens(2, 6)


def conv(x: Any, w: Any, stride: int = 1, groups: int = 1, padding: Any = "SAME") -> Any:
    names = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=names, feature_group_count=groups
    )


def softmax_attention(q: Any, k: Any, v: Any) -> Any:
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


@MODELS("papers/Transformer-XL, relative shift")
def relative_shift() -> Model:
    params = weights(q=(8, 12), k=(8, 12), v=(8, 12), o=(12, 8), r=(8, 12), u=(3, 4), w=(3, 4))
    angle = np.arange(11)[:, None] / 10 ** (np.arange(4) / 4)
    code = jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], -1), jnp.float32)

    def fn(p: Any, x: Any) -> Any:
        q, k, v = ((x @ p[n]).reshape(2, 6, 3, 4) for n in "qkv")
        r = (code @ p["r"]).reshape(11, 3, 4)
        content = jnp.einsum("bqhd,bkhd->bhqk", q + p["u"], k)
        place = jnp.einsum("bqhd,khd->bhqk", q + p["w"], r)
        place = jnp.pad(place, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(2, 3, 12, 6)
        place = place[:, :, 1:].reshape(2, 3, 6, 11)[..., :6]
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax((content + place) / 2), v)
        return x + y.reshape(2, 6, 12) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Sliding window attention")
def window() -> Model:
    params = weights(qkv=(8, 36), o=(12, 8))

    def fn(p: Any, x: Any) -> Any:
        q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(2, 6, 3, 3, 4), 2, 0)

        def near(z: Any) -> Any:
            z = jnp.pad(z, ((0, 0), (2, 0), (0, 0), (0, 0)))
            return jnp.stack([z[:, i : i + 6] for i in range(3)], 2)

        logits = jnp.einsum("bthd,btwhd->bthw", q, near(k)) / 2
        y = jnp.einsum("bthw,btwhd->bthd", jax.nn.softmax(logits), near(v))
        return x + y.reshape(2, 6, 12) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Performer, random features")
def performer() -> Model:
    params = weights(q=(8, 12), k=(8, 12), v=(8, 12), o=(12, 8))
    draws = floats(4, 10, seed=9)

    def fn(p: Any, x: Any) -> Any:
        q, k, v = ((x @ p[n]).reshape(2, 6, 3, 4) for n in "qkv")

        def features(z: Any) -> Any:
            square = jnp.sum(z * z, -1, keepdims=True) / 2
            return jnp.exp(z @ draws - square) + 1e-4

        q, k = features(q), features(k)
        state = jnp.cumsum(jnp.einsum("bthm,bthd->bthmd", k, v), 1)
        below = jnp.einsum("bthm,bthm->bth", q, jnp.cumsum(k, 1))
        y = jnp.einsum("bthm,bthmd->bthd", q, state) / below[..., None]
        return x + y.reshape(2, 6, 12) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Reformer, sorted buckets")
def reformer() -> Model:
    params = weights(qk=(8, 12), v=(8, 12), o=(12, 8))
    turn = floats(12, 2, seed=9)

    def fn(p: Any, x: Any) -> Any:
        qk, v = x @ p["qk"], x @ p["v"]
        projected = qk @ turn
        bucket = jnp.argmax(jnp.concatenate([projected, -projected], -1), -1)
        order = jnp.argsort(bucket, 1)
        back = jnp.argsort(order, 1)
        qk, v = (jnp.take_along_axis(z, order[..., None], 1).reshape(2, 3, 2, 12) for z in (qk, v))
        y = jnp.einsum("bcij,bcjd->bcid", jax.nn.softmax(qk @ qk.swapaxes(2, 3) / 3), v)
        return x + jnp.take_along_axis(y.reshape(2, 6, 12), back[..., None], 1) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Set transformer, induced points")
def induced() -> Model:
    params = weights(i=(3, 12), q=(12, 12), k=(8, 12), v=(8, 12), o=(12, 12), head=(12, 3))

    def fn(p: Any, x: Any) -> Any:
        q = jnp.broadcast_to(p["i"] @ p["q"], (2, 3, 12)).reshape(2, 3, 3, 4)
        k, v = ((x @ p[n]).reshape(2, 6, 3, 4) for n in "kv")
        h = softmax_attention(q, k, v).reshape(2, 3, 12)
        return jax.nn.relu(h @ p["o"]) @ p["head"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Hyena, gated long convolution")
def hyena() -> Model:
    params = weights(i=(8, 36), f1=(5, 10), f2=(10, 12), o=(12, 8), decay=(12,), short=(3, 36))
    time = np.linspace(0, 1, 6)[:, None]
    code = jnp.asarray(np.concatenate([time, np.sin(time * [3, 5]), np.cos(time * [3, 5])], 1))

    def fn(p: Any, x: Any) -> Any:
        z = jnp.pad(x @ p["i"], ((0, 0), (2, 0), (0, 0)))
        z = sum(z[:, i : i + 6] * p["short"][i] for i in range(3))
        a, b, v = jnp.split(z, 3, -1)
        kernel = jnp.sin(code.astype(x.dtype) @ p["f1"]) @ p["f2"]
        kernel = kernel * jnp.exp(-jnp.exp(p["decay"]) * jnp.arange(6)[:, None])
        f = jnp.fft.rfft(a * v, 12, axis=1) * jnp.fft.rfft(kernel, 12, axis=0)
        return x + (b * jnp.fft.irfft(f, 12, axis=1)[:, :6]) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Griffin, gated linear recurrence")
def griffin() -> Model:
    params = weights(x=(8, 12), y=(8, 12), a=(12, 12), i=(12, 12), l=(12,), o=(12, 8))

    def fn(p: Any, x: Any) -> Any:
        h, gate = x @ p["x"], jax.nn.gelu(x @ p["y"])
        log_a = -8 * jax.nn.softplus(p["l"]) * jax.nn.sigmoid(h @ p["a"])
        drive = jnp.sqrt(1 - jnp.exp(2 * log_a) + 1e-6) * jax.nn.sigmoid(h @ p["i"]) * h

        def combine(one: Any, two: Any) -> Any:
            return one[0] + two[0], jnp.exp(two[0]) * one[1] + two[1]

        h = jax.lax.associative_scan(combine, (log_a, drive), reverse=True, axis=1)[1]
        return x + (h * gate) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/xLSTM, matrix memory")
def mlstm() -> Model:
    params = weights(q=(8, 12), k=(8, 12), v=(8, 12), i=(8, 3), f=(8, 3), o=(12, 8))

    def fn(p: Any, x: Any) -> Any:
        q, k, v = ((x @ p[n]).reshape(2, 6, 3, 4) for n in "qkv")
        log_f = jnp.cumsum(jax.nn.log_sigmoid(x @ p["f"] + 3), 1)
        d = log_f[:, :, None] - log_f[:, None] + (x @ p["i"])[:, None]
        d = jnp.where(jnp.tril(jnp.ones((6, 6), bool))[None, :, :, None], d, -jnp.inf)
        top = jax.lax.stop_gradient(d.max(2, keepdims=True))
        c = jnp.einsum("bqhd,bkhd->bqkh", q, k) / 2 * jnp.exp(d - top)
        scale = jnp.maximum(jnp.abs(c.sum(2)), jnp.exp(-top[:, :, 0]))
        y = jnp.einsum("bqkh,bkhd->bqhd", c, v) / scale[..., None]
        return x + y.reshape(2, 6, 12) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Neural Turing machine")
def turing() -> Model:
    params = weights(c=(14, 12), key=(12, 6), erase=(12, 6), add=(12, 6), out=(12, 3))

    def fn(p: Any, x: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            memory, read = carry
            h = jnp.tanh(jnp.concatenate([x, read], -1) @ p["c"])
            key = h @ p["key"]
            norm = jnp.sqrt(jnp.sum(memory**2, -1) * jnp.sum(key**2, -1)[:, None] + 1e-6)
            w = jax.nn.softmax(jnp.einsum("bnm,bm->bn", memory, key) / norm)
            erase = 1 - w[..., None] * jax.nn.sigmoid(h @ p["erase"])[:, None]
            memory = memory * erase + w[..., None] * (h @ p["add"])[:, None]
            return (memory, jnp.einsum("bn,bnm->bm", w, memory)), h @ p["out"]

        start = jnp.full((2, 5, 6), 0.1), jnp.zeros((2, 6))
        return jax.lax.scan(step, start, x.swapaxes(0, 1))[1]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Pointer network")
def pointer() -> Model:
    params = weights(e=(8, 12), d=(12, 12), w1=(12, 10), w2=(12, 10), v=(10, 1))

    def fn(p: Any, x: Any) -> Any:
        memory = jnp.tanh(x @ p["e"])

        def step(h: Any, _: Any) -> Any:
            score = (jnp.tanh((memory @ p["w1"]) + (h @ p["w2"])[:, None]) @ p["v"])[..., 0]
            read = jnp.einsum("bt,btd->bd", jax.nn.softmax(score), memory)
            return jnp.tanh(read @ p["d"]), jax.nn.log_softmax(score)

        return jax.lax.scan(step, memory.mean(1), None, length=3)[1]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Capsules, routing by agreement")
def capsules() -> Model:
    params = weights(low=(6, 20), w=(5, 3, 4, 6), head=(6, 2))

    def fn(p: Any, x: Any) -> Any:
        def squash(s: Any) -> Any:
            n = jnp.sum(s * s, -1, keepdims=True)
            return n / (1 + n) * s / jnp.sqrt(n + 1e-9)

        low = squash((x @ p["low"]).reshape(4, 5, 4))
        votes = jnp.einsum("bid,ijde->bije", low, p["w"])
        logits = jnp.zeros(votes.shape[:3])
        for _ in range(2):
            out = squash(jnp.einsum("bij,bije->bje", jax.nn.softmax(logits, 2), votes))
            logits = logits + jnp.einsum("bije,bje->bij", votes, out)
        return out @ p["head"]

    return Model(fn, params, (ROWS,))


@MODELS("papers/Glow, invertible mixing")
def glow() -> Model:
    params = weights(s=(6,), b=(6,), n1=(3, 12), n2=(12, 6)) | {
        "w": jnp.eye(6) + 0.1 * floats(6, 6, seed=7)
    }

    def fn(p: Any, x: Any) -> Any:
        x = (x + p["b"]) * jnp.exp(p["s"])
        x, det = x @ p["w"], p["s"].sum() + jnp.linalg.slogdet(p["w"])[1]
        a, b = jnp.split(x, 2, -1)
        shift, log_scale = jnp.split(jax.nn.relu(a @ p["n1"]) @ p["n2"], 2, -1)
        log_scale = jnp.tanh(log_scale)
        b = b * jnp.exp(log_scale) + shift
        z = jnp.concatenate([a, b], -1)
        return -0.5 * jnp.sum(z**2, -1) + det + log_scale.sum(-1)

    return Model(fn, params, (ROWS,))


@MODELS("papers/Masked autoencoder of densities")
def made() -> Model:
    degrees = np.arange(12) % 5 + 1
    first = jnp.asarray(np.arange(1, 7)[:, None] <= degrees, jnp.float32)
    second = jnp.asarray(degrees[:, None] < np.arange(1, 7), jnp.float32)
    params = weights(w1=(6, 12), b1=(12,), mean=(12, 6), scale=(12, 6))

    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.relu(x @ (p["w1"] * first) + p["b1"])
        mean, scale = h @ (p["mean"] * second), jnp.tanh(h @ (p["scale"] * second))
        return jnp.sum(-0.5 * ((x - mean) * jnp.exp(-scale)) ** 2 - scale, -1)

    return Model(fn, params, (ROWS,))


@MODELS("papers/Linear-chain CRF")
def crf() -> Model:
    params = weights(w=(8, 12), e=(12, 4), t=(4, 4))

    def fn(p: Any, x: Any, tags: Any) -> Any:
        score = jnp.tanh(x @ p["w"]) @ p["e"]

        def step(alpha: Any, s: Any) -> Any:
            return jax.nn.logsumexp(alpha[:, :, None] + p["t"], 1) + s, None

        alpha = jax.lax.scan(step, score[:, 0], score[:, 1:].swapaxes(0, 1))[0]
        gold = jnp.take_along_axis(score, tags[..., None], -1)[..., 0].sum(1)
        gold = gold + p["t"][tags[:, :-1], tags[:, 1:]].sum(1)
        return jax.nn.logsumexp(alpha, -1) - gold

    return Model(fn, params, (SERIES, IDS % 4))


@MODELS("papers/CTC loss")
def ctc() -> Model:
    import optax

    params = weights(w=(8, 12), v=(12, 5))

    def fn(p: Any, x: Any) -> Any:
        logits = jax.nn.relu(x @ p["w"]) @ p["v"]
        labels, pad = jnp.array([[1, 2], [3, 3]]), jnp.zeros((2, 2))
        return optax.ctc_loss(logits, jnp.zeros((2, 6)), labels, pad), logits

    return Model(fn, params, (SERIES,))


@MODELS("papers/Modulated convolution of StyleGAN")
def stylegan() -> Model:
    params = weights(map1=(5, 12), map2=(12, 12), style=(12, 8), const=(4, 4, 8), w=(3, 3, 8, 6))
    params |= weights(rgb=(6, 3), noise=(6,))

    def fn(p: Any, z: Any) -> Any:
        z = z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + 1e-8)
        s = jax.nn.leaky_relu(jax.nn.leaky_relu(z @ p["map1"]) @ p["map2"]) @ p["style"] + 1
        w = p["w"] * s[:, None, None, :, None]
        w = w * jax.lax.rsqrt(jnp.sum(w * w, (1, 2, 3), keepdims=True) + 1e-8)
        one = jax.vmap(lambda w: conv(p["const"][None], w)[0])
        noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
        return jax.nn.leaky_relu(one(w) + noise * p["noise"]) @ p["rgb"]

    return Model(fn, params, (floats(2, 5),))


@MODELS("papers/Super-resolution, pixel shuffle")
def pixel_shuffle() -> Model:
    params = weights(a=(3, 3, 3, 8), b=(3, 3, 8, 12), c=(3, 3, 3, 3))

    def fn(p: Any, x: Any) -> Any:
        h = conv(jax.nn.relu(conv(x, p["a"])), p["b"]).reshape(2, 8, 8, 2, 2, 3)
        h = h.transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 3)
        return conv(h, p["c"]) + jax.image.resize(x, (2, 16, 16, 3), "bilinear")

    return Model(fn, params, (IMAGES,))


@MODELS("papers/Spatial transformer, bilinear sampling")
def spatial_transformer() -> Model:
    params = weights(l1=(192, 12), l2=(12, 2), c=(3, 3, 3, 8), d=(3, 3, 8, 6), head=(6, 3))

    def sample(image: Any, shift: Any) -> Any:
        grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0), indexing="ij"))
        at = grid + shift[:, None, None]
        low = jnp.floor(at)
        out: Any = 0.0
        for i in (0, 1):
            for j in (0, 1):
                y, x = low[0] + i, low[1] + j
                weight = (1 - jnp.abs(at[0] - y)) * (1 - jnp.abs(at[1] - x))
                rows = jnp.clip(y, 0, 7).astype(int), jnp.clip(x, 0, 7).astype(int)
                out = out + image[rows] * weight[..., None]
        return out

    def fn(p: Any, x: Any) -> Any:
        shift = jnp.tanh(jax.nn.relu(x.reshape(2, -1) @ p["l1"]) @ p["l2"])
        h = jax.vmap(sample)(jax.nn.relu(conv(x, p["c"])), shift)
        return jax.nn.relu(conv(h, p["d"])).mean((1, 2)) @ p["head"]

    return Model(fn, params, (IMAGES,))


@MODELS("papers/PointNet with a learned rotation")
def pointnet() -> Model:
    params = weights(t1=(3, 12), t2=(12, 9), a=(3, 12), t3=(12, 36), b=(6, 16), c=(16, 3))
    params |= weights(mid=(12, 6))

    def fn(p: Any, x: Any) -> Any:
        turn = jax.nn.relu(x @ p["t1"]).max(1) @ p["t2"]
        x = x @ (turn.reshape(2, 3, 3) + jnp.eye(3))
        h = jax.nn.relu(x @ p["a"])
        turn = (h.max(1) @ p["t3"]).reshape(2, 6, 6) + jnp.eye(6)
        h = jax.nn.relu((h @ p["mid"]) @ turn)
        return jax.nn.relu(h @ p["b"]).max(1) @ p["c"]

    return Model(fn, params, (floats(2, 7, 3),))


@MODELS("papers/DLRM, pairwise interactions")
def dlrm() -> Model:
    params = weights(bottom=(6, 8), e1=(10, 8), e2=(12, 8), e3=(9, 8), top=(14, 12), out=(12, 1))
    rows, columns = np.triu_indices(4, 1)

    def fn(p: Any, dense: Any, ids: Any) -> Any:
        x = jax.nn.relu(dense @ p["bottom"])
        z = jnp.stack([x, *(p[f"e{i + 1}"][ids[:, i]] for i in range(3))], 1)
        pairs = jnp.einsum("bid,bjd->bij", z, z)[:, rows, columns]
        return jax.nn.relu(jnp.concatenate([x, pairs], -1) @ p["top"]) @ p["out"]

    return Model(fn, params, (ROWS, tokens(4, 3, high=9)))


@MODELS("papers/Factorisation machine, wide and deep")
def factorisation() -> Model:
    params = weights(wide=(30, 1), table=(30, 8), d1=(24, 12), d2=(12, 1))

    def fn(p: Any, ids: Any) -> Any:
        e = p["table"][ids]
        pairs = 0.5 * jnp.sum(e.sum(1) ** 2 - (e**2).sum(1), -1)
        deep = jax.nn.relu(e.reshape(len(e), -1) @ p["d1"]) @ p["d2"]
        return p["wide"][ids].sum((1, 2)) + pairs + deep[:, 0]

    return Model(fn, params, (tokens(4, 3, high=30),))


@MODELS("papers/TabNet, sparsemax")
def tabnet() -> Model:
    params = weights(f=(6, 32), a=(8, 6), head=(8, 3))

    def sparsemax(z: Any) -> Any:
        ordered = -jnp.sort(-z, -1)
        total, k = jnp.cumsum(ordered, -1), jnp.arange(1, z.shape[-1] + 1)
        size = jnp.sum(1 + k * ordered > total, -1, keepdims=True)
        tau = (jnp.take_along_axis(total, size - 1, -1) - 1) / size
        return jnp.maximum(z - tau, 0)

    def fn(p: Any, x: Any) -> Any:
        prior: Any = jnp.ones_like(x)
        out: Any = 0.0
        a = jnp.zeros((len(x), p["a"].shape[0]))
        for _ in range(2):
            mask = sparsemax(prior * (a @ p["a"]) + x)
            prior = prior * (1.3 - mask)
            d, a = jnp.split(jax.nn.glu((mask * x) @ p["f"]), 2, -1)
            out = out + jax.nn.relu(d)
        return out @ p["head"]

    return Model(fn, params, (ROWS,))


@MODELS("papers/Highway and maxout")
def highway() -> Model:
    params = weights(i=(6, 12), h=(12, 12), t=(12, 12), m=(12, 24), head=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        x = x @ p["i"]
        gate = jax.nn.sigmoid(x @ p["t"] - 1)
        x = gate * jnp.tanh(x @ p["h"]) + (1 - gate) * x
        return (x @ p["m"]).reshape(len(x), 8, 3).max(-1) @ p["head"]

    return Model(fn, params, (ROWS,))


@MODELS("papers/DenseNet and transition")
def densenet() -> Model:
    layers = [weights(s=(4 + 4 * i,), w=(3, 3, 4 + 4 * i, 4)) for i in range(3)]
    params = {"stem": floats(3, 3, 3, 4), "layers": layers} | weights(t=(16, 8), head=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        x = conv(x, p["stem"])
        for w in p["layers"]:
            x = jnp.concatenate([x, conv(jax.nn.relu(x * w["s"]), w["w"])], -1)
        x = jax.lax.reduce_window(x @ p["t"], 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.mean((1, 2)) @ p["head"]

    return Model(fn, params, (IMAGES,))


@MODELS("papers/Inception and feature pyramid")
def pyramid() -> Model:
    params = weights(a=(1, 1, 3, 4), b=(3, 3, 3, 6), c=(5, 5, 3, 2), d=(3, 3, 12, 8))
    params |= weights(top=(8, 6), side=(12, 6), out=(3, 3, 6, 3))

    def fn(p: Any, x: Any) -> Any:
        low = jax.nn.relu(jnp.concatenate([conv(x, p[n]) for n in "abc"], -1))
        high = jax.nn.relu(conv(low, p["d"], 2))
        up = jnp.repeat(jnp.repeat(high @ p["top"], 2, 1), 2, 2)
        return conv(up + low @ p["side"], p["out"]), high.mean((1, 2))

    return Model(fn, params, (IMAGES,))


@MODELS("papers/Coordinate attention, separable pooling")
def coordinate() -> Model:
    params = weights(i=(3, 8), s=(8, 4), h=(4, 8), w=(4, 8), head=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        x = jax.nn.relu(x @ p["i"])
        rows, columns = x.mean(2), x.mean(1)
        y = jax.nn.hard_swish(jnp.concatenate([rows, columns], 1) @ p["s"])
        a, b = jnp.split(y, 2, 1)
        gate = jax.nn.sigmoid(a @ p["h"])[:, :, None] * jax.nn.sigmoid(b @ p["w"])[:, None]
        return (x * gate).mean((1, 2)) @ p["head"]

    return Model(fn, params, (IMAGES,))


@MODELS("papers/Gumbel softmax, temperature")
def gumbel() -> Model:
    params = weights(e=(6, 16), l=(16, 20), d=(20, 6))

    def fn(p: Any, x: Any) -> Any:
        logits = (jnp.tanh(x @ p["e"]) @ p["l"]).reshape(4, 4, 5)
        noise = jax.random.gumbel(jax.random.key(0), logits.shape)
        soft = jax.nn.softmax((logits + noise) / 0.5)
        hard = jax.nn.one_hot(jnp.argmax(soft, -1), 5)
        z = soft + jax.lax.stop_gradient(hard - soft)
        return z.reshape(4, 20) @ p["d"], jax.nn.softmax(logits)

    return Model(fn, params, (ROWS,))


@MODELS("papers/Sinkhorn sorting")
def sinkhorn() -> Model:
    params = weights(w=(8, 12), v=(12, 6), o=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        score = jax.nn.relu(x @ p["w"]) @ p["v"]
        for _ in range(3):
            score = score - jax.nn.logsumexp(score, 1, keepdims=True)
            score = score - jax.nn.logsumexp(score, 2, keepdims=True)
        return jnp.einsum("bts,btd->bsd", jnp.exp(score), x) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Mixture density network")
def mixture_density() -> Model:
    params = weights(w=(6, 16), pi=(16, 3), mean=(16, 6), scale=(16, 3))

    def fn(p: Any, x: Any, y: Any) -> Any:
        h = jnp.tanh(x @ p["w"])
        mean, scale = (h @ p["mean"]).reshape(4, 3, 2), jnp.exp(h @ p["scale"])[..., None]
        each = -0.5 * (((y[:, None] - mean) / scale) ** 2).sum(-1) - 2 * jnp.log(scale[..., 0])
        return -jax.nn.logsumexp(jax.nn.log_softmax(h @ p["pi"]) + each, -1)

    return Model(fn, params, (ROWS, floats(4, 2, seed=1)))


@MODELS("papers/Gaussian process on deep features")
def deep_kernel() -> Model:
    params = weights(w1=(6, 16), w2=(16, 4), noise=())

    def fn(p: Any, x: Any, y: Any, new: Any) -> Any:
        def features(x: Any) -> Any:
            return jnp.tanh(x @ p["w1"]) @ p["w2"]

        def kernel(a: Any, b: Any) -> Any:
            return jnp.exp(-0.5 * jnp.sum((a[:, None] - b) ** 2, -1))

        a, b = features(x), features(new)
        factor = jax.scipy.linalg.cho_factor(kernel(a, a) + jnp.exp(p["noise"]) * jnp.eye(4))
        return kernel(b, a) @ jax.scipy.linalg.cho_solve(factor, y)

    return Model(fn, params, (ROWS, floats(4), floats(3, 6, seed=2)))


@MODELS("papers/Orthogonal recurrence by a matrix exponential")
def orthogonal() -> Model:
    params = weights(a=(8, 8), u=(8, 8), b=(8,), head=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        w = jax.scipy.linalg.expm((p["a"] - p["a"].T) * 0.3)

        def step(h: Any, x: Any) -> Any:
            h = h @ w + x @ p["u"]
            h = jnp.sign(h) * jax.nn.relu(jnp.abs(h) + p["b"])
            return h, None

        return jax.lax.scan(step, jnp.zeros((2, 8)), x.swapaxes(0, 1))[0] @ p["head"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Transposed attention over channels")
def channel_attention() -> Model:
    """Restormer: heads attend over channels; queries and keys are normalised over space."""
    params = weights(qkv=(8, 24), d=(3, 3, 1, 24), t=(2, 1, 1), o=(8, 8), i=(3, 8), head=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        x = x @ p["i"]
        qkv = conv(x @ p["qkv"], p["d"], groups=24).reshape(2, 64, 3, 2, 4)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q, k = (z * jax.lax.rsqrt(jnp.sum(z * z, 1, keepdims=True) + 1e-6) for z in (q, k))
        a = jax.nn.softmax(jnp.einsum("bnhc,bnhe->bhce", q, k) * p["t"])
        y = jnp.einsum("bhce,bnhe->bnhc", a, v).reshape(2, 8, 8, 8)
        return (x + y @ p["o"]).mean((1, 2)) @ p["head"]

    return Model(fn, params, (IMAGES,))


@MODELS("papers/Tensor-train layer")
def tensor_train() -> Model:
    params = weights(a=(4, 3, 5), b=(5, 4, 2, 3), head=(9, 3))

    def fn(p: Any, x: Any) -> Any:
        x = x.reshape(12, 2, 4)
        y = jnp.einsum("nji,iar,rbjc->nabc", x, p["a"], p["b"])
        return jax.nn.relu(y.mean(2).reshape(12, 9)) @ p["head"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Equivariant by group averaging")
def equivariant() -> Model:
    params = weights(a=(3, 3, 3, 8), b=(3, 3, 8, 6), head=(6, 3))

    def fn(p: Any, x: Any) -> Any:
        out: Any = 0.0
        for turn in range(4):
            h = jax.nn.relu(conv(jnp.rot90(x, turn, (1, 2)), p["a"]))
            out = out + jnp.rot90(jax.nn.relu(conv(h, p["b"], 2)), -turn, (1, 2))
        return (out / 4).max((1, 2)) @ p["head"]

    return Model(fn, params, (IMAGES,))


@MODELS("papers/Token merging")
def merging() -> Model:
    """Each of the even tokens joins the most similar odd one; weights by size."""
    params = weights(w=(8, 12), v=(12, 10), head=(10, 3))

    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.gelu(x @ p["w"])
        a, b = h[:, ::2], h[:, 1::2]
        best = jnp.argmax(jnp.einsum("bid,bjd->bij", a, b), -1)
        one = jax.nn.one_hot(best, 3)
        merged = (b + jnp.einsum("bij,bid->bjd", one, a)) / (1 + one.sum(1)[..., None])
        return jax.nn.relu(merged @ p["v"]).mean(1) @ p["head"]

    return Model(fn, params, (SERIES,))


@MODELS("papers/Cosine classifier with a margin")
def cosine() -> Model:
    params = weights(w1=(6, 16), w2=(16, 8), proxies=(5, 8))

    def fn(p: Any, x: Any) -> Any:
        def unit(z: Any) -> Any:
            return z * jax.lax.rsqrt(jnp.sum(z * z, -1, keepdims=True) + 1e-9)

        cosine = unit(jax.nn.relu(x @ p["w1"]) @ p["w2"]) @ unit(p["proxies"]).T
        return jax.nn.log_softmax(16 * (cosine - 0.1 * jnp.eye(5)[:4]))

    return Model(fn, params, (ROWS,))


@MODELS("papers/Byte model, patches of bytes")
def bytes_() -> Model:
    """MegaByte: a patch's embeddings are concatenated for a global step, then split again."""
    params = weights(e=(40, 4), g=(8, 12), g2=(12, 8), l=(4, 10), out=(10, 40), n=(8,))

    def fn(p: Any, ids: Any) -> Any:
        x = p["e"][ids]
        big = x.reshape(2, 3, 8)
        shifted = jnp.pad(big, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        y = jax.nn.gelu((jnp.cumsum(shifted, 1) * p["n"]) @ p["g"]) @ p["g2"]
        return jax.nn.relu((y.reshape(2, 6, 4) + x) @ p["l"]) @ p["out"]

    return Model(fn, params, (IDS,))
