"""Whole networks, of which half of every dimension that may go goes: a ViT and a ResNet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.models.outside.model import floats
from tests.unit.adapters.shrinking import assert_same, halved

pytestmark = pytest.mark.slow
IMAGES, CHANNELS_FIRST = floats(2, 8, 8, 3), floats(2, 3, 8, 8)


def nnx_networks() -> dict[str, tuple[Any, str]]:
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.one, self.two = nnx.LayerNorm(16, rngs=rngs), nnx.LayerNorm(16, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.attention(self.one(x))
            return x + self.down(nnx.gelu(self.up(self.two(x))))

    class Vit(nnx.Module):
        def __init__(self, rngs: Any):
            self.patches = nnx.Conv(3, 16, (4, 4), strides=4, rngs=rngs)
            self.places = nnx.Param(jnp.zeros((4, 16)))
            self.blocks = nnx.List([Block(rngs), Block(rngs)])
            self.head = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.patches(x)
            x = x.reshape(len(x), -1, x.shape[-1]) + self.places[...]
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    class Residual(nnx.Module):
        def __init__(self, rngs: Any):
            self.up, self.down = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in "ab")
            self.one, self.two = nnx.BatchNorm(8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return nnx.relu(x + self.two(self.down(nnx.relu(self.one(self.up(x))))))

    class Resnet(nnx.Module):
        def __init__(self, rngs: Any):
            self.first, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.blocks = nnx.Sequential(Residual(rngs), Residual(rngs))
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.blocks(nnx.relu(self.norm(self.first(x)))).mean((1, 2)))

    return {"vit": (Vit(nnx.Rngs(0)), "kept"), "resnet": (Resnet(nnx.Rngs(0)), "masked")}


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_nnx(name):
    from flax import nnx

    from jaxprune.adapters.nnx import shrink

    module, semantics = nnx_networks()[name]
    module.eval()
    graphdef, state = nnx.split(module)
    small = halved(lambda s, x: nnx.merge(graphdef, s)(x), state, IMAGES, semantics=semantics)
    graphdef, arrays = nnx.split(shrink(module, small))
    assert_same(lambda s, x: nnx.merge(graphdef, s)(x), arrays, small, IMAGES)


def equinox_vit() -> Any:
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 6)

    class Vit(eqx.Module):
        patches: Any
        places: Any
        norms: list
        attention: Any
        mlp: Any
        head: Any

        def __init__(self) -> None:
            self.patches = eqx.nn.Conv2d(3, 16, 4, 4, key=keys[0])
            self.places = jax.random.normal(keys[1], (4, 16))
            self.norms = [eqx.nn.LayerNorm(16), eqx.nn.LayerNorm(16)]
            self.attention = eqx.nn.MultiheadAttention(4, 16, key=keys[2])
            self.mlp = eqx.nn.MLP(16, 16, 32, 1, jax.nn.gelu, key=keys[3])
            self.head = eqx.nn.Linear(16, 3, key=keys[4])

        def __call__(self, image: Any) -> Any:
            x = self.patches(image)
            x = x.reshape(len(x), -1).T + self.places
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attention(y, y, y)
            return self.head((x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))).mean(0))

    return Vit()


def test_equinox_vit():
    eqx = pytest.importorskip("equinox")
    from jaxprune.adapters.equinox import shrink

    module = equinox_vit()
    params, static = eqx.partition(module, eqx.is_inexact_array)
    fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    small = halved(fn, params, CHANNELS_FIRST, semantics="kept")
    arrays, static = eqx.partition(shrink(module, small), eqx.is_array)
    assert_same(lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays, small, CHANNELS_FIRST)


def test_equinox_resnet_with_batch_statistics():
    eqx = pytest.importorskip("equinox")
    import jaxprune as jp
    from jaxprune.adapters.equinox import shrink
    from tests.unit.adapters.shrinking import halves

    keys = jax.random.split(jax.random.key(0), 5)

    class Resnet(eqx.Module):
        convolutions: list
        norms: list
        head: Any

        def __init__(self) -> None:
            sizes = ((3, 8), (8, 8), (8, 8))
            made = [eqx.nn.Conv2d(*s, 3, padding=1, key=k) for s, k in zip(sizes, keys)]
            self.convolutions, self.head = made, eqx.nn.Linear(8, 3, key=keys[4])
            self.norms = [eqx.nn.BatchNorm(8, "batch", mode="batch") for _ in made]

        def __call__(self, x: Any, state: Any) -> Any:
            first, up, down = self.convolutions
            x, state = self.norms[0](first(x), state)
            x = jax.nn.relu(x)
            y, state = self.norms[1](up(x), state)
            y, state = self.norms[2](down(jax.nn.relu(y)), state)
            return self.head(jax.nn.relu(x + y).mean((1, 2))), state

    def call(both: Any, x: Any) -> Any:
        net = jax.vmap(both[0], in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return net(x, both[1])[0]

    net, state = eqx.nn.make_with_state(Resnet)()
    pair = eqx.nn.inference_mode(net), state
    params, static = eqx.partition(pair, eqx.is_inexact_array)
    fn = lambda p, x: call(eqx.combine(p, static), x)  # noqa: E731
    structure = jp.infer_structure(fn, params, CHANNELS_FIRST)
    masks = structure.masks(halves(structure, params))
    small = jp.compact(fn, params, masks, CHANNELS_FIRST)
    new, _ = shrink(pair, small, call=call)
    assert [n.input_size for n in new.norms] == [4, 4, 4]
