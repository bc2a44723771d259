"""Haiku: its own networks and cores, and nets as its examples write them."""

from __future__ import annotations

from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from tests.models.outside.model import Model, Models, floats, haiku_model, tokens

MODELS = Models()

CHW, IMAGES, SERIES = floats(2, 3, 32, 32), floats(2, 32, 32, 3), floats(2, 6, 5)


def haiku_net(name: str, *args: Any, training: bool = True, **settings: Any) -> Model:
    def call(*a: Any, **mode: bool) -> Any:
        return getattr(hk.nets, name)(**settings)(
            *a, **({"is_training": False} | mode if training else {})
        )

    return haiku_model(call, *args, **({"is_training": True} if training else {}))


_RESNET = {
    "num_classes": 5, "blocks_per_group": (1, 1, 1, 1), "channels_per_group": (8, 16, 16, 24),
    "initial_conv_config": {"output_channels": 8},
}  # fmt: skip
MODELS.add("haiku/ResNet v1", haiku_net, "ResNet", IMAGES, bottleneck=False, **_RESNET)
MODELS.add("haiku/ResNet v1 bottleneck", haiku_net, "ResNet", IMAGES, **_RESNET)
MODELS.add("haiku/ResNet v2", haiku_net, "ResNet", IMAGES, resnet_v2=True, **_RESNET)
MODELS.add(
    "haiku/MobileNetV1",
    haiku_net,
    "MobileNetV1",
    IMAGES,
    strides=(1, 2, 1),
    channels=(8, 16, 16),
    num_classes=5,
)
MODELS.add("haiku/MLP", haiku_net, "MLP", floats(3, 6), training=False, output_sizes=(16, 16, 4))


def haiku_rnn(core: str, dynamic: bool = True) -> Model:
    cores = {
        "LSTM": lambda: hk.LSTM(12),
        "GRU": lambda: hk.GRU(12),
        "VanillaRNN": lambda: hk.VanillaRNN(12),
        "DeepRNN": lambda: hk.DeepRNN([hk.LSTM(12), jax.nn.relu, hk.GRU(8)]),
        "ResidualRNN": lambda: hk.deep_rnn_with_skip_connections([hk.LSTM(12), hk.LSTM(8)]),
    }

    def net(x: Any) -> Any:
        rnn = cores[core]()
        x = jnp.swapaxes(x, 0, 1)
        unroll = hk.dynamic_unroll if dynamic else hk.static_unroll
        out, _ = unroll(rnn, x, rnn.initial_state(x.shape[1]))
        return hk.Linear(3)(out)

    return haiku_model(net, SERIES)


for _core in ("LSTM", "GRU", "VanillaRNN", "DeepRNN", "ResidualRNN"):
    MODELS.add(f"haiku/{_core}", haiku_rnn, _core)
MODELS.add("haiku/LSTM static", haiku_rnn, "LSTM", dynamic=False)


def haiku_conv_lstm() -> Model:
    def net(x: Any) -> Any:
        core = hk.Conv2DLSTM((8, 8), 6, 3)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(3)(out.mean((2, 3)))

    return haiku_model(net, floats(4, 2, 8, 8, 3))


def haiku_vqvae(ema: bool) -> Model:
    def net(x: Any) -> Any:
        z = hk.Linear(8)(jax.nn.relu(hk.Linear(16)(x)))
        if ema:
            out = hk.nets.VectorQuantizerEMA(8, 10, 0.25, 0.9)(z, is_training=False)
        else:
            out = hk.nets.VectorQuantizer(8, 10, 0.25)(z, is_training=False)
        return hk.Linear(6)(jax.nn.relu(hk.Linear(16)(out["quantize"])))

    return haiku_model(net, floats(5, 6))


def haiku_transformer() -> Model:
    """The pre-norm decoder of Haiku's examples, from its public modules."""

    def net(ids: Any) -> Any:
        h = hk.Embed(50, 16)(ids) + hk.get_parameter(
            "positions", (8, 16), init=hk.initializers.RandomNormal()
        )
        causal = jnp.tril(jnp.ones((1, 1, 8, 8)))
        norm = partial(hk.LayerNorm, axis=-1, create_scale=True, create_offset=True)
        for _ in range(2):
            x = norm()(h)
            init = hk.initializers.VarianceScaling(0.5)
            h = h + hk.MultiHeadAttention(4, 4, model_size=16, w_init=init)(x, x, x, mask=causal)
            h = h + hk.Linear(16)(jax.nn.gelu(hk.Linear(64)(norm()(h))))
        return hk.Linear(50)(norm()(h))

    return haiku_model(net, tokens(2, 8))


def haiku_norms(norm: str) -> Model:
    norms: dict[str, Any] = {
        "GroupNorm": lambda: hk.GroupNorm(4),
        "InstanceNorm": lambda: hk.InstanceNorm(True, True),
        "RMSNorm": lambda: hk.RMSNorm(-1),
        "BatchNorm training": lambda: lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True),
    }

    def net(x: Any) -> Any:
        for width in (16, 16):
            x = jax.nn.silu(norms[norm]()(hk.Conv2D(width, 3, stride=2)(x)))
        return hk.Linear(5)(hk.Flatten()(x))

    return haiku_model(net, IMAGES)


MODELS.add("haiku/Conv2DLSTM", haiku_conv_lstm)
MODELS.add("haiku/VectorQuantizer", haiku_vqvae, ema=False)
MODELS.add("haiku/VectorQuantizerEMA", haiku_vqvae, ema=True)
MODELS.add("haiku/Transformer", haiku_transformer)
for _norm in ("GroupNorm", "InstanceNorm", "RMSNorm", "BatchNorm training"):
    MODELS.add(f"haiku/CNN {_norm}", haiku_norms, _norm)


@MODELS("haiku/Layers by layer_stack, rematerialised")
def layer_stack() -> Model:
    def net(x: Any) -> Any:
        def block(x: Any) -> Any:
            y = hk.LayerNorm(-1, True, True)(x)
            return x + hk.Linear(16)(jax.nn.gelu(hk.Linear(24)(y)))

        x = hk.experimental.layer_stack(3)(hk.remat(block))(hk.Linear(16)(x))
        return hk.Linear(3)(x)

    return haiku_model(net, SERIES)


@MODELS("haiku/hk.scan over time by hand")
def scanned() -> Model:
    def net(x: Any) -> Any:
        cell, gate = hk.Linear(12), hk.Linear(12)

        def step(h: Any, x: Any) -> Any:
            both = jnp.concatenate([h, x], -1)
            z = jax.nn.sigmoid(gate(both))
            h = (1 - z) * h + z * jnp.tanh(cell(both))
            return h, h

        step(jnp.zeros((2, 12)), x[:, 0])  # the parameters must be there before the scan
        out = hk.scan(step, jnp.zeros((2, 12)), x.swapaxes(0, 1))[1]
        return hk.Linear(3)(out)

    return haiku_model(net, SERIES)


@MODELS("haiku/Attention with a cross memory and bias")
def cross_attention() -> Model:
    def net(x: Any, memory: Any) -> Any:
        init = hk.initializers.VarianceScaling()
        x = hk.Linear(12)(x)
        attend = hk.MultiHeadAttention(3, 4, value_size=6, model_size=12, w_init=init)
        x = hk.RMSNorm(-1)(x + attend(x, memory, memory))
        return hk.Linear(3)(hk.nets.MLP([24, 12], activation=jax.nn.silu)(x))

    return haiku_model(net, SERIES, floats(2, 4, 7, seed=1))


@MODELS("haiku/AlphaZero residual tower")
def tower() -> Model:
    """Two heads, batch statistics in evaluation."""

    def net(x: Any, is_training: bool = False) -> Any:
        def norm(x: Any) -> Any:
            return hk.BatchNorm(True, True, 0.9)(x, is_training)

        x = jax.nn.relu(norm(hk.Conv2D(8, 3)(x)))
        for _ in range(2):
            y = jax.nn.relu(norm(hk.Conv2D(8, 3)(x)))
            x = jax.nn.relu(x + norm(hk.Conv2D(8, 3)(y)))
        policy = jax.nn.relu(norm(hk.Conv2D(2, 1)(x)))
        value = jax.nn.relu(hk.Linear(12)(hk.Flatten()(jax.nn.relu(norm(hk.Conv2D(1, 1)(x))))))
        return hk.Linear(5)(hk.Flatten()(policy)), jnp.tanh(hk.Linear(1)(value))

    return haiku_model(net, floats(2, 4, 4, 3), is_training=True)


@MODELS("haiku/Depthwise, separable and transposed")
def depthwise() -> Model:
    def net(x: Any) -> Any:
        x = jax.nn.relu(hk.DepthwiseConv2D(2, 3)(hk.Conv2D(6, 3)(x)))
        x = jax.nn.relu(hk.SeparableDepthwiseConv2D(1, 8, 3)(x))
        x = jax.nn.relu(hk.Conv2DTranspose(6, 3, 2)(x))
        return hk.Linear(3)(x.mean((1, 2)))

    return haiku_model(net, floats(2, 6, 6, 3))
