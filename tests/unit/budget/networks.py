"""Small networks that tests of searches share; each is traced once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.models.speed import LSTM, BottleneckResNet
from benchmarks.models.transformers import GPT, ViT, Widths
from jaxprune.budget import clock, model
from jaxprune.structure.select import chosen_dims

FAST = {"mlp", "lstm"}  # Searches over the others take seconds to trace and to compile.
HALF = jp.Target(flops=0.5)
SMALL = Widths(16, 2, 8, 32)


def mlp():
    """(fn, params, x) of two hidden layers of 64 and 48 units."""
    params = {
        "up": {"kernel": jax.random.normal(jax.random.key(0), (16, 64)), "bias": jnp.ones(64)},
        "mid": {"kernel": jax.random.normal(jax.random.key(1), (64, 48))},
        "down": {"kernel": jax.random.normal(jax.random.key(2), (48, 5))},
    }

    def fn(p, x):
        x = jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"])
        return jax.nn.relu(x @ p["mid"]["kernel"]) @ p["down"]["kernel"]

    x = jax.random.normal(jax.random.key(3), (8, 16))
    return fn, params, x


def module(net, x):
    """(fn, params, x) of a Flax module; its own initializers take most of a test to compile."""
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        values = rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape).astype(leaf.dtype)
        is_scale = jax.tree_util.keystr(path).endswith(("'scale']", "'var']"))
        return jnp.asarray(1 + np.abs(values) if is_scale else values)

    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return net.apply, jax.tree_util.tree_map_with_path(drawn, shapes), x


NETWORKS = {
    "mlp": mlp,
    "resnet": lambda: module(BottleneckResNet(10, 4, (1,)), jnp.ones((1, 16, 16, 3))),
    "vit": lambda: module(ViT(10, SMALL, 1, 8), jnp.ones((1, 16, 16, 3))),
    "gpt": lambda: module(GPT(50, SMALL, 2, 8), jnp.ones((1, 8), jnp.int32)),
    "scanned gpt": lambda: module(GPT(50, SMALL, 4, 8, scanned=True), jnp.ones((1, 8), jnp.int32)),
    "lstm": lambda: module(LSTM(5, 16, 2), jnp.ones((2, 6, 8))),
}  # fmt: skip


def slow_unless_small(names):
    """Parameters for pytest, of which the networks that take seconds are marked."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def clockless(monkeypatch):
    """Groups take the time of their FLOPs, and none is compiled."""
    monkeypatch.setattr(clock, "time_group", lambda group, at: lambda: 1e-9 * group.work(at))


def scores_of(params):
    """Magnitudes; batch statistics have no score."""
    scores = jp.magnitude(params)
    if "batch_stats" in params:
        scores = {**scores, "batch_stats": jax.tree.map(jnp.zeros_like, scores["batch_stats"])}
    return scores


@functools.cache
def setting(name):
    """(fn, params, structure, scores, x) of a network."""
    fn, params, x = NETWORKS[name]()
    return fn, params, jp.infer_structure(fn, params, x), scores_of(params), x


@functools.cache
def searching(name):
    """A search over all widths of a network: as two tests of one network use it, both know more."""
    return jp.Search(*setting(name), round_to=1)


@functools.cache
def built(name):
    """The cost model of a network over all of its dimensions."""
    fn, params, structure, _, x = setting(name)
    return model.build(fn, params, (x,), structure, chosen_dims(structure, "*"), 1, {})


def close(small, fn, params, masks, x):
    """Whether the compact network computes what the masked one does; each is compiled whole."""
    masked = jax.jit(fn)(jp.apply_masks(params, masks), x)
    chex.assert_trees_all_close(jax.jit(small.fn)(small.params, x), masked, atol=1e-4)


def accuracy(fn, params, x):
    """A metric that is 1 for the dense network: agreement with it."""
    chosen = jax.jit(lambda p: fn(p, x).argmax(-1))
    wanted = chosen(params)
    return lambda p: float((chosen(p) == wanted).mean())
