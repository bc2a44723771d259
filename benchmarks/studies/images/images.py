"""What does a measured speed cost image classifiers, by one recipe?

``python -m benchmarks images`` takes the networks of ``python -m benchmarks recovery``, trained on
Fashion-MNIST, and one of depthwise convolutions; scores their units by the loss
(``jp.scores.taylor_units``), searches for 1.5, 2, 3 and 4 times their measured speed, and recovers
with ``jp.recover`` and its own number of steps. Beside them the dense network is trained on by the
same recipe and as many steps as the longest recovery took: what more training alone brings.

The study goes on where it was interrupted; its stage ``plan`` measures times, and wants the machine
for itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
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
from benchmarks.studies.recovery import recovery
from benchmarks.studies.recovery.recovery import Case, Settings

STAGES = ("plan", "recover", "further")
NETWORKS = ("residual", "depthwise", "vit")
# No steps are given to a recovery: it has a recipe.
SETTINGS = dataclasses.replace(Settings(), times_less=(1.5, 2.0, 3.0, 4.0), tune_steps=0)
QUICK = dataclasses.replace(recovery.QUICK, times_less=(1.5,))
ALLOWED = {1.5: 0.5, 2.0: 1.0, 3.0: 2.0}  # Points that may be lost at a speed.
Rows = dict[str, Any]


def plan(case: Case, rows: Rows) -> Iterator[None]:
    """What is kept at each speed."""
    missing = [s for s in case.settings.times_less if f"{s:g}" not in rows]
    if not missing:
        return
    search = jp.Search(case.fn, case.dense, case.structure, case.scores("taylor"), case.x)
    for asked in missing:
        try:
            found = search.plan(jp.Target(speedup=asked))
        except ValueError as error:  # a speed that cannot be had
            rows[f"{asked:g}"] = {"asked": asked, "refused": str(error).splitlines()[0]}
            yield
            continue
        rows[f"{asked:g}"] = {
            "asked": asked,
            "speedup": found.measured["speedup"],
            "units": {name: np.flatnonzero(v).tolist() for name, v in found.keep.items()},
            "load_average": load_average(),
        }
        print(f"  {asked:g} x asked: {found.measured['speedup']:.2f} x", flush=True)
        yield


def recover(case: Case, rows: Rows) -> Iterator[None]:
    """The accuracy before and after recovery."""
    for asked, row in sorted(rows.items()):
        if "units" not in row or "accuracy" in row:
            continue
        small = case.small(row)
        row["untuned"] = case.accuracy(small.fn, small.params)
        row["params"] = int(sum(leaf.size for leaf in jax.tree.leaves(small.params)))
        row["flops"] = jp.cost(small.fn, small.params, case.x).flops / len(case.x)
        row |= recovered(case, small, case.settings.tune_steps or None)
        print(f"  {asked} x: {row['accuracy']:.4f} after {row['steps']} steps", flush=True)
        yield


def recovered(case: Case, small: jp.typing.Compact, steps: int | None) -> dict[str, Any]:
    teacher = jax.jit(lambda x: case.fn(case.dense, x))
    tuned = jp.recover(small, case.loss, case.batches, teacher=teacher, steps=steps, progress=False)
    accuracy = case.accuracy(tuned.fn, tuned.params)
    return {"accuracy": accuracy, "steps": tuned.recovery.steps}


def further(case: Case, rows: Rows) -> Iterator[None]:
    """The dense network, trained on as long as the longest recovery."""
    steps = max((row["steps"] for row in rows.values() if "steps" in row), default=0)
    if steps and "further" not in rows:
        whole = jp.compact(case.fn, case.dense, _all(case), case.x)
        rows["further"] = recovered(case, whole, steps)
        print(f"  dense, trained on: {rows['further']['accuracy']:.4f}", flush=True)
        yield


def _all(case: Case) -> Any:
    return jax.tree.map(lambda _: jnp.asarray(True), case.dense)


DO = {"plan": plan, "recover": recover, "further": further}


# ---- results --------------------------------------------------------------------------------


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Points lost at each speed against the dense network, and against it trained on."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for each in seeds.values():
        for key, row in each.get("rows", {}).items():
            if "accuracy" in row and "units" in row:
                found.setdefault(key, []).append((each, row))
    return [
        {
            "asked": float(key),
            "seeds": len(rows),
            "allowed": ALLOWED.get(float(key)),
            "speedups": [row["speedup"] for _, row in rows],
            "points_lost": [100 * (each["dense"] - row["accuracy"]) for each, row in rows],
            "of_trained_on": [
                100 * (each["rows"]["further"]["accuracy"] - row["accuracy"])
                for each, row in rows
                if "further" in each["rows"]
            ],
        }
        for key, rows in sorted(found.items(), key=lambda item: float(item[0]))
    ]


def table(network: str, seeds: dict[str, Any]) -> Table:
    dense = [each["dense"] for each in seeds.values() if "dense" in each]
    title = f"{network}: points lost of {np.mean(dense):.2%}, seeds: {len(dense)}"
    shown = Table("asked", "measured", "points lost", "of dense trained on", title=title)
    for row in summary(seeds):
        cells = (row["speedups"], row["points_lost"], row["of_trained_on"])
        shown.add_row(f"{row['asked']:g} x", *(" ".join(f"{v:.2f}" for v in c) for c in cells))
    return shown


def picture(networks: dict[str, Any], path: Path) -> None:
    """A line per network: points lost at the speed that was measured, means over seeds."""
    import matplotlib.pyplot as plt

    series = {
        f"{name}, seeds: {len(seeds)}": [
            (float(np.mean(row["speedups"])), float(np.mean(row["points_lost"])))
            for row in summary(seeds)
        ]
        for name, seeds in networks.items()
    }
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in series.items():
        if points:
            ax.plot(*zip(*points), marker="o", label=name)
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(xlabel="measured speed-up over the dense network", ylabel="points of accuracy lost")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = studies.parser("images", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=SETTINGS.seeds)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    images, settings = data.load(), QUICK if args.quick else SETTINGS
    few = slice(settings.test_images)
    images = dataclasses.replace(images, test_x=images.test_x[few], test_y=images.test_y[few])
    path = results.folder(args.results) / ("images-quick.json" if args.quick else "images.json")
    about = results.header("images") | {
        "settings": dataclasses.asdict(settings),
        "data": {"name": images.name, "source": images.source},
    }
    kept = results.continued(path, about["settings"])
    seeds = range(settings.first_seed, settings.first_seed + min(args.seeds, settings.seeds))
    weights = args.weights / ("recovery-quick" if args.quick else "recovery")
    for seed, network, stage in itertools.product(seeds, args.networks, args.stages):
        case = Case(network, images, settings, seed, weights)
        found = kept.setdefault(network, {}).setdefault(str(seed), {"rows": {}})
        if "dense" not in found:
            found["dense"] = case.accuracy(case.fn, case.dense)
        for _ in itertools.chain([None], DO[stage](case, found["rows"])):
            summaries = {name: summary(each) for name, each in kept.items()}
            results.save(about | {"networks": kept, "summary": summaries}, path)
        print(f"{stage}: {network}, seed {seed}, dense {found['dense']:.4f}", flush=True)
    for network, each in kept.items():
        Console(width=110).print(table(network, each))
    picture(kept, path.with_suffix(".png"))
    print(path)
