"""When may an encoder be pruned that learns without labels, and what should tell its units apart?

``python -m benchmarks self_supervision`` trains a residual encoder on Fashion-MNIST without labels
(SimCLR, Chen et al., 2020: two random views of an image are to be alike and unlike those of others)
and judges it by a linear probe, a ridge classifier of its features that sees labels. Half and three
quarters of its FLOPs go

* before pretraining, by magnitude: a smaller network learns from the start;
* after it, by magnitude, by the loss without labels, or by the loss of the probe, which knows them;
  then pretraining goes on for a while;
* at the same place, and nothing follows but a new probe.

Beside them an encoder that learned from labels is pruned by them, and tuned by them. All training
is ``jp.recover``'s, of the dense encoder as well. It goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from benchmarks.common.data import Data
from benchmarks.models.resnet import ResNet

PyTree = Any
NAME = "encoder"
VIEWS, LABELS = "views", "labels"  # what a loss is made of
BEFORE = "before"


# how units are told apart, by what the network learned before and learns after
WAYS = {
    "after, by magnitude": (VIEWS, "magnitude"),
    "after, by the loss without labels": (VIEWS, VIEWS),
    "after, by the probe's loss": (VIEWS, "probe"),
    "learned and pruned by labels": (LABELS, LABELS),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    seeds: int = 3
    steps: int = 1000  # of pretraining
    tune_steps: int = 300  # after pruning
    batch: int = 128
    widths: tuple[int, ...] = (16, 32, 64)
    features: int = 64
    projected: int = 32
    temperature: float = 0.2
    flops: tuple[float, ...] = (0.5, 0.25)  # that stay
    evidence: int = 32  # batches that scores are made from
    probe: int = 10_000  # images with labels
    test_images: int = 10_000
    ways: tuple[str, ...] = (BEFORE, *WAYS)


QUICK = Settings(
    seeds=1, steps=12, tune_steps=10, batch=16, widths=(8, 8), features=16, projected=8,
    flops=(0.5,), evidence=2, probe=200, test_images=200,
    ways=("after, by the loss without labels",),
)  # fmt: skip

# ---- an encoder and its losses --------------------------------------------------------------


def view(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by up to a seventh, perhaps mirrored, brighter or not, partly erased."""
    height, width = images.shape[1:3]
    moves, mirrors, contrasts, holes = jax.random.split(key, 4)
    count, pad = len(images), max(height // 7, 1)
    wide = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    at = jax.random.randint(moves, (count, 2), 0, 2 * pad + 1)

    def cropped(image: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, 1))

    x = jax.vmap(cropped)(wide, at)
    mirrored = jax.random.bernoulli(mirrors, 0.5, (count, 1, 1, 1))
    x = jnp.where(mirrored, x[:, :, ::-1], x)
    x = x * jax.random.uniform(contrasts, (count, 1, 1, 1), minval=0.6, maxval=1.4)
    corner = jax.random.randint(holes, (count, 2, 1, 1), 0, height - height // 4)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    below, right = rows - corner[:, 0], columns - corner[:, 1]
    inside = (below >= 0) & (below < height // 4) & (right >= 0) & (right < height // 4)
    return jnp.where(inside[..., None], images.min(), x)


def alike(z: jax.Array, temperature: float) -> jax.Array:
    """Chen et al.'s loss (2020, equation 1) of projections of views, (2 x images, features)."""
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    count = len(z)
    scores = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, z @ z.T / temperature)
    other = (jnp.arange(count) + count // 2) % count
    return optax.softmax_cross_entropy_with_integer_labels(scores, other).mean()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Features of images, and losses with and without labels of all parameters."""

    module: ResNet
    settings: Settings
    classes: int

    def start(self, images: Any, seed: int) -> PyTree:
        keys = jax.random.split(jax.random.key(seed), 3)
        sizes = {VIEWS: self.settings.projected, LABELS: self.classes}
        heads = {
            name: 0.1 * jax.random.normal(key, (self.settings.features, size))
            for key, (name, size) in zip(keys, sizes.items())
        }
        return {"net": jax.jit(self.module.init)(keys[2], images), "heads": heads}

    def features(self, params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.module.apply(params["net"], x, train=False))

    def loss(self, name: str) -> Callable[..., Any]:
        """In train mode, with new running statistics: ``(params, images, labels, number)``."""

        def loss(params: PyTree, x: jax.Array, y: jax.Array, number: jax.Array) -> Any:
            if name == VIEWS:
                keys = jax.random.split(jax.random.key(number))
                x = jnp.concatenate([view(x, key) for key in keys])
            h, new = self.module.apply(params["net"], x, train=True, mutable=["batch_stats"])
            out = jax.nn.relu(h) @ params["heads"][name]
            if name == VIEWS:
                return alike(out, self.settings.temperature), {"net": new}
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), {"net": new}

        return loss

    def probe_loss(self, probe: Any) -> Callable[..., Any]:
        """The squared error of a fitted probe's outputs: labels without any training by them."""
        weights, bias = jnp.asarray(probe.coef_.T), jnp.asarray(probe.intercept_)

        def loss(params: PyTree, x: jax.Array, y: jax.Array, number: jax.Array) -> jax.Array:
            wanted = 2 * jax.nn.one_hot(y, self.classes) - 1
            found = self.features(params, x) @ weights + bias
            return jnp.mean(jnp.square(found - wanted))

        return loss


# ---- one seed -------------------------------------------------------------------------------


class Case:
    """One seed: batches, the dense encoders, and what is made of them."""

    def __init__(self, images: Data, settings: Settings, seed: int):
        self.images, self.settings, self.seed = images, settings, seed
        size = images.train_x.shape[1]
        strides = 2 if size > 16 else 1
        net = ResNet(settings.features, settings.widths, stem_strides=strides)
        self.encoder = Encoder(net, settings, images.classes)
        self._dense: dict[str, PyTree] = {}
        self.fn, self.x = self.encoder.features, jnp.asarray(images.test_x[:64])
        self.start = self.encoder.start(self.x[:1], seed)
        self.structure = jp.infer_structure(self.fn, self.start, self.x)
        order = np.random.default_rng(seed).permutation(len(images.train_x))
        picks = order[: len(order) // settings.batch * settings.batch].reshape(-1, settings.batch)
        self.batches = [
            (images.train_x[pick], images.train_y[pick], np.int32(k))
            for k, pick in enumerate(picks)
        ]

    def trained(self, small: jp.typing.Compact, by: str, steps: int) -> jp.typing.Compact:
        loss = self.encoder.loss(by)
        return jp.recover(small, loss, self.batches, steps=steps, progress=False)

    def dense(self, by: str) -> PyTree:
        """All parameters after training by a loss."""
        if by not in self._dense:
            whole = self.cut(self.start, jax.tree.map(lambda _: jnp.asarray(True), self.start))
            self._dense[by] = self.trained(whole, by, self.settings.steps).params
        return self._dense[by]

    def cut(self, params: PyTree, masks: PyTree) -> jp.typing.Compact:
        return jp.compact(self.fn, params, masks, self.x)

    def pruned(self, params: PyTree, scores: Any, flops: float) -> jp.typing.Compact:
        plan = jp.search(
            self.fn, params, self.structure, scores, self.x, target=jp.Target(flops=flops),
            progress=False,
        )  # fmt: skip
        return self.cut(params, plan.masks)

    def scores(self, params: PyTree, by: str) -> Any:
        """Of units: magnitude, or what a loss says."""
        if by == "magnitude":
            return jp.magnitude(params)
        probed = by == "probe"
        loss = self.encoder.probe_loss(self.probe(self.fn, params)) if probed else (
            self.encoder.loss(by))  # fmt: skip
        some = self.batches[: self.settings.evidence]
        return jp.scores.taylor_units(self.structure, params, loss, some, progress=False)

    def _features(self, fn: Callable[..., Any], params: PyTree, x: np.ndarray) -> np.ndarray:
        fn, size = jax.jit(fn), min(500, len(x))
        return np.concatenate([np.asarray(fn(params, x[i : i + size]))
                               for i in range(0, len(x), size)])  # fmt: skip

    def probe(self, fn: Callable[..., Any], params: PyTree) -> Any:
        from sklearn.linear_model import RidgeClassifier

        few = slice(self.settings.probe)
        x, y = self.images.train_x[few], self.images.train_y[few]
        return RidgeClassifier(alpha=1.0).fit(self._features(fn, params, x), y)

    def accuracy(self, small: jp.typing.Compact) -> float:
        return self.judged(small.fn, small.params)

    def judged(self, fn: Callable[..., Any], params: PyTree) -> float:
        """Accuracy of a linear probe of the features on the test images."""
        found = self.probe(fn, params).predict(self._features(fn, params, self.images.test_x))
        return float(np.mean(found == self.images.test_y))


def rows(case: Case, found: dict[str, Any]) -> Iterator[None]:
    """Adds what is missing of one seed; yields after each."""
    settings = case.settings
    wanted = [(name, f) for f in settings.flops for name in settings.ways]
    missing = [(name, f) for name, f in wanted if key(name, f) not in found.get("rows", {})]
    learned = dict.fromkeys(WAYS.get(name, (VIEWS,))[0] for name in settings.ways)
    for by in learned if missing else ():
        if by not in found.setdefault("dense", {}):
            found["dense"][by] = case.judged(case.fn, case.dense(by))
            print(f"  dense, by {by}: {found['dense'][by]:.4f}", flush=True)
            yield
    for name, flops in missing:
        rows = found.setdefault("rows", {})
        rows[key(name, flops)] = {"way": name, "flops": flops} | made(case, name, flops)
        print(f"  {key(name, flops)}: {rows[key(name, flops)]}", flush=True)
        yield


def made(case: Case, name: str, flops: float) -> dict[str, Any]:
    """The accuracy of a probe after pruning, and after training on."""
    if name == BEFORE:
        small = case.pruned(case.start, jp.magnitude(case.start), flops)
        return {"accuracy": case.accuracy(case.trained(small, VIEWS, case.settings.steps))}
    learned, score = WAYS[name]
    dense = case.dense(learned)
    small = case.pruned(dense, case.scores(dense, score), flops)
    tuned = case.trained(small, learned, case.settings.tune_steps)
    return {"untuned": case.accuracy(small), "accuracy": case.accuracy(tuned)}


def key(name: str, flops: float) -> str:
    return f"{name}, {flops:.0%} of FLOPs"


# ---- results --------------------------------------------------------------------------------


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Points that a probe loses to that of the dense encoder which learned alike, over seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for each in seeds.values():
        for name, row in each.get("rows", {}).items():
            by = WAYS.get(row["way"], (VIEWS,))[0]
            kinds = [k for k in ("untuned", "accuracy") if k in row]
            lost = {k: 100 * (each["dense"][by] - row[k]) for k in kinds}
            found.setdefault(name, []).append(lost)
    return [
        {"row": name, "seeds": len(lost), "points_lost": [one["accuracy"] for one in lost]}
        | {"untuned_lost": [one["untuned"] for one in lost if "untuned" in one]}
        for name, lost in found.items()
    ]


def table(seeds: dict[str, Any]) -> Table:
    known = next(iter(seeds.values()))["dense"]
    dense = {by: np.mean([each["dense"][by] for each in seeds.values()]) for by in known}
    said = ", ".join(f"learned by {by} {value:.2%}" for by, value in dense.items())
    shown = Table("", "a new probe alone", "trained on, points lost",
                  title=f"linear probe: {said}, seeds: {len(seeds)}")  # fmt: skip
    for row in summary(seeds):
        cells = (row["untuned_lost"], row["points_lost"])
        shown.add_row(row["row"], *(" ".join(f"{v:.2f}" for v in c) for c in cells))
    return shown


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")  # of Okabe and Ito


def picture(seeds: dict[str, Any], path: Path) -> None:
    """Points that a probe loses to that of the dense encoder, by the FLOPs that stay."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lost = {row["row"]: row["points_lost"] for row in summary(seeds)}
    ways = dict.fromkeys(row["way"] for each in seeds.values() for row in each["rows"].values())
    parts = sorted({row["flops"] for each in seeds.values() for row in each["rows"].values()})
    for name, colour in zip(ways, COLOURS):
        known = [lost[key(name, part)] for part in parts] + [[0.0]]
        at = [100 * part for part in parts] + [100]
        means, spread = zip(*[(np.mean(values), np.std(values)) for values in known])
        ax.errorbar(at, means, yerr=spread, marker="o", capsize=3, label=name, color=colour)
    ax.set(
        xlabel="FLOPs that stay [%]", ylabel="points of a linear probe lost to its dense encoder"
    )
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    ax.set_title(f"Fashion-MNIST, seeds: {len(seeds)}: mean ± deviation", fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = studies.parser("self_supervision", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--seeds", type=int, default=Settings().seeds)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    settings, images = QUICK if args.quick else Settings(), data.load()
    few = slice(settings.test_images)
    images = dataclasses.replace(images, test_x=images.test_x[few], test_y=images.test_y[few])
    stem = "self_supervision-quick" if args.quick else "self_supervision"
    path = results.folder(args.results) / f"{stem}.json"
    about = results.header("self_supervision") | {
        "settings": dataclasses.asdict(settings),
        "data": {"name": images.name, "source": images.source},
    }
    kept = results.continued(path, about["settings"])
    for seed in range(min(args.seeds, settings.seeds)):
        found = kept.setdefault(NAME, {}).setdefault(str(seed), {})
        for _ in rows(Case(images, settings, seed), found):
            results.save(about | {"networks": kept, "summary": summary(kept[NAME])}, path)
    Console(width=110).print(table(kept[NAME]))
    picture(kept[NAME], path.with_suffix(".png"))
    print(path)
