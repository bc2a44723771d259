"""Does a CNN lose half a point by thresholds, one for convolutions and one for dense layers?

``python -m benchmarks thresholds`` trains two convolutions and two dense layers on Fashion-MNIST,
cuts every weight below its kind's threshold at once (``jp.threshold``), and trains on under these
masks. Beside it, as many weights go from all kernels alike, and the dense network is trained on as
long. Zeros make no program faster; what does is the study ``images``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
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
from benchmarks.common.data import Data
from benchmarks.studies.recovery import networks
from benchmarks.studies.speed.accuracy import load, save

PyTree = Any
CLAIM = 0.5  # points


class CNN(nn.Module):
    """Two convolutions with pooling, a dense layer and a classifier."""

    classes: int
    widths: tuple[int, int, int] = (32, 64, 128)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for width in self.widths[:2]:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.widths[2])(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    seeds: int = 3
    steps: int = 1000
    tune_steps: int = 300
    batch: int = 64
    rate: float = 1e-3
    # (of convolutions, of dense layers), absolute values below which weights go
    taus: tuple[tuple[float, float], ...] = ((0.02, 0.01), (0.05, 0.02), (0.1, 0.05))
    widths: tuple[int, int, int] = (32, 64, 128)
    test_images: int = 10_000


QUICK = Settings(
    seeds=1, steps=10, tune_steps=4, taus=((0.05, 0.02),), widths=(4, 8, 16), test_images=200
)


def by_kind(convolutions: float, dense: float) -> jp.typing.PatternFn:
    """Masks of what is at least its kind's threshold."""
    return jp.threshold(lambda path: convolutions if "Conv" in path else dense)


def trained(
    module: nn.Module, data: Data, settings: Settings, seed: int, steps: int,
    start: PyTree = None, masks: PyTree = None,
) -> PyTree:  # fmt: skip
    """Variables after some steps of Adam, under masks if there are any."""
    rate = optax.cosine_decay_schedule(settings.rate, steps)
    tx: Any = optax.adam(rate)
    if start is None:
        start = jax.jit(module.init)(jax.random.key(seed), jnp.asarray(data.train_x[:1]))
    if masks is not None:
        tx = optax.chain(tx, jp.keep_params_sparse(masks))
    loss = networks.loss_of(module)

    @jax.jit
    def step(variables: PyTree, state: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(lambda v: loss(v, x, y)[0])(variables)
        updates, state = tx.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state

    variables, state, stream = start, tx.init(start), list[Any]()
    for k in range(steps):
        stream = stream or networks.batches_of(data, settings.batch, 1000 * seed + k)
        variables, state = step(variables, state, *stream.pop())
    return variables


def rows(
    data: Data, settings: Settings, seed: int, found: dict[str, Any], path: Path
) -> Iterator[None]:
    """Adds what is missing of one seed; yields after each row."""
    if len(found.get("rows", {})) == 2 * len(settings.taus) + 1:
        return
    module = CNN(data.classes, settings.widths)
    fn = jax.jit(train.inference(module))
    judged = lambda v: train.accuracy(fn, v, data, 250)  # noqa: E731
    if not path.exists():
        save(trained(module, data, settings, seed, settings.steps), path)
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(data.train_x[:1]))
    dense = jax.tree.map(jnp.asarray, load(like, path))
    found.update(dense=judged(dense), rows=found.get("rows", {}))
    for name, masks in choices(dense, settings).items():
        if name in found["rows"]:
            continue
        masked = dense if masks is None else jp.apply_masks(dense, masks)
        after = trained(module, data, settings, seed, settings.tune_steps, masked, masks)
        found["rows"][name] = {
            "kept": 1.0 if masks is None else float(jp.density(dense, masks)),
            "kept_by_layer": {} if masks is None else by_layer(masks),
            "untuned": judged(masked),
            "accuracy": judged(after),
        }
        print(f"  seed {seed}: {name}: {found['rows'][name]}", flush=True)
        yield


def choices(dense: PyTree, settings: Settings) -> dict[str, PyTree]:
    """name -> masks: by thresholds, and of as many weights of all kernels alike."""
    made: dict[str, PyTree] = {"dense, trained on": None}
    scores = jp.magnitude(dense)
    for taus in settings.taus:
        masks = by_kind(*taus)(scores, 0.0)
        made[f"thresholds {taus[0]:g}, {taus[1]:g}"] = masks
        kept = float(np.concatenate([np.ravel(m) for m in _kernels(masks)]).mean())
        made[f"alike as {taus[0]:g}, {taus[1]:g}"] = jp.unstructured()(scores, 1 - kept)
    return made


def _kernels(masks: PyTree) -> list[Any]:
    return [mask for mask in jax.tree.leaves(masks) if np.ndim(mask)]


def by_layer(masks: PyTree) -> dict[str, float]:
    """The share of each kernel that is kept."""
    leaves = jax.tree_util.tree_leaves_with_path(masks)
    return {jp.typing.path_str(path): float(np.mean(m)) for path, m in leaves if np.ndim(m)}


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Points lost, over seeds, and whether they are within the claim."""
    names = list(next(iter(seeds.values()))["rows"])
    made = []
    for name in names:
        rows = [(each["dense"], each["rows"][name]) for each in seeds.values()
                if name in each["rows"]]  # fmt: skip
        lost = [100 * (dense - row["accuracy"]) for dense, row in rows]
        made.append({
            "row": name,
            "kept": float(np.mean([row["kept"] for _, row in rows])),
            "untuned_lost": [100 * (dense - row["untuned"]) for dense, row in rows],
            "points_lost": lost,
            "within_claim": bool(np.mean(lost) <= CLAIM),
        })  # fmt: skip
    return made


def table(seeds: dict[str, Any]) -> Table:
    dense = np.mean([each["dense"] for each in seeds.values()])
    shown = Table("", "weights kept", "points lost at once", "after training on",
                  title=f"CNN: dense {dense:.2%}, seeds: {len(seeds)}")  # fmt: skip
    for row in summary(seeds):
        cells = (row["untuned_lost"], row["points_lost"])
        shown.add_row(row["row"], f"{row['kept']:.1%}",
                      *(" ".join(f"{v:.2f}" for v in c) for c in cells))  # fmt: skip
    return shown


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = studies.parser("thresholds", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--tau", nargs=2, type=float, action="append", metavar=("CONV", "DENSE"))
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    settings, images = QUICK if args.quick else Settings(), data.load()
    if args.tau:
        settings = dataclasses.replace(settings, taus=tuple(map(tuple, args.tau)))
    few = slice(settings.test_images)
    images = dataclasses.replace(images, test_x=images.test_x[few], test_y=images.test_y[few])
    stem = "thresholds-quick" if args.quick else "thresholds"
    path = results.folder(args.results) / f"{stem}.json"
    about = results.header("thresholds") | {
        "settings": dataclasses.asdict(settings),
        "data": {"name": images.name, "source": images.source},
        "claim": CLAIM,
    }
    kept = results.continued(path, about["settings"])
    for seed in range(settings.seeds):
        found = kept.setdefault("CNN", {}).setdefault(str(seed), {})
        weights = args.weights / stem / f"{seed}-{settings.steps}.npz"
        for _ in rows(images, settings, seed, found, weights):
            results.save(about | {"networks": kept, "summary": summary(kept["CNN"])}, path)
    Console(width=110).print(table(kept["CNN"]))
    print(path)
