"""Rows 42 to 44 and 46: operations that mix, order, draw or shift along the units themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.models.zoo.common import Model, drawn, entry, filled, floats

ROWS = floats(5, 3)


def between(middle: Callable[..., jax.Array], *args: Any, width: int = 8, out: int = 8) -> Model:
    """``middle`` stands between two dense layers and sees the units of the first."""

    def fn(p, x, *more):
        return middle(x @ p["up"] + p["bias"], *more) @ p["down"]

    return fn, drawn(up=(3, width), bias=(width,), down=(out, 5)), (ROWS, *args)


UNITS = {"up:1": (8,), "down:0": (8,)}


@entry(42, prunable={"up:1": (), "a:1": (6,)}, refused="gather")
def gathered_channels() -> Model:
    def fn(p, x, index):
        x = jax.nn.relu(x @ p["a"])
        return (x @ p["up"])[:, index] @ p["down"]

    params = drawn(a=(3, 6), up=(6, 8), down=(4, 5))
    return fn, params, (ROWS, jnp.asarray([3, 0, 5, 5]))


@entry(42, prunable={"up:1": (), "a:1": (6,)}, refused="top_k")
def top_k_features() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ p["a"])
        return jax.lax.top_k(x @ p["up"], 4)[0] @ p["down"]

    return fn, drawn(a=(3, 6), up=(6, 8), down=(4, 5)), (ROWS,)


@entry(42, prunable={"up:1": (), "a:1": (6,)}, refused="sort")
def argsorted_channels() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ p["a"]) @ p["up"]
        return jnp.take_along_axis(x, jnp.argsort(x, -1), -1) @ p["down"]

    return fn, drawn(a=(3, 6), up=(6, 8), down=(8, 5)), (ROWS,)


@entry(42, prunable={"up:1": (), "a:1": (6,)}, refused="argmax")
def one_hot_of_channels() -> Model:
    def fn(p, x):
        x = jax.nn.relu(x @ p["a"]) @ p["up"]
        return (x * jax.nn.one_hot(jnp.argmax(x, -1), 8, dtype=x.dtype)) @ p["down"]

    return fn, drawn(a=(3, 6), up=(6, 8), down=(8, 5)), (ROWS,)


@entry(43, prunable={"up:1": ()}, refused="fft")
def spectrum_of_channels() -> Model:
    return between(lambda x: jnp.fft.rfft(x).real, out=5)


@entry(43, prunable={"up:1": ()}, refused="sort")
def sorted_channels() -> Model:
    return between(lambda x: jnp.sort(x, -1))


@entry(43, prunable=UNITS)
def cumulative_sum() -> Model:
    return between(lambda x: jnp.cumsum(x, -1))


@entry(43, prunable={"up:1": (8,)})
def largest_channel() -> Model:
    return between(lambda x: jnp.max(x, -1, keepdims=True) + jnp.min(x, -1, keepdims=True), out=1)


@entry(43, prunable={"up:1": (8,)})
def product_of_channels() -> Model:
    return between(lambda x: jnp.prod(1 + x, -1, keepdims=True), out=1)


@entry(43, prunable=UNITS)
def unit_vectors() -> Model:
    return between(lambda x: x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6))


@entry(43, prunable={"up:1": (8,)})
def standard_deviation() -> Model:
    return between(lambda x: jnp.std(x, -1, keepdims=True) + jnp.median(x, 0).mean(), out=1)


def activation(f: Callable[[jax.Array], jax.Array]) -> Model:
    """Twice, so that the constants of removed units would reach a second layer."""

    def fn(p, x):
        x = f(x @ p["up"] + p["bias"])
        return f(x @ p["mid"]).mean(-1, keepdims=True) @ p["down"]

    return fn, drawn(up=(3, 8), bias=(8,), mid=(8, 6), down=(1, 5)), (ROWS,)


TWICE = {"up:1": (8,), "mid:1": (6,)}


@entry(44, prunable=TWICE)
def sigmoid() -> Model:
    return activation(jax.nn.sigmoid)


@entry(44, prunable=TWICE)
def cosine() -> Model:
    return activation(jnp.cos)


@entry(44, prunable=TWICE)
def softplus() -> Model:
    return activation(jax.nn.softplus)


@entry(44, prunable={"up:1": (4, 2)})
def maxout() -> Model:
    return between(lambda x: x.reshape(x.shape[0], -1, 2).max(-1), out=4)


@entry(44, prunable={"up:1": (8,), "down:0": (8,)})
def concatenated_relu() -> Model:
    return between(lambda x: jax.nn.relu(jnp.concatenate([x, -x], -1)), out=16)


@entry(44, prunable={"up:1": (4,)})
def group_sort() -> Model:
    return between(lambda x: jnp.sort(x.reshape(x.shape[0], -1, 2), -1).reshape(x.shape))


@entry(44, prunable={"up:1": (4,)})
def group_sort_by_min_and_max() -> Model:
    def middle(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([jnp.minimum(a, b), jnp.maximum(a, b)], -1)

    return between(middle)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.4, deterministic=False)(nn.relu(nn.Dense(8)(x)))
        x = nn.Dropout(0.2, broadcast_dims=(0,), deterministic=False)(nn.Dense(6)(x))
        return nn.Dense(5)(x)


@entry(46, prunable={"params/Dense_0/kernel:1": (8,), "params/Dense_1/kernel:1": (6,)})
def dropout() -> Model:
    net = Dropped()
    shapes = jax.eval_shape(
        net.init, {"params": jax.random.key(0), "dropout": jax.random.key(0)}, ROWS
    )
    fn = lambda p, x, key: net.apply(p, x, rngs={"dropout": key})  # noqa: E731
    return fn, filled(shapes), (ROWS, jax.random.key(3))


@entry(46, prunable=UNITS)
def uniform_noise() -> Model:
    def middle(x, key):
        return jax.nn.relu(x + 0.1 * jax.random.uniform(key, x.shape, x.dtype))

    return between(middle, jax.random.key(3))


@entry(46, prunable={"a:1": (6,), "mean_log:1": (4,)})
def reparametrised_sample() -> Model:
    """A variational autoencoder's code: mean and log variance are halves of one kernel."""

    def fn(p, x, key):
        x = jax.nn.relu(x @ p["a"])
        mean, log = jnp.split(x @ p["mean_log"], 2, -1)
        code = mean + jnp.exp(0.5 * log) * jax.random.normal(key, mean.shape, mean.dtype)
        divergence = 0.5 * jnp.mean(jnp.exp(log) + mean**2 - 1 - log, -1)
        return code @ p["out"], divergence

    params = drawn(a=(3, 6), mean_log=(6, 8), out=(4, 5))
    return fn, params, (ROWS, jax.random.key(3))


@entry(42, prunable={"up:1": (8,), "down:0": (8,)})
def permuted_channels() -> Model:
    order = np.array([3, 0, 5, 1, 7, 6, 2, 4], np.int32)
    return between(lambda x: jax.nn.relu(x)[:, order])
