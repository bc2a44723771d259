"""The networks whose speed is measured: published sizes, and small ones for a quick look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.native_models import GPT, ViT, Widths


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut (He et al., 2016), the stride in the 3x3."""

    width: int
    out: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for features, size, strides in (
            (self.width, 1, 1), (self.width, 3, self.strides), (self.out, 1, 1)
        ):  # fmt: skip
            y = nn.Conv(features, (size, size), strides, use_bias=False)(y)
            y = nn.BatchNorm(use_running_average=True)(y)
            y = nn.relu(y) if features != self.out else y
        if x.shape != y.shape:
            x = nn.Conv(self.out, (1, 1), self.strides, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=True)(x)
        return nn.relu(x + y)


class BottleneckResNet(nn.Module):
    """ResNet-50 with the default arguments."""

    classes: int = 1000
    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            width = self.width * 2**stage
            for block in range(count):
                x = Bottleneck(width, 4 * width, 2 if stage and not block else 1)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class LSTM(nn.Module):
    """Layers of LSTM cells over time, and a classifier of the last step."""

    classes: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(self.width))(x))
        return nn.Dense(self.classes)(x[:, -1])


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    classes: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


@dataclass(frozen=True)
class Case:
    """A network and what it is given; ``native`` writes it at other widths by hand."""

    module: nn.Module
    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    words: int = 0  # tokens are drawn below it

    def example(self) -> jax.Array:
        if self.words:
            return jax.random.randint(jax.random.key(0), self.shape, 0, self.words)
        return jax.random.normal(jax.random.key(0), self.shape, self.dtype)


def _gpt(layers: int) -> nn.Module:
    return GPT(50257, Widths(768, 12, 64, 3072), layers, 1024)


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-50, batch 1": lambda: Case(BottleneckResNet(), (1, 224, 224, 3)),
    "ViT-B/16, batch 1": lambda: Case(
        ViT(1000, Widths(768, 12, 64, 3072), 12, 16), (1, 224, 224, 3)
    ),
    "GPT stack of 12, prefill of 128": lambda: Case(_gpt(12), (1, 128), words=50257),
    "LSTM 2 x 512, 64 steps, batch 8": lambda: Case(LSTM(10, 512, 2), (8, 64, 80)),
    "MLP 784-4096-4096-10, batch 64": lambda: Case(MLP(10, (4096, 4096)), (64, 784)),
}
QUICK: dict[str, Callable[[], Case]] = {
    "small ResNet": lambda: Case(BottleneckResNet(10, 8, (1, 1)), (1, 32, 32, 3)),
    "small ViT": lambda: Case(ViT(10, Widths(64, 4, 16, 128), 2, 8), (1, 32, 32, 3)),
    "small LSTM": lambda: Case(LSTM(10, 64, 1), (2, 8, 16)),
}
