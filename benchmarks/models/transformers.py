"""Networks whose every width is an argument, so that half the width is a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models.resnet import ResNet


@dataclass(frozen=True)
class Widths:
    """Of a transformer. Half of them all is again a transformer, by :meth:`half`."""

    residual: int
    heads: int
    head: int  # features of each head
    hidden: int

    def half(self) -> Widths:
        return Widths(self.residual // 2, self.heads // 2, self.head // 2, self.hidden // 2)


class Attention(nn.Module):
    """Self-attention; kernels are (residual, heads, head) as in Vaswani et al. (2017)."""

    widths: Widths
    causal: bool
    cached: int = 0  # tokens before these, whose keys and values are given

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.widths.heads, self.widths.head)
        q, k, v = (nn.DenseGeneral(shape, name=name)(x) for name in ("query", "key", "value"))
        if self.cached:
            # Parameters, so that their heads go with the others; an argument would hold them all.
            past = (x.shape[0], self.cached, *shape)
            k = jnp.concatenate([self.param("keys", nn.initializers.zeros, past), k], 1)
            v = jnp.concatenate([self.param("values", nn.initializers.zeros, past), v], 1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(self.widths.head)
        if self.causal:
            allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool), self.cached)
            scores = jnp.where(allowed, scores, -jnp.inf)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return nn.DenseGeneral(self.widths.residual, (-2, -1), name="out")(mixed)


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a normalisation and beside a shortcut."""

    widths: Widths
    causal: bool
    two_pass: bool = False  # variance after the mean: what is removed still counts there
    cached: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norms = [nn.LayerNorm(use_fast_variance=not self.two_pass) for _ in range(2)]
        x = x + Attention(self.widths, self.causal, self.cached)(norms[0](x))
        hidden = nn.gelu(nn.Dense(self.widths.hidden)(norms[1](x)))
        return x + nn.Dense(self.widths.residual)(hidden)


class ViT(nn.Module):
    """A vision transformer with a class token (Dosovitskiy et al., 2021)."""

    classes: int
    widths: Widths
    layers: int
    patch: int
    two_pass: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.widths.residual, size, size, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("token", nn.initializers.normal(0.02), (1, 1, x.shape[-1]))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1])), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.layers):
            x = TransformerBlock(self.widths, False, self.two_pass)(x)
        norm = nn.LayerNorm(use_fast_variance=not self.two_pass)
        return nn.Dense(self.classes)(norm(x[:, 0]))


class _ScannedBlock(nn.Module):
    """A block as the body of a scan: from what is carried to what is carried."""

    widths: Widths

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return TransformerBlock(self.widths, causal=True)(x), None


class GPT(nn.Module):
    """A causal transformer that ends in its own embedding (Radford et al., 2019)."""

    words: int
    widths: Widths
    layers: int
    length: int
    scanned: bool = False  # one block with stacked parameters, in a loop
    cached: int = 0  # tokens before these; not in a loop

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.words, self.widths.residual)
        positions = nn.Embed(self.length, self.widths.residual)
        x = embed(tokens) + positions(jnp.arange(self.cached, self.cached + tokens.shape[1]))
        if self.scanned:
            stack = nn.scan(
                _ScannedBlock, {"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            x, _ = stack(self.widths)(x, None)
        else:
            for _ in range(self.layers):
                x = TransformerBlock(self.widths, causal=True, cached=self.cached)(x)
        return embed.attend(nn.LayerNorm()(x))


@dataclass(frozen=True)
class Case:
    """One network at full and at half width, and an input of any batch size."""

    name: str
    dense: nn.Module
    native: nn.Module
    example: Callable[[int], jax.Array]
    settings: dict[str, Any]


def images(size: int, channels: int) -> Callable[[int], jax.Array]:
    return lambda batch: jax.random.normal(jax.random.key(0), (batch, size, size, channels))


def tokens(words: int, length: int) -> Callable[[int], jax.Array]:
    return lambda batch: jax.random.randint(jax.random.key(0), (batch, length), 0, words)


def resnet(name: str, size: int, channels: int, widths: tuple[int, ...], **more: Any) -> Case:
    dense = ResNet(10, widths, **more)
    native = ResNet(10, tuple(width // 2 for width in widths), **more)
    settings = {"widths": widths, "image": [size, size, channels], **more}
    return Case(name, dense, native, images(size, channels), settings)


def vit(widths: Widths, layers: int, size: int, patch: int, two_pass: bool = False) -> Case:
    dense, native = (ViT(10, w, layers, patch, two_pass) for w in (widths, widths.half()))
    settings = {"widths": vars(widths), "layers": layers, "image": [size, size, 3], "patch": patch}
    name = "ViT, two-pass LayerNorm" if two_pass else "ViT"
    return Case(name, dense, native, images(size, 3), settings)


def gpt(widths: Widths, layers: int, length: int, words: int, scanned: bool) -> Case:
    dense, native = (GPT(words, w, layers, length, scanned) for w in (widths, widths.half()))
    settings = {"widths": vars(widths), "layers": layers, "length": length, "words": words}
    name = "GPT, scan over layers" if scanned else "GPT, unrolled"
    return Case(name, dense, native, tokens(words, length), settings)


def cases() -> list[Case]:
    """The networks of the benchmark: seconds to compile on two cores, milliseconds to run."""
    widths = Widths(residual=192, heads=6, head=32, hidden=768)
    return [
        resnet("small ResNet", 28, 1, (64, 128)),
        resnet("ResNet", 32, 3, (32, 64, 128), blocks=2, stem_strides=1),
        vit(widths, layers=4, size=64, patch=8),
        vit(widths, layers=4, size=64, patch=8, two_pass=True),
        gpt(widths, layers=4, length=64, words=1000, scanned=False),
        gpt(widths, layers=4, length=64, words=1000, scanned=True),
    ]


def tiny_cases() -> list[Case]:
    """The same networks, as small as they get: for tests."""
    widths = Widths(residual=8, heads=2, head=4, hidden=12)
    return [
        resnet("small ResNet", 8, 1, (4, 8)),
        vit(widths, layers=1, size=8, patch=4),
        vit(widths, layers=1, size=8, patch=4, two_pass=True),
        gpt(widths, layers=2, length=6, words=11, scanned=False),
        gpt(widths, layers=2, length=6, words=11, scanned=True),
    ]
