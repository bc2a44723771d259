"""``python -m benchmarks pretrained``: a text and a speech model pruned by the same calls.

MiniLM embeds WordNet glosses; a ridge probe, trained for each row on the pruned model's embeddings,
tells 26 supersenses apart. Silero VAD says for each 32 ms of real prompts whether there is speech.
Nothing is fine-tuned: one calibration pass through the dense model serves all rows. Single weights
go from every kernel alike, or whole units from the named dimensions alike; these are compacted.

Rows that the result file has are kept. ``--time`` measures the times of all rows in one interleaved
run: a network of the same widths stands for each, for values don't change a time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results, sounds, texts
from benchmarks.common.machine import load_average
from benchmarks.models import minilm, silero
from jaxprune.typing import ScoreFn

SEED = 0
TRAIN, TEST, LENGTH = 2000, 1000, 32  # glosses; tokens at most
CALIBRATED = {16: 256, 24: 256}  # tokens: glosses of exactly that length, so that none is padding
BATCH, BUCKETS = 50, (16, 32)  # of embedding
SECONDS, EXCERPTS, HEARD = 4, 64, 32  # of prompts: evaluated, calibrated on

Fn = Callable[..., Any]


# ---- models: what differs between them ----------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A pretrained network, and what is measured on it."""

    fn: Fn
    params: Any
    batches: list[Any]  # of calibration
    dims: tuple[str, ...]  # names of the dimensions that lose units
    measure: Callable[[Fn, Any], dict[str, float]]  # of a jitted function and params
    timed: dict[str, Any]  # name -> input; the first one's FLOPs are counted
    about: dict[str, Any]

    @property
    def example(self) -> Any:
        return next(iter(self.timed.values()))

    @functools.cached_property
    def structure(self) -> jp.typing.Structure:
        return jp.infer_structure(self.fn, self.params, self.example)


MINILM_DIMS = ("blocks/*/up/kernel:1", "blocks/*/q/kernel:1.0")  # hidden units, heads
SILERO_DIMS = ("conv?/kernel:2", "lstm/kernel:1.0")  # channels, hidden units


def text() -> Model:
    params, tokenizer = minilm.load(LENGTH)
    glosses, labels = texts.labelled_glosses()
    order = np.random.default_rng(SEED).permutation(len(glosses))
    ids = [e.ids for e in tokenizer.encode_batch([glosses[k] for k in order[: 5 * TRAIN]])]
    labels = labels[order]
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (32, LENGTH), 1000, 20_000))

    def measure(fn: Fn, params: Any) -> dict[str, float]:
        x = embed(fn, params, ids[: TRAIN + TEST])
        right = probe(x[:TRAIN], labels[:TRAIN]).predict(x[TRAIN:]) == labels[TRAIN : TRAIN + TEST]
        return {"accuracy": round(float(np.mean(right)), 4)}

    classes, counts = np.unique(labels[TRAIN : TRAIN + TEST], return_counts=True)
    return Model(
        minilm.apply, params, list(whole_glosses(ids[TRAIN + TEST :])), MINILM_DIMS, measure,
        {"batch 1": tokens[:1], "batch 32": tokens},
        {
            "model": "all-MiniLM-L6-v2", "train": TRAIN, "test": TEST, "tokens_at_most": LENGTH,
            "classes": 1 + int(labels.max()), "largest_class": counts.max() / TEST,
            "probe": "RidgeClassifier(alpha=1), trained per row",
        },
    )  # fmt: skip


def probe(x: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.linear_model import RidgeClassifier

    return RidgeClassifier(alpha=1.0).fit(x, labels)


def whole_glosses(ids: list[list[int]]) -> Iterator[np.ndarray]:
    """Calibration batches without padding, which would count as a token."""
    for length, count in CALIBRATED.items():
        rows = [row for row in ids if len(row) == length][:count]
        yield np.asarray(rows, np.int32)


def embed(fn: Fn, params: Any, ids: list[list[int]]) -> np.ndarray:
    """Embeddings of texts, the short ones apart: less of them is padding."""
    lengths = np.array([len(row) for row in ids])
    bucket = np.searchsorted(BUCKETS, lengths)
    out: dict[int, np.ndarray] = {}
    for k, length in enumerate(BUCKETS):
        members = np.flatnonzero(bucket == k)
        for begin in range(0, len(members), BATCH):
            part = np.resize(members[begin : begin + BATCH], BATCH)  # the last one: some twice
            found = np.asarray(fn(params, minilm.padded([ids[i] for i in part], length)))
            out.update(zip(part.tolist(), found))
    return np.stack([out[i] for i in range(len(ids))])


def speech() -> Model:
    params = silero.load()
    audio = sounds.excerpts(HEARD + EXCERPTS, SECONDS, SEED)
    heard, judged = audio[:HEARD], audio[HEARD:]
    dense = np.asarray(jax.jit(silero.apply)(params, judged)) > 0
    loud = sounds.loud(judged, silero.CHUNK)

    def measure(fn: Fn, params: Any) -> dict[str, float]:
        found = np.asarray(fn(params, judged)) > 0
        pairs = {"agreement": dense, "energy_agreement": loud}
        return {name: round(float(np.mean(found == other)), 4) for name, other in pairs.items()}

    return Model(
        silero.apply, params, np.split(heard, 4), SILERO_DIMS, measure,
        {f"{SECONDS} s": judged[:1]},
        {
            "model": "Silero VAD 6.2.3, 16 kHz", "excerpts": EXCERPTS, "seconds_each": SECONDS,
            "frames": dense.size, "speech_by_dense": round(float(dense.mean()), 4),
            "speech_by_energy": round(float(loud.mean()), 4),
        },
    )  # fmt: skip


MODELS: dict[str, Callable[[], Model]] = {"MiniLM": text, "Silero VAD": speech}


# ---- recipes: the same for all models -----------------------------------------------------------


class Recipe(NamedTuple):
    """How weights are scored, which go together, and how what stays is repaired."""

    score: Callable[[Any, jp.typing.Stats], Any]
    pattern: Callable[[Model], Any]
    refit: bool = False
    bias: bool = False


def is_pruned(path: str, leaf: Any) -> bool:
    return path.endswith("kernel")  # not embeddings, norms, and the Fourier transform


def entries(model: Model) -> Any:
    return jp.unstructured(where=is_pruned)


def entries_per_output(model: Model) -> Any:
    return jp.unstructured(per_output=True, where=is_pruned)


def units(model: Model) -> Any:
    return jp.structured(model.structure, dims=model.dims, reduce=jp.reduce.sum)


def magnitude(params: Any, stats: jp.typing.Stats) -> Any:
    return jp.magnitude(params)


def wanda(params: Any, stats: jp.typing.Stats) -> Any:
    return jp.wanda(params, input_norms=stats.norms)


def read(score: ScoreFn) -> Callable[[Any, jp.typing.Stats], Any]:
    """The same scores in sum per input, spread evenly over outputs.

    What computes a unit then gives all of them the same: only what reads them tells them apart.
    """

    def scores(params: Any, stats: jp.typing.Stats) -> Any:
        def even(path: Any, s: Any) -> Any:
            layout = stats.layouts.get(jp.typing.path_str(path))
            return jnp.zeros_like(s) + (0 if layout is None else s.mean(layout.outs, keepdims=True))

        return jax.tree_util.tree_map_with_path(even, score(params, stats=stats))

    return scores


energy, flap = read(jp.scores.activation_energy), read(jp.scores.flap)
RECIPES = {
    "magnitude": Recipe(magnitude, entries),
    "Wanda": Recipe(wanda, entries_per_output),
    "Wanda + refit": Recipe(wanda, entries_per_output, refit=True),
    "energy": Recipe(energy, units),
    "energy + refit + bias": Recipe(energy, units, refit=True, bias=True),
    "FLAP + refit": Recipe(flap, units, refit=True),
    "FLAP + refit + bias": Recipe(flap, units, refit=True, bias=True),
}
POINTS: dict[Any, tuple[float, ...]] = {
    entries: (0.5, 0.7),
    entries_per_output: (0.5, 0.7),
    units: (0.25, 0.5),
}


def calibrated(model: Model) -> jp.typing.Stats:
    return jp.calibrate(model.fn, model.params, model.batches, where=is_pruned)


def pruned(
    model: Model, stats: jp.typing.Stats, recipe: Recipe, sparsity: float
) -> tuple[Any, Any]:
    """Params with zeros, and masks."""
    dense = model.params
    masks = recipe.pattern(model)(recipe.score(dense, stats), sparsity)
    params = jp.apply_masks(dense, masks)
    if recipe.refit:
        params = jp.oneshot.refit(dense, masks, stats, start=params)
    if recipe.bias:
        params = jp.oneshot.compensate(dense, params, masks, stats, biases=biases(dense))
    return params, masks


def biases(params: Any) -> dict[str, str]:
    """Each kernel's bias: the leaf of that name beside it."""
    paths = [jp.typing.path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {p: f"{p.rpartition('/')[0]}/bias" for p in paths if is_pruned(p, None)}


# ---- rows ---------------------------------------------------------------------------------------


def jobs() -> dict[str, tuple[Recipe, float]]:
    return {
        f"{name} -{sparsity:.0%}": (recipe, sparsity)
        for name, recipe in RECIPES.items()
        for sparsity in POINTS[recipe.pattern]
    }


def weighed(model: Model, fn: Fn, params: Any) -> dict[str, Any]:
    """Size, cost and quality of a function and its params."""
    leaves = jax.tree.leaves(params)
    return {
        "params": sum(leaf.size for leaf in leaves),
        "nonzero": sum(int(jnp.count_nonzero(leaf)) for leaf in leaves),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "flops": jp.cost(fn, params, model.example).flops,
    } | model.measure(jax.jit(fn), params)


def row(model: Model, stats: jp.typing.Stats, recipe: Recipe, sparsity: float) -> dict[str, Any]:
    begin = time.perf_counter()
    params, masks = jax.block_until_ready(pruned(model, stats, recipe, sparsity))
    seconds = {"pruning_seconds": round(time.perf_counter() - begin, 2), "sparsity": sparsity}
    if recipe.pattern is not units:
        return seconds | weighed(model, model.fn, params)
    small = jp.compact(model.fn, params, masks, model.example)
    want = jax.jit(model.fn)(params, model.example)
    got = jax.jit(small.fn)(small.params, model.example)
    keep = model.structure.keep(masks)
    return seconds | weighed(model, small.fn, small.params) | {
        "exact": small.certificate.exact,
        "max_relative_error": float(jnp.abs(got - want).max() / jnp.abs(want).max()),
        "kept": {name: int(k.sum()) for name, k in keep.items() if not k.all()},
    }  # fmt: skip


def stand_in(model: Model, jitted: Fn, found: dict[str, Any]) -> tuple[Fn, Any]:
    """A function and params of a row's widths, with as many zeros."""
    if "kept" not in found:
        masks = entries(model)(jp.magnitude(model.params), found["sparsity"])
        return jitted, jp.apply_masks(model.params, masks)
    sizes = {name: dim.size for name, dim in model.structure.dims.items()}
    keep = {name: np.arange(sizes[name]) < count for name, count in found["kept"].items()}
    small = jp.compact(model.fn, model.params, model.structure.masks(keep), model.example)
    return jax.jit(small.fn), small.params


def timed(model: Model, rows: dict[str, Any], rounds: int) -> None:
    """Adds each row's times, of one interleaved run per input."""
    jitted = jax.jit(model.fn)
    stands: dict[str, tuple[Fn, Any]] = {"dense": (jitted, model.params)}
    stands |= {k: stand_in(model, jitted, found) for k, found in rows.items() if k != "dense"}
    for name, x in model.timed.items():
        compared = jp.compare({k: (fn, (p, x)) for k, (fn, p) in stands.items()}, repeats=rounds)
        for key, found in rows.items():
            speedup = {"speedup": compared.ratios[key]._asdict()}
            found.setdefault("timing", {})[name] = compared.timings[key].to_json() | speedup


QUALITY = {"accuracy": "accuracy", "agreement": "agrees with dense", "energy_agreement": "energy"}


def table(name: str, rows: dict[str, Any]) -> Table:
    dense = rows["dense"]
    quality = [key for key in QUALITY if key in dense]
    times = list(dense.get("timing", {}))
    heads = [*(QUALITY[k] for k in quality), "params", "not zero", "kB", "MFLOPs"]
    shown = Table(name, *heads, *(h for t in times for h in (f"{t} [ms]", "speed-up")), title=name)
    for key, found in rows.items():
        sizes = [f"{found['params']:,}", f"{found['nonzero']:,}", f"{found['bytes'] / 1e3:,.0f}"]
        spent = [found["timing"][t] for t in times] if "timing" in found else []
        shown.add_row(
            key,
            *(f"{found[k]:.1%}" for k in quality),
            *sizes,
            f"{found['flops'] / 1e6:,.1f}",
            *(c for t in spent for c in _time(t)),
        )
    return shown


def _time(found: dict[str, Any]) -> tuple[str, str]:
    return f"{found['median_seconds'] * 1e3:.2f}", f"{found['speedup']['median']:.2f} x"


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("pretrained", __doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="*", default=list(jobs()), metavar="NAME", help="to add")
    parser.add_argument("--time", action="store_true", help="time all rows that are there")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    path = results.folder(args.results) / "pretrained.json"
    result = results.load(path) if path.exists() else results.header("pretrained")
    for name in args.models:
        model = MODELS[name]()
        kept = result.setdefault("models", {}).setdefault(name, {"about": model.about, "rows": {}})
        if args.time:
            kept["load_average"] = {"before": load_average()}
            timed(model, kept["rows"], args.rounds)
            results.save(result, path)
        else:
            for _ in fill(model, kept["rows"], args.rows):
                results.save(result, path)
            order = ["dense", *jobs()]
            kept["rows"] = {k: kept["rows"][k] for k in order if k in kept["rows"]}
            results.save(result, path)
        Console(width=160).print(table(name, kept["rows"]))


def fill(model: Model, rows: dict[str, Any], names: Iterable[str]) -> Iterator[None]:
    """Adds those of the named rows that are not there; yields after each."""
    if "dense" not in rows:
        rows["dense"] = weighed(model, model.fn, model.params)
        yield
    missing = {name: jobs()[name] for name in names if name not in rows}
    if not missing:
        return
    stats = calibrated(model)
    for name, job in missing.items():
        rows[name] = row(model, stats, *job)
        print(name, {k: v for k, v in rows[name].items() if k != "kept"}, flush=True)
        yield
