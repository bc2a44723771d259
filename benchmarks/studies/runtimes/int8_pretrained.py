"""What do int8 and pruning cost together in text and speech models?

``python -m benchmarks int8_pretrained`` prunes MiniLM, Silero VAD and SmolLM2 as ``pretrained`` and
``oneshot_structured`` do, without training, and runs each in each engine that is installed, in
float32 and in int8: dense; pruned; and pruned after its weights were rounded to int8, the other
order. Where calibrated int8 loses more than a point, the weights that ``jp.runtimes.sensitivity``
names stay in float. It saves quality, bytes, and milliseconds of one interleaved run, and a picture
of each in the engine where it is fastest. It resumes by row: files for engines are kept, and a row
during which the process ended, for want of memory, says so when it goes on.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average
from benchmarks.models import smollm2
from benchmarks.studies import pretrained
from benchmarks.studies.oneshot import structured, weights
from benchmarks.studies.runtimes import picture
from benchmarks.studies.runtimes.int8 import ENGINES
from jaxprune.runtimes._sensitivity import rounded

SEQUENCES, LENGTH = 32, 128  # of SmolLM2: calibration; tokens of each that is judged
BATCHES = 4  # of calibration, for an engine; the last one finds what should stay in float
QUALITIES = ("agreement", "energy_agreement", "accuracy", "perplexity")
LOST, NEAR = 0.01, 0.98  # More of a quality lost asks for weights in float, for outputs so near.

Fn = Callable[..., Any]
Save = Callable[[], None]


class Task(NamedTuple):
    """A network in some forms, and what is measured on it."""

    models: dict[str, tuple[Fn, Any]]
    measure: Callable[[Fn, Any], dict[str, float]]
    batches: list[Any]  # of calibration
    timed: Any


def _as_int8(params: Any, held: Callable[[str], bool]) -> Any:
    """Weights as 8 bits hold them, one scale for each output."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: rounded(x, 8, -1) if held(jp.typing.path_str(path)) else x, params
    )


def _cut(model: pretrained.Model, recipe: pretrained.Recipe, sparsity: float) -> tuple[Fn, Any]:
    params, masks = pretrained.pruned(model, pretrained.calibrated(model), recipe, sparsity)
    small = jp.compact(model.fn, params, masks, model.example)
    return small.fn, small.params


def of_pretrained(model: pretrained.Model, recipe: str, sparsity: float) -> Task:
    """MiniLM or Silero VAD, whose units go by a row of ``pretrained``."""
    name = pretrained.RECIPES[recipe]
    held = _as_int8(model.params, lambda path: pretrained.is_pruned(path, None))
    other = replace(model, params=held)
    models = {
        "dense": (model.fn, model.params),
        "pruned": _cut(model, name, sparsity),
        "int8, then pruned": _cut(other, name, sparsity),
    }
    return Task(models, model.measure, model.batches, list(model.timed.values())[-1])


def of_smollm2() -> Task:
    """SmolLM2 without a fifth of its hidden units, as ``oneshot_structured`` repairs them."""
    params, tokenizer = smollm2.load()
    tokens = weights.calibration(tokenizer, True, SEQUENCES)
    excerpt = weights.corpora(tokenizer)["excerpt"].reshape(-1, LENGTH)

    def pruned(dense: Any) -> tuple[Fn, Any]:
        keep = structured.ffn("FLAP", 20, structured.scored(dense, tokens))
        cut, masks = structured.pruned_model(dense, tokens, keep, True, True)
        every = {"embedding": True, "norm": True, "blocks": masks}
        small = jp.compact(smollm2.apply, cut, every, jnp.asarray(excerpt[:1]))
        return small.fn, small.params

    def measure(fn: Fn, params: Any) -> dict[str, float]:
        losses = []
        for row in excerpt:
            logits = jax.nn.log_softmax(jnp.asarray(fn(params, row[None])[0, :-1]))
            losses.append(-np.mean(np.take_along_axis(np.asarray(logits), row[1:, None], 1)))
        return {"perplexity": float(np.exp(np.mean(losses)))}

    models = {
        "dense": (smollm2.apply, params),
        "pruned": pruned(params),
        "int8, then pruned": pruned(_as_int8(params, lambda path: "norm" not in path)),
    }
    return Task(models, measure, [tokens[:8, :LENGTH]], excerpt[:1])


TASKS: dict[str, Callable[[], Task]] = {
    "MiniLM": lambda: of_pretrained(pretrained.text(), "FLAP + refit + bias", 0.25),
    "Silero VAD": lambda: of_pretrained(pretrained.speech(), "energy + refit + bias", 0.25),
    "SmolLM2": of_smollm2,
}

# LiteRT's converter was stopped at 21.7 GB of memory.
WITHOUT: dict[str, tuple[str, ...]] = {"SmolLM2": ("litert",)}


@dataclass
class Served:
    """A function in an engine, written anew for each shape of its input."""

    fn: Fn
    params: Any
    make: Callable[..., Any]
    bits: str | None
    batches: list[Any]
    folder: Path
    root: Path
    keep: tuple[str, ...] = ()  # weights in float
    files: dict[Any, Any] = field(default_factory=dict)

    def __call__(self, params: Any, x: Any) -> Any:
        return self.file(np.asarray(x))({}, x)

    def file(self, x: Any) -> Any:
        if x.shape not in self.files:
            where = self.path(x)
            jp.export(self.fn, where, self.params, x, runtime=self.runtime(x))
            self.files[x.shape] = jp.load_exported(where).fn
        return self.files[x.shape]

    def path(self, x: Any) -> Path:
        return self.folder / "x".join(map(str, x.shape))

    def runtime(self, x: Any) -> Any:
        calibration = None
        if self.bits == "static":
            calibration = [(_fitted(b, x),) for b in self.batches[:BATCHES]]
        return self.make(quantize=self.bits, calibration=calibration, keep_float=self.keep)

    def some_in_float(self, x: Any) -> Served:
        """The same without the weights around which calibrated ranges don't hold the outputs."""
        given = jnp.asarray(_fitted(self.batches[-1], x))
        wanted = np.asarray(self.fn(self.params, given))

        def near(runtime: Any) -> float:
            got = runtime(self.fn, self.params, given)(self.params, given)
            return 1 - float(np.abs(got - wanted).mean() / np.abs(wanted).mean())

        found = jp.runtimes.sensitivity(self.params, near, runtime=self.runtime(given))
        kept = found.keep_float(NEAR)
        return replace(self, keep=kept, folder=self.folder / "in float", files={})


def _fitted(batch: Any, like: Any) -> Any:
    """A batch in another's shape: rows again, or some; cut, or zeros at the end."""
    given = np.asarray(batch)
    rows = np.resize(given, (len(like), *given.shape[1:]))
    length = min(rows.shape[1], like.shape[1])
    out = np.zeros(like.shape, like.dtype)
    out[:, :length] = rows[:, :length]
    return out


def measured(
    task: Task, engines: dict[str, Any], repeats: int, found: dict[str, Any], save: Save
) -> None:
    """Rows of quality, bytes and milliseconds, saved one by one."""
    known, timed = found.get("rows", []), np.asarray(task.timed)
    # Times need the files, which another machine does not have.
    rows = [r for r in known if "file" not in r or (found["folder"] / r["file"]).exists()]
    found["rows"] = rows
    for row, served in _each(task, engines, found["folder"]):
        if not any(_same(row, other) for other in rows):
            _judge(row, served, task, rows, save)
        if _loses(row, rows):
            some = served.some_in_float(timed)
            _judge({**row, "in float": some.keep}, some, task, rows, save)
        served.files.clear()
        gc.collect()
    calls: dict[str, Any] = {
        str(k): (jp.load_exported(found["folder"] / row["file"]).fn, ({}, timed))
        for k, row in enumerate(rows)
        if "file" in row
    }
    times = jp.compare(calls, repeats=repeats, progress=False)
    for key, timing in times.timings.items():
        rows[int(key)] |= {"milliseconds": 1e3 * timing.median, "runtime": timing.runtime,
                           "quartiles": [1e3 * q for q in timing.quartiles]}  # fmt: skip
    found["load_average"] = load_average()
    found["float32 in XLA"] = {
        n: task.measure(jax.jit(fn), params) for n, (fn, params) in task.models.items()
    }
    save()


def _judge(
    row: dict[str, Any], served: Served, task: Task, rows: list[dict[str, Any]], save: Save
) -> None:
    rows.append(row)
    row["refused"] = "the process ended here"  # That stands if it does.
    save()
    shutil.rmtree(served.folder, ignore_errors=True)  # A file of older code is not this row's.
    try:
        row |= task.measure(served, None)
        where = served.path(np.asarray(task.timed))
        served.file(np.asarray(task.timed))
        certificate = json.loads((where / "certificate.json").read_text())
        row |= {
            "bytes": sum(file["bytes"] for file in certificate["files"].values()),
            "residual": certificate["residual"]["relative"],
            "file": str(where.relative_to(served.root)),
        }
        del row["refused"]
    except Exception as error:  # It is the row's verdict.
        row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    save()
    print("  ", row, flush=True)


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are one model, engine and number of bits, all of its weights in them."""
    return "in float" not in other and all(row[k] == other[k] for k in row)


def _loses(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether ONNX Runtime's calibrated int8 loses agreement, and no row of less of it is there."""
    if row["engine"] != "onnx" or row["int8"] != "static":
        return False
    same = [r for r in rows if (r["model"], r["engine"]) == (row["model"], "onnx")]
    known = {("some" if "in float" in r else r["int8"]): r.get("agreement") for r in same}
    if "some" in known or known[None] is None or known["static"] is None:
        return False
    return known[None] - known["static"] > LOST


def _each(
    task: Task, engines: dict[str, Any], folder: Path
) -> Iterator[tuple[dict[str, Any], Served]]:
    for engine, make in engines.items():
        for model, (fn, params) in task.models.items():
            for bits in (None, *make().engine.quantize):
                row = {"model": model, "engine": engine, "int8": bits}
                where = folder / f"{model}-{engine}-{bits}"
                yield row, Served(fn, params, make, bits, task.batches, where, folder)


# ------------------------------------------------------------------------------------- results


def table(found: dict[str, Any]) -> Table:
    """A row for each network, engine and number of bits."""
    shown = Table("network", "model", "engine", "int8", "quality", "ms", "MB")
    for network, each in found.items():
        for model, qualities in each.get("float32 in XLA", {}).items():
            shown.add_row(network, model, "xla", "-", _said(qualities), "", "")
        for row in each["rows"]:
            cells = [row.get("refused", ""), "", ""]
            if "refused" not in row:
                known = {k: row[k] for k in QUALITIES if k in row}
                time = f"{row['milliseconds']:.3g}" if "milliseconds" in row else ""
                cells = [_said(known), time, f"{row['bytes'] / 1e6:.2f}"]
            bits = (row["int8"] or "-") + (", some in float" if "in float" in row else "")
            shown.add_row(network, row["model"], row["engine"], bits, *cells)
    return shown


def _finished(found: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in found.items() if "load_average" in each}


def _said(qualities: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in qualities.items())


def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = studies.parser("int8_pretrained", __doc__)
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=list(ENGINES),
        default=[n for n in ENGINES if "thread" not in n],
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    kept = Path.home() / ".cache" / "jaxprune" / "int8"
    parser.add_argument("--files", type=Path, default=kept, help="where engines' files are kept")
    args = parser.parse_args(argv)
    engines = {name: make for name, (package, make) in ENGINES.items()
               if name in args.engines and importlib.util.find_spec(package)}  # fmt: skip
    if not engines:
        parser.error("no engine is installed: pip install 'jaxprune[onnx]'")
    settings = {"repeats": args.repeats, "engines": list(engines)}
    path = results.folder(args.results) / "int8_pretrained.json"
    found = results.continued(path, settings)

    def save() -> None:
        header = results.header("int8_pretrained")
        kept = {n: {k: v for k, v in each.items() if k != "folder"} for n, each in found.items()}
        results.save(header | {"settings": settings, "networks": kept}, path)

    for name in args.networks:
        each = found.setdefault(name, {})
        if "load_average" not in each:
            each["folder"] = args.files / name
            without = WITHOUT.get(name, ())
            some = {engine: make for engine, make in engines.items() if engine not in without}
            measured(TASKS[name](), some, args.repeats, each, save)
            print(name, flush=True)
            jax.clear_caches()
    Console(width=140).print(table(found))
    panels = {name: _panel(each) for name, each in _finished(found).items()}
    picture.draw(panels, path.with_suffix(".png"))
    print(path)


def _panel(found: dict[str, Any]) -> tuple[str, dict[str, picture.Point]]:
    quality = next(iter(found["float32 in XLA"]["dense"]))
    return quality, picture.fastest(found["rows"], quality)
