"""Plain functions of dicts, as papers' code writes them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.outside.model import Model, Models, floats, tokens, weights

MODELS = Models()
SERIES, ROWS, IDS = floats(2, 6, 8), floats(4, 6), tokens(2, 6)


def rms(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def layer_norm(x: Any, scale: Any, bias: Any) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def rope_halves(x: Any) -> Any:
    """Rotary positions, first half against second half."""
    d = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] / 100 ** (jnp.arange(d // 2) / (d // 2))
    a, b = jnp.split(x, 2, -1)
    c, s = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def rope_pairs(x: Any) -> Any:
    """Rotary positions, even entries against odd ones."""
    d = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] / 100 ** (jnp.arange(d // 2) / (d // 2))
    a, b = x[..., ::2], x[..., 1::2]
    c, s = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    return jnp.stack([a * c - b * s, b * c + a * s], -1).reshape(x.shape)


def rope_complex(x: Any) -> Any:
    """Rotary positions as a product of complex numbers."""
    d = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] / 100 ** (jnp.arange(d // 2) / (d // 2))
    pairs = x.reshape(*x.shape[:-1], d // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * jnp.exp(1j * angle)[:, None]
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attend(q: Any, k: Any, v: Any, bias: Any = 0.0) -> Any:
    """Causal attention; of grouped queries, ``k`` and ``v`` have fewer heads."""
    t, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + bias
    logits = jnp.where(jnp.tril(jnp.ones((t, t), bool)), logits, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


@MODELS("plain/Llama, rotary halves", rope_halves)
@MODELS("plain/Llama, rotary pairs", rope_pairs)
@MODELS("plain/Llama, rotary complex", rope_complex)
def llama(rope: Any) -> Model:
    layer = {"n1": (16,), "q": (16, 32), "k": (16, 16), "v": (16, 16), "o": (32, 16), "n2": (16,)}
    layer |= {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    params = {"embed": floats(40, 16), "layers": [weights(**layer), weights(**layer)]}

    def fn(p: Any, ids: Any) -> Any:
        x = p["embed"][ids]
        for w in p["layers"]:
            h = rms(x, w["n1"])
            q, k, v = ((h @ w[n]).reshape(*x.shape[:2], -1, 8) for n in "qkv")
            x = x + attend(rope(q), rope(k), v).reshape(*x.shape[:2], 32) @ w["o"]
            h = rms(x, w["n2"])
            x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return x @ p["embed"].T

    return Model(fn, params, (IDS,))


@MODELS("plain/GPT, fused projections, scanned")
def gpt() -> Model:
    """Stacked layers; queries, keys and values of one product, gate and up of another."""
    layer = {"qkv": (2, 16, 48), "o": (2, 16, 16), "gu": (2, 16, 48), "down": (2, 24, 16)}
    params = weights(**layer, n1=(2, 16), n2=(2, 16), embed=(40, 16), pos=(12, 16))

    def fn(p: Any, ids: Any) -> Any:
        x = p["embed"][ids] + p["pos"][: ids.shape[1]]

        @jax.checkpoint
        def step(x: Any, w: Any) -> Any:
            qkv = (rms(x, w["n1"]) @ w["qkv"]).reshape(*x.shape[:2], 3, 4, 4)
            y = attend(*(qkv[:, :, i] for i in range(3)))
            x = x + y.reshape(x.shape) @ w["o"]
            gate, up = jnp.split(rms(x, w["n2"]) @ w["gu"], 2, -1)
            return x + (jax.nn.gelu(gate) * up) @ w["down"], None

        stacked = {k: p[k] for k in ("qkv", "o", "gu", "down", "n1", "n2")}
        return jax.lax.scan(step, x, stacked)[0] @ p["embed"].T

    return Model(fn, params, (IDS,))


@MODELS("plain/ALiBi, parallel block")
def alibi() -> Model:
    params = weights(q=(8, 16), k=(8, 16), v=(8, 16), o=(16, 8), up=(8, 20), down=(20, 8), n=(8,))
    slopes = 2.0 ** -np.arange(1, 5)

    def fn(p: Any, x: Any) -> Any:
        h, t = rms(x, p["n"]), x.shape[1]
        q, k, v = ((h @ p[n]).reshape(2, t, 4, 4) for n in "qkv")
        far = jnp.arange(t)[None] - jnp.arange(t)[:, None]
        y = attend(q, k, v, slopes[:, None, None] * far).reshape(2, t, 16) @ p["o"]
        return x + y + jax.nn.gelu(h @ p["up"]) @ p["down"]

    return Model(fn, params, (SERIES,))


@MODELS("plain/Latent attention")
def latent() -> Model:
    """Keys and values from one low rank; part of a key is shared by the heads and rotated."""
    params = weights(q=(8, 24), down=(8, 10), up=(6, 32), o=(16, 8), n=(6,))

    def fn(p: Any, x: Any) -> Any:
        b, t, _ = x.shape
        q, low = (x @ p["q"]).reshape(b, t, 4, 6), x @ p["down"]
        kv = (rms(low[..., :6], p["n"]) @ p["up"]).reshape(b, t, 4, 8)
        shared = jnp.broadcast_to(low[:, :, None, 6:], (b, t, 4, 4))
        q = jnp.concatenate([q[..., :2], rope_halves(q[..., 2:])], -1)
        k = jnp.concatenate([kv[..., :2], rope_halves(shared)], -1)
        return x + attend(q, k, kv[..., 2:6]).reshape(b, t, 16) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("plain/Swin block")
def swin() -> Model:
    """Windows of 2 x 2 shifted by one, a table of relative positions, patch merging."""
    params = weights(
        qkv=(8, 24), o=(8, 8), table=(9, 2), merge=(32, 12), head=(12, 3), g=(8,), b=(8,)
    )
    where = np.stack(np.meshgrid(np.arange(2), np.arange(2), indexing="ij")).reshape(2, 4)
    index = ((where[:, :, None] - where[:, None]) + 1).T @ np.array([3, 1])

    def fn(p: Any, x: Any) -> Any:
        y = jnp.roll(layer_norm(x, p["g"], p["b"]), (-1, -1), (1, 2))
        y = y.reshape(2, 2, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(8, 4, 8)
        q, k, v = (z.reshape(8, 4, 2, 4) for z in jnp.split(y @ p["qkv"], 3, -1))
        logits = jnp.einsum("wqhd,wkhd->whqk", q, k) / 2 + p["table"][index].transpose(2, 0, 1)
        y = jnp.einsum("whqk,wkhd->wqhd", jax.nn.softmax(logits), v).reshape(8, 4, 8) @ p["o"]
        y = y.reshape(2, 2, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 8)
        x = x + jnp.roll(y, (1, 1), (1, 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return (jnp.concatenate(corners, -1) @ p["merge"]).mean((1, 2)) @ p["head"]

    return Model(fn, params, (floats(2, 4, 4, 8),))


@MODELS("plain/Mamba, associative scan", True)
@MODELS("plain/Mamba, sequential scan", False)
def mamba(parallel: bool) -> Model:
    params = weights(i=(8, 32), conv=(3, 16), x=(16, 9), dt=(3, 16), a=(16, 3), d=(16,), o=(16, 8))

    def fn(p: Any, x: Any) -> Any:
        u, z = jnp.split(x @ p["i"], 2, -1)
        padded = jnp.pad(u, ((0, 0), (2, 0), (0, 0)))
        u = jax.nn.silu(sum(padded[:, i : i + 6] * p["conv"][i] for i in range(3)))
        dt, b, c = jnp.split(u @ p["x"], (3, 6), -1)
        dt = jax.nn.softplus(dt @ p["dt"])
        decay = jnp.exp(-jnp.exp(p["a"]) * dt[..., None])
        drive = (dt * u)[..., None] * b[:, :, None]

        def combine(one: Any, two: Any) -> Any:
            return one[0] * two[0], two[0] * one[1] + two[1]

        if parallel:
            h = jax.lax.associative_scan(combine, (decay, drive), axis=1)[1]
        else:
            pairs = jax.tree.map(lambda s: s.swapaxes(0, 1), (decay, drive))
            zero = jnp.zeros_like(drive[:, 0])
            h = jax.lax.scan(lambda h, s: (s[0] * h + s[1],) * 2, zero, pairs)[1].swapaxes(0, 1)
        y = jnp.einsum("btds,bts->btd", h, c) + u * p["d"]
        return x + (y * jax.nn.silu(z)) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("plain/S4, convolution by FFT")
def s4() -> Model:
    """A diagonal state space of complex numbers, as one long convolution."""
    params = weights(re=(8, 4), im=(8, 4), c=(8, 4), cim=(8, 4), d=(8,), o=(8, 16), last=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        a = -jnp.exp(p["re"]) + 1j * p["im"]
        powers = jnp.exp(a[..., None] * jnp.arange(6) * 0.1)
        kernel = 2 * jnp.einsum("ds,dst->dt", p["c"] + 1j * p["cim"], powers).real
        f = jnp.fft.rfft(x, 12, axis=1) * jnp.fft.rfft(kernel, 12, axis=1).T
        y = jax.nn.gelu(jnp.fft.irfft(f, 12, axis=1)[:, :6] + x * p["d"])
        return jax.nn.glu(y @ p["o"]) @ p["last"]

    return Model(fn, params, (SERIES,))


@MODELS("plain/RWKV")
def rwkv() -> Model:
    names = {"r": (8, 12), "k": (8, 12), "v": (8, 12), "o": (12, 8), "decay": (12,), "first": (12,)}
    params = weights(**names, mr=(8,), mk=(8,), fk=(8, 20), fv=(20, 8), fr=(8, 8))

    def fn(p: Any, x: Any) -> Any:
        def shift(x: Any) -> Any:
            return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], 1)

        mixed = [x * p[m] + shift(x) * (1 - p[m]) for m in ("mr", "mk")]
        r, k, v = jax.nn.sigmoid(mixed[0] @ p["r"]), mixed[1] @ p["k"], mixed[1] @ p["v"]

        def step(carry: Any, kv: Any) -> Any:
            (num, den, top), (k, v) = carry, kv
            best = jnp.maximum(top, p["first"] + k)
            a, b = jnp.exp(top - best), jnp.exp(p["first"] + k - best)
            out = (a * num + b * v) / (a * den + b)
            decayed = top - jnp.exp(p["decay"])
            best = jnp.maximum(decayed, k)
            a, b = jnp.exp(decayed - best), jnp.exp(k - best)
            return (a * num + b * v, a * den + b, best), out

        zero = jnp.zeros((2, 12))
        kv = k.swapaxes(0, 1), v.swapaxes(0, 1)
        _, wkv = jax.lax.scan(step, (zero, zero, zero - 1e30), kv)
        x = x + (r * wkv.swapaxes(0, 1)) @ p["o"]
        return x + jax.nn.sigmoid(x @ p["fr"]) * (jnp.square(jax.nn.relu(x @ p["fk"])) @ p["fv"])

    return Model(fn, params, (SERIES,))


@MODELS("plain/Linear attention, chunked state")
def linear_attention() -> Model:
    params = weights(q=(8, 16), k=(8, 16), v=(8, 16), o=(16, 8), beta=(8, 4))

    def fn(p: Any, x: Any) -> Any:
        """The delta rule: a state per head that is read, corrected and written."""
        q, k, v = ((x @ p[n]).reshape(2, 6, 4, 4).swapaxes(0, 1) for n in "qkv")
        k = k * jax.lax.rsqrt(jnp.sum(k * k, -1, keepdims=True) + 1e-6)
        beta = jax.nn.sigmoid(x @ p["beta"]).swapaxes(0, 1)

        def step(s: Any, now: Any) -> Any:
            q, k, v, b = now
            error = v - jnp.einsum("bhkv,bhk->bhv", s, k)
            s = s + jnp.einsum("bhk,bhv,bh->bhkv", k, error, b)
            return s, jnp.einsum("bhkv,bhk->bhv", s, q)

        out = jax.lax.scan(step, jnp.zeros((2, 4, 4, 4)), (q, k, v, beta))[1]
        return x + out.swapaxes(0, 1).reshape(2, 6, 16) @ p["o"]

    return Model(fn, params, (SERIES,))


@MODELS("plain/Experts, top two, gathered weights", "gathered")
@MODELS("plain/Experts, capacity and one-hot dispatch", "capacity")
@MODELS("plain/Experts, sorted and ragged", "ragged")
def experts(way: str) -> Model:
    params = weights(gate=(8, 4), up=(4, 8, 12), down=(4, 12, 8))

    def fn(p: Any, x: Any) -> Any:
        x = x.reshape(-1, 8)
        weight, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["gate"]), 2)
        if way == "gathered":
            h = jax.nn.relu(jnp.einsum("nd,nkdf->nkf", x, p["up"][chosen]))
            return jnp.einsum("nkf,nkfd,nk->nd", h, p["down"][chosen], weight)
        if way == "capacity":
            hot = jax.nn.one_hot(chosen, 4)
            place = jnp.cumsum(hot.reshape(-1, 4), 0).reshape(hot.shape) * hot - 1
            dispatch = jax.nn.one_hot(place, 8) * hot[..., None]
            combine = jnp.einsum("nkec,nk->nec", dispatch, weight)
            inputs = jnp.einsum("nkec,nd->ecd", dispatch, x)
            h = jax.nn.relu(jnp.einsum("ecd,edf->ecf", inputs, p["up"]))
            return jnp.einsum("nec,ecf,efd->nd", combine, h, p["down"])
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=4)
        h = jax.nn.relu(jax.lax.ragged_dot(x[order // 2], p["up"], sizes))
        y = jax.lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
        return jnp.einsum("nkd,nk->nd", y.reshape(-1, 2, 8), weight)

    return Model(fn, params, (SERIES,))


@MODELS("plain/LoRA on frozen weights")
def lora() -> Model:
    params = weights(w1=(6, 16), a1=(6, 4), b1=(4, 16), w2=(16, 3), a2=(16, 4), b2=(4, 3))

    def fn(p: Any, x: Any) -> Any:
        w1, w2 = jax.lax.stop_gradient((p["w1"], p["w2"]))
        h = jax.nn.relu(x @ w1 + 2.0 * (x @ p["a1"]) @ p["b1"])
        return h @ w2 + 2.0 * (h @ p["a2"]) @ p["b2"]

    return Model(fn, params, (ROWS,))


@MODELS("plain/Int8 weights with scales")
def int8() -> Model:
    params = {
        "w1": (floats(6, 16) * 40).astype(jnp.int8), "s1": floats(16, seed=1) * 0.01,
        "w2": (floats(16, 3) * 40).astype(jnp.int8), "s2": floats(3, seed=2) * 0.01,
    }  # fmt: skip

    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.relu((x @ p["w1"].astype(x.dtype)) * p["s1"])
        step = jax.lax.stop_gradient(jnp.abs(h).max(-1, keepdims=True) / 127 + 1e-6)
        low = jnp.round(h / step).astype(jnp.int8)
        product = jax.lax.dot(low, p["w2"], preferred_element_type=jnp.int32)
        return product * step * p["s2"]

    return Model(fn, params, (ROWS,))


@MODELS("plain/Quantisation-aware, straight through")
def straight_through() -> Model:
    params = weights(w1=(6, 16), w2=(16, 12), w3=(12, 3))

    @jax.custom_vjp
    def rounded(w: Any) -> Any:
        return jnp.round(w * 16) / 16

    rounded.defvjp(lambda w: (rounded(w), w), lambda w, g: (g * (jnp.abs(w) < 2),))

    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.relu(x @ rounded(p["w1"]))
        return jax.nn.relu(h @ rounded(p["w2"])) @ rounded(p["w3"])

    return Model(fn, params, (ROWS,))


@MODELS("plain/NeRF")
def nerf() -> Model:
    """Positional codes, a skip into the middle, volume rendering along a ray."""
    params = weights(w1=(15, 16), w2=(16, 16), w3=(31, 16), sigma=(16, 1), w4=(19, 8), rgb=(8, 3))

    def fn(p: Any, points: Any, direction: Any) -> Any:
        angle = (points[..., None] * 2.0 ** jnp.arange(2)).reshape(*points.shape[:-1], -1)
        code = jnp.concatenate([points, jnp.sin(angle), jnp.cos(angle)], -1)
        h = jax.nn.relu(jax.nn.relu(code @ p["w1"]) @ p["w2"])
        h = jax.nn.relu(jnp.concatenate([h, code], -1) @ p["w3"])
        alpha = 1 - jnp.exp(-jax.nn.softplus(h @ p["sigma"])[..., 0])
        passed = jnp.cumprod(1 - alpha + 1e-6, -1)
        ray = jnp.broadcast_to(direction[:, None], points.shape)
        h = jax.nn.relu(jnp.concatenate([h, ray], -1) @ p["w4"])
        return jnp.sum((alpha * passed)[..., None] * jax.nn.sigmoid(h @ p["rgb"]), 1)

    return Model(fn, params, (floats(4, 5, 3), floats(4, 3, seed=1)))


def conv1d(x: Any, w: Any, dilation: int = 1) -> Any:
    """A causal convolution over time."""
    x = jnp.pad(x, ((0, 0), (dilation * (len(w) - 1), 0), (0, 0)))
    names = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, w, (1,), "VALID", None, (dilation,), names)


@MODELS("plain/WaveNet")
def wavenet() -> Model:
    layer = {"filter": (2, 8, 12), "gate": (2, 8, 12), "skip": (12, 10), "out": (12, 8)}
    params = {"first": floats(8, 8), "layers": [weights(**layer) for _ in range(3)]}
    params |= weights(h1=(10, 10), h2=(10, 5))

    def fn(p: Any, x: Any) -> Any:
        x, skips = x @ p["first"], 0.0
        for i, w in enumerate(p["layers"]):
            gate = jax.nn.sigmoid(conv1d(x, w["gate"], 2**i))
            h = jnp.tanh(conv1d(x, w["filter"], 2**i)) * gate
            skips, x = skips + h @ w["skip"], x + h @ w["out"]
        return jax.nn.relu(jax.nn.relu(skips) @ p["h1"]) @ p["h2"]

    return Model(fn, params, (SERIES,))


@MODELS("plain/TCN, weight normalised")
def tcn() -> Model:
    params = weights(v1=(3, 8, 12), g1=(12,), v2=(3, 12, 8), g2=(8,), skip=(8, 8), head=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        h = x
        for i in "12":
            v = p[f"v{i}"]
            norm = jnp.sqrt(jnp.sum(v * v, (0, 1)) + 1e-12)
            h = jax.nn.relu(conv1d(h, p[f"g{i}"] * v / norm, int(i)))
        return jax.nn.relu(h + x @ p["skip"])[:, -1] @ p["head"]

    return Model(fn, params, (SERIES,))


@MODELS("plain/Speech CNN on a spectrum")
def speech() -> Model:
    """Frames of a wave, a Fourier transform, fixed filters, convolutions over time."""
    params = weights(c1=(3, 6, 10), c2=(3, 10, 8), b1=(10,), head=(8, 4))
    bank = np.abs(np.random.default_rng(0).normal(size=(9, 6)))

    def fn(p: Any, wave: Any) -> Any:
        frames = jnp.stack([wave[:, i : i + 16] for i in range(0, 48, 8)], 1) * np.hanning(16)
        power = jnp.abs(jnp.fft.rfft(frames)) ** 2
        x = jnp.log(power @ bank + 1e-3)
        x = jax.nn.relu(conv1d(x, p["c1"]) + p["b1"])
        return jax.nn.relu(conv1d(x, p["c2"])).max(1) @ p["head"]

    return Model(fn, params, (floats(2, 64),))


@MODELS("plain/Hypernetwork")
def hypernetwork() -> Model:
    params = weights(h1=(4, 16), h2=(16, 6 * 10 + 10 * 3), b=(10,))

    def fn(p: Any, x: Any, task: Any) -> Any:
        made = jax.nn.relu(task @ p["h1"]) @ p["h2"]
        w1, w2 = made[:60].reshape(6, 10), made[60:].reshape(10, 3)
        return jnp.tanh(x @ w1 + p["b"]) @ w2

    return Model(fn, params, (ROWS, floats(4)))


@MODELS("plain/DeepSets with a mask")
def deep_sets() -> Model:
    params = weights(p1=(8, 16), p2=(16, 12), r1=(24, 10), r2=(10, 3))

    def fn(p: Any, x: Any, mask: Any) -> Any:
        h = jax.nn.relu(jax.nn.relu(x @ p["p1"]) @ p["p2"])
        m = mask[..., None]
        mean = jnp.sum(h * m, 1) / jnp.sum(m, 1)
        top = jnp.max(jnp.where(m > 0, h, -1e9), 1)
        return jax.nn.relu(jnp.concatenate([mean, top], -1) @ p["r1"]) @ p["r2"]

    return Model(fn, params, (SERIES, jnp.array([[1.0] * 6, [1, 1, 1, 0, 0, 0]])))


_SEND, _RECEIVE = jnp.array([0, 1, 2, 3, 0]), jnp.array([1, 2, 3, 0, 2])


@MODELS("plain/Message passing, segment sum", "sum")
@MODELS("plain/Message passing, segment max", "max")
@MODELS("plain/Graph attention, segment softmax", "attention")
def graph(way: str) -> Model:
    params = weights(e=(6, 12), m1=(24, 16), m2=(16, 12), u=(24, 12), a=(24, 1), head=(12, 3))

    def fn(p: Any, nodes: Any, send: Any, receive: Any) -> Any:
        h = nodes @ p["e"]
        for _ in range(2):
            pair = jnp.concatenate([h[send], h[receive]], -1)
            m = jax.nn.relu(pair @ p["m1"]) @ p["m2"]
            if way == "attention":
                score = jnp.exp(jax.nn.leaky_relu(pair @ p["a"]))
                m = m * score / jax.ops.segment_sum(score, receive, 4)[receive]
            pool = jax.ops.segment_max if way == "max" else jax.ops.segment_sum
            h = jax.nn.relu(jnp.concatenate([h, pool(m, receive, 4)], -1) @ p["u"])
        return h.mean(0) @ p["head"]

    return Model(fn, params, (ROWS, _SEND, _RECEIVE))


@MODELS("plain/DiT block, adaLN-zero")
def dit() -> Model:
    params = weights(t=(5, 8), ada=(8, 48), qkv=(8, 24), o=(8, 8), up=(8, 20), down=(20, 8))

    def norm(x: Any) -> Any:
        return layer_norm(x, 1.0, 0.0)

    def fn(p: Any, x: Any, time: Any) -> Any:
        c = jax.nn.silu(time @ p["t"]) @ p["ada"]
        s1, b1, g1, s2, b2, g2 = jnp.split(c[:, None], 6, -1)
        q, k, v = jnp.moveaxis(((norm(x) * (1 + s1) + b1) @ p["qkv"]).reshape(2, 6, 3, 2, 4), 2, 0)
        x = x + g1 * (jax.nn.dot_product_attention(q, k, v).reshape(2, 6, 8) @ p["o"])
        h = norm(x) * (1 + s2) + b2
        return x + g2 * (jax.nn.gelu(h @ p["up"]) @ p["down"])

    return Model(fn, params, (SERIES, floats(2, 5, seed=1)))


@MODELS("plain/ShuffleNet unit")
def shuffle() -> Model:
    params = weights(a=(1, 1, 4, 8), d=(3, 3, 1, 8), b=(1, 1, 8, 4), head=(8, 3))

    def conv(x: Any, w: Any, groups: int = 1) -> Any:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=names, feature_group_count=groups
        )

    def fn(p: Any, x: Any) -> Any:
        left, right = jnp.split(x, 2, -1)
        y = conv(conv(jax.nn.relu(conv(right, p["a"])), p["d"], 8), p["b"])
        x = jnp.concatenate([left, jax.nn.relu(y)], -1)
        x = x.reshape(*x.shape[:3], 2, 4).swapaxes(3, 4).reshape(x.shape)
        return x.mean((1, 2)) @ p["head"]

    return Model(fn, params, (floats(2, 4, 4, 8),))


@MODELS("plain/Neural ODE, Runge-Kutta")
def ode() -> Model:
    params = weights(i=(6, 8), w1=(8, 16), b1=(16,), w2=(16, 8), head=(8, 3))

    def fn(p: Any, x: Any) -> Any:
        def slope(h: Any) -> Any:
            return jnp.tanh(h @ p["w1"] + p["b1"]) @ p["w2"]

        def step(h: Any, _: Any) -> Any:
            k1 = slope(h)
            k2 = slope(h + 0.05 * k1)
            k3 = slope(h + 0.05 * k2)
            return h + (k1 + 2 * k2 + 2 * k3 + slope(h + 0.1 * k3)) * 0.1 / 6, None

        return jax.lax.scan(step, x @ p["i"], None, length=3)[0] @ p["head"]

    return Model(fn, params, (ROWS,))


@MODELS("plain/Physics-informed, second derivatives")
def physics() -> Model:
    params = weights(w1=(2, 16), b1=(16,), w2=(16, 12), w3=(12, 1))

    def fn(p: Any, points: Any) -> Any:
        def u(x: Any) -> Any:
            return (jnp.tanh(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]) @ p["w3"])[0]

        def residual(x: Any) -> Any:
            slope, second = jax.grad(u)(x), jax.hessian(u)(x)
            return slope[0] + u(x) * slope[1] - 0.1 * second[1, 1]

        return jax.vmap(residual)(points)

    return Model(fn, params, (floats(5, 2),))


@MODELS("plain/Vector quantiser, straight through")
def quantiser() -> Model:
    params = weights(e1=(6, 16), e2=(16, 4), codes=(10, 4), d1=(4, 16), d2=(16, 6))

    def fn(p: Any, x: Any) -> Any:
        z = jax.nn.relu(x @ p["e1"]) @ p["e2"]
        far = jnp.sum(z**2, 1)[:, None] - 2 * z @ p["codes"].T + jnp.sum(p["codes"] ** 2, 1)
        q = p["codes"][jnp.argmin(far, 1)]
        loss = jnp.mean((jax.lax.stop_gradient(q) - z) ** 2)
        q = z + jax.lax.stop_gradient(q - z)
        return jax.nn.relu(q @ p["d1"]) @ p["d2"], loss

    return Model(fn, params, (ROWS,))


@MODELS("plain/Actor and critic")
def actor() -> Model:
    params = weights(w=(6, 16), b=(16,), pi=(16, 3), log_std=(3,), v=(16, 1), q=(19, 8), q2=(8, 1))

    def fn(p: Any, state: Any) -> Any:
        h = jnp.tanh(state @ p["w"] + p["b"])
        mean, std = jnp.tanh(h @ p["pi"]), jnp.exp(p["log_std"])
        action = mean + std * jax.random.normal(jax.random.key(0), mean.shape)
        q = jax.nn.relu(jnp.concatenate([h, action], -1) @ p["q"]) @ p["q2"]
        return action, q, h @ p["v"]

    return Model(fn, params, (ROWS,))


@MODELS("plain/Fourier neural operator")
def fno() -> Model:
    params = weights(i=(2, 8), re=(3, 8, 8), im=(3, 8, 8), w=(8, 8), o1=(8, 12), o2=(12, 1))

    def fn(p: Any, x: Any) -> Any:
        h = x @ p["i"]
        for _ in range(2):
            f = jnp.fft.rfft(h, axis=1)[:, :3]
            f = jnp.einsum("bki,kio->bko", f, p["re"] + 1j * p["im"])
            f = jnp.zeros((len(x), 9, 8), f.dtype).at[:, :3].set(f)
            h = jax.nn.gelu(jnp.fft.irfft(f, 16, axis=1) + h @ p["w"])
        return jax.nn.gelu(h @ p["o1"]) @ p["o2"]

    return Model(fn, params, (floats(2, 16, 2),))


@MODELS("plain/Mixed precision")
def mixed() -> Model:
    """Products in bfloat16 and sums in float32; only the value is of full precision."""
    params = weights(w1=(6, 16), s=(16,), w2=(16, 12), w3=(12, 3))

    def fn(p: Any, x: Any) -> Any:
        def product(x: Any, w: Any) -> Any:
            half = jnp.bfloat16
            return jnp.dot(x.astype(half), w.astype(half), preferred_element_type=jnp.float32)

        h = rms(jax.nn.silu(product(x, p["w1"])), p["s"])
        return product(jax.nn.silu(product(h, p["w2"])), p["w3"])

    return Model(fn, params, (ROWS,))


@MODELS("plain/Early exits by cond")
def early_exit() -> Model:
    params = weights(w1=(6, 16), w2=(16, 16), w3=(16, 16), head=(16, 3))

    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.relu(x @ p["w1"])
        sure = jnp.max(jax.nn.softmax(h @ p["head"])) > 0.9

        def deeper(h: Any) -> Any:
            return jax.nn.relu(jax.nn.relu(h @ p["w2"]) @ p["w3"])

        return jax.lax.cond(sure, lambda h: h, deeper, h) @ p["head"]

    return Model(fn, params, (ROWS,))


@MODELS("plain/Deep equilibrium, implicit gradient")
def equilibrium() -> Model:
    params = weights(w=(12, 12), u=(6, 12), b=(12,), head=(12, 3))

    def cell(p: Any, z: Any, x: Any) -> Any:
        return jnp.tanh(z @ p["w"] * 0.3 + x @ p["u"] + p["b"])

    @jax.custom_vjp
    def fixed(p: Any, x: Any) -> Any:
        zero = jnp.zeros((len(x), p["b"].shape[0]))
        return jax.lax.fori_loop(0, 30, lambda _, z: cell(p, z, x), zero)

    def forward(p: Any, x: Any) -> Any:
        z = fixed(p, x)
        return z, (p, x, z)

    def backward(saved: Any, g: Any) -> Any:
        p, x, z = saved
        _, pull = jax.vjp(lambda z: cell(p, z, x), z)
        g = jax.lax.fori_loop(0, 30, lambda _, u: g + pull(u)[0], g)
        return jax.vjp(lambda p, x: cell(p, z, x), p, x)[1](g)

    fixed.defvjp(forward, backward)
    return Model(lambda p, x: fixed(p, x) @ p["head"], params, (ROWS,))
