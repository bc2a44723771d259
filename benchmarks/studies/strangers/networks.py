"""Three networks as their owners would write them: what the recipe needs, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import optax
from flax import nnx

import jaxprune as jp
import jaxprune.adapters.equinox
import jaxprune.adapters.linen
import jaxprune.adapters.nnx

PyTree = Any


class Stranger(NamedTuple):
    """A network, and what its owner hands to the recipe.

    Attributes:
      fn: ``(params, images) -> logits``, in evaluation mode.
      params: all of them, running statistics among them.
      loss: ``(params, images, labels) -> (number, params with new running statistics)``.
      back: a compact model -> a function of images by a module of the owner's own kind.
      semantics: of the structure; "kept" where a norm goes over channels.
    """

    fn: Callable[[PyTree, Any], Any]
    params: PyTree
    loss: Callable[..., Any]
    back: Callable[[jp.typing.Compact], Callable[[Any], Any]]
    semantics: str = "masked"


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# ---- Flax NNX


class Convolutions(nnx.Module):
    """README's network with a third convolution, for larger images."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), 2, rngs=rngs)
        self.norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.conv3 = nnx.Conv(64, 128, (3, 3), 2, rngs=rngs)
        self.norm3 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(nnx.relu(self.norm3(self.conv3(x))).mean((1, 2)))


def convolutions(seed: int, images: jax.Array) -> Stranger:
    net = Convolutions(nnx.Rngs(seed))
    net.eval()
    graph, params = nnx.split(net)

    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
        net = nnx.merge(graph, params)
        net.train()
        return cross_entropy(net(x), y), nnx.state(net)

    def back(small: jp.typing.Compact) -> Callable[[Any], Any]:
        return nnx.jit(jaxprune.adapters.nnx.shrink(net, small))

    return Stranger(fn, params, loss, back)


# ---- Flax Linen


class Residual(nn.Module):
    """Three residual blocks behind a stem, each at half of the size before."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def convolved(x: jax.Array, width: int, size: int = 3, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (size, size), stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(convolved(x, 32, stride=2))
        for width, stride in ((32, 1), (64, 2), (128, 2)):
            y = convolved(nn.relu(convolved(x, width, stride=stride)), width)
            x = nn.relu(y + (x if stride == 1 else convolved(x, width, 1, stride)))
        return nn.Dense(10)(x.mean((1, 2)))


def residual(seed: int, images: jax.Array) -> Stranger:
    net = Residual()

    def loss(variables: PyTree, x: jax.Array, y: jax.Array) -> Any:
        logits, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, y), {**variables, **new}

    def back(small: jp.typing.Compact) -> Callable[[Any], Any]:
        smaller = jaxprune.adapters.linen.wrap(small)
        variables = smaller.init(jax.random.key(0), images)
        return jax.jit(lambda x: smaller.apply(variables, x))

    return Stranger(net.apply, jax.jit(net.init)(jax.random.key(seed), images), loss, back)


# ---- Equinox


class Block(eqx.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut; (tokens, width)."""

    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(4, width, key=keys[0])
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h)
        h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.down)(h)


class ViT(eqx.Module):
    """A vision transformer of one image, (height, width, 1), in 7 x 7 patches at most."""

    embed: eqx.nn.Linear
    position: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    patch: int = eqx.field(static=True)

    def __init__(self, size: int, key: jax.Array, width: int = 64, depth: int = 3):
        keys = jax.random.split(key, depth + 3)
        self.patch = max(size // 7, 1)
        self.embed = eqx.nn.Linear(self.patch**2, width, key=keys[0])
        self.position = 0.02 * jax.random.normal(keys[1], ((size // self.patch) ** 2, width))
        self.blocks = [Block(width, key) for key in keys[3:]]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, 10, key=keys[2])

    def __call__(self, image: jax.Array) -> jax.Array:
        side, p = image.shape[0] // self.patch, self.patch
        patches = image.reshape(side, p, side, p).transpose(0, 2, 1, 3).reshape(side**2, p * p)
        x = jax.vmap(self.embed)(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(jax.vmap(self.norm)(x).mean(0))


def vit(seed: int, images: jax.Array) -> Stranger:
    net = ViT(images.shape[1], jax.random.key(seed))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
        return cross_entropy(fn(params, x), y), params

    def back(small: jp.typing.Compact) -> Callable[[Any], Any]:
        smaller = jaxprune.adapters.equinox.shrink(net, small)
        return eqx.filter_jit(lambda x: jax.vmap(smaller)(x))

    return Stranger(fn, params, loss, back, "kept")


STRANGERS: dict[str, Callable[[int, jax.Array], Stranger]] = {
    "NNX convolutions": convolutions,
    "Linen residual": residual,
    "Equinox ViT": vit,
}
