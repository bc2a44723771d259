"""Torch-Pruning's side of ``structure_speed``: a line with a network's name in, seconds out.

Runs in an environment of its own: ``pip install torch torch-pruning``. The two networks are
written here with PyTorch's own layers, so that nothing else has to be installed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional


def conv_norm(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        first = conv_norm(inputs, outputs, 3, stride)
        self.branch = nn.Sequential(*first, nn.ReLU(), *conv_norm(outputs, outputs, 3, 1))
        straight = inputs == outputs and stride == 1
        self.skip = nn.Sequential(*([] if straight else conv_norm(inputs, outputs, 1, stride)))

    def forward(self, x: Any) -> Any:
        return functional.relu(self.branch(x) + self.skip(x))


def resnet18() -> nn.Module:
    widths = [64] + [64 * 2 ** (k // 2) for k in range(8)]
    blocks = [Block(widths[k], widths[k + 1], 2 if k in (2, 4, 6) else 1) for k in range(8)]
    stem = [*conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*stem, *blocks, *head)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Any) -> Any:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        hidden = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.think = nn.Sequential(nn.LayerNorm(width), *hidden)

    def forward(self, x: Any) -> Any:
        x = x + self.attend(x)
        return x + self.think(x)


class ViTSmall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 384, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 384))
        self.positions = nn.Parameter(torch.zeros(1, 197, 384))
        self.layers = nn.Sequential(*(Layer(384, 6) for _ in range(12)), nn.LayerNorm(384))
        self.head = nn.Linear(384, 1000)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.layers(x)[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "vit_small": ViTSmall}


def times(model: Any, image: Any) -> dict[str, float]:
    """Seconds of the processor until all groups are listed; "tracing" is the run of the model.

    Walking the record that autograd made of this run counts as building the graph.
    """
    tracing = 0.0

    def run(module: Any, inputs: Any) -> Any:
        nonlocal tracing
        before = time.process_time()
        out = module(inputs)
        tracing += time.process_time() - before
        return out

    begin = time.process_time()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=image, forward_fn=run)
    count = len(list(graph.get_all_groups()))
    whole = time.process_time() - begin
    return {"tracing": tracing, "after_tracing": whole - tracing, "whole": whole, "groups": count}


def main() -> None:
    out = sys.stdout  # Torch-Pruning prints there, too: its words go to the errors instead
    torch.set_num_threads(1)
    names = ("torch", "torch-pruning")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps(versions | {"threads": torch.get_num_threads()}), file=out, flush=True)
    models = {name: build().eval() for name, build in NETWORKS.items()}
    image = torch.zeros(1, 3, 224, 224)
    for line in sys.stdin:
        model = models[line.strip()]
        with contextlib.redirect_stdout(sys.stderr):
            found = times(model, image)
        found["parameters"] = sum(p.numel() for p in model.parameters())
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
