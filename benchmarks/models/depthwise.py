"""A small network of depthwise convolutions, made as EfficientNet-Lite is."""

from __future__ import annotations

import flax.linen as nn
import jax


class Inverted(nn.Module):
    """1x1 to many channels, 3x3 in each alone, 1x1 back; a shortcut where shapes allow it."""

    width: int
    expand: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        hidden = self.expand * x.shape[-1]
        y = nn.Conv(hidden, (1, 1), use_bias=False)(x)
        y = nn.relu6(nn.BatchNorm(not train, momentum=0.9)(y))
        y = nn.Conv(hidden, (3, 3), self.strides, feature_group_count=hidden, use_bias=False)(y)
        y = nn.relu6(nn.BatchNorm(not train, momentum=0.9)(y))
        y = nn.Conv(self.width, (1, 1), use_bias=False)(y)
        y = nn.BatchNorm(not train, momentum=0.9)(y)
        return x + y if x.shape == y.shape else y


class DepthwiseNet(nn.Module):
    """Tan and Le's EfficientNet (2019) without its squeezes and with ReLU6, as its Lite form is."""

    classes: int
    stem: int = 16
    # Of each stage: width, blocks, strides of the first.
    stages: tuple[tuple[int, int, int], ...] = ((16, 1, 1), (24, 2, 2), (40, 2, 2))
    expand: int = 4
    head: int = 160

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.stem, (3, 3), 2 if x.shape[1] > 16 else 1, use_bias=False)(x)
        x = nn.relu6(nn.BatchNorm(not train, momentum=0.9)(x))
        for width, blocks, strides in self.stages:
            for k in range(blocks):
                x = Inverted(width, self.expand, 1 if k else strides)(x, train)
        x = nn.Conv(self.head, (1, 1), use_bias=False)(x)
        x = nn.relu6(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))
