"""State that is an argument freezes what it stands beside, and the reason says where it belongs."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxprune as jp

X = jnp.ones((2, 3))
BELONGS = "(state, which belongs into params)"
NOTE = "note: state that is an argument keeps its size"


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(x))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.norm(self.up(x))))


class Eqx(eqx.Module):
    up: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    down: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        self.up, self.down = (eqx.nn.Linear(*s, key=k) for s, k in zip([(3, 4), (4, 2)], keys))
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        x, _ = self.norm(self.up(x), state)
        return self.down(jax.nn.relu(x))


def linen():
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    fn = lambda p, stats, x: model.apply({"params": p, "batch_stats": stats}, x)  # noqa: E731
    return fn, variables["params"], variables["batch_stats"]


def linen_collection():
    fn, params, stats = linen()
    return lambda p, state, x: fn(p, state["batch_stats"], x), params, {"batch_stats": stats}


def of_nnx():
    graph, params, rest = nnx.split(Nnx(), nnx.Param, ...)
    return lambda p, rest, x: nnx.merge(graph, p, rest)(x), params, rest


def of_equinox():
    model, state = eqx.nn.make_with_state(Eqx)()
    model = eqx.nn.inference_mode(model)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(p, state, x):
        return jax.vmap(lambda x: eqx.combine(p, static)(x, state))(x)

    return fn, params, state


@pytest.mark.parametrize("make", [linen, linen_collection, of_nnx, of_equinox])
def test_statistics_as_an_argument_are_told_to_belong_into_params(make):
    fn, params, stats = make()
    structure = jp.infer_structure(fn, params, stats, X)
    frozen = [d for d in structure.dims.values() if d.size == 4]
    assert all(BELONGS in d.frozen for d in frozen) and frozen
    assert NOTE in str(structure) and BELONGS in str(structure)
    with pytest.raises(ValueError, match="prunable are: none.*; state that .* nnx.split"):
        jp.structured(structure)
    both = jp.infer_structure(lambda v, x: fn(*v, x), (params, stats), X)
    assert [d.size for d in both.dims.values() if not d.frozen] == [4]
    assert NOTE not in str(both)


def test_data_is_no_state():
    params = {"up": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, "down": {"w": jnp.ones((4, 2))}}
    fn = lambda p, batch: jnp.tanh(batch["x"] @ p["up"]["w"] + p["up"]["b"]) @ p["down"]["w"]  # noqa: E731
    structure = jp.infer_structure(fn, params, {"x": X})
    assert structure.dims["up/w:0"].frozen == "input 0/x of the function"
    assert NOTE not in str(structure)
