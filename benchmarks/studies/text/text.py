"""When and how is a text encoder pruned that is fine-tuned for classes?

``python -m benchmarks text`` fine-tunes MiniLM end to end, by default its first three layers of
six, on two tasks out of WordNet (see ``tasks.py``), dense and pruned. Single weights go before
fine-tuning by magnitude, while it by magnitude or movement (Sanh et al., 2020), or after it by
magnitude, with as many steps again; each at the rate, of three, that is best on training texts
that it has not seen. Whole heads and hidden units go for a measured speed, before
fine-tuning by magnitude, after it by what the loss says, with ``jp.recover`` and the dense network
as a teacher.

It goes on where it was interrupted; the stage ``plan`` measures times, and wants the machine for
itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average
from benchmarks.models import minilm
from benchmarks.studies.speed.accuracy import load, save
from benchmarks.studies.text import tuning
from benchmarks.studies.text.tasks import TASKS
from benchmarks.studies.text.tuning import AFTER, BEFORE, WHILE, Settings

STAGES = ("train", "plan", "recover", "weights")
QUICK = Settings(
    layers=1, train=128, test=100, batch=16, steps=4, every=2, kept=(0.15,), speedups=(1.5,),
    evidence=2, timed=4, rates=(1e-3,), tried=50,
)  # fmt: skip
DIMS = ("encoder/blocks/*/up/kernel:1", "encoder/blocks/*/q/kernel:1.0")  # hidden units, heads
EARLY = 2.0  # The speed at which pruning before is compared with pruning after.
# single weights: when -> methods of tuning.optimizer
WAYS = ((WHILE, "magnitude"), (WHILE, "movement"), (BEFORE, "magnitude, once"),
        (AFTER, "magnitude, once"))  # fmt: skip
Rows = dict[str, Any]


class Case:
    """One task with one seed: texts, pretrained and fine-tuned parameters."""

    def __init__(self, task: str, settings: Settings, seed: int, weights: Path):
        self.settings, self.seed = settings, seed
        encoder, tokenizer = minilm.load(settings.length)
        encoder = encoder | {"blocks": encoder["blocks"][: settings.layers]}
        made = TASKS[task]()
        self.about = {
            "classes": made.classes,
            "texts": {"train": len(made.train.texts), "test": len(made.test.texts)},
            "test by class": np.bincount(made.test.labels[: settings.test]).tolist(),
        }
        self.texts = tuning.Texts(made, tokenizer, settings)
        self.start = tuning.with_head(self.texts.known(encoder), len(made.classes), seed)
        sizes = settings.steps, settings.train, settings.layers, settings.length, *settings.rates
        path = weights / f"{task}-{seed}-{'-'.join(map(str, sizes))}.npz"
        if not path.exists():
            save(tuning.best(self.start, self.texts, "magnitude", 1.0, settings, seed)[0], path)
        self.dense = jax.tree.map(jnp.asarray, load(self.start, path))
        self.right = self.texts.right(tuning.logits, self.dense)
        self.batches = self.texts.batches(seed)
        self.x = jnp.asarray(self.texts.test[0][: settings.timed])
        self.structure = jp.infer_structure(tuning.logits, self.dense, self.x)

    def judged(self, fn: Callable[..., Any], params: Any) -> dict[str, float]:
        """Accuracy, the points lost to the dense network, and their paired standard error."""
        right = self.texts.right(fn, params)
        gaps = 100 * (self.right.astype(float) - right)
        error = gaps.std(ddof=1) / np.sqrt(len(gaps))
        return {"accuracy": float(right.mean()), "lost": float(gaps.mean()), "error": float(error)}

    def small(self, row: dict[str, Any], params: Any) -> jp.typing.Compact:
        dims = self.structure.dims
        keep = {n: np.isin(np.arange(dims[n].size), units) for n, units in row["units"].items()}
        return jp.compact(tuning.logits, params, self.structure.masks_of(keep), self.x)


# ---- rows -----------------------------------------------------------------------------------


def single_weights(case: Case, rows: Rows) -> Iterator[None]:
    """Fine-tunes under each method at each share of weights that is kept."""
    for kept, (when, method) in itertools.product(case.settings.kept, WAYS):
        name = f"{when}, {method.partition(',')[0]}, {kept:.0%} kept"
        if name in rows:
            continue
        start = case.dense if when == AFTER else case.start
        row = {"when": when, "method": method, "kept": kept}
        found, rates = tuning.best(start, case.texts, method, kept, case.settings, case.seed)
        rows[name] = row | case.judged(tuning.logits, found) | rates
        if when == AFTER:
            masks = tuning.PATTERN(jp.magnitude(case.dense), 1 - kept)
            cut = jp.apply_masks(case.dense, masks)
            rows[name]["untuned"] = float(case.texts.right(tuning.logits, cut).mean())
        print(f"  {name}: {rows[name]['lost']:.2f} points lost", flush=True)
        yield


def plan(case: Case, rows: Rows) -> Iterator[None]:
    """Which heads and hidden units stay at each speed, before and after fine-tuning."""
    asked = [(AFTER, s) for s in case.settings.speedups]
    asked += [(BEFORE, s) for s in case.settings.speedups if s == EARLY]
    missing = [(w, s) for w, s in asked if structured(w, s) not in rows]
    if not missing:
        return
    batches = case.batches[: case.settings.evidence]
    scores = jp.scores.taylor_units(
        case.structure, case.dense, tuning.loss, batches, progress=False
    )
    search = jp.Search(
        tuning.logits, case.dense, case.structure, scores, case.x, dims=DIMS, minimum={"*": 0}
    )
    early = search.stage(jp.magnitude(case.start), objective="balanced")
    for when, speedup in missing:
        found = (early if when == BEFORE else search).plan(jp.Target(speedup=speedup))
        rows[structured(when, speedup)] = {
            "when": when,
            "asked": speedup,
            "speedup": found.measured["speedup"],
            "kept_units": {name: int(v.sum()) for name, v in found.keep.items()},
            "units": {name: np.flatnonzero(v).tolist() for name, v in found.keep.items()},
            "load_average": load_average(),
        }
        print(f"  {structured(when, speedup)}: {found.measured['speedup']:.2f} x", flush=True)
        yield


def structured(when: str, speedup: float) -> str:
    return f"{when}, heads and units, {speedup:g} x"


def recover(case: Case, rows: Rows) -> Iterator[None]:
    """Fine-tunes what plans have left: from the pretrained weights, or with the dense teacher."""
    for name, row in rows.items():
        if "units" not in row or "accuracy" in row:
            continue
        late = row["when"] == AFTER
        small = case.small(row, case.dense if late else case.start)
        teacher = jax.jit(lambda x: tuning.logits(case.dense, x)) if late else None
        row["untuned"] = float(case.texts.right(small.fn, small.params).mean())
        row["params"] = int(sum(leaf.size for leaf in jax.tree.leaves(small.params)))
        steps = case.settings.steps
        found = jp.recover(
            small, tuning.loss, case.batches, teacher=teacher, steps=steps, progress=False
        )
        row.update(case.judged(found.fn, found.params), steps=found.recovery.steps)
        print(f"  {name}: {row['lost']:.2f} points lost", flush=True)
        yield


DO = {"plan": plan, "recover": recover, "weights": single_weights}


# ---- results --------------------------------------------------------------------------------


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """For each row the points lost to the dense network of its seed, over seeds."""
    lost: dict[str, list[Any]] = {}
    for found in seeds.values():
        for name, row in found.get("rows", {}).items():
            if "lost" in row:
                lost.setdefault(name, []).append(row)
    return [
        {
            "row": name,
            "seeds": len(each),
            "mean": float(np.mean([row["lost"] for row in each])),
            "points_lost": [row["lost"] for row in each],
            "errors": [row["error"] for row in each],
        }
        | ({"speedups": [row["speedup"] for row in each]} if "speedup" in each[0] else {})
        for name, each in sorted(lost.items())
    ]


def table(task: str, seeds: dict[str, Any]) -> Table:
    dense = [found["dense"] for found in seeds.values() if "dense" in found]
    title = f"{task}: dense {np.mean(dense):.2%}, seeds: {len(dense)}"
    shown = Table("", "points lost", "paired error", "measured", title=title)
    for row in summary(seeds):
        speeds = " ".join(f"{s:.2f} x" for s in row.get("speedups", []))
        errors = " ".join(f"{e:.2f}" for e in row["errors"])
        shown.add_row(row["row"], f"{row['mean']:.2f} of {row['seeds']}", errors, speeds)
    return shown


def picture(tasks: dict[str, Any], path: Path) -> None:
    """A row of panels per task: single weights by what is kept, units by measured speed."""
    import matplotlib.pyplot as plt

    size = 5.2, 3.4 * len(tasks)
    figure, axes = plt.subplots(len(tasks), 2, figsize=(2 * size[0], size[1]), squeeze=False,
                                layout="constrained")  # fmt: skip
    for (weights, speed), (task, seeds) in zip(axes, tasks.items()):
        dense = float(np.mean([found["dense"] for found in seeds.values()]))
        by_kept, by_speed = points(seeds)
        for ax, found, draw in ((weights, by_kept, jp.plot.accuracy_density),
                                (speed, by_speed, jp.plot.accuracy_speedup)):  # fmt: skip
            if found:
                draw(found, dense=dense, ax=ax)
                ax.legend(frameon=False, fontsize="small")
            ax.set_title(f"{task}, seeds: {', '.join(seeds)}", fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def points(seeds: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """{label: [(kept or speed, accuracy)]}, means over seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for each in seeds.values():
        for name, row in each.get("rows", {}).items():
            if "accuracy" in row:
                found.setdefault(name, []).append(row)
    kept: dict[str, Any] = {}
    speed: dict[str, Any] = {}
    for rows in found.values():
        first, accuracy = rows[0], float(np.mean([row["accuracy"] for row in rows]))
        if "kept" in first:
            label = f"{first['method'].partition(',')[0]}, {first['when']}"
            kept.setdefault(label, []).append((first["kept"], accuracy))
        else:
            at = float(np.mean([row["speedup"] for row in rows]))
            speed.setdefault(f"heads and units, {first['when']}", []).append((at, accuracy))
    return ({k: sorted(v) for k, v in kept.items()}, {k: sorted(v) for k, v in speed.items()})


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = studies.parser("text", __doc__)
    default = Settings()
    parser.add_argument("--quick", action="store_true", help="a look: hardly trained")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=default.seeds)
    parser.add_argument("--first-seed", type=int, default=default.first_seed)
    parser.add_argument("--steps", type=int, default=default.steps, help="of each fine-tuning")
    parser.add_argument("--train", type=int, default=default.train, help="texts")
    parser.add_argument("--layers", type=int, default=default.layers, help="of the encoder's six")
    parser.add_argument("--length", type=int, default=default.length, help="tokens of a text")
    parser.add_argument("--kept", type=float, nargs="+", default=list(default.kept))
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    settings = QUICK if args.quick else Settings(
        steps=args.steps, train=args.train, kept=tuple(args.kept), layers=args.layers,
        length=args.length,
    )  # fmt: skip
    stem = "text-quick" if args.quick else "text"
    path = results.folder(args.results) / f"{stem}.json"
    about = results.header("text") | {"settings": dataclasses.asdict(settings)}
    kept = results.continued(path, about["settings"])
    every = range(args.first_seed, args.first_seed + args.seeds)
    for seed, task in itertools.product(every, args.tasks):
        case = Case(task, settings, seed, args.weights / stem)
        found = kept.setdefault(task, {}).setdefault(str(seed), {"rows": {}})
        found |= {"dense": float(case.right.mean()), "about": case.about}
        for stage in (stage for stage in args.stages if stage in DO):
            for _ in DO[stage](case, found["rows"]):
                _save(about, kept, path)
        _save(about, kept, path)
        print(f"{task}, seed {seed}: dense {found['dense']:.4f}", flush=True)
    for task, each in kept.items():
        Console(width=110).print(table(task, each))
    picture(kept, path.with_suffix(".png"))
    print(path)


def _save(about: dict[str, Any], kept: dict[str, Any], path: Path) -> None:
    summaries = {task: summary(seeds) for task, seeds in kept.items()}
    results.save(about | {"networks": kept, "summary": summaries}, path)
