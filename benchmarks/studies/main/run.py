"""The main job's order of work: train once, prune in many ways, then time all in one run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import optax

import jaxprune as jp
from benchmarks.common import measuring, train
from benchmarks.common.data import Data
from benchmarks.common.train import Fn, Run
from benchmarks.models.resnet import ResNet
from benchmarks.studies.main import methods
from benchmarks.studies.main.methods import GRADUAL, ONE_SHOT, STRUCTURED, UNSTRUCTURED, Method

PyTree = Any
Advance = Callable[[str], Callable[[], Any]]  # what is being done -> call it once per step


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    mode: str
    seeds: int
    test_images: int
    dense_steps: int
    tune_steps: int  # after one-shot pruning
    gradual_steps: int  # while and after pruning gradually
    renew_every: int  # steps between two choices of units in gradual pruning
    gradient_batches: int  # the evidence of one-shot Taylor scores
    rounds: int  # of timing
    points: tuple[float, ...]  # fractions of units removed
    gradual_scores: tuple[str, ...]
    sparsities: tuple[float, ...]  # fractions of weights masked, unstructured
    widths: tuple[int, ...] = (32, 64, 128)  # of the network's stages
    batch: int = 64
    timing_batches: tuple[int, int] = (1, 256)
    dense_rate: float = 0.1
    tune_rate: float = 0.04


QUICK = Settings(
    mode="quick", seeds=1, test_images=5000, dense_steps=600, tune_steps=50, gradual_steps=100,
    renew_every=10, gradient_batches=8, rounds=9, points=(0.25, 0.375, 0.5, 0.625, 0.75),
    gradual_scores=("magnitude L2",), sparsities=(0.5, 0.9),
)  # fmt: skip
FULL = Settings(
    mode="full", seeds=3, test_images=10_000, dense_steps=2400, tune_steps=200, gradual_steps=300,
    renew_every=20, gradient_batches=32, rounds=21,
    points=(0.25, 0.375, 0.5, 0.625, 0.75, 0.875), gradual_scores=tuple(STRUCTURED),
    sparsities=(0.5, 0.8, 0.9, 0.95),
)  # fmt: skip


def plan(settings: Settings) -> list[Method]:
    """Returns the rows of the comparison, the dense network trained further first."""
    ways = [(score, ONE_SHOT) for score in STRUCTURED]
    ways += [(score, GRADUAL) for score in settings.gradual_scores]
    return [
        Method("dense", "trained further", ONE_SHOT, 0.0),
        *(Method("unstructured", UNSTRUCTURED, ONE_SHOT, s) for s in settings.sparsities),
        Method("2:4", UNSTRUCTURED, ONE_SHOT, 0.5),
        *(Method("structured", *way, point) for way in ways for point in settings.points),
    ]


def count_steps(settings: Settings) -> int:
    """Returns the number of training steps of the whole job, for the progress bar."""
    each = {ONE_SHOT: settings.tune_steps, GRADUAL: settings.gradual_steps}
    tuning = sum(each[method.schedule] for method in plan(settings))
    return settings.seeds * (settings.dense_steps + tuning)


def build(data: Data, settings: Settings) -> nn.Module:
    """Returns the network for images of this size: small ones are not halved by the stem."""
    strides = 2 if data.train_x.shape[1] > 16 else 1
    return ResNet(data.classes, settings.widths, stem_strides=strides)


def rows(data: Data, settings: Settings, advance: Advance) -> Iterator[dict[str, Any]]:
    """Yields one record per seed and method, the dense network first."""
    data = dataclasses.replace(
        data,
        test_x=data.test_x[: settings.test_images],
        test_y=data.test_y[: settings.test_images],
    )
    for seed in range(settings.seeds):
        yield from _Seed(data, settings, advance, seed).rows()


class _Seed:
    """One network trained from one seed, and everything that is made of it."""

    def __init__(self, data: Data, settings: Settings, advance: Advance, seed: int):
        self.data, self.settings, self.advance, self.seed = data, settings, advance, seed
        self.model = build(data, settings)
        self.image = data.test_x[:1]
        self.fn = train.inference(self.model)
        self.jitted = jax.jit(self.fn)  # the one program of all networks of full size
        self.dense = self._train()
        self.structure = jp.infer_structure(self.fn, self.dense, self.image)
        self.gradient = methods.mean_gradient(
            self.model, self.dense, data, settings.gradient_batches, settings.batch
        )
        self.tune_sparse = optax.chain(
            train.sgd(settings.tune_steps, settings.tune_rate),
            jp.keep_params_sparse(methods.dense(self.dense)),
        )
        self.prune_gradually = functools.cache(self._gradual_tx)

    def rows(self) -> Iterator[dict[str, Any]]:
        before = measuring.size_and_cost(self.fn, self.dense, self.image)
        dense: dict[str, Any] = {
            "pattern": "dense",
            "score": "",
            "schedule": "",
            "sparsity": 0.0,
            "equality": None,
        }
        found = [dense | before | {"accuracy": self._accuracy(self.jitted, self.dense)}]
        networks: dict[str, tuple[Fn, PyTree]] = {"dense": (self.jitted, self.dense)}
        for method in plan(self.settings):
            row, networks[method.label] = self._row(method)
            found.append(row)
        timing = self._times(networks)
        for row, name in zip(found, networks, strict=True):
            theory = before["flops_per_image"] / row["flops_per_image"]
            yield row | {"seed": self.seed, "flops_ratio": theory, "timing": timing[name]}

    def _train(self) -> PyTree:
        variables = jax.jit(self.model.init)(jax.random.key(self.seed), self.image)
        tx = train.sgd(self.settings.dense_steps, self.settings.dense_rate)
        run = Run(variables, tx.init(variables))
        return self._fit("dense", tx, run, self.settings.dense_steps).variables

    def _fit(self, name: str, tx: Any, run: Run, steps: int) -> Run:
        return train.fit(
            self.model,
            tx,
            run,
            self.data,
            steps=steps,
            batch=self.settings.batch,
            seed=self.seed,
            advance=self.advance(f"seed {self.seed}: {name}"),
        )

    def _accuracy(self, fn: Fn, variables: PyTree) -> float:
        return train.accuracy(fn, variables, self.data, self.settings.timing_batches[1])

    def _row(self, method: Method) -> tuple[dict[str, Any], tuple[Fn, PyTree]]:
        """Prunes, tunes and, where whole units are gone, compacts; the record and the network."""
        if method.schedule == ONE_SHOT:
            masks, untuned, variables = self._one_shot(method)
        else:
            masks, untuned, variables = self._gradually(method)
        fn, params, equality = self.jitted, variables, None
        if method.compact:
            small = jp.compact(self.fn, variables, masks, self.image)
            fn, params = jax.jit(small.fn), small.params
            untuned = small.restrict(untuned) if untuned else None  # the same masks: as exact
            images = self.data.test_x[: self.settings.timing_batches[1]]
            equality = measuring.equality(self.jitted, variables, small, fn, images)
        row = dataclasses.asdict(method) | measuring.size_and_cost(fn, params, self.image)
        row |= {
            "accuracy_untuned": self._accuracy(fn, untuned) if untuned else None,
            "accuracy": self._accuracy(fn, params),
            "equality": equality,
        }
        return row, (fn, params)

    def _one_shot(self, method: Method) -> tuple[PyTree, PyTree, PyTree]:
        """Returns the masks, the masked variables, and those tuned."""
        masks = methods.one_shot(method, self.structure, self.dense, self.gradient)
        masked = jp.apply_masks(self.dense, masks)
        # Masks live in the state: all methods whose masks have the same shapes share one
        # transformation, and with it one compiled step.
        state = optax.tree_utils.tree_set(self.tune_sparse.init(masked), masks=masks)
        steps = self.settings.tune_steps
        run = self._fit(method.label, self.tune_sparse, Run(masked, state), steps)
        return masks, masked, run.variables

    def _gradually(self, method: Method) -> tuple[PyTree, None, PyTree]:
        """Returns the masks, nothing that was masked and not trained, and the variables."""
        tx = self.prune_gradually(method.score)
        state = optax.tree_utils.tree_set(tx.init(self.dense), target=method.sparsity)
        run = self._fit(method.label, tx, Run(self.dense, state), self.settings.gradual_steps)
        return optax.tree_utils.tree_get(run.opt_state, "masks"), None, run.variables

    def _gradual_tx(self, score: str) -> optax.GradientTransformation:
        steps = self.settings.gradual_steps
        inner = train.sgd(steps, self.settings.tune_rate)
        return methods.gradual(score, self.structure, inner, steps, self.settings.renew_every)

    def _times(self, networks: dict[str, tuple[Fn, PyTree]]) -> dict[str, list[dict[str, Any]]]:
        self.advance(f"seed {self.seed}: timing")
        runs = [
            measuring.times(networks, self.data.test_x, batch, self.settings.rounds)
            for batch in self.settings.timing_batches
        ]
        return {name: [run[name] for run in runs] for name in networks}
