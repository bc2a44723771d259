"""In which engine is a network fastest, before and after pruning?

``python -m benchmarks runtimes`` writes each network for each engine that is installed, times the
dense files in one interleaved run, asks ``jp.search`` for twice the speed in the engine that was
fastest, writes what it found for every engine, checks each file against the masked model, and times
all of it in one run again. The machine should have nothing else to do. It resumes by network.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average
from benchmarks.studies.runtimes.networks import NETWORKS, Network

ENGINES: dict[str, tuple[str, Callable[[], Any]]] = {  # name -> (package, runtime)
    "xla": ("jax", jp.runtimes.xla),
    "onnx": ("onnxruntime", jp.runtimes.onnx),
    "openvino": ("openvino", jp.runtimes.openvino),
    "litert": ("ai_edge_litert", jp.runtimes.litert),
}
QUICK = ("LSTM",)


def measured(network: Network, engines: dict[str, Any], asked: float, repeats: int) -> Any:
    """What a network's files are like in each engine."""
    with tempfile.TemporaryDirectory() as folder:
        dense = _written(network, network.fn, engines, Path(folder) / "dense")
        made = {f"dense, {n}": a for n, a in dense.items() if not isinstance(a, str)}
        times = _times(made, repeats)
        fastest = min(times.timings, key=lambda name: times.timings[name].median)
        fastest = fastest.removeprefix("dense, ")
        small, plan = _pruned(network, engines[fastest], asked)
        files = _written(network, small, engines, Path(folder) / "pruned")
        all_files = {f"dense, {n}": a for n, a in dense.items()}
        all_files |= {f"pruned, {n}": a for n, a in files.items()}
        made = {n: a for n, a in all_files.items() if not isinstance(a, str)}
        times = _times(made, repeats)
        rows = {name: _row(a, times, name) for name, a in all_files.items()}
    return {
        "weights": network.weights, "input": ", ".join(str(jax.typeof(x)) for x in network.args),
        "searched in": fastest, "asked": asked, "plan": plan, "load_average": load_average(),
        "rows": rows,
    }  # fmt: skip


def _pruned(network: Network, runtime: Any, asked: float) -> tuple[Any, dict[str, Any]]:
    """Half of the time by magnitudes; the score decides which units, not how many fit."""
    fn, params, args = network.fn, network.params, network.args
    structure = jp.infer_structure(fn, params, *args)
    plan = jp.search(
        fn, params, structure, jp.magnitude(params), *args, target=jp.Target(speedup=asked),
        objective="balanced", runtime=runtime if runtime.engine else None, progress=False,
    )  # fmt: skip
    said = {"measured": plan.measured.get("speedup"), "widths": plan.widths}
    return jp.compact(fn, params, plan.masks, *args), said


def _written(network: Network, fn: Any, engines: dict[str, Any], folder: Path) -> Any:
    """Of each engine the artefact, or what stands in the way."""
    args = network.args if isinstance(fn, jp.typing.Compact) else (network.params, *network.args)
    made: dict[str, Any] = {}
    for name, runtime in engines.items():
        state = network.state if runtime.engine else None
        try:
            made[name] = jp.export(fn, folder / name, *args, runtime=runtime, state=state)
        except Exception as error:  # It is the row's verdict.
            made[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return made


def _times(made: dict[str, Any], repeats: int) -> Any:
    entries = {name: artefact.timed() for name, artefact in made.items()}
    return jp.compare(entries, repeats=repeats, progress=False)


def _row(artefact: Any, times: Any, name: str) -> dict[str, Any]:
    if isinstance(artefact, str):
        return {"refused": artefact}
    timing = times.timings[name]
    return {
        "residual": artefact.check(3), "bytes": artefact.size,
        "milliseconds": 1e3 * timing.median, "quartiles": [1e3 * q for q in timing.quartiles],
        "speedup over the first": times.ratios[name].median, "runtime": timing.runtime,
    }  # fmt: skip


# ------------------------------------------------------------------------------------- results


def table(networks: dict[str, Any]) -> Table:
    """A row for each network and engine."""
    shown = Table("network", "engine", "dense ms", "pruned ms", "ratio", "dense kB", "pruned kB",
                  "residual", "searched here")  # fmt: skip
    for network, found in networks.items():
        for engine in dict.fromkeys(name.split(", ")[1] for name in found["rows"]):
            dense, pruned = (found["rows"].get(f"{k}, {engine}", {}) for k in ("dense", "pruned"))
            refused = dense.get("refused") or pruned.get("refused")
            cells = [refused or "no file"] + [""] * 6
            if "milliseconds" in dense and "milliseconds" in pruned:
                a, b = dense["milliseconds"], pruned["milliseconds"]
                cells = [f"{a:.3g}", f"{b:.3g}", f"{a / b:.2f}", f"{dense['bytes'] / 1e3:.0f}",
                         f"{pruned['bytes'] / 1e3:.0f}", f"{pruned['residual']:.1e}",
                         "x" if engine == found["searched in"] else ""]  # fmt: skip
            shown.add_row(network, engine, *cells)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = studies.parser("runtimes", __doc__)
    parser.add_argument("--quick", action="store_true", help="one small network")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--asked", type=float, default=2.0, help="the speed-up")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    engines = {name: make() for name, (package, make) in ENGINES.items()
               if importlib.util.find_spec(package)}  # fmt: skip
    settings = {"asked": args.asked, "repeats": args.repeats, "engines": list(engines)}
    stem = "runtimes-quick" if args.quick else "runtimes"
    path = results.folder(args.results) / f"{stem}.json"
    found = results.continued(path, settings)
    for name in QUICK if args.quick else args.networks:
        if name not in found:
            found[name] = measured(NETWORKS[name](), engines, args.asked, args.repeats)
            results.save(
                results.header("runtimes") | {"settings": settings, "networks": found}, path
            )
            print(f"{name}: searched in {found[name]['searched in']}", flush=True)
    Console(width=130).print(table(found))
    print(path)
