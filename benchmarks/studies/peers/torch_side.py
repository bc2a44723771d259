"""What Torch-Pruning makes of a trained network, and how fast that is in PyTorch."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch.nn import functional as F

from benchmarks.studies.peers import networks
from benchmarks.studies.peers.networks import FUNCTIONS as FUNCTIONS
from benchmarks.studies.peers.networks import from_torch as from_torch
from benchmarks.studies.recovery.recovery import Case

MIN_ROUND = 0.05  # seconds


def pruned(case: Case, network: str, way: str, ratio: float, settings: Any) -> Any:
    """The module after one step of Torch-Pruning at a ratio of each group's channels."""
    module = networks.to_torch(network, case.dense)
    by_loss = way.endswith("Taylor")
    importance = (
        tp.importance.TaylorImportance() if by_loss else tp.importance.MagnitudeImportance(p=2)
    )
    heads = {layer: networks.HEADS for block in getattr(module, "attention", ())
             for layer in (block.query, block.key, block.value)}  # fmt: skip
    options: dict[str, Any] = {"ignored_layers": [module.head], "num_heads": heads}
    if hasattr(module, "position"):
        options["unwrapped_parameters"] = [(module.position, 1)]
    pruner = tp.pruner.BasePruner(
        module, images(case, 1), importance, pruning_ratio=ratio, round_to=settings.round_to,
        **options,
    )  # fmt: skip
    if by_loss:
        evidence(module, case, settings.evidence)
    pruner.step()
    module.zero_grad()
    return module.eval()


def evidence(module: Any, case: Case, count: int) -> None:
    """The gradient of the loss, summed over the first batches."""
    for x, y in case.batches[:count]:
        shown = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
        F.cross_entropy(module(shown), torch.from_numpy(np.array(y)).long()).backward()


def images(case: Case, count: int | None = None) -> Any:
    return torch.from_numpy(np.array(case.x[:count])).permute(0, 3, 1, 2).contiguous()


def speedup(case: Case, network: str, module: Any, rounds: int) -> float:
    return float(times(case, network, {"small": module}, rounds)["small"]["speedup"])


def times(case: Case, network: str, modules: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Median seconds of each, and the median of dense time over its time, interleaved."""
    x, every = images(case), {"dense": networks.to_torch(network, case.dense)} | modules
    counts: dict[str, int] = {}
    with torch.inference_mode():
        for name, module in every.items():
            module(x)
            counts[name] = max(1, int(MIN_ROUND / _seconds(module, x, 3)))
        spent = [{name: _seconds(m, x, counts[name]) for name, m in every.items()}
                 for _ in range(rounds)]  # fmt: skip
    return {
        name: {
            "median_seconds": statistics.median(one[name] for one in spent),
            "speedup": statistics.median(one["dense"] / one[name] for one in spent),
        }
        for name in every
    }


def _seconds(module: Any, x: Any, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        module(x)
    return (time.perf_counter() - begin) / count
