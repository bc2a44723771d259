"""Flax Linen, in the ways that its documentation shows."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.models.outside.model import Model, Models, floats, linen, tokens

MODELS = Models()
SERIES, IMAGES, IDS = floats(2, 6, 5), floats(2, 8, 8, 3), tokens(2, 8)


@MODELS("linen/Encoder block")
@MODELS("linen/Encoder block, normed query and key", normalize_qk=True)
def encoder(**settings: Any) -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(16)(x)
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4, deterministic=True, **settings)(y)
            y = nn.RMSNorm()(x)
            return nn.Dense(3)(x + nn.Dense(16)(nn.gelu(nn.Dense(32)(y))))

    return linen(Block(), SERIES)


@MODELS("linen/LSTMCell", "LSTMCell")
@MODELS("linen/OptimizedLSTMCell", "OptimizedLSTMCell")
@MODELS("linen/GRUCell", "GRUCell")
@MODELS("linen/SimpleCell", "SimpleCell")
@MODELS("linen/MGUCell", "MGUCell")
def recurrent(cell: str) -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(nn.RNN(getattr(nn, cell)(12))(x))

    return linen(Net(), SERIES)


@MODELS("linen/Bidirectional")
def bidirectional() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            both = nn.Bidirectional(nn.RNN(nn.LSTMCell(8)), nn.RNN(nn.GRUCell(8)))
            return nn.Dense(3)(both(x))

    return linen(Net(), SERIES)


@MODELS("linen/ConvLSTMCell")
def conv_lstm() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y: Any = nn.RNN(nn.ConvLSTMCell(6, (3, 3)))(x)
            return nn.Dense(3)(y.mean((2, 3)))

    return linen(Net(), floats(2, 3, 6, 6, 4))


@MODELS("linen/Sequence lengths and reverse")
def lengths() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, length: Any) -> Any:
            rnn = nn.RNN(nn.GRUCell(8), reverse=True, keep_order=True, return_carry=True)
            carry, y = rnn(x, seq_lengths=length)
            return nn.Dense(3)(y), nn.Dense(2)(carry)

    return linen(Net(), SERIES, jnp.array([4, 6]))


class GPTBlock(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.SelfAttention(4)(nn.LayerNorm()(x), mask)
        y = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(y), None


@MODELS("linen/GPT, scanned", "scan")
@MODELS("linen/GPT, scanned and rematerialised", "remat_scan")
@MODELS("linen/GPT, rematerialised", "remat")
def gpt(way: str) -> Model:
    class GPT(nn.Module):
        @nn.compact
        def __call__(self, ids: Any) -> Any:
            embed = nn.Embed(50, 16)
            x = embed(ids) + self.param("positions", nn.initializers.normal(), (8, 16))
            block = GPTBlock if way == "scan" else nn.remat(GPTBlock)
            if way == "remat":
                for _ in range(2):
                    x, _ = block()(x)
            else:
                axes: Any = {"params": 0}
                rngs: Any = {"params": True}
                x, _ = nn.scan(block, axes, split_rngs=rngs, length=2)()(x, None)
            return embed.attend(nn.LayerNorm()(x))

    return linen(GPT(), IDS)


@MODELS("linen/Cached decoding")
def decode() -> Model:
    """One token against a cache that holds three; the cache goes in and comes out."""

    class Net(nn.Module):
        decode: bool = True

        @nn.compact
        def __call__(self, ids: Any) -> Any:
            x = nn.Embed(50, 16)(ids)
            x = x + nn.SelfAttention(4, decode=self.decode)(nn.LayerNorm()(x))
            return nn.Dense(50)(x)

    net, token = Net(), tokens(2, 1)
    start = net.init(jax.random.key(0), tokens(2, 6))
    for _ in range(3):
        start = {**start, **net.apply(start, token, mutable=["cache"])[1]}
    return Model(lambda p, ids: net.apply(p, ids, mutable=["cache"]), start, (token,))


@MODELS("linen/CNN BatchNorm evaluation", "batch")
@MODELS("linen/CNN BatchNorm training", "batch", True)
@MODELS("linen/CNN GroupNorm", "group")
@MODELS("linen/CNN InstanceNorm", "instance")
@MODELS("linen/CNN LayerNorm over all axes", "layer")
def cnn(norm: str, training: bool = False) -> Model:
    norms: dict[str, Any] = {
        "batch": partial(nn.BatchNorm, use_running_average=not training),
        "group": partial(nn.GroupNorm, num_groups=4),
        "instance": nn.InstanceNorm,
        "layer": partial(nn.LayerNorm, reduction_axes=(1, 2, 3)),
    }

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for stride in (1, 2):
                x = nn.relu(norms[norm]()(nn.Conv(8, (3, 3), stride)(x)))
            x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
            return nn.Dense(4)(nn.relu(nn.Dense(12)(x)))

    if not training:
        return linen(Net(), IMAGES)
    net = Net()
    start = jax.jit(net.init)(jax.random.key(0), IMAGES)
    return Model(lambda p, x: net.apply(p, x, mutable=["batch_stats"]), start, (IMAGES,))


@MODELS("linen/WeightNorm", "WeightNorm")
@MODELS("linen/SpectralNorm", "SpectralNorm")
def reparametrised(kind: str) -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for width in (12, 8, 3):
                if kind == "WeightNorm":
                    x = nn.tanh(nn.WeightNorm(nn.Dense(width))(x))
                else:
                    x = nn.tanh(nn.SpectralNorm(nn.Dense(width))(x, update_stats=False))
            return x

    return linen(Net(), floats(4, 6))


@MODELS("linen/DenseGeneral and Einsum")
def einsum() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.relu(nn.DenseGeneral((3, 8))(x))
            y = nn.relu(nn.Einsum((3, 8, 6), "...hd,hdf->...hf")(y))
            return nn.DenseGeneral(4, axis=(-2, -1))(y)

    return linen(Net(), SERIES)


@MODELS("linen/ConvTranspose decoder")
def transposed() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, z: Any) -> Any:
            x = nn.relu(nn.Dense(3 * 3 * 8)(z)).reshape(-1, 3, 3, 8)
            x = nn.leaky_relu(nn.ConvTranspose(6, (4, 4), (2, 2))(x))
            return nn.sigmoid(nn.ConvTranspose(3, (3, 3), (2, 2), transpose_kernel=False)(x))

    return linen(Net(), floats(2, 5))


@MODELS("linen/ConvLocal")
def local() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(6, (3, 3))(x))
            x = nn.relu(nn.ConvLocal(6, (3, 3), 2, padding="VALID")(x))
            return nn.Dense(3)(x.mean((1, 2)))

    return linen(Net(), IMAGES)


@MODELS("linen/Squeeze and excite")
def efficientnet() -> Model:
    """Inverted bottlenecks with a depthwise convolution and a gate per channel."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            width = x.shape[-1] * 4
            y = nn.swish(nn.BatchNorm(True)(nn.Conv(width, (1, 1))(x)))
            y = nn.Conv(width, (3, 3), feature_group_count=width)(y)
            y = nn.swish(nn.BatchNorm(True)(y))
            gate = nn.Conv(4, (1, 1))(y.mean((1, 2), keepdims=True))
            y = y * nn.sigmoid(nn.Conv(width, (1, 1))(nn.swish(gate)))
            return x + nn.BatchNorm(True)(nn.Conv(x.shape[-1], (1, 1))(y))

    return linen(nn.Sequential([nn.Conv(8, (3, 3)), Block(), Block(), nn.Dense(3)]), IMAGES)


@MODELS("linen/Mixture of experts, vmapped")
def experts() -> Model:
    """Top two of four, all computed; the gate's weights renormalised."""

    class Expert(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(12)(x)))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(8)(x)
            weight, chosen = jax.lax.top_k(nn.softmax(nn.Dense(4)(x)), 2)
            gate = jax.nn.one_hot(chosen, 4) * (weight / weight.sum(-1, keepdims=True))[..., None]
            axes: Any = {"params": 0}
            rngs: Any = {"params": True}
            every = nn.vmap(Expert, axes, in_axes=None, out_axes=-2, axis_size=4, split_rngs=rngs)
            y = jnp.einsum("btke,bted->btd", gate, every()(x))
            return nn.Dense(3)(x + y)

    return linen(Net(), SERIES)


@MODELS("linen/Dropout in training")
def dropout() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(16)(x)))
            return nn.Dense(3)(nn.relu(nn.Dense(12)(x)))

    net, x = Net(), floats(4, 6)
    key = jax.random.key(1)
    params = net.init({"params": key, "dropout": key}, x)
    return Model(lambda p, x: net.apply(p, x, rngs={"dropout": key}), params, (x,))


@MODELS("linen/Variational autoencoder")
def vae() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.relu(nn.Dense(16)(x))
            mean, log_variance = nn.Dense(4)(h), nn.Dense(4)(h)
            noise = jax.random.normal(jax.random.key(0), mean.shape)
            z = mean + jnp.exp(0.5 * log_variance) * noise
            kl = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), -1)
            return nn.Dense(6)(nn.relu(nn.Dense(16)(z))), kl

    return linen(Net(), floats(4, 6))


@MODELS("linen/U-Net of diffusion")
def unet() -> Model:
    """Time embedding, residual blocks with FiLM, attention in the middle, skips."""

    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x: Any, time: Any) -> Any:
            y = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm(4)(x)))
            scale, shift = jnp.split(nn.Dense(2 * self.width)(time)[:, None, None], 2, -1)
            y = nn.swish(nn.GroupNorm(4)(y) * (1 + scale) + shift)
            y = nn.Conv(self.width, (3, 3))(y)
            return y + (x if x.shape[-1] == self.width else nn.Conv(self.width, (1, 1))(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, t: Any) -> Any:
            angle = t[:, None] * jnp.exp(-jnp.arange(4) / 2.0)
            time = nn.Dense(16)(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1))
            a = Block(8)(nn.Conv(8, (3, 3))(x), time)
            b = Block(12)(nn.Conv(8, (3, 3), 2)(a), time)
            flat = nn.GroupNorm(4)(b).reshape(len(b), -1, 12)
            b = b + nn.SelfAttention(2)(flat).reshape(b.shape)
            up = jax.image.resize(b, (*a.shape[:3], 12), "nearest")
            out = Block(8)(jnp.concatenate([up, a], -1), time)
            return nn.Conv(3, (3, 3))(nn.swish(nn.GroupNorm(4)(out)))

    return linen(Net(), IMAGES, jnp.array([3.0, 7.0]))


@MODELS("linen/MLP-Mixer")
def mixer() -> Model:
    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(12, (2, 2), (2, 2))(x).reshape(len(x), -1, 12)
            for _ in range(2):
                y = nn.LayerNorm()(x).swapaxes(1, 2)
                y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(8)(y)))
                x = x + y.swapaxes(1, 2)
                x = x + nn.Dense(12)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x))))
            return nn.Dense(3)(nn.LayerNorm()(x).mean(1))

    return linen(Mixer(), IMAGES)


@MODELS("linen/ConvNeXt V2")
def convnext() -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.Conv(8, (5, 5), feature_group_count=8)(x)
            y = nn.gelu(nn.Dense(32)(nn.LayerNorm()(y)))
            norm = jnp.sqrt(jnp.sum(y * y, (1, 2), keepdims=True) + 1e-12)
            gamma = self.param("gamma", nn.initializers.ones, (32,))
            beta = self.param("beta", nn.initializers.zeros, (32,))
            y = gamma * (y * norm / (norm.mean(-1, keepdims=True) + 1e-6)) + beta + y
            return x + nn.Dense(8)(y)

    head: list[Any] = [lambda x: x.mean((1, 2)), nn.LayerNorm(), nn.Dense(3)]
    return linen(nn.Sequential([nn.Conv(8, (2, 2), (2, 2)), Block(), Block(), *head]), IMAGES)


@MODELS("linen/Perceiver")
def perceiver() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            latent = self.param("latent", nn.initializers.normal(1.0), (4, 16))
            z = jnp.broadcast_to(latent, (len(x), 4, 16))
            for _ in range(2):
                z = z + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(z), nn.LayerNorm()(x))
                z = z + nn.SelfAttention(2)(nn.LayerNorm()(z))
                z = z + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(z))))
            return nn.Dense(3)(z.mean(1))

    return linen(Net(), SERIES)


@MODELS("linen/Siamese")
def siamese() -> Model:
    class Net(nn.Module):
        def setup(self) -> None:
            self.tower = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(8)])
            self.head = nn.Dense(1)

        def __call__(self, a: Any, b: Any) -> Any:
            a, b = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in map(self.tower, (a, b)))
            return jnp.sum(a * b, -1), self.head(jnp.abs(a - b))

    return linen(Net(), floats(4, 6), floats(4, 6, seed=1))


@MODELS("linen/Conformer")
def conformer() -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def half() -> Any:
                return nn.Sequential([nn.LayerNorm(), nn.Dense(24), nn.swish, nn.Dense(12)])

            x = x + 0.5 * half()(x)
            x = x + nn.SelfAttention(2)(nn.LayerNorm()(x))
            y = nn.glu(nn.Dense(24)(nn.LayerNorm()(x)))
            y = nn.Conv(12, (3,), feature_group_count=12)(y)
            x = x + nn.Dense(12)(nn.swish(nn.BatchNorm(True)(y)))
            return nn.LayerNorm()(x + 0.5 * half()(x))

    return linen(nn.Sequential([nn.Conv(12, (3,), 2), Block(), Block(), nn.Dense(7)]), SERIES)
