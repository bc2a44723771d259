"""Which score, objective and repair keep most accuracy, before and after recovery?

``python -m benchmarks recovery`` trains small networks on Fashion-MNIST, asks ``jp.search`` for a
1.5th, a half and a third of their FLOPs by each score and objective, and for 1.5, 2 and 3 times
their measured speed by the likely ones, and recovers each result with ``jp.recover``. It goes on
where it was interrupted; the stage ``time`` wants the machine for itself.
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
from benchmarks.common import data, results, train
from benchmarks.common.data import Data
from benchmarks.common.machine import load_average
from benchmarks.studies.recovery import networks
from benchmarks.studies.speed.accuracy import load, save

STAGES = ("train", "plan", "time", "tune")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    first_seed: int = 1
    seeds: int = 3
    times_less: tuple[float, ...] = (1.5, 2.0, 3.0)  # FLOPs or seconds
    scores: tuple[str, ...] = ("magnitude", "taylor", "fisher")
    objectives: tuple[str, ...] = ("sum", "proportional", "balanced", "uniform")
    likely: tuple[str, ...] = (
        "taylor, sum", "taylor, uniform", "magnitude, balanced", "magnitude, uniform",
    )  # fmt: skip
    compared: float = 2.0  # all pairs are asked for here, the likely ones everywhere
    repairs: tuple[str, ...] = ("tuned", "refit, tuned", "distilled")
    dense_steps: int = 1500
    tune_steps: int = 300  # a fifth
    evidence: int = 32  # batches that scores are made from
    batch: int = 64
    timed: int = 64
    test_images: int = 10_000


QUICK = Settings(
    seeds=1, times_less=(2.0,), scores=("taylor",), objectives=("sum",), repairs=("refit, tuned",),
    dense_steps=30, tune_steps=5, evidence=2, test_images=500, timed=16,
)  # fmt: skip


class Case:
    """One network with one seed, trained."""

    def __init__(self, name: str, images: Data, settings: Settings, seed: int, weights: Path):
        self.images, self.settings, self.seed = images, settings, seed
        network = networks.NETWORKS[name]
        path = weights / f"{name}-{seed}-{settings.dense_steps}.npz"
        self.module = network.make(images.classes, images.train_x.shape[1])
        self.x = jnp.asarray(images.test_x[: settings.timed])
        if not path.exists():
            steps, batch = settings.dense_steps, settings.batch
            save(networks.trained(network, images, steps, batch, seed)[1], path)
        like = jax.eval_shape(self.module.init, jax.random.key(0), self.x)
        self.dense = jax.tree.map(jnp.asarray, load(like, path))
        self.fn, self.loss = train.inference(self.module), networks.loss_of(self.module)
        self.structure = jp.infer_structure(self.fn, self.dense, self.x)
        self.batches = networks.batches_of(images, settings.batch, seed)

    def accuracy(self, fn: Any, variables: Any) -> float:
        return train.accuracy(jax.jit(fn), variables, self.images, 250)

    def scores(self, name: str) -> Any:
        if name == "magnitude":
            return jp.magnitude(self.dense)
        return jp.scores.taylor_units(
            self.structure, self.dense, self._still, self.batches[: self.settings.evidence],
            fisher=name == "fisher",
        )  # fmt: skip

    def _still(self, variables: Any, x: Any, y: Any) -> Any:
        """The loss in evaluation mode."""
        logits = self.fn(variables, x)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))

    def small(self, row: dict[str, Any]) -> jp.typing.Compact:
        dims = self.structure.dims
        keep = {n: np.isin(np.arange(dims[n].size), units) for n, units in row["units"].items()}
        masks = self.structure.masks_of(keep)
        return jp.compact(self.fn, self.dense, masks, self.x)


def plan(case: Case, rows: list[dict[str, Any]], of: str) -> Iterator[None]:
    """Adds for each score, objective and budget what is kept, and the accuracy before any repair.

    ``of``: "flops", or "speedup", for which the likely pairs are asked for alone.
    """
    done = {(r["score"], r["objective"], r["asked"]) for r in rows if r["of"] == of}
    missing = [each for each in _asked(case.settings, of) if each not in done]
    if not missing:
        return
    found = {score: case.scores(score) for score in case.settings.scores}
    search = jp.Search(case.fn, case.dense, case.structure, [*found.values()][0], case.x)
    for score, objective, asked in missing:
        uniform = objective == "uniform"  # the same fraction of every dimension
        staged = search.stage(found[score], objective="sum" if uniform else objective)
        row = {"score": score, "objective": objective, "asked": asked, "of": of}
        rows.append(row | _planned(case, staged, row))
        print(f"  {score}, {objective}, {asked:g} x less: {rows[-1].get('speedup')}", flush=True)
        yield


def _asked(settings: Settings, of: str) -> Iterator[tuple[str, str, float]]:
    """All pairs of a score and an objective at half of the FLOPs, the likely ones everywhere."""
    for score, objective, less in itertools.product(
        settings.scores, settings.objectives, settings.times_less
    ):
        whole = of == "flops" and less == settings.compared
        if whole or f"{score}, {objective}" in settings.likely:
            yield score, objective, less


def _planned(case: Case, search: jp.Search, asked: dict[str, Any]) -> dict[str, Any]:
    less = asked["asked"]
    target = jp.Target(flops=1 / less) if asked["of"] == "flops" else jp.Target(speedup=less)
    try:
        found = search.plan(target, uniform=asked["objective"] == "uniform")
    except ValueError as error:  # a budget that cannot be had
        return {"refused": str(error).splitlines()[0]}
    row: dict[str, Any] = {
        "units": {name: np.flatnonzero(v).tolist() for name, v in found.keep.items()},
        "speedup": found.measured.get("speedup"),
        "load_average": load_average(),
    }
    small = case.small(row)
    row["before"] = case.accuracy(small.fn, small.params)
    row["params"] = int(sum(leaf.size for leaf in jax.tree.leaves(small.params)))
    row["flops"] = jp.cost(small.fn, small.params, case.x).flops / len(case.x)
    return row


def tune(case: Case, row: dict[str, Any], repair: str) -> dict[str, Any]:
    """The accuracy after a repair, and what it did."""
    small = case.small(row)
    options: dict[str, Any] = {}
    if repair == "refit, tuned":
        options["dense"] = case.dense
    if repair == "distilled":
        options["teacher"] = jax.jit(lambda x: case.fn(case.dense, x))
    tuned = jp.recover(
        small, case.loss, case.batches, steps=case.settings.tune_steps, progress=False, **options
    )
    stages = [stage._asdict() for stage in tuned.recovery.stages]
    steps = tuned.recovery.steps
    return {"after": case.accuracy(tuned.fn, tuned.params), "steps": steps, "stages": stages}


def _wanted(row: dict[str, Any], repair: str, settings: Settings) -> bool:
    """Every plan is tuned; the repairs are compared on the plans of one score and objective."""
    return repair == "tuned" or f"{row['score']}, {row['objective']}" == settings.likely[0]


def fill(
    case: Case, found: dict[str, Any], stage: str, of: Sequence[str], repairs: Sequence[str]
) -> Iterator[None]:
    """Does what is missing of a stage; yields whenever something new is worth saving."""
    if "dense" not in found:
        found["dense"] = case.accuracy(case.fn, case.dense)
        yield
    if stage in ("plan", "time"):
        budget = "flops" if stage == "plan" else "speedup"
        yield from plan(case, found.setdefault("rows", []), budget)
    if stage == "tune":
        timed_first = sorted(found["rows"], key=lambda row: row["of"] != "speedup")
        for repair, row in itertools.product(repairs, timed_first):
            if "units" not in row or row["of"] not in of or not _wanted(row, repair, case.settings):
                continue
            if repair not in row.setdefault("repairs", {}):
                row["repairs"][repair] = tune(case, row, repair)
                yield


# ------------------------------------------------------------------------------------- results


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """For each score, objective, repair and budget the points that are lost, over seeds."""
    lost: dict[tuple[Any, ...], list[float]] = {}
    for found in seeds.values():
        for row in (row for row in found.get("rows", []) if "units" in row):
            after = {"none": row["before"]} | {
                repair: done["after"] for repair, done in row.get("repairs", {}).items()
            }
            for repair, accuracy in after.items():
                key = (row["of"], row["asked"], row["score"], row["objective"], repair)
                lost.setdefault(key, []).append(100 * (found["dense"] - accuracy))
    names = ("of", "asked", "score", "objective", "repair")
    return [dict(zip(names, key)) | {"points_lost": each, "mean": float(np.mean(each))}
            for key, each in sorted(lost.items())]  # fmt: skip


def table(network: str, seeds: dict[str, Any]) -> Table:
    """A row for each budget, score and objective, a column for each repair."""
    dense = [found["dense"] for found in seeds.values() if "dense" in found]
    rows = summary(seeds)
    columns = tuple(dict.fromkeys(row["repair"] for row in rows))
    title = f"{network}: points lost of {np.mean(dense):.2%}, seeds: {len(dense)}"
    shown = Table("less", "score", "objective", *columns, title=title)
    for key in dict.fromkeys((r["of"], r["asked"], r["score"], r["objective"]) for r in rows):
        cells = {r["repair"]: f"{r['mean']:.2f} of {len(r['points_lost'])}" for r in rows
                 if (r["of"], r["asked"], r["score"], r["objective"]) == key}  # fmt: skip
        less = f"{key[1]:g} x {'FLOPs' if key[0] == 'flops' else 'time'}"
        shown.add_row(less, key[2], key[3], *(cells.get(c, "") for c in columns))
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = studies.parser("recovery", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    names = list(networks.NETWORKS)
    parser.add_argument("--networks", nargs="+", choices=names, default=["residual", "vit", "lstm"])
    parser.add_argument("--of", nargs="+", default=["speedup", "flops"], help="budgets to tune at")
    parser.add_argument("--repairs", nargs="+", choices=Settings().repairs, help="to tune by")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    args = parser.parse_args(argv)
    images, settings = data.load(), QUICK if args.quick else Settings()
    few = slice(settings.test_images)
    images = dataclasses.replace(images, test_x=images.test_x[few], test_y=images.test_y[few])
    stem = "recovery-quick" if args.quick else "recovery"
    path = results.folder(args.results) / f"{stem}.json"
    about = results.header("recovery") | {
        "settings": dataclasses.asdict(settings),
        "data": {"name": images.name, "source": images.source},
    }
    kept = results.continued(path, about["settings"])
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    for seed, stage, network in itertools.product(seeds, args.stages, args.networks):
        found = kept.setdefault(network, {}).setdefault(str(seed), {})
        case = Case(network, images, settings, seed, args.weights / stem)
        for _ in fill(case, found, stage, args.of, args.repairs or settings.repairs):
            summaries = {name: summary(each) for name, each in kept.items()}
            results.save(about | {"networks": kept, "summary": summaries}, path)
        print(f"{stage}: {network}, seed {seed}", flush=True)
    for network, each in kept.items():
        Console(width=110).print(table(network, each))
    print(path)
