"""What do int8 and pruning cost and bring together, in the engine that serves?

``python -m benchmarks int8`` takes the trained networks of ``recovery``, prunes each to half of its
FLOPs by Taylor scores of units and recovers it, and writes the dense and the pruned one for each
engine that is installed, in float32 and in int8 (calibrated on training images): accuracy on test
images, bytes, and milliseconds from one interleaved run. It resumes by network.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import data, results
from benchmarks.common.machine import load_average
from benchmarks.studies.recovery import networks
from benchmarks.studies.recovery.recovery import QUICK as QUICKLY
from benchmarks.studies.recovery.recovery import Case
from benchmarks.studies.recovery.recovery import Settings as Training
from benchmarks.studies.runtimes import picture


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    seed: int = 1
    less: float = 2.0  # FLOPs
    batch: int = 64
    calibration: int = 4  # batches of training images
    test_images: int = 2000
    repeats: int = 15


ENGINES: dict[str, tuple[str, Callable[..., Any]]] = {  # name -> (package, runtime)
    "onnx": ("onnxruntime", jp.runtimes.onnx),
    "openvino": ("openvino", jp.runtimes.openvino),
    "litert": ("ai_edge_litert", jp.runtimes.litert),
    "litert, one thread": ("ai_edge_litert", functools.partial(jp.runtimes.litert, threads=1)),
}


def pruned(case: Case, less: float) -> jp.typing.Compact:
    """The network at a part of its FLOPs, recovered."""
    target = jp.Target(flops=1 / less)
    scores = case.scores("taylor")
    plan = jp.search(case.fn, case.dense, case.structure, scores, case.x, target=target)
    small = jp.compact(case.fn, case.dense, plan.masks, case.x)
    steps = case.settings.tune_steps
    return jp.recover(small, case.loss, case.batches, steps=steps, progress=False)


def measured(case: Case, settings: Settings) -> dict[str, Any]:
    """Rows of accuracy, bytes and milliseconds."""
    small = pruned(case, settings.less)
    models = {"dense": (case.fn, (case.dense, case.x)), "pruned": (small, (case.x,))}
    rows: list[dict[str, Any]] = []
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, engine, bits, artefact in _artefacts(models, case, settings, Path(folder)):
            row: dict[str, Any] = {"model": name, "engine": engine, "int8": bits}
            if isinstance(artefact, str):
                rows.append(row | {"refused": artefact})
                continue
            accuracy = _accuracy(artefact.fn, case, settings)
            calls[len(rows)] = (artefact.fn, (case.x,))
            rows.append(row | {"accuracy": accuracy, "bytes": artefact.size})
        entries = {str(k): call for k, call in calls.items()}
        times = jp.compare(entries, repeats=settings.repeats, progress=False)
    for key, timing in times.timings.items():
        rows[int(key)] |= {"milliseconds": 1e3 * timing.median, "runtime": timing.runtime,
                           "quartiles": [1e3 * q for q in timing.quartiles]}  # fmt: skip
    return {
        "float32 in XLA": {
            "dense": case.accuracy(case.fn, case.dense),
            "pruned": case.accuracy(small.fn, small.params),
        },
        "load_average": load_average(),
        "rows": rows,
    }


def _artefacts(
    models: dict[str, Any], case: Case, settings: Settings, folder: Path
) -> Iterator[tuple[str, str, str | None, Any]]:
    calibration = [(jnp.asarray(x),) for x, _ in case.batches[: settings.calibration]]
    for name, (fn, args) in models.items():
        for engine, (package, make) in ENGINES.items():
            known = (None, *make().engine.quantize)
            for bits in known if importlib.util.find_spec(package) else ():
                try:
                    runtime = make(
                        quantize=bits, calibration=calibration if bits == "static" else None
                    )
                    where = folder / f"{name}-{engine}-{bits}"
                    yield name, engine, bits, jp.export(fn, where, *args, runtime=runtime)
                except Exception as error:  # It is the row's verdict.
                    said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    yield name, engine, bits, said


def _accuracy(fn: Callable[..., Any], case: Case, settings: Settings) -> float:
    size, images = settings.batch, case.images
    starts = range(0, min(settings.test_images, len(images.test_x)) - size + 1, size)
    right = [
        np.asarray(fn(jnp.asarray(images.test_x[i : i + size]))).argmax(-1)
        == images.test_y[i : i + size]
        for i in starts
    ]
    return float(np.mean(right))


# ------------------------------------------------------------------------------------- results


def table(found: dict[str, Any]) -> Table:
    """A row for each network, engine and number of bits: dense beside pruned."""
    shown = Table("network", "engine", "int8", "dense %", "pruned %", "dense ms", "pruned ms",
                  "dense kB", "pruned kB")  # fmt: skip
    for network, each in found.items():
        by = {(r["engine"], r["int8"], r["model"]): r for r in each["rows"]}
        for engine, bits in dict.fromkeys((e, b) for e, b, _ in by):
            dense, small = (by[engine, bits, model] for model in ("dense", "pruned"))
            cells = [dense.get("refused") or small.get("refused") or ""] + [""] * 5
            if not cells[0]:
                pair = (dense, small)
                cells = [
                    *(f"{100 * r['accuracy']:.1f}" for r in pair),
                    *(f"{r['milliseconds']:.3g}" for r in pair),
                    *(f"{r['bytes'] / 1e3:.0f}" for r in pair),
                ]
            shown.add_row(network, engine, bits or "-", *cells)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = studies.parser("int8", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: hardly trained")
    names = list(networks.NETWORKS)
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    args = parser.parse_args(argv)
    if not any(importlib.util.find_spec(package) for package, _ in ENGINES.values()):
        parser.error("no engine is installed: pip install 'jaxprune[onnx]'")
    training = QUICKLY if args.quick else Training()
    settings = Settings(test_images=128, repeats=2) if args.quick else Settings()
    path = results.folder(args.results) / f"int8{'-quick' if args.quick else ''}.json"
    about = {"settings": dataclasses.asdict(settings) | {"training": dataclasses.asdict(training)}}
    found = results.continued(path, about["settings"])
    stem = f"recovery{'-quick' if args.quick else ''}"
    for name in ["lstm"] if args.quick else args.networks:
        if name not in found:
            case = Case(name, data.load(), training, settings.seed, args.weights / stem)
            found[name] = measured(case, settings)
            results.save(results.header("int8") | about | {"networks": found}, path)
            print(name, flush=True)
            jax.clear_caches()
    Console(width=120).print(table(found))
    panels = {name: ("test accuracy [%]", _points(each["rows"])) for name, each in found.items()}
    picture.draw(panels, path.with_suffix(".png"))
    print(path)


def _points(rows: list[dict[str, Any]]) -> dict[str, picture.Point]:
    found = picture.fastest(rows, "accuracy")
    return {kind: point._replace(quality=100 * point.quality) for kind, point in found.items()}
