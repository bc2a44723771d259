"""A residual network and a ViT at any widths, in JAX and in PyTorch, from one tree of weights.

The tree is that of the Flax modules of ``benchmarks.studies.recovery``. Flax refuses kernels of
other sizes than its module's; these functions take what comes, so that a network which another
library has cut is tuned and judged here by the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import nn
from torch.nn import functional as F

Tree = dict[str, Any]
MOMENTUM, EPSILON, NORM_EPSILON, HEADS = 0.9, 1e-5, 1e-6, 4

# ---- in JAX ---------------------------------------------------------------------------------


class Stats:
    """Batch normalisation that notes new running statistics when it trains."""

    def __init__(self, old: Tree, train: bool):
        self.old, self.train, self.new = old, train, dict[str, Any]()

    def __call__(self, at: Tree, name: str, x: jax.Array) -> jax.Array:
        mean, var = self.old[name]["mean"], self.old[name]["var"]
        if self.train:
            axes = tuple(range(x.ndim - 1))
            now = {"mean": x.mean(axes), "var": x.var(axes)}
            self.new[name] = {k: MOMENTUM * self.old[name][k] + (1 - MOMENTUM) * v
                              for k, v in now.items()}  # fmt: skip
            mean, var = now["mean"], now["var"]
        return (x - mean) * lax.rsqrt(var + EPSILON) * at[name]["scale"] + at[name]["bias"]


def convolved(kernel: jax.Array, x: jax.Array, stride: int = 1) -> jax.Array:
    shapes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=shapes)


def residual(variables: Tree, x: jax.Array, train: bool = False) -> Any:
    """Logits of ``ResNet``, beside new statistics in train mode."""
    p, old = variables["params"], variables["batch_stats"]
    norm, new = Stats(old, train), {}
    x = jax.nn.relu(norm(p, "BatchNorm_0", convolved(p["Conv_0"]["kernel"], x, 2)))
    for k in range(sum(name.startswith("Block") for name in p)):
        at, stride = p[f"Block_{k}"], 2 if k else 1
        inner = Stats(old[f"Block_{k}"], train)
        y = convolved(at["Conv_0"]["kernel"], x, stride)
        y = jax.nn.relu(inner(at, "BatchNorm_0", y))
        y = inner(at, "BatchNorm_1", convolved(at["Conv_1"]["kernel"], y))
        if "Conv_2" in at:
            x = inner(at, "BatchNorm_2", convolved(at["Conv_2"]["kernel"], x, stride))
        x, new[f"Block_{k}"] = jax.nn.relu(x + y), inner.new
    logits = x.mean((1, 2)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    return (logits, norm.new | new) if train else logits


def vit(variables: Tree, x: jax.Array, train: bool = False) -> Any:
    """Logits of ``ViT``, beside no statistics in train mode."""
    p = variables["params"]
    patch = p["Conv_0"]["kernel"]
    x = convolved(patch, x, patch.shape[0]) + p["Conv_0"]["bias"]
    x = x.reshape(x.shape[0], -1, x.shape[-1]) + p["position"]
    for k in range(sum(name.startswith("MultiHead") for name in p)):
        x = x + _attention(p[f"MultiHeadAttention_{k}"], _norm(p[f"LayerNorm_{2 * k}"], x))
        h = jax.nn.gelu(_dense(p[f"Dense_{2 * k}"], _norm(p[f"LayerNorm_{2 * k + 1}"], x)))
        x = x + _dense(p[f"Dense_{2 * k + 1}"], h)
    last = sum(name.startswith("LayerNorm") for name in p) - 1
    logits = _dense(p[f"Dense_{last}"], _norm(p[f"LayerNorm_{last}"], x).mean(1))
    return (logits, {}) if train else logits


def _dense(p: Tree, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _norm(p: Tree, x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    var = jnp.square(centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(var + NORM_EPSILON) * p["scale"] + p["bias"]


def _attention(p: Tree, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("bnd,dhf->bnhf", x, p[name]["kernel"]) + p[name]["bias"]
               for name in ("query", "key", "value"))  # fmt: skip
    weights = jax.nn.softmax(jnp.einsum("bqhf,bkhf->bhqk", q, k) / np.sqrt(q.shape[-1]))
    mixed = jnp.einsum("bhqk,bkhf->bqhf", weights, v)
    return jnp.einsum("bqhf,hfd->bqd", mixed, p["out"]["kernel"]) + p["out"]["bias"]


FUNCTIONS = {"residual": residual, "vit": vit}

# ---- in PyTorch -----------------------------------------------------------------------------


class Same(nn.Module):
    """A convolution with Flax's padding: what is odd goes below and to the right."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, bias=bias)
        self.size, self.stride = size, stride

    def forward(self, x: Any) -> Any:
        sides = []
        for length in (x.shape[3], x.shape[2]):
            pad = max((-(-length // self.stride) - 1) * self.stride + self.size - length, 0)
            sides += [pad // 2, pad - pad // 2]
        return self.conv(F.pad(x, sides) if any(sides) else x)


class TorchBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = Same(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Same(width, width, 3), nn.BatchNorm2d(width)
        if stride > 1 or inputs != width:
            self.conv3, self.bn3 = Same(inputs, width, 1, stride), nn.BatchNorm2d(width)

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            x = self.bn3(self.conv3(x))
        return F.relu(x + y)


class TorchResidual(nn.Module):
    """As ``ResNet`` with one block per stage."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), classes: int = 10):
        super().__init__()
        self.stem, self.bn = Same(1, widths[0], 3, 2), nn.BatchNorm2d(widths[0])
        pairs = zip((widths[0], *widths), widths)
        self.blocks = nn.ModuleList(TorchBlock(a, b, 2 if k else 1) for k, (a, b) in
                                    enumerate(pairs))  # fmt: skip
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))

    def pairs(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """(path in the tree, layer that holds it)."""
        yield from ((("Conv_0",), self.stem.conv), (("BatchNorm_0",), self.bn))
        for k, block in enumerate(self.blocks):
            for j in range(3 if hasattr(block, "conv3") else 2):
                yield (f"Block_{k}", f"Conv_{j}"), getattr(block, f"conv{j + 1}").conv
                yield (f"Block_{k}", f"BatchNorm_{j}"), getattr(block, f"bn{j + 1}")
        yield ("Dense_0",), self.head


class TorchAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = HEADS

    def forward(self, x: Any) -> Any:
        q, k, v = (layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))  # fmt: skip
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class TorchViT(nn.Module):
    """As ``ViT`` of ``benchmarks.studies.recovery.networks``."""

    def __init__(self, classes: int = 10, width: int = 64, depth: int = 3, size: int = 28):
        super().__init__()
        patch = size // 7
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(torch.zeros(49, width))
        norm = lambda: nn.LayerNorm(width, NORM_EPSILON)  # noqa: E731
        self.attention = nn.ModuleList(TorchAttention(width) for _ in range(depth))
        self.norms = nn.ModuleList(norm() for _ in range(2 * depth + 1))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Any) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for k, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * k](x))
            h = F.gelu(self.up[k](self.norms[2 * k + 1](x)), approximate="tanh")
            x = x + self.down[k](h)
        return self.head(self.norms[-1](x).mean(1))

    def pairs(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """(path in the tree, layer that holds it)."""
        yield ("Conv_0",), self.patch
        for k, layer in enumerate(self.attention):
            for name in ("query", "key", "value", "out"):
                yield (f"MultiHeadAttention_{k}", name), getattr(layer, name)
            yield (f"Dense_{2 * k}",), self.up[k]
            yield (f"Dense_{2 * k + 1}",), self.down[k]
        for k, norm in enumerate(self.norms):
            yield (f"LayerNorm_{k}",), norm
        yield (f"Dense_{len(self.norms) - 1}",), self.head


MODULES: dict[str, Any] = {"residual": TorchResidual, "vit": TorchViT}

# ---- between them ---------------------------------------------------------------------------


def to_torch(name: str, variables: Tree) -> Any:
    """The module with the tree's weights, in evaluation mode."""
    module = MODULES[name]()
    with torch.no_grad():
        for path, layer in module.pairs():
            at = _at(variables["params"], path)
            weight = at["kernel"] if "kernel" in at else at["scale"]
            _copy(layer.weight, _weight(layer, np.asarray(weight)))
            if layer.bias is not None:
                _copy(layer.bias, np.asarray(at["bias"]).ravel())
            if isinstance(layer, nn.BatchNorm2d):
                stats = _at(variables["batch_stats"], path)
                _copy(layer.running_mean, np.asarray(stats["mean"]))
                _copy(layer.running_var, np.asarray(stats["var"]))
        if "position" in variables["params"]:
            _copy(module.position, np.asarray(variables["params"]["position"]))
    return module.eval()


def from_torch(module: Any) -> Tree:
    """The tree of a module at whatever widths it has by now."""
    found: Tree = {"params": {}, "batch_stats": {}}
    for path, layer in module.pairs():
        weight, heads = _array(layer.weight), path[0].startswith("MultiHead")
        leaf: Tree = {"scale": weight} if weight.ndim == 1 else {"kernel": weight.T}
        if weight.ndim == 4:
            leaf = {"kernel": weight.transpose(2, 3, 1, 0)}
        if layer.bias is not None:
            leaf["bias"] = _array(layer.bias)
        if heads and path[1] == "out":
            leaf["kernel"] = leaf["kernel"].reshape(HEADS, -1, leaf["kernel"].shape[-1])
        elif heads:
            leaf = {k: v.reshape(*v.shape[:-1], HEADS, -1) for k, v in leaf.items()}
        _set(found["params"], path, leaf)
        if isinstance(layer, nn.BatchNorm2d):
            stats = {"mean": _array(layer.running_mean), "var": _array(layer.running_var)}
            _set(found["batch_stats"], path, stats)
    if hasattr(module, "position"):
        found["params"]["position"] = _array(module.position)
    return jax.tree.map(jnp.asarray, found if found["batch_stats"] else {"params": found["params"]})


def _weight(layer: Any, kernel: np.ndarray) -> np.ndarray:
    """A kernel of Flax in the layout of a layer."""
    if isinstance(layer, nn.Conv2d):
        return kernel.transpose(3, 2, 0, 1)
    if isinstance(layer, nn.Linear):
        return kernel.reshape(layer.in_features, layer.out_features).T
    return kernel


def _copy(to: Any, array: np.ndarray) -> None:
    to.copy_(torch.from_numpy(np.array(array, np.float32)))


def _array(x: Any) -> np.ndarray:
    return np.array(x.detach().numpy(), np.float32)


def _at(tree: Tree, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: Tree, path: tuple[str, ...], leaf: Tree) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
