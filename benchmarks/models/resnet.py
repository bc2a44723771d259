"""The network of the main job: a residual CNN with batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax


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
