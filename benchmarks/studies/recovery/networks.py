"""Small networks on images, each with what a user would write: a function and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import train
from benchmarks.common.data import Data
from benchmarks.models.depthwise import DepthwiseNet
from benchmarks.models.resnet import ResNet

PyTree = Any


class ViT(nn.Module):
    """A small vision transformer: 7 x 7 patches of an image, pre-norm blocks, a mean over them."""

    classes: int
    width: int = 64
    heads: int = 4
    depth: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        size = max(x.shape[1] // 7, 1)
        x = nn.Conv(self.width, (size, size), strides=(size, size))(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.depth):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadAttention(self.heads)(h)
            h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(h))
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(1))


class Rows(nn.Module):
    """Two LSTM layers that read an image row by row."""

    classes: int
    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(*x.shape[:2], -1)
        for _ in range(2):
            x = jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(self.width))(x))
        return nn.Dense(self.classes)(x[:, -1])


class Network(NamedTuple):
    """How a network is made and first trained."""

    make: Callable[[int, int], nn.Module]  # (classes, image size) -> module
    optimizer: Callable[[int], optax.GradientTransformation]  # of the steps


def _adam(peak: float) -> Callable[[int], optax.GradientTransformation]:
    def make(steps: int) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 10, 1), steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

    return make


NETWORKS = {
    "residual": Network(
        lambda classes, size: ResNet(classes, (32, 64, 128), stem_strides=2 if size > 16 else 1),
        lambda steps: train.sgd(steps, 0.1),
    ),
    "vit": Network(lambda classes, size: ViT(classes), _adam(1e-3)),
    "lstm": Network(lambda classes, size: Rows(classes), _adam(3e-3)),
    "depthwise": Network(lambda classes, size: DepthwiseNet(classes), _adam(3e-3)),
}


def loss_of(module: nn.Module) -> Callable[..., Any]:
    """The loss in train mode, and the variables with new running statistics."""

    def loss(variables: PyTree, x: jax.Array, y: jax.Array) -> Any:
        logits, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return value, {**variables, **new}

    return loss


def batches_of(data: Data, size: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """One pass over the training images in a random order."""
    order = np.random.default_rng(seed).permutation(len(data.train_x))
    picks = order[: len(order) // size * size].reshape(-1, size)
    return [(data.train_x[pick], data.train_y[pick]) for pick in picks]


def trained(network: Network, data: Data, steps: int, batch: int, seed: int) -> tuple[Any, PyTree]:
    """The module and its variables after some steps."""
    module = network.make(data.classes, data.train_x.shape[1])
    variables = jax.jit(module.init)(jax.random.key(seed), jnp.asarray(data.train_x[:1]))
    loss, tx = loss_of(module), network.optimizer(steps)

    @jax.jit
    def step(variables: PyTree, state: Any, x: Any, y: Any) -> Any:
        grad, new = jax.grad(loss, has_aux=True)(variables, x, y)
        if "batch_stats" in variables:  # as benchmarks.common.train has it: changes are updates
            change = jax.tree.map(jnp.subtract, new["batch_stats"], variables["batch_stats"])
            grad = {**grad, "batch_stats": change}
        updates, state = tx.update(grad, state, variables)
        return optax.apply_updates(variables, updates), state

    state, passes = tx.init(variables), 0
    stream: list[Any] = []
    for _ in range(steps):
        if not stream:
            stream, passes = batches_of(data, batch, 1000 * seed + passes), passes + 1
        variables, state = step(variables, state, *stream.pop())
    return module, variables
