"""How long finding the structure takes: by the number of equations, and beside Torch-Pruning.

``python -m benchmarks structure_speed`` infers an unrolled transformer of about 5,000, 10,000 and
20,000 equations from shapes alone, with the tracing apart. With ``--torch-python PATH`` (a Python
that has torch and torch-pruning) it also takes turns with Torch-Pruning on ResNet-18 and ViT-S/16.

How the two are made comparable: both start from the model object and a single image of 224 x 224,
and end when every group of coupled channels is known. Torch-Pruning traces by running the model
once, we trace with ``jax.make_jaxpr``; both are given with that and without. JAX's caches are
emptied before every measurement, so that ours is the time of a first call in a warm process.
Seconds are those of the processor, and PyTorch runs on one thread as Python does: what else the
machine is doing counts for neither, and two cores would shorten PyTorch's run of the model only.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.studies.structure.networks import NETWORKS, Case, of_flax, of_transformer
from jaxprune.structure import infer

LAYERS = (48, 90, 180)
TORCH_SIDE = Path(__file__).with_name("torch_side.py")
Times = dict[str, float]


def seconds(fn: Callable[[], Any]) -> float:
    begin = time.process_time()
    fn()
    return time.process_time() - begin


def timed_once(case: Case) -> Times:
    """The two halves, then the whole as a user calls it, each from empty caches."""
    fn, *args = case
    jax.clear_caches()
    tracing = seconds(lambda: jax.make_jaxpr(fn, return_shape=True)(*args))
    after = seconds(lambda: jp.infer_structure(fn, *args))  # JAX still knows the trace
    jax.clear_caches()
    whole = seconds(lambda: jp.infer_structure(fn, *args))
    return {"tracing": tracing, "after_tracing": after, "whole": whole}


def summary(samples: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    spread = {"least": min(samples), "low": low, "median": median, "high": high}
    return spread | {"samples": list(samples)}


def summaries(rounds: Sequence[Times]) -> dict[str, Any]:
    return {key: summary([times[key] for times in rounds]) for key in rounds[0]}


# --------------------------------------------------------------------------------- by size


def by_size(layers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds for each number of layers, in turns, and the memory that it took."""
    cases = {n: of_transformer(n) for n in layers}
    times: dict[int, list[Times]] = {n: [] for n in layers}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        for n, case in cases.items():
            times[n].append(timed_once(case))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # from kilobytes
    return {
        "layers": {str(n): row_of_size(case, times[n]) for n, case in cases.items()},
        "resident_bytes_grown": grown,
        "live_array_bytes": sum(x.nbytes for x in jax.live_arrays()),
    }


def row_of_size(case: Case, times: Sequence[Times]) -> dict[str, Any]:
    fn, params, argument = case
    equations = len(infer.infer([(fn, (argument,))], params)[0].tape.steps)
    structure = jp.infer_structure(*case)
    spread = summaries(times)
    return {
        "equations": equations,
        "dimensions": len(structure.dims),
        "parameter_bytes": 4 * sum(map(math.prod, structure.shapes)),
        "seconds": spread,
        "microseconds_per_equation": 1e6 * spread["after_tracing"]["median"] / equations,
        "seconds_to_print": seconds(lambda: str(structure)),
    }


# ------------------------------------------------------------------------ beside Torch-Pruning


class Torch:
    """The other side: one process that builds a graph for every line that it is sent."""

    def __init__(self, python: str):
        self.process = subprocess.Popen(
            [python, str(TORCH_SIDE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def build(self, network: str) -> Times:
        assert self.process.stdin is not None
        self.process.stdin.write(network + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.communicate()  # no more lines: it ends


def beside_torch(python: str, rounds: int) -> dict[str, Any]:
    """Both libraries in turns on the same architectures."""
    rows = {}
    with contextlib.closing(Torch(python)) as torch:
        for name, module in NETWORKS.items():
            case = of_flax(module())
            timed_once(case), torch.build(name)  # warm-up of both
            pairs = [(timed_once(case), torch.build(name)) for _ in range(rounds)]
            rows[name] = row_of_network([ours for ours, _ in pairs], [other for _, other in pairs])
    return {"versions": torch.versions, "networks": rows}


def row_of_network(ours: Sequence[Times], theirs: Sequence[Times]) -> dict[str, Any]:
    """Ratios are theirs over ours, of the two in the same round: above 1 we are faster."""
    parameters, groups = theirs[0]["parameters"], theirs[0]["groups"]
    keys = ("tracing", "after_tracing", "whole")
    return {
        "parameters": parameters,
        "torch_pruning_groups": groups,
        "infer_structure": summaries(ours),
        "torch_pruning": summaries([{key: times[key] for key in keys} for times in theirs]),
        "theirs_over_ours": {
            key: summary([b[key] / a[key] for a, b in zip(ours, theirs, strict=True)])
            for key in keys
        },
    }


# ----------------------------------------------------------------------------------- the job


def report(found: dict[str, Any]) -> str:
    lines = [
        f"{row['equations']:6,} equations: tracing {row['seconds']['tracing']['median']:.3f} s, "
        f"inference {row['seconds']['after_tracing']['median']:.3f} s"
        for row in found["layers"].values()
    ]
    for name, row in found.get("beside_torch_pruning", {}).get("networks", {}).items():
        for key in ("whole", "after_tracing"):
            ours, theirs = (
                row[side][key]["median"] for side in ("infer_structure", "torch_pruning")
            )
            ratio = row["theirs_over_ours"][key]["median"]
            lines.append(
                f"{name}, {key.replace('_', ' ')}: {ours:.3f} s, Torch-Pruning {theirs:.3f} s "
                f"({ratio:.2f} x)"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("structure_speed", __doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--torch-python", help="a Python with torch and torch-pruning")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    found = results.header("structure_speed") | {"rounds": args.rounds}
    found |= by_size(args.layers, args.rounds)
    if args.torch_python:
        found["beside_torch_pruning"] = beside_torch(args.torch_python, args.rounds)
    print(report(found))
    path = results.folder(args.results) / "structure_speed.json"
    results.save(found, path)
    print(f"written to {path}")
