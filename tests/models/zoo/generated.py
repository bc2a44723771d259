"""Rows 40, 41, 47 and 48: products of axes, generated weights, graphs, spectra."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.zoo.common import Model, drawn, entry, floats, heads

ROWS = floats(4, 3)


@entry(40, prunable={"a:1": (4,), "b:1": (6,), "out:0": (4, 6)})
def outer_product() -> Model:
    def fn(p, x):
        left, right = jnp.tanh(x @ p["a"]), jax.nn.relu(x @ p["b"])
        outer = left[:, :, None] * right[:, None]
        return outer.reshape(x.shape[0], -1) @ p["out"]

    return fn, drawn(a=(3, 4), b=(3, 6), out=(24, 5)), (ROWS,)


@entry(40, prunable={"a:1": (4,), "b:1": (6,), "w:0": (4,), "w:1": (6,), "w:2": (8,)})
def bilinear() -> Model:
    def fn(p, x):
        y = jnp.einsum("ni,nj,ijk->nk", x @ p["a"], x @ p["b"], p["w"])
        return jax.nn.relu(y) @ p["out"]

    return fn, drawn(a=(3, 4), b=(3, 6), w=(4, 6, 8), out=(8, 5)), (ROWS,)


@entry(40, prunable={"up:1": (2, 3), "a:1": (4,), "b:1": (2,)})
def kronecker_weight() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ p["up"])
        return jnp.tanh(x @ jnp.kron(p["a"], p["b"])) @ p["out"]

    return fn, drawn(up=(3, 6), a=(2, 4), b=(3, 2), out=(8, 5)), (ROWS,)


@entry(41, prunable={"up:1": (8,), "film:1": (8,), "embed:1": (6,)})
def film() -> Model:
    def fn(p, x, condition):
        scale, shift = jnp.split(jax.nn.relu(condition @ p["embed"]) @ p["film"], 2, -1)
        return jax.nn.relu((x @ p["up"]) * (1 + scale) + shift) @ p["down"]

    shapes = {"up": (3, 8), "embed": (2, 6), "film": (6, 16), "down": (8, 5)}
    return fn, drawn(**shapes), (ROWS, floats(4, 2))


@entry(
    41,
    prunable={"embed:1": (6,), "ada:0": (6,), "ada:1": (6,), "up:1": (10,), "v:1": (2, 2)},
)
def adaptive_layer_norm() -> Model:
    """A diffusion transformer's block: shift, scale and gate come from the condition."""

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def fn(p, x, condition):
        x = x @ p["in"]
        c = jax.nn.silu(condition @ p["embed"])
        parts = jnp.split((c @ p["ada"] + p["ada_bias"])[:, None], 6, -1)
        shift, scale, gate, shift2, scale2, gate2 = parts
        y = norm(x) * (1 + scale) + shift
        q, k, v = (heads(y @ p[n], 2) for n in "qkv")
        y = jax.nn.dot_product_attention(q, k, v)
        x = x + gate * (y.reshape(*x.shape[:2], -1) @ p["proj"])
        y = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * (jax.nn.gelu(y @ p["up"]) @ p["down"])
        return norm(x) @ p["out"]

    shapes = {"in": (3, 6), "embed": (2, 6), "ada": (6, 36), "ada_bias": (36,), "proj": (4, 6)}
    shapes |= dict.fromkeys("qkv", (6, 4)) | {"up": (6, 10), "down": (10, 6), "out": (6, 5)}
    return fn, drawn(**shapes), (floats(2, 4, 3), floats(2, 2))


@entry(41, prunable={"embed:1": (6,), "make:1": (8,), "down:0": (8,)})
def hypernetwork() -> Model:
    def fn(p, x, condition):
        weights = jax.nn.relu(condition @ p["embed"]) @ p["make"]
        kernel = weights.reshape(x.shape[-1], -1)
        return jax.nn.relu(x @ kernel) @ p["down"]

    return fn, drawn(embed=(2, 6), make=(6, 24), down=(8, 5)), (ROWS, floats(2))


NODES = floats(5, 3)
SENDERS = np.array([0, 1, 2, 3, 4, 0, 2, 1], np.int32)
RECEIVERS = np.array([1, 2, 3, 4, 0, 2, 0, 1], np.int32)


@entry(47, prunable={"embed:1": (6,), "message:1": (8,), "update:1": (6,)})
def message_passing() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ p["embed"])
        pairs = jnp.concatenate([x[SENDERS], x[RECEIVERS]], -1)
        messages = jax.nn.relu(pairs @ p["message"] + p["bias"])
        total = jax.ops.segment_sum(messages, RECEIVERS, x.shape[0])
        x = x + total @ p["update"]
        return x.mean(0) @ p["out"]

    shapes = {"embed": (3, 6), "message": (12, 8), "bias": (8,), "update": (8, 6)}
    return fn, drawn(**shapes, out=(6, 5)), (NODES,)


@entry(47, prunable={"w:1": (2, 4), "source:0": (2,), "source:1": (4,)})
def graph_attention() -> Model:
    def fn(p, x):
        h = heads(x @ p["w"], 2)
        logits = jnp.sum(h * p["source"], -1)[SENDERS] + jnp.sum(h * p["target"], -1)[RECEIVERS]
        logits = jax.nn.leaky_relu(logits, 0.2)
        top = jax.ops.segment_max(logits, RECEIVERS, x.shape[0])
        weights = jnp.exp(logits - top[RECEIVERS])
        total = jax.ops.segment_sum(weights, RECEIVERS, x.shape[0])
        weights = weights / total[RECEIVERS]
        mixed = jax.ops.segment_sum(h[SENDERS] * weights[..., None], RECEIVERS, x.shape[0])
        return jax.nn.elu(mixed.reshape(x.shape[0], -1)) @ p["out"]

    return fn, drawn(w=(3, 8), source=(2, 4), target=(2, 4), out=(8, 5)), (NODES,)


@entry(47, prunable={"embed:1": (6,), "w:1": (8,)})
def graph_convolution() -> Model:
    adjacency = np.eye(5, dtype=np.float32) + np.eye(5, k=1, dtype=np.float32)

    def fn(p, x):
        x = jax.nn.relu(adjacency @ (x @ p["embed"]))
        x = jax.nn.relu(adjacency @ (x @ p["w"]))
        return x.max(0) @ p["out"]

    return fn, drawn(embed=(3, 6), w=(6, 8), out=(8, 5)), (NODES,)


@entry(48, prunable={"lift:1": (6,), "real:1": (4,), "mix:1": (4,)})
def fourier_layer() -> Model:
    """The spectrum is taken over space; the kernel is (in, out, modes), real and imaginary."""

    def fn(p, x):
        x = x @ p["lift"]
        spectrum = jnp.fft.rfft(x, axis=1)[:, :3]
        kernel = jax.lax.complex(p["real"], p["imaginary"])
        mixed = jnp.einsum("bmi,iom->bmo", spectrum, kernel)
        y = jnp.fft.irfft(mixed, n=x.shape[1], axis=1) + x @ p["mix"]
        return jax.nn.gelu(y) @ p["out"]

    shapes = {"lift": (3, 6), "real": (6, 4, 3), "imaginary": (6, 4, 3), "mix": (6, 4)}
    return fn, drawn(**shapes, out=(4, 5)), (floats(2, 8, 3),)


@entry(48, prunable={"lift:1": (6,), "kernel:1": (4,)})
def complex_leaf() -> Model:
    def fn(p, x):
        spectrum = jnp.fft.fft2(x @ p["lift"], axes=(1, 2))
        y = jnp.fft.ifft2(spectrum @ p["kernel"], axes=(1, 2)).real
        return jax.nn.gelu(y).mean((1, 2)) @ p["out"]

    params = drawn(lift=(3, 6), out=(4, 5)) | drawn(jnp.complex64, kernel=(6, 4))
    return fn, params, (floats(2, 4, 4, 3),)
