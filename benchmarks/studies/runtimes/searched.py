"""Does a search in the engine that serves get what is asked, and are its widths best elsewhere?

``python -m benchmarks runtimes_search`` asks ``jp.search`` for several speeds in each engine, and
measures what it chose in one interleaved run of that engine; then all that was chosen for one of
the speeds in every engine: a column of which the diagonal is slower than another row is a search
that would better have been asked elsewhere. The machine should have nothing else to do. It resumes.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections.abc import Sequence
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
from benchmarks.studies.runtimes.runtimes import ENGINES

ASKED = (1.5, 2.0, 3.0)
CROSSED = 2.0  # What was chosen for it is measured in every engine.
CHOSEN = ("residual CNN", "ViT", "LSTM", "GRU")
QUICK = ("LSTM",)


def searched(network: Network, runtime: Any) -> tuple[dict[str, Any], dict[float, Any]]:
    """What one engine's search found for each speed, and the compact models."""
    fn, params, args = network.fn, network.params, network.args
    structure = jp.infer_structure(fn, params, *args)
    search = jp.Search(
        fn, params, structure, jp.magnitude(params), *args, objective="balanced",
        runtime=runtime if runtime.engine else None, progress=False,
    )  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    models: dict[float, Any] = {}
    for asked in ASKED:
        begin = time.perf_counter()
        try:
            plan = search.plan(jp.Target(speedup=asked))
        except ValueError as error:
            rows[f"{asked:g}"] = {"refused": str(error).splitlines()[0]}
            continue
        models[asked] = jp.compact(fn, params, plan.masks, *args)
        rows[f"{asked:g}"] = {
            "said": plan.measured["speedup"], "widths": plan.widths, "notes": plan.notes,
            "seconds": time.perf_counter() - begin, "load_average": load_average(),
        }  # fmt: skip
    return rows, models


def raced(network: Network, models: dict[str, Any], runtime: Any, repeats: int) -> dict[str, Any]:
    """Speed-ups over the dense network of one interleaved run in an engine."""
    entries = {"dense": (network.fn, (network.params, *network.args))}
    entries |= {name: (m.fn, (m.params, *network.args)) for name, m in models.items()}
    found = jp.compare(entries, runtime=runtime, repeats=repeats, progress=False)
    return {
        name: {"speedup": found.ratios[name]._asdict(), "milliseconds": 1e3 * timing.median}
        for name, timing in found.timings.items()
    }


def measured(network: Network, engines: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Each engine's own rows, and all engines' choices in each."""
    own: dict[str, Any] = {}
    crossed: dict[str, Any] = {}
    for name, runtime in engines.items():
        rows, models = searched(network, runtime)
        found = raced(network, {f"{k:g}": m for k, m in models.items()}, runtime, repeats)
        for asked, row in rows.items():
            row |= found.get(asked, {})
        own[name] = rows | {"dense milliseconds": found["dense"]["milliseconds"]}
        if CROSSED in models:
            crossed[name] = models[CROSSED]
        jax.clear_caches()
    everywhere = {name: raced(network, crossed, run, repeats) for name, run in engines.items()}
    return {"own": own, "crossed": everywhere, "load_average": load_average()}


# ------------------------------------------------------------------------------------- results


def tables(networks: dict[str, Any]) -> list[Table]:
    """What was asked and measured in each engine; where it was searched by where it is served."""
    own = Table("network", "engine", *(f"{asked:g} x asked" for asked in ASKED))
    crossed = Table("network", "searched in", *(f"served by {name}" for name in ENGINES))
    for network, found in networks.items():
        for engine, rows in found["own"].items():
            own.add_row(network, engine, *(_said(rows[f"{asked:g}"]) for asked in ASKED))
        for chosen in next(iter(found["crossed"].values())):
            times = (found["crossed"].get(e, {}).get(chosen) for e in ENGINES)
            crossed.add_row(network, chosen, *(f"{t['milliseconds']:.3g} ms" if t else "-"
                                               for t in times))  # fmt: skip
    return [own, crossed]


def _said(row: dict[str, Any]) -> str:
    """The speed-up measured, or the most that can be had."""
    if "speedup" in row:
        return f"{row['speedup']['median']:.2f}"
    most = re.search(r"would be speedup=([\d.]+);", row["refused"])
    return f"at most {float(most[1]):.2f}" if most else row["refused"]


def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = studies.parser("runtimes_search", __doc__)
    parser.add_argument("--quick", action="store_true", help="one small network")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(CHOSEN))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    engines = {name: make() for name, (package, make) in ENGINES.items()
               if importlib.util.find_spec(package)}  # fmt: skip
    settings = {"asked": list(ASKED), "repeats": args.repeats, "engines": list(engines)}
    stem = "runtimes_search-quick" if args.quick else "runtimes_search"
    path = results.folder(args.results) / f"{stem}.json"
    found = results.continued(path, settings)
    for name in QUICK if args.quick else args.networks:
        if name not in found:
            found[name] = measured(NETWORKS[name](), engines, args.repeats)
            header = results.header("runtimes_search")
            results.save(header | {"settings": settings, "networks": found}, path)
            print(name, flush=True)
    for each in tables(found):
        Console(width=130).print(each)
    print(path)
