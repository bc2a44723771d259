"""The network of the main job: a residual CNN with batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first may halve the resolution (He et al., 2016)."""

    width: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.Conv(self.width, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(not train, momentum=0.9)(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(not train, momentum=0.9)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), self.strides, use_bias=False)(x)
            x = nn.BatchNorm(not train, momentum=0.9)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, residual blocks in stages of one width each, a mean over the image, a classifier.

    Every stage but the first halves the resolution. All convolutions of a stage that meet at an
    addition share one logical dimension, and each block has one of its own.
    """

    classes: int
    widths: Sequence[int]
    blocks: int = 1  # per stage
    stem_strides: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), self.stem_strides, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                x = Block(width, 2 if stage and not block else 1)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class Depthwise(nn.Module):
    """A 3x3 convolution of each channel, as nine shifted products.

    Few FLOPs, and each of them reads memory. XLA for CPUs has no kernel for grouped convolutions
    and runs them slowly; this is merged into one pass.
    """

    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width, features = x.shape[1:]
        kernel = self.param("kernel", nn.initializers.normal(1 / 3), (3, 3, features))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = jnp.zeros_like(x[:, :: self.strides, :: self.strides])
        for i in range(3):
            for j in range(3):
                rows, columns = (
                    slice(i, i + height, self.strides),
                    slice(j, j + width, self.strides),
                )
                y = y + padded[:, rows, columns] * kernel[i, j]
        return y


class Separable(nn.Module):
    """A stem and depthwise-separable blocks, a mean over the image, a classifier.

    After Howard et al., [MobileNets](https://arxiv.org/abs/1704.04861), 2017, for small images:
    most FLOPs are in 1x1 convolutions at low resolution, much of the time is not.
    """

    classes: int
    widths: Sequence[int]
    strides: Sequence[int]  # of all but the stem, which keeps the resolution

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        for width, strides in zip(self.widths[1:], self.strides, strict=True):
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(Depthwise(strides)(x)))
            x = nn.Conv(width, (1, 1), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))
