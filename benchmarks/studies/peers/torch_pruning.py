"""What Torch-Pruning cuts of the networks that ``jaxprune.adapters.torch`` is shown on.

Runs in an environment of its own: ``pip install torch torch-pruning``, then
``python -m benchmarks.studies.peers.torch_pruning results.json``. Half of each group goes by
magnitude. The reference is the network at full size with the same units masked: what it gives
differently is what the cut changes beside them.
"""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.models import torch_networks as networks

torch.manual_seed(0)
IMAGES, TOKENS = torch.randn(2, 3, 32, 32), torch.randint(0, 50, (2, 7))


def head(model: Any) -> list[Any]:
    """The layer that gives the outputs."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]


def width(model: Any) -> list[Any]:
    """The layers of a ViT that make its residual width, and its head."""
    ends = [layer for block in model.blocks for layer in (block.attn.proj, block.mlp[3])]
    return [model.patch_embed, *ends, model.head]


# name -> builds it, input, layers whose outputs stay
NETWORKS: dict[str, tuple[Callable[[], Any], Any, Callable[[Any], list[Any]]]] = {
    "resnet18": (networks.resnet18, IMAGES, head),
    "resnet50": (networks.resnet50, IMAGES, head),
    "vit": (networks.Vit, IMAGES, head),
    "vit, width stays": (networks.Vit, IMAGES, width),
    "encoder": (networks.Encoder, TOKENS, head),
    "gpt": (networks.Gpt, TOKENS, head),
    "lstm": (networks.Recurrent, torch.randn(2, 6, 12), head),
}
COLUMNS = (nn.Linear, nn.modules.conv._ConvNd)  # their second axis counts inputs


def heads_of(model: Any) -> dict[Any, int]:
    """What Torch-Pruning has to be told: the heads of the projections that make them."""
    found: dict[Any, int] = {}
    for layer in model.modules():
        if isinstance(layer, networks.Attention):
            found[layer.qkv] = layer.heads
        elif isinstance(layer, networks.GroupedAttention):
            found |= {layer.q_proj: layer.n_head}
            found |= {layer.k_proj: layer.n_kv_head, layer.v_proj: layer.n_kv_head}
        elif isinstance(layer, nn.MultiheadAttention):
            found[layer] = layer.num_heads
    return found


def settle(model: Any) -> None:
    """The sizes that modules of the user's own store, by hand."""
    for layer in model.modules():
        if isinstance(layer, networks.Attention):
            layer.size = layer.qkv.out_features // (3 * layer.heads)
            layer.scale = layer.size**-0.5
        elif isinstance(layer, networks.GroupedAttention):
            layer.head_dim = layer.k_proj.out_features // layer.n_kv_head


def mask(names: dict[Any, str], masked: Any, group: Any) -> list[str]:
    """Zeros what a group cuts, in the copy at full size; returns what it can't mask."""
    unknown = []
    for dep, places in group:
        layer, name, inputs = dep.target.module, names.get(dep.target.module), "in" in step(dep)
        if isinstance(layer, nn.Parameter):
            with torch.no_grad():
                own = masked.get_parameter(names[layer])
                own.index_fill_(dep.target.pruning_dim, torch.tensor(places), 0.0)
            continue
        if name is None:  # an operation of the graph
            continue
        own = masked.get_submodule(name)
        with torch.no_grad():
            if isinstance(own, nn.Embedding) or (isinstance(own, COLUMNS) and inputs):
                own.weight[:, places] = 0.0
            elif hasattr(own, "weight") and isinstance(own.weight, nn.Parameter):
                own.weight[places] = 0.0
                if getattr(own, "bias", None) is not None:
                    own.bias[places] = 0.0
            elif list(own.parameters()):
                unknown.append(f"{name} ({type(own).__name__})")
    return unknown


def step(dep: Any) -> str:
    """``prune_out_channels`` or ``prune_in_channels``."""
    return str(dep.handler.__name__)


def cut(build: Callable[[], Any], x: Any, stay: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """Half of each group; parameters, seconds, and the difference from the masked network."""
    torch.manual_seed(0)
    model = build().eval()
    masked, held = copy.deepcopy(model), [*model.named_modules(), *model.named_parameters()]
    names = {x: name for name, x in held}
    row: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters())}
    begin = time.perf_counter()
    importance = tp.importance.MagnitudeImportance(p=2)
    options = {"ignored_layers": stay(model), "num_heads": heads_of(model)}
    pruner = tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, **options)
    unknown = []
    for group in pruner.step(interactive=True):
        unknown += mask(names, masked, group)
        group.prune()
    row["seconds"] = time.perf_counter() - begin
    row["params after"] = sum(p.numel() for p in model.parameters())
    settle(model)
    with torch.no_grad():
        row["not masked"], wanted = sorted(set(unknown)), masked(x)
        row["difference"] = float((model(x) - wanted).abs().max() / wanted.abs().max())
    return row


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning")}
    found: dict[str, Any] = {"job": "torch_pruning", "date": datetime.date.today().isoformat()}
    found |= {"versions": versions, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    rows: dict[str, Any] = {}
    for name, network in NETWORKS.items():
        try:
            rows[name] = cut(*network)
        except Exception as error:  # whatever it raises is the finding
            traceback.print_exc()
            rows[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(name, rows[name], flush=True)
    Path(sys.argv[1]).write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
