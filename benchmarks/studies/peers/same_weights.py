"""Whose cut of the same trained weights is more accurate at the same measured speed?

Runs in an environment that has PyTorch as well: ``pip install torch torch-pruning``, then
``python -m benchmarks peers``. The networks are those of ``python -m benchmarks recovery``, with
the same weights in Flax and in PyTorch. Torch-Pruning's ratio is bisected until its network runs in
PyTorch (eager, evaluation mode) at the speed asked for over the dense one there; the widths of
jaxprune are those of the study ``images``, or are searched for, at this speed over the dense
network in XLA. Both are then tuned by ``jp.recover``, the same loss, teacher, batches and steps:
the pruned PyTorch weights are read back for it. At the end each framework times its networks in one
interleaved run; the networks of Torch-Pruning are timed in XLA, too.

The stages ``plan`` and ``time`` want the machine for themselves. It goes on where it was
interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import data, results
from benchmarks.common.machine import load_average
from benchmarks.studies.images import images as image_study
from benchmarks.studies.recovery import recovery
from benchmarks.studies.recovery.recovery import Case

STAGES = ("plan", "tune", "time")
NETWORKS = ("residual", "vit")
OURS, TAYLOR, MAGNITUDE = "jaxprune", "Torch-Pruning, Taylor", "Torch-Pruning, magnitude"
THEIRS = (TAYLOR, MAGNITUDE)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Settings(recovery.Settings):
    """How much of everything; the whole of it goes into the result file."""

    evidence: int = 16
    tune_steps: int = 600
    round_to: int = 8  # of Torch-Pruning
    within: float = 0.03  # of the speed asked for
    attempts: int = 8  # at the ratio
    rounds: int = 15  # of each timing


QUICK = Settings(
    seeds=1, times_less=(1.5,), dense_steps=30, tune_steps=10, evidence=2, test_images=200,
    timed=16, attempts=2, rounds=3,
)  # fmt: skip


def torch_side() -> Any:
    """The half of this study that needs PyTorch."""
    try:
        return importlib.import_module("benchmarks.studies.peers.torch_side")
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: pip install torch torch-pruning") from error


def name_of(way: str, asked: float) -> str:
    return f"{way}, {asked:g} x"


# ---- stages ---------------------------------------------------------------------------------


def plan(case: Case, network: str, found: dict[str, Any], settings: Settings) -> Iterator[None]:
    """The ratios that make a speed in PyTorch, and the units that a search keeps."""
    rows, side = found["rows"], torch_side()
    for way, asked in itertools.product(THEIRS, settings.times_less):
        if name_of(way, asked) not in rows:
            found_at = at_speed(
                functools.partial(side.pruned, case, network, way, settings=settings),
                functools.partial(side.speedup, case, network, rounds=settings.rounds),
                asked, settings,
            )  # fmt: skip
            rows[name_of(way, asked)] = {"way": way, "asked": asked} | found_at
            print(f"  {rows[name_of(way, asked)]}", flush=True)
            yield
    plans: dict[str, Any] = dict(found["known"])
    for _ in image_study.plan(case, plans):
        pass
    for asked in settings.times_less:
        ours = plans[f"{asked:g}"]
        if name_of(OURS, asked) not in rows and "units" in ours:
            rows[name_of(OURS, asked)] = {"way": OURS} | ours
            yield


def of_images(path: Path, network: str, seed: int, settings: Settings) -> dict[str, Any]:
    """The plans of the study ``images``, of networks that were trained alike."""
    found = results.load(path) if path.exists() else {}
    if found.get("settings", {}).get("dense_steps") != settings.dense_steps:
        return {}
    rows = found["networks"].get(network, {}).get(str(seed), {}).get("rows", {})
    keys = ("asked", "speedup", "units", "load_average")
    return {asked: {key: row[key] for key in keys} for asked, row in rows.items() if "units" in row}


def at_speed(
    cut: Callable[[float], Any], speedup: Callable[[Any], float], asked: float, settings: Settings
) -> dict[str, Any]:
    """The ratio whose measured speed is nearest to the one asked for, by bisection."""
    low, high, tried = 0.0, 0.95, dict[float, float]()
    begin = time.perf_counter()
    for _ in range(settings.attempts):
        ratio = (low + high) / 2
        tried[ratio] = speedup(cut(ratio))
        if abs(tried[ratio] / asked - 1) < settings.within:
            break
        low, high = (ratio, high) if tried[ratio] < asked else (low, ratio)
    best = min(tried, key=lambda r: abs(np.log(tried[r] / asked)))
    return {
        "ratio": best, "speedup": tried[best], "tried": sorted(tried.items()),
        "seconds": round(time.perf_counter() - begin, 1), "load_average": load_average(),
    }  # fmt: skip


def tune(case: Case, network: str, found: dict[str, Any], settings: Settings) -> Iterator[None]:
    """Accuracy before and after the same recovery."""
    teacher = jax.jit(lambda x: case.fn(case.dense, x))
    for key, row in found["rows"].items():
        if "accuracy" in row:
            continue
        small, loss = made(case, network, row, settings)
        row["untuned"] = case.accuracy(small.fn, small.params)
        tuned = jp.recover(
            small, loss, case.batches, teacher=teacher, steps=settings.tune_steps, progress=False
        )
        row["accuracy"] = case.accuracy(tuned.fn, tuned.params)
        row["params"] = int(sum(leaf.size for leaf in jax.tree.leaves(small.params)))
        row["flops"] = jp.cost(small.fn, small.params, case.x).flops / len(case.x)
        print(f"  {key}: {row['untuned']:.4f}, tuned {row['accuracy']:.4f}", flush=True)
        yield


def made(
    case: Case, network: str, row: dict[str, Any], settings: Settings
) -> tuple[jp.typing.Compact, Any]:
    """A small network and a loss of its parameters."""
    if row["way"] == OURS:
        return case.small(row), case.loss
    side = torch_side()
    tree = side.from_torch(side.pruned(case, network, row["way"], row["ratio"], settings))
    forward = side.FUNCTIONS[network]
    whole = jax.tree.map(lambda _: jnp.asarray(True), tree)

    def loss(variables: PyTree, x: jax.Array, y: jax.Array) -> Any:
        logits, new = forward(variables, x, train=True)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return (value, {"batch_stats": new}) if new else value

    return jp.compact(forward, tree, whole, case.x), loss


def timed(case: Case, network: str, found: dict[str, Any], settings: Settings) -> Iterator[None]:
    """Times each framework's networks in one interleaved run, of the first seed."""
    if case.seed != settings.first_seed or "timing" in found:
        return
    side = torch_side()
    found["timing"] = {"load_average": {"before": load_average()}}
    models = {
        key: side.pruned(case, network, row["way"], row["ratio"], settings)
        for key, row in found["rows"].items() if row["way"] != OURS
    }  # fmt: skip
    found["timing"]["PyTorch"] = side.times(case, network, models, settings.rounds)
    entries: dict[str, Any] = {"dense": (jax.jit(case.fn), (case.dense, case.x))}
    for key, row in found["rows"].items():
        small, _ = made(case, network, row, settings)
        entries[key] = (jax.jit(small.fn), (small.params, case.x))
    compared = jp.compare(entries, repeats=settings.rounds)
    found["timing"]["XLA"] = {
        key: {"median_seconds": t.median, "speedup": compared.ratios[key].median}
        for key, t in compared.timings.items()
    }
    yield


DO = {"plan": plan, "tune": tune, "time": timed}

# ---- results --------------------------------------------------------------------------------


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean accuracies over seeds and their standard errors, by way and speed."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for each in seeds.values():
        for row in each.get("rows", {}).values():
            if "accuracy" in row:
                found.setdefault((row["asked"], row["way"]), []).append(row)
    timing: dict[str, Any] = next(iter(seeds.values())).get("timing", {})
    made = []
    for (asked, way), rows in sorted(found.items()):
        accuracies = np.array([row["accuracy"] for row in rows])
        key, error = name_of(way, asked), 0.0
        if len(rows) > 1:
            error = float(accuracies.std(ddof=1) / np.sqrt(len(rows)))
        made.append({
            "asked": asked, "way": way, "seeds": len(rows), "accuracy": float(accuracies.mean()),
            "standard_error": error, "speedups": [row["speedup"] for row in rows],
            "milliseconds": {
                engine: 1e3 * times[key]["median_seconds"]
                for engine, times in timing.items() if key in times
            },
        })  # fmt: skip
    return made


def table(network: str, seeds: dict[str, Any]) -> Table:
    dense = np.mean([each["dense"] for each in seeds.values()])
    shown = Table("asked", "", "accuracy", "speed-up over own dense", "ms",
                  title=f"{network}: dense {dense:.2%}, seeds: {len(seeds)}")  # fmt: skip
    for row in summary(seeds):
        milliseconds = ", ".join(f"{k} {v:.2f}" for k, v in row["milliseconds"].items())
        error = f" ± {row['standard_error']:.2%}" if row["seeds"] > 1 else ""
        shown.add_row(
            f"{row['asked']:g} x", row["way"], f"{row['accuracy']:.2%}{error} of {row['seeds']}",
            " ".join(f"{s:.2f}" for s in row["speedups"]), milliseconds,
        )  # fmt: skip
    return shown


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = studies.parser("peers", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=Settings().seeds)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    torch_side()
    settings, images = QUICK if args.quick else Settings(), data.load()
    few = slice(settings.test_images)
    images = dataclasses.replace(images, test_x=images.test_x[few], test_y=images.test_y[few])
    path = results.folder(args.results) / ("peers-quick.json" if args.quick else "peers.json")
    about = results.header("peers") | {
        "settings": dataclasses.asdict(settings),
        "peers": {p: importlib.metadata.version(p) for p in ("torch", "torch-pruning")},
        "data": {"name": images.name, "source": images.source},
    }
    kept = results.continued(path, about["settings"])
    seeds = range(settings.first_seed, settings.first_seed + min(args.seeds, settings.seeds))
    weights = args.weights / ("recovery-quick" if args.quick else "recovery")
    for stage, network, seed in itertools.product(args.stages, args.networks, seeds):
        case = Case(network, images, settings, seed, weights)
        found = kept.setdefault(network, {}).setdefault(str(seed), {"rows": {}})
        if "dense" not in found:
            found["dense"] = case.accuracy(case.fn, case.dense)
            found["known"] = of_images(results.folder() / "images.json", network, seed, settings)
        for _ in itertools.chain([None], DO[stage](case, network, found, settings)):
            summaries = {name: summary(each) for name, each in kept.items()}
            results.save(about | {"networks": kept, "summary": summaries}, path)
        print(f"{stage}: {network}, seed {seed}, dense {found['dense']:.4f}", flush=True)
    for network, each in kept.items():
        Console(width=130).print(table(network, each))
    print(path)
