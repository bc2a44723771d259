"""Does README's recipe hold for networks of others?

``python -m benchmarks strangers`` copies README's recipe (scores, search, compact, recover, shrink)
to three networks that it was not made on, one per framework, trained on Fashion-MNIST, with nothing
tuned: 1.5, 2 and 3 times the measured speed at a batch of 64, and a fifth of the training steps to
recover in. The transformer is also cut by the scores of single units, to first order, which cost
less. It goes on where it was interrupted; its stage ``plan`` measures times, and wants the
machine for itself.
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
import optax
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import data, results, train
from benchmarks.common.data import Data
from benchmarks.common.machine import load_average
from benchmarks.studies.recovery.networks import batches_of
from benchmarks.studies.speed.accuracy import load, save
from benchmarks.studies.strangers.networks import STRANGERS, Stranger

STAGES = ("train", "plan", "recover")
BY = ", by "  # behind it stands another score than README's
COMPARED = (f"Equinox ViT{BY}taylor_units",)
EVERY = [*STRANGERS, *COMPARED]
ALLOWED = {1.5: 0.5, 2.0: 1.0, 3.0: 2.0}  # Points that may be lost at a speed, mean over seeds.


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    seeds: int = 3
    speeds: tuple[float, ...] = (1.5, 2.0, 3.0)
    dense_steps: int = 1000
    recover_steps: int = 200  # a fifth
    evidence: int = 64  # batches that units are scored on
    batch: int = 64
    rate: float = 3e-3
    rounds: int = 25
    test_images: int = 10_000


QUICK = Settings(
    seeds=1, speeds=(2.0,), dense_steps=20, recover_steps=4, evidence=2, rounds=3, test_images=500
)


class Case:
    """One network with one seed, trained."""

    def __init__(self, name: str, images: Data, settings: Settings, seed: int, weights: Path):
        self.images, self.settings = images, settings
        self.x = jnp.asarray(images.test_x[: settings.batch])
        self.batches = batches_of(images, settings.batch, seed)
        network, _, score = name.partition(BY)
        self.score = getattr(jp.scores, score or "loss_units")
        self.net = STRANGERS[network](seed, self.x)
        path = weights / f"{network}-{seed}-{settings.dense_steps}.npz"
        if not path.exists():
            save(trained(self.net, images, settings, seed), path)
        params = jax.tree.map(jnp.asarray, load(self.net.params, path))
        self.net = self.net._replace(params=params)

    @property
    def structure(self) -> jp.typing.Structure:
        net = self.net
        return jp.infer_structure(net.fn, net.params, self.x, semantics=net.semantics)

    def teacher(self, x: Any) -> Any:
        return self.net.fn(self.net.params, x)

    def small(self, row: dict[str, Any]) -> jp.typing.Compact:
        net, structure = self.net, self.structure
        kept = {n: np.asarray(units, int) for n, units in row["units"].items()}
        keep = {n: np.isin(np.arange(structure.dims[n].size), u) for n, u in kept.items()}
        masks = structure.masks_of(keep)
        return jp.compact(net.fn, net.params, masks, self.x, semantics=net.semantics)

    def accuracy(self, fn: Any) -> float:
        return train.accuracy(lambda _, x: fn(x), None, self.images, 250)


def trained(net: Stranger, images: Data, settings: Settings, seed: int) -> Any:
    """The parameters after some steps of Adam, along a cosine."""
    steps = settings.dense_steps
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.rate, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        grad, updated = jax.grad(net.loss, has_aux=True)(params, x, y)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(updated, updates), state

    params, state = net.params, tx.init(net.params)
    passes = (batches_of(images, settings.batch, 1000 * seed + k) for k in itertools.count())
    for batch in itertools.islice(itertools.chain.from_iterable(passes), steps):
        params, state = step(params, state, *batch)
    return params


def plan(case: Case, rows: dict[str, Any]) -> Iterator[None]:
    """What is kept at each speed, and what all of them take beside the dense network."""
    missing = [s for s in case.settings.speeds if f"{s:g}" not in rows]
    if not missing:
        return
    net, structure = case.net, case.structure
    evidence = case.batches[: case.settings.evidence]
    scores = case.score(structure, net.params, net.loss, evidence, progress=False)
    search = jp.Search(net.fn, net.params, structure, scores, case.x, progress=False)
    for asked in missing:
        found = search.plan(jp.Target(speedup=asked))
        rows[f"{asked:g}"] = {
            "asked": asked,
            "units": {name: np.flatnonzero(v).tolist() for name, v in found.keep.items()},
            "searched": found.measured["speedup"],
            "notes": list(found.notes),
        }
    entries: dict[str, Any] = {"dense": (net.fn, (net.params, case.x))}
    for key, row in rows.items():
        small = case.small(row)
        entries[key] = (small.fn, (small.params, case.x))
    compared = jp.compare(entries, repeats=case.settings.rounds, progress=False)
    for key, row in rows.items():
        row["timing"] = compared.timings[key].to_json()
        row["speedup"] = compared.ratios[key]._asdict()
        row["load_average"] = load_average()
        print(f"  {key} x asked: {row['speedup']['median']:.2f} x", flush=True)
    yield


def recover(case: Case, rows: dict[str, Any]) -> Iterator[None]:
    """The accuracy of the cut network, and of the owner's own module after recovery."""
    for asked, row in rows.items():
        if "accuracy" in row:
            continue
        small = case.small(row)
        row["untuned"] = case.accuracy(jax.jit(lambda x, s=small: s.fn(s.params, x)))
        steps = case.settings.recover_steps
        tuned = jp.recover(
            small, case.net.loss, case.batches, dense=case.net.params, teacher=case.teacher,
            steps=steps, progress=False,
        )  # fmt: skip
        row["params"] = int(sum(np.size(leaf) for leaf in jax.tree.leaves(tuned.params)))
        row["steps"] = tuned.recovery.steps
        row["recovery"] = [stage.said for stage in tuned.recovery.stages if stage.said]
        row["accuracy"] = case.accuracy(case.net.back(tuned))
        print(f"  {asked} x: {row['untuned']:.4f} -> {row['accuracy']:.4f}", flush=True)
        yield


DO = {"plan": plan, "recover": recover}


# ---- results --------------------------------------------------------------------------------


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Points that are lost at each speed, each seed's and their mean."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for each in seeds.values():
        for key, row in each["rows"].items():
            if "accuracy" in row:
                found.setdefault(key, []).append((each["dense"], row))
    return [
        {
            "asked": float(key),
            "allowed": ALLOWED[float(key)],
            "speedups": [row["speedup"]["median"] for _, row in rows],
            "lost": [100 * (dense - row["accuracy"]) for dense, row in rows],
            "untuned": [100 * (dense - row["untuned"]) for dense, row in rows],
            "mean": float(np.mean([100 * (dense - row["accuracy"]) for dense, row in rows])),
        }
        for key, rows in sorted(found.items(), key=lambda item: float(item[0]))
    ]


def table(network: str, seeds: dict[str, Any]) -> Table:
    dense = [each["dense"] for each in seeds.values() if "dense" in each]
    title = f"{network}: points lost of {np.mean(dense):.2%}, seeds: {len(dense)}"
    names = ("asked", "measured", "before recovery", "after", "mean", "allowed")
    shown = Table(*names, title=title)
    for row in summary(seeds):
        cells = (row["speedups"], row["untuned"], row["lost"])
        said = (" ".join(f"{v:.2f}" for v in cell) for cell in cells)
        shown.add_row(f"{row['asked']:g} x", *said, f"{row['mean']:.2f}", f"{row['allowed']:g}")
    return shown


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = studies.parser("strangers", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--networks", nargs="+", choices=EVERY, default=EVERY)
    parser.add_argument("--seeds", type=int, nargs="+", help="those to look at; all by default")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    images, settings = data.load(), QUICK if args.quick else Settings()
    few = slice(settings.test_images)
    images = dataclasses.replace(images, test_x=images.test_x[few], test_y=images.test_y[few])
    stem = "strangers-quick" if args.quick else "strangers"
    path = results.folder(args.results) / f"{stem}.json"
    about = results.header("strangers") | {
        "settings": dataclasses.asdict(settings),
        "data": {"name": images.name, "source": images.source},
    }
    kept = results.continued(path, about["settings"])
    seeds = range(settings.seeds) if args.seeds is None else args.seeds
    for stage, seed, network in itertools.product(args.stages, seeds, args.networks):
        case = Case(network, images, settings, seed, args.weights / stem)
        found = kept.setdefault(network, {}).setdefault(str(seed), {"rows": {}})
        if "dense" not in found:
            found["dense"] = case.accuracy(jax.jit(lambda x, net=case.net: net.fn(net.params, x)))
        done = DO[stage](case, found["rows"]) if stage in DO else ()
        for _ in itertools.chain([None], done):
            summaries = {name: summary(each) for name, each in kept.items()}
            results.save(about | {"networks": kept, "summary": summaries}, path)
        print(f"{stage}: {network}, seed {seed}, dense {found['dense']:.4f}", flush=True)
    for network, each in kept.items():
        Console(width=110).print(table(network, each))
    print(path)
