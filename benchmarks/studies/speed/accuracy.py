"""At the same measured speed, whose network is the most accurate after fine-tuning?

``python -m benchmarks speed_accuracy`` trains a network on Fashion-MNIST, prunes it to 2 and 3
times its measured speed, and fine-tunes all results alike. Score, objective, solver and widths are
the same everywhere; what differs is what the solver limits: *time*, the tables of ``jp.search``;
*FLOPs*; or *uniform*, one fraction for all dimensions, whatever the objective. Each way's budget is
bisected until the speed that is measured is the one asked for. At the end all are timed again in
one interleaved run.

It goes in stages, each of which goes on where it was interrupted: ``--stages train`` and ``tune``
may share the machine, ``plan`` and ``time`` want it for themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import data, results, train
from benchmarks.common.machine import load_average
from benchmarks.models.resnet import ResNet
from benchmarks.studies.main import methods
from jaxprune.budget.score_tables import OBJECTIVES
from jaxprune.budget.solver import first_uniform, solve

PyTree = Any
Keep = dict[str, np.ndarray]

TIME, FLOPS, UNIFORM = "time", "FLOPs", "uniform"
WAYS = (TIME, FLOPS, UNIFORM)
PAIRS = ((TIME, FLOPS), (TIME, UNIFORM), (FLOPS, UNIFORM))
STAGES = ("train", "plan", "tune", "time")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    first_seed: int = 1
    seeds: int = 3
    speedups: tuple[float, ...] = (2.0, 3.0)
    dense_steps: int = 1200
    tune_steps: int = 150
    gradient_batches: int = 32
    scale: int = 1  # widths are divided by it
    batch: int = 64  # of training
    timed: int = 256  # images in the batch that is timed
    dense_rate: float = 0.1
    tune_rate: float = 0.04
    within: float = 0.03  # of the speed asked for
    attempts: int = 7  # at the budget that makes a speed
    rounds: int = 25  # of the last run
    min_round: float = 0.1  # seconds
    round_to: int = 4
    test_images: int = 10_000


QUICK = Settings(
    seeds=1, speedups=(1.25,), dense_steps=20, tune_steps=5, gradient_batches=2, scale=2,
    test_images=500, attempts=2, rounds=3, timed=64,
)  # fmt: skip

NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "residual": lambda classes, scale, strides: ResNet(
        classes, tuple(w // scale for w in (32, 64, 128)), stem_strides=strides
    ),
}


class Trainer:
    """One network with one seed, and what every way of pruning it needs."""

    def __init__(self, network: str, images: data.Data, settings: Settings, seed: int):
        self.data, self.settings, self.seed = images, settings, seed
        strides = 2 if images.train_x.shape[1] > 16 else 1
        self.model = NETWORKS[network](images.classes, settings.scale, strides)
        self.fn = train.inference(self.model)
        self.jitted = jax.jit(self.fn)
        self.x = jnp.asarray(images.test_x[: settings.timed])
        self.start = jax.jit(self.model.init)(jax.random.key(seed), self.x[:1])

    def trained(self, path: Path) -> Trainer:
        """With the dense variables of an earlier run, or trained now."""
        if not path.exists():
            tx = train.sgd(self.settings.dense_steps, self.settings.dense_rate)
            run = train.Run(self.start, tx.init(self.start))
            save(self._fit(tx, run, self.settings.dense_steps), path)
        self.dense = load(self.start, path)
        self.structure = jp.infer_structure(self.fn, self.dense, self.x)
        self.tune = optax.chain(
            train.sgd(self.settings.tune_steps, self.settings.tune_rate),
            jp.keep_params_sparse(methods.dense(self.dense)),
        )
        return self

    def _fit(self, tx: Any, run: train.Run, steps: int) -> PyTree:
        batch = self.settings.batch
        done = train.fit(self.model, tx, run, self.data, steps=steps, batch=batch, seed=self.seed)
        return done.variables

    def scores(self) -> dict[str, Any]:
        """Per unit, squared sums of weight x gradient over batches.

        Molchanov et al. (2019), equation 8, whose square is taken in each batch.
        """
        still = {"batch_stats": jax.tree.map(jnp.zeros_like, self.dense["batch_stats"])}

        @jax.jit
        def taylor(x: jax.Array, y: jax.Array) -> dict[str, Any]:
            grad = train.updates(self.model, self.dense, x, y)
            scores = jp.scores.taylor(self.dense, grad=grad) | still
            return self.structure.unit_scores(scores, jp.reduce.taylor)

        size = self.settings.batch
        batches = [slice(i * size, (i + 1) * size) for i in range(self.settings.gradient_batches)]
        found = [taylor(self.data.train_x[b], self.data.train_y[b]) for b in batches]
        return jax.tree.map(lambda *each: np.mean(each, axis=0), *found)

    def accuracy(self, variables: PyTree) -> float:
        return train.accuracy(self.jitted, variables, self.data, self.settings.timed)

    def tuned(self, masks: PyTree) -> PyTree:
        masked = jp.apply_masks(self.dense, masks)
        state = optax.tree_utils.tree_set(self.tune.init(masked), masks=masks)
        return self._fit(self.tune, train.Run(masked, state), self.settings.tune_steps)

    def compacted(self, keep: Keep) -> jp.typing.Compact:
        return jp.compact(self.fn, self.dense, self.structure.masks(keep), self.x)

    def entries(self, keeps: dict[str, Keep]) -> dict[str, Any]:
        """What is timed: the dense network, and compact ones by name."""
        small = {name: self.compacted(keep) for name, keep in keeps.items()}
        found: dict[str, Any] = {"dense": (self.jitted, (self.dense, self.x))}
        return found | {name: (s.fn, (s.params, self.x)) for name, s in small.items()}

    def speedup(self, keep: Keep) -> float:
        entries = self.entries({"small": keep})
        return (
            jp.compare(entries, repeats=9, min_round=self.settings.min_round / 2)
            .ratios["small"]
            .median
        )


def save(variables: PyTree, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, *map(np.asarray, jax.tree.leaves(variables)))


def load(like: PyTree, path: Path) -> PyTree:
    with np.load(path) as file:
        return jax.tree.unflatten(jax.tree.structure(like), [file[name] for name in file.files])


# ---------------------------------------------------------------------------------------- plans


def plans(trainer: Trainer, objective: str) -> list[dict[str, Any]]:
    """For every way and speed the units kept, and the speed that was measured then."""
    settings = trainer.settings
    search = jp.Search(
        trainer.fn, trainer.dense, trainer.structure, trainer.scores(), trainer.x,
        objective=objective, round_to=settings.round_to,
    )  # fmt: skip
    search._time()
    rows = []
    for way, asked in itertools.product(WAYS, settings.speedups):
        keep, found = at_speed(trainer, search, way, asked)
        units = {name: np.flatnonzero(v).tolist() for name, v in keep.items()}
        rows.append({"way": way, "asked": asked, "planned": found, "units": units})
        print(f"  {way}, {asked:g} x: {found:.2f} x", flush=True)
    return rows


def at_speed(trainer: Trainer, search: jp.Search, way: str, asked: float) -> tuple[Keep, float]:
    """What a way keeps at the budget whose measured speed is nearest to the one asked for."""
    tried: dict[float, tuple[Keep, float]] = {}
    low, high, part = 0.0, 1.0, 1 / asked
    for _ in range(trainer.settings.attempts):
        keep = kept_at(search, way, part)
        if keep is None:
            low = part
        else:
            found = trainer.speedup(keep)
            tried[abs(np.log(found / asked))] = keep, found
            if min(tried) < trainer.settings.within:
                break
            low, high = (part, high) if found > asked else (low, part)
        part = (low + high) / 2 if low and high < 1 else part * (0.75 if high < 1 else 1.3)
        part = min(part, (1 + low) / 2)
    if not tried:
        raise ValueError(f"{way}: no budget of {trainer.settings.attempts} tried can be met")
    return tried[min(tried)]


def kept_at(search: jp.Search, way: str, part: float) -> Keep | None:
    """The most score at a part of the dense network's FLOPs or modelled time."""
    cost = "flops" if way == FLOPS else "latency"
    budget = part * search.model.tables[cost].at(search.choices.full)
    problem = search.model.problem(search.choices.worth, {cost: budget})
    choice = first_uniform(problem) if way == UNIFORM else solve(problem)
    return None if choice is None else search.choices.keep(choice)


def keep_of(trainer: Trainer, row: dict[str, Any]) -> Keep:
    sizes = {name: trainer.structure.dims[name].size for name in row["units"]}
    return {name: np.isin(np.arange(sizes[name]), units) for name, units in row["units"].items()}


# --------------------------------------------------------------------------------------- stages


def plan(trainer: Trainer, found: dict[str, Any], objective: str) -> None:
    found["rows"] = plans(trainer, objective)


def tune(trainer: Trainer, found: dict[str, Any]) -> None:
    """Accuracies; those of rows that have one stay."""
    for row in found["rows"]:
        if "accuracy" in row:
            continue
        keep = keep_of(trainer, row)
        row["accuracy"] = trainer.accuracy(trainer.tuned(trainer.structure.masks(keep)))
        small = trainer.compacted(keep)
        row["flops"] = jp.cost(small.fn, small.params, trainer.x).flops / len(trainer.x)
        row["params"] = sum(leaf.size for leaf in jax.tree.leaves(small.params))
        row["kept"] = {name: [int(v.sum()), v.size] for name, v in keep.items()}


def timed(trainer: Trainer, found: dict[str, Any]) -> None:
    """All rows in one interleaved run."""
    keeps = {name_of(row): keep_of(trainer, row) for row in found["rows"]}
    settings = trainer.settings
    before = load_average()
    compared = jp.compare(
        trainer.entries(keeps), repeats=settings.rounds, min_round=settings.min_round
    )
    for row in found["rows"]:
        row["speedup"] = compared.ratios[name_of(row)]._asdict()
    found["timed"] = {
        "dense_median_seconds": compared.timings["dense"].median,
        "load_average": {"before": before, "after": load_average()},
    }


def name_of(row: dict[str, Any]) -> str:
    return f"{row['way']}, {row['asked']:g} x"


def missing(stage: str, found: dict[str, Any]) -> bool:
    """Whether a stage has something to do."""
    rows = found.get("rows", [])
    return {
        "train": "dense" not in found,
        "plan": not rows,
        "tune": any("accuracy" not in row for row in rows),
        "time": any("speedup" not in row for row in rows),
    }[stage]


def run(stage: str, trainer: Trainer, found: dict[str, Any], objective: str) -> None:
    start = time.perf_counter()
    if stage == "train":
        found["dense"] = trainer.accuracy(trainer.dense)
    elif stage == "plan":
        plan(trainer, found, objective)
    else:
        {"tune": tune, "time": timed}[stage](trainer, found)
    found.setdefault("seconds", {})[stage] = time.perf_counter() - start


# -------------------------------------------------------------------------------------- results


def groups(seeds: dict[str, Any]) -> Iterator[tuple[str, float, list[dict[str, Any]]]]:
    """(way, asked speed, a row per seed)."""
    rows = [row for found in seeds.values() for row in found.get("rows", []) if "accuracy" in row]
    for way, asked in dict.fromkeys((row["way"], row["asked"]) for row in rows):
        yield way, asked, [r for r in rows if (r["way"], r["asked"]) == (way, asked)]


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Per way and asked speed the mean over seeds; per pair of ways the paired difference."""
    rows: list[dict[str, Any]] = [
        {
            "way": way,
            "asked": asked,
            "accuracy": float(np.mean([row["accuracy"] for row in group])),
            "accuracies": [row["accuracy"] for row in group],
            "speedups": [speed_of(row) for row in group],
            "flops": float(np.mean([row["flops"] for row in group])),
        }
        for way, asked, group in groups(seeds)
    ]
    by_name = {(row["way"], row["asked"]): row["accuracies"] for row in rows}
    differences = [
        {"pair": [a, b], "asked": asked} | paired(by_name[a, asked], by_name[b, asked])
        for asked in dict.fromkeys(row["asked"] for row in rows)
        for a, b in PAIRS
        if (a, asked) in by_name and (b, asked) in by_name
    ]
    return {"rows": rows, "differences": differences}


def speed_of(row: dict[str, Any]) -> float:
    """As the last run found it, or, before there is one, as it was planned."""
    return row["speedup"]["median"] if "speedup" in row else row["planned"]


def paired(a: list[float], b: list[float]) -> dict[str, float]:
    """Mean difference over seeds and its standard error; none for one seed."""
    gaps = np.subtract(a, b)
    error = {} if len(gaps) < 2 else {"error": float(gaps.std(ddof=1) / np.sqrt(len(gaps)))}
    return {"mean": float(gaps.mean())} | error


def table(network: str, seeds: dict[str, Any]) -> Table:
    dense = [found["dense"] for found in seeds.values()]
    title = f"{network}: dense {np.mean(dense):.2%}, {len(seeds)} seeds"
    shown = Table("way", "asked", "measured", "MFLOPs", "accuracy", "each", title=title)
    found = summary(seeds)
    for row in found["rows"]:
        shown.add_row(
            row["way"],
            f"{row['asked']:g} x",
            " ".join(f"{s:.2f}" for s in row["speedups"]),
            f"{row['flops'] / 1e6:.2f}",
            f"{row['accuracy']:.2%}",
            " ".join(f"{a:.2%}" for a in row["accuracies"]),
        )
    for d in found["differences"]:
        error = f" +- {d['error'] * 100:.2f}" if "error" in d else ""
        shown.add_row(
            " - ".join(d["pair"]), f"{d['asked']:g} x", "", "", f"{d['mean'] * 100:+.2f}{error}", ""
        )
    return shown


def picture(networks: dict[str, Any], path: Path) -> None:
    """A panel per network: means over seeds; bars from the least to the largest accuracy."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(networks), figsize=(6 * len(networks), 4), squeeze=False)
    for ax, (network, seeds) in zip(axes[0], networks.items()):
        series: dict[str, list[Any]] = {}
        for row in summary(seeds)["rows"]:
            each = row["accuracies"]
            spread = (min(each), row["accuracy"], max(each))
            series.setdefault(row["way"], []).append((float(np.mean(row["speedups"])), spread))
        dense = float(np.mean([found["dense"] for found in seeds.values()]))
        jp.plot.accuracy_speedup(series, dense=dense, ax=ax)
        ax.legend(frameon=False, fontsize="small", loc="lower left")
        ax.set_title(f"{network}, {len(seeds)} seeds: mean and range")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("speed_accuracy", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="sum", help="of the search; results are apart"
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    args = parser.parse_args(argv)
    images, settings = data.load(), QUICK if args.quick else Settings()
    images = dataclasses.replace(
        images,
        test_x=images.test_x[: settings.test_images],
        test_y=images.test_y[: settings.test_images],
    )
    stem = "speed_accuracy-quick" if args.quick else "speed_accuracy"
    path = results.folder(args.results) / f"{stem}.json"
    about = results.header("speed_accuracy") | {
        "settings": dataclasses.asdict(settings),
        "data": {"name": images.name, "source": images.source},
    }
    kept = results.continued(path, about["settings"])
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    for stage, network, seed in itertools.product(args.stages, args.networks, seeds):
        name = network if args.objective == "sum" else f"{network}, {args.objective}"
        found = kept.setdefault(name, {}).setdefault(str(seed), {})
        if not missing(stage, found):
            continue
        weights = args.weights / stem / f"{network}-{seed}-{settings.dense_steps}.npz"
        run(stage, Trainer(network, images, settings, seed).trained(weights), found, args.objective)
        print(f"{stage}: {name}, seed {seed}", flush=True)
        summaries = {name: summary(seeds) for name, seeds in kept.items()}
        results.save(about | {"networks": kept, "summary": summaries}, path)
    there = {network: seeds for network, seeds in kept.items() if summary(seeds)["rows"]}
    for network, seeds_found in there.items():
        Console(width=110).print(table(network, seeds_found))
    if there:
        picture(there, path.with_suffix(".png"))
    print(path)
