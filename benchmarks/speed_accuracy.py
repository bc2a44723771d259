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
import time
from collections.abc import Callable
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

# way -> (score, objective, what is limited)
TIME, UNIFORM, FLOPS = "time", "uniform", "FLOPs"
WAYS = {
    f"{limited}, {score}, {objective}": (score, objective, limited)
    for score in ("magnitude", "Taylor")
    for limited, objective in (
        (TIME, "sum"), (TIME, "balanced"), (FLOPS, "sum"), (FLOPS, "balanced"), (UNIFORM, "sum")
    )
}  # fmt: skip


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
        done = train.fit(
            self.model, tx, run, self.data, steps=steps, batch=batch, seed=self.seed
        )
        return done.variables

    def _scores(self) -> dict[str, Any]:
        """Squared magnitudes per entry; squared sums of weight times gradient per unit."""
        grad = methods.mean_gradient(
            self.model, self.dense, self.data, self.settings.gradient_batches, self.settings.batch
        )
        still = {"batch_stats": jax.tree.map(jnp.zeros_like, self.dense["batch_stats"])}
        taylor = jp.scores.taylor(self.dense, grad=grad) | still
        units = self.structure.unit_scores(taylor, "taylor")
        return {
            "magnitude": methods.l2(self.dense) | still,
            "Taylor": {name: np.asarray(score) for name, score in units.items()},
        }

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
        small = jp.compact(self.fn, self.dense, masks, self.x)
        return jp.compare(
            {"dense": (self.jitted, (self.dense, self.x)), "small": (small.fn, (small.params, self.x))},
            rounds=9,
        ).ratios["small"].median


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    """Every way at every speed-up; all are timed again, in one run, when they are tuned."""
    found, entries = [], {"dense": (trainer.jitted, (trainer.dense, trainer.x))}
    for speedup in trainer.settings.speedups:
        for name, way in WAYS.items():
            plan = trainer.plan(way, speedup)
            tuned = trainer.tuned(plan.masks)
            small = jp.compact(trainer.fn, tuned, plan.masks, trainer.x)
            entries[f"{name}, {speedup:g} x"] = (small.fn, (small.params, trainer.x))
            row = {
                "way": name,
                "asked": speedup,
                "accuracy": trainer.accuracy(tuned),
                "flops": jp.cost(small.fn, small.params, trainer.x).flops,
                "params": sum(leaf.size for leaf in jax.tree.leaves(small.params)),
                "kept": {n: [int(v.sum()), v.size] for n, v in plan.keep.items()},
            }
            print(row, flush=True)
            found.append(row)
    ratios = jp.compare(entries, rounds=21).ratios
    for row in found:
        row["speedup"] = ratios[f"{row['way']}, {row['asked']:g} x"]._asdict()
    return found


if __name__ == "__main__":
    images = data.load()
    s = dataclasses.replace(Settings(), seeds=1, dense_steps=600, tune_steps=100, test_images=5000)
    t0 = time.time()
    t = Trainer(images, s, 0)
    print("dense", t.accuracy(t.dense), time.time() - t0)
    for row in rows(t):
        print(row["way"], row["asked"], row["accuracy"], row["speedup"]["median"])
    print(time.time() - t0)
