"""At the same measured speed, whose network is the most accurate after fine-tuning?

``python -m benchmarks.speed_accuracy`` trains a residual network on Fashion-MNIST, prunes it to
2 and 3 times its measured speed in several ways, and fine-tunes each result alike: ``jp.search``
with several scores and objectives; uniform, the same fraction of every dimension; and by FLOPs,
the same solver with FLOPs in place of time, its budget tightened until the measured speed is the
one asked for. Each seed is saved when it is done: an interrupted job goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import data, methods, results, train
from benchmarks.model import ResNet
from benchmarks.native import load_average
from jaxprune.budget.search import MET, Search

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    first_seed: int = 1
    seeds: int = 3
    speedups: tuple[float, ...] = (2.0, 3.0)
    dense_steps: int = 1200
    tune_steps: int = 200
    gradient_batches: int = 32
    widths: tuple[int, ...] = (32, 64, 128)
    batch: int = 64  # of training, and of the images that are timed
    dense_rate: float = 0.1
    tune_rate: float = 0.04
    attempts: int = 6  # at the FLOPs that make a speed
    test_images: int = 10_000


QUICK = Settings(
    seeds=1, speedups=(1.25,), dense_steps=20, tune_steps=5, gradient_batches=2, widths=(16, 32),
    test_images=500, attempts=2,
)  # fmt: skip

# way -> (score, objective, what is limited). Score and objective were chosen on seed 0, hardly
# trained; it isn't among the seeds that are reported.
TIME, UNIFORM, FLOPS = "time", "uniform", "FLOPs"
WAYS = {
    f"{limited}, {score}, {objective}": (score, objective, limited)
    for score, objective, several in (
        ("Taylor", "sum", (TIME, FLOPS, UNIFORM)),
        ("magnitude", "balanced", (TIME, FLOPS)),
    )
    for limited in several
}


class Trainer:
    """One trained network, and what every way of pruning it needs."""

    def __init__(self, images: data.Data, settings: Settings, seed: int):
        self.data, self.settings, self.seed = images, settings, seed
        strides = 2 if images.train_x.shape[1] > 16 else 1
        self.model = ResNet(images.classes, settings.widths, stem_strides=strides)
        self.fn = train.inference(self.model)
        self.jitted = jax.jit(self.fn)
        self.x = jnp.asarray(images.test_x[: settings.batch])
        variables = jax.jit(self.model.init)(jax.random.key(seed), self.x[:1])
        tx = train.sgd(settings.dense_steps, settings.dense_rate)
        start = train.Run(variables, tx.init(variables))
        self.dense = self._fit(tx, start, settings.dense_steps)
        self.structure = jp.infer_structure(self.fn, self.dense, self.x)
        self.scores = self._scores()
        self.tune = optax.chain(
            train.sgd(settings.tune_steps, settings.tune_rate),
            jp.keep_params_sparse(methods.dense(self.dense)),
        )

    def _fit(self, tx: Any, run: train.Run, steps: int) -> PyTree:
        batch = self.settings.batch
        done = train.fit(self.model, tx, run, self.data, steps=steps, batch=batch, seed=self.seed)
        return done.variables

    def _scores(self) -> dict[str, Any]:
        """Squared magnitudes per entry; per unit, squared sums of weight x gradient over batches.

        The latter is Molchanov et al. (2019), equation 8, whose square is taken in each batch.
        """
        still = {"batch_stats": jax.tree.map(jnp.zeros_like, self.dense["batch_stats"])}

        @jax.jit
        def taylor(x: jax.Array, y: jax.Array) -> dict[str, Any]:
            grad = train.updates(self.model, self.dense, x, y)
            units = self.structure.unit_scores(
                jp.scores.taylor(self.dense, grad=grad) | still, "sum"
            )
            return {name: score**2 for name, score in units.items()}

        batches = [slice(i, i + self.settings.batch) for i in self._starts()]
        found = [taylor(self.data.train_x[b], self.data.train_y[b]) for b in batches]
        mean = jax.tree.map(lambda *each: np.mean(each, axis=0), *found)
        return {"magnitude": methods.l2(self.dense) | still, "Taylor": mean}

    def _starts(self) -> range:
        size = self.settings.batch
        return range(0, size * self.settings.gradient_batches, size)

    def accuracy(self, variables: PyTree) -> float:
        return train.accuracy(self.jitted, variables, self.data, 256)

    def tuned(self, masks: PyTree) -> PyTree:
        masked = jp.apply_masks(self.dense, masks)
        state = optax.tree_utils.tree_set(self.tune.init(masked), masks=masks)
        return self._fit(self.tune, train.Run(masked, state), self.settings.tune_steps)

    def plan(self, way: tuple[str, str, str], speedup: float) -> jp.SearchPlan:
        score, objective, limited = way
        search = Search(
            self.fn, self.dense, self.structure, self.scores[score], self.x, objective=objective
        )
        if limited == FLOPS:
            return self._by_flops(search, speedup)
        return search.plan(jp.Target(speedup=speedup), uniform=limited == UNIFORM)

    def _by_flops(self, search: Search, speedup: float) -> jp.SearchPlan:
        """The most FLOPs at which the measured speed is the one asked for, by bisection."""
        low, high, best = 0.0, 1.0, None
        part = 1 / speedup
        for _ in range(self.settings.attempts):
            plan = search.plan(jp.Target(flops=part))
            if self.speedup(plan.masks) >= MET * speedup:
                low, best = part, plan
            else:
                high = part
            part = (low + high) / 2 if best is not None else part * 0.7
        if best is None:
            raise ValueError(f"no FLOPs of {self.settings.attempts} tried give {speedup} x")
        return best

    def speedup(self, masks: PyTree) -> float:
        small = self.compacted(masks)
        entries: dict[str, Any] = {
            "dense": (self.jitted, (self.dense, self.x)),
            "small": (small.fn, (small.params, self.x)),
        }
        return jp.compare(entries, rounds=9).ratios["small"].median

    def compacted(self, masks: PyTree, variables: PyTree = None) -> jp.Compact:
        return jp.compact(self.fn, self.dense if variables is None else variables, masks, self.x)


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    """Every way at every speed-up; all are timed again, in one run, when they are tuned."""
    found: list[dict[str, Any]] = []
    entries: dict[str, Any] = {"dense": (trainer.jitted, (trainer.dense, trainer.x))}
    for speedup in trainer.settings.speedups:
        for name, way in WAYS.items():
            plan = trainer.plan(way, speedup)
            tuned = trainer.tuned(plan.masks)
            small = trainer.compacted(plan.masks, tuned)
            entries[f"{name}, {speedup:g} x"] = (small.fn, (small.params, trainer.x))
            row = {
                "way": name,
                "asked": speedup,
                "accuracy": trainer.accuracy(tuned),
                "flops": jp.cost(small.fn, small.params, trainer.x).flops,
                "params": sum(leaf.size for leaf in jax.tree.leaves(small.params)),
                "kept": {n: [int(v.sum()), v.size] for n, v in plan.keep.items()},
            }
            found.append(row)
    ratios = jp.compare(entries, rounds=21).ratios
    for row in found:
        row["speedup"] = ratios[f"{row['way']}, {row['asked']:g} x"]._asdict()
    return found


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Per way and asked speed: mean accuracy over seeds with its range, and the speed-ups."""
    groups: dict[tuple[str, float], list[Any]] = {}
    for found in seeds.values():
        for row in found["rows"]:
            groups.setdefault((row["way"], row["asked"]), []).append(row)
    return [
        {
            "way": way,
            "asked": asked,
            "accuracy": float(np.mean([row["accuracy"] for row in group])),
            "accuracies": [row["accuracy"] for row in group],
            "speedups": [row["speedup"]["median"] for row in group],
            "flops": float(np.mean([row["flops"] for row in group])),
        }
        for (way, asked), group in groups.items()
    ]


def table(seeds: dict[str, Any]) -> Table:
    dense = [found["dense"] for found in seeds.values()]
    title = f"dense {np.mean(dense):.2%}, {len(seeds)} seeds"
    shown = Table("way", "asked", "measured", "MFLOPs", "accuracy", "each", title=title)
    for row in summary(seeds):
        shown.add_row(
            row["way"],
            f"{row['asked']:g} x",
            f"{np.mean(row['speedups']):.2f} x",
            f"{row['flops'] / 1e6:.0f}",
            f"{row['accuracy']:.2%}",
            " ".join(f"{a:.2%}" for a in row["accuracies"]),
        )
    return shown


def picture(seeds: dict[str, Any], path: Path) -> None:
    """Means over seeds; bars from the least to the largest accuracy."""
    series: dict[str, list[Any]] = {}
    for row in summary(seeds):
        each = row["accuracies"]
        spread = (min(each), row["accuracy"], max(each))
        series.setdefault(row["way"], []).append((float(np.mean(row["speedups"])), spread))
    dense = float(np.mean([found["dense"] for found in seeds.values()]))
    ax = jp.plot.accuracy_speedup(series, dense=dense)
    ax.set_title(f"{len(seeds)} seeds: mean and range; limited by what, score, objective")
    ax.figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args()
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
    kept = _kept(path, about["settings"])
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        if str(seed) in kept:
            continue
        before, start = load_average(), time.perf_counter()
        trainer = Trainer(images, settings, seed)
        kept[str(seed)] = {
            "dense": trainer.accuracy(trainer.dense),
            "rows": rows(trainer),
            "load_average": {"before": before, "after": load_average()},
            "seconds": time.perf_counter() - start,
        }
        results.save(about | {"seeds": kept, "summary": summary(kept)}, path)
    Console(width=110).print(table(kept))
    picture(kept, path.with_suffix(".png"))
    print(path)


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Seeds of an interrupted job with the same settings."""
    found = results.load(path) if path.exists() else {}
    same = json.loads(json.dumps(settings)) == found.get("settings")
    return found["seeds"] if same else {}


if __name__ == "__main__":
    main()
