"""The networks whose speed is measured: published sizes, and small ones for a quick look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models.transformers import GPT, ViT, Widths


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
    """A network, the same one written at half of every width, and what both are given."""

    module: nn.Module
    half: nn.Module
    shape: tuple[int, ...]
    words: int = 0  # tokens are drawn below it
    fixed: str = ""  # dimensions that stay, with wildcards

    def example(self, dtype: Any) -> jax.Array:
        if self.words:
            return jax.random.randint(jax.random.key(0), self.shape, 0, self.words)
        return jax.random.normal(jax.random.key(0), self.shape, dtype)


FULL = Widths(768, 12, 64, 3072)
SMALL = Widths(64, 4, 16, 128)


def _resnet(size: int, width: int = 64, **more: Any) -> Case:
    dense, half = (BottleneckResNet(width=w, **more) for w in (width, width // 2))
    return Case(dense, half, (1, size, size, 3))


def _vit(widths: Widths, layers: int, patch: int, size: int) -> Case:
    dense, half = (ViT(1000, w, layers, patch) for w in (widths, widths.half()))
    return Case(dense, half, (1, size, size, 3))


def _gpt(
    widths: Widths, layers: int, batch: int, tokens: int, cached: int = 0, words: int = 50257
) -> Case:
    dense, half = (GPT(words, w, layers, 1024, cached=cached) for w in (widths, widths.half()))
    return Case(dense, half, (batch, tokens), words, fixed="*/keys:1")  # the tokens before


def _lstm(width: int, layers: int, shape: tuple[int, ...]) -> Case:
    dense, half = (LSTM(10, w, layers) for w in (width, width // 2))
    return Case(dense, half, shape)


def _mlp(widths: tuple[int, ...], batch: int) -> Case:
    dense, half = (MLP(10, w) for w in (widths, tuple(w // 2 for w in widths)))
    return Case(dense, half, (batch, 784))


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-50, batch 1": lambda: _resnet(224),
    "ViT-B/16, batch 1": lambda: _vit(FULL, 12, 16, 224),
    "GPT of 12 layers, prefill of 128": lambda: _gpt(FULL, 12, 1, 128),
    "GPT of 12 layers, decode after 256": lambda: _gpt(FULL, 12, 1, 1, cached=256),
    "LSTM 2 x 512, 64 steps, batch 8": lambda: _lstm(512, 2, (8, 64, 80)),
    "MLP 784-4096-4096-10, batch 64": lambda: _mlp((4096, 4096), 64),
    "GPT of 12 layers, batch 8 of 64": lambda: _gpt(FULL, 12, 8, 64),
}
QUICK: dict[str, Callable[[], Case]] = {
    "small ResNet": lambda: _resnet(32, 8, classes=10, blocks=(1, 1)),
    "small ViT": lambda: _vit(SMALL, 2, 8, 32),
    "small GPT, decode after 16": lambda: _gpt(SMALL, 2, 1, 1, cached=16, words=128),
    "small LSTM": lambda: _lstm(64, 1, (2, 8, 16)),
    "small MLP": lambda: _mlp((256, 256), 4),
}
