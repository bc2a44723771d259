"""Flax NNX, in the ways that its documentation shows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.models.outside.model import Model, Models, floats, nnx_model, tokens

MODELS = Models()
SERIES, IMAGES, ROWS = floats(2, 6, 5), floats(2, 8, 8, 3), floats(4, 6)


@MODELS("nnx/LSTMCell", "LSTMCell")
@MODELS("nnx/OptimizedLSTMCell", "OptimizedLSTMCell")
@MODELS("nnx/GRUCell", "GRUCell")
@MODELS("nnx/SimpleCell", "SimpleCell")
def recurrent(cell: str) -> Model:
    class Net(nnx.Module):
        rnn: Any

        def __init__(self, rngs: Any) -> None:
            self.rnn = nnx.RNN(getattr(nnx, cell)(5, 12, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(12, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.rnn(x))

    return nnx_model(Net(nnx.Rngs(0)), SERIES)


@MODELS("nnx/Bidirectional")
def bidirectional() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            forward, backward = (nnx.RNN(nnx.GRUCell(5, 8, rngs=rngs), rngs=rngs) for _ in "ab")
            self.rnn: Any = nnx.Bidirectional(forward, backward, rngs=rngs)
            self.head = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.rnn(x))

    return nnx_model(Net(nnx.Rngs(0)), SERIES)


class Block(nnx.Module):
    """A residual block with dropout."""

    def __init__(self, rngs: Any, rate: float = 0.0) -> None:
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(self.dropout(nnx.gelu(self.up(self.norm(x)))))


@MODELS("nnx/scan over layers")
@MODELS("nnx/scan and remat", True)
def scanned(remat: bool = False) -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def blocks(rngs: Any) -> Block:
                return Block(rngs)

            self.first = nnx.Linear(6, 16, rngs=rngs)
            self.blocks = blocks(rngs)
            self.last = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            def step(x: Any, block: Any) -> Any:
                return nnx.remat(lambda b, x: b(x))(block, x) if remat else block(x)

            x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                self.first(x), self.blocks
            )
            return self.last(x)

    return nnx_model(Net(nnx.Rngs(0)), ROWS)


@MODELS("nnx/Ensemble by vmap")
def ensemble() -> Model:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def build(rngs: Any) -> Any:
        return nnx.Sequential(nnx.Linear(6, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 3, rngs=rngs))

    def call(members: Any, x: Any) -> Any:
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(members, x)

    return nnx_model(build(nnx.Rngs(0)), ROWS, call=call)


@MODELS("nnx/Dropout, random state in the parameters")
def dropout() -> Model:
    """Every variable is a parameter here, the random counts too; the state comes out again."""
    module = nnx.Sequential(
        nnx.Linear(6, 16, rngs=nnx.Rngs(0)),
        Block(nnx.Rngs(1), 0.5),
        nnx.Linear(16, 3, rngs=nnx.Rngs(2)),
    )
    graphdef, state = nnx.split(module)

    def fn(state: Any, x: Any) -> Any:
        module = nnx.merge(graphdef, state)
        return module(x), nnx.state(module, nnx.RngState)

    return Model(fn, state, (ROWS,))


@MODELS("nnx/CNN BatchNorm training", True)
@MODELS("nnx/CNN BatchNorm evaluation", False)
def cnn(training: bool) -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.wide = nnx.Conv(8, 16, (3, 3), strides=2, feature_group_count=4, rngs=rngs)
            self.groups = nnx.GroupNorm(16, 4, rngs=rngs)
            self.head = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.relu(self.norm(self.conv(x)))
            x = nnx.relu(self.groups(self.wide(nnx.avg_pool(x, (2, 2)))))
            return self.head(x.mean((1, 2)))

    module = Net(nnx.Rngs(0))
    if not training:
        module.eval()
        return nnx_model(module, IMAGES)
    graphdef, params = nnx.split(module)

    def fn(p: Any, x: Any) -> Any:
        net = nnx.merge(graphdef, p)
        return net(x), nnx.state(net, nnx.BatchStat)

    return Model(fn, params, (IMAGES,))


@MODELS("nnx/Transformer with cross attention")
def cross() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            def attention() -> Any:
                return nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)

            self.embed = nnx.Embed(40, 16, rngs=rngs)
            self.one, self.two = attention(), attention()
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.block = Block(rngs)

        def __call__(self, ids: Any, source: Any) -> Any:
            x, memory = self.embed(ids), self.embed(source)
            x = x + self.one(self.norm(x), mask=nnx.make_causal_mask(ids))
            x = x + self.two(x, memory, memory)
            return self.embed.attend(self.block(x))

    return nnx_model(Net(nnx.Rngs(0)), tokens(2, 6), tokens(2, 8, seed=1))


@MODELS("nnx/Cached decoding")
def decode() -> Model:
    """One token against a cache; the cache is part of the state, and comes out again."""
    module = nnx.MultiHeadAttention(4, 16, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((2, 5, 16))
    graphdef, state = nnx.split(module)

    def fn(state: Any, x: Any) -> Any:
        attention = nnx.merge(graphdef, state)
        return attention(x), nnx.state(attention, nnx.Cache)

    return Model(fn, state, (floats(2, 1, 16),))


@MODELS("nnx/LoRA")
def lora() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.one = nnx.LoRALinear(6, 16, lora_rank=4, rngs=rngs)
            self.two = nnx.LoRALinear(16, 3, lora_rank=4, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.two(nnx.relu(self.one(x)))

    return nnx_model(Net(nnx.Rngs(0)), ROWS)


@MODELS("nnx/ConvTranspose and PReLU")
def transposed() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.dense = nnx.Linear(6, 2 * 2 * 8, rngs=rngs)
            self.up = nnx.ConvTranspose(8, 6, (3, 3), strides=2, rngs=rngs)
            self.prelu = nnx.PReLU()
            self.out = nnx.Conv(6, 3, (3, 3), rngs=rngs)

        def __call__(self, z: Any) -> Any:
            x = self.dense(z).reshape(-1, 2, 2, 8)
            return jnp.tanh(self.out(self.prelu(self.up(x))))

    return nnx_model(Net(nnx.Rngs(0)), ROWS)


@MODELS("nnx/Einsum, LinearGeneral, weight norm")
def general() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.heads = nnx.LinearGeneral(6, (3, 8), rngs=rngs)
            self.mix = nnx.Einsum("...hd,hdf->...hf", (3, 8, 6), (3, 6), rngs=rngs)
            self.merge = nnx.LinearGeneral((3, 6), 12, axis=(-2, -1), rngs=rngs)
            self.out = nnx.WeightNorm(nnx.Linear(12, 4, rngs=rngs), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(nnx.silu(self.merge(nnx.relu(self.mix(self.heads(x))))))

    return nnx_model(Net(nnx.Rngs(0)), ROWS)


@MODELS("nnx/Recurrence by hand, while loop")
def loop() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.cell, self.head = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
            self.first = nnx.Linear(6, 16, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            h = self.first(x)
            h = jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(self.cell(h) + i * 0.1), h)
            return self.head(h)

    return nnx_model(Net(nnx.Rngs(0)), ROWS)
