"""``python -m benchmarks scale``: what finding, cutting and tracing cost when a network doubles.

Networks of :mod:`benchmarks.models.deep` at a size and at its half, and the compilation of one
training step of a tree of leaves of twelve shapes. Seconds of the processor, the least of some
rounds; compiled programs are forgotten before each. Rows that the file has are not measured again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.models.deep import NETWORKS

SIZES = {"transformer": 192, "dense_net": 128, "branches": 1000, "tree": 10_000}
LEAVES = 500
SHAPES = [(4, 4), (4, 8), (8, 4), (8, 8), (16, 4), (4, 16), (3, 3, 2, 4), (16, 8), (8, 16), (8, 2),
          (2, 8), (16, 2)]  # fmt: skip
TRAINING = ("adamw", "jp.prune")

Row = dict[str, Any]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def network(name: str, size: int) -> Row:
    """The seconds of each job on one network."""
    jax.clear_caches()
    fn, params, x = NETWORKS[name](size)
    trace, closed = seconds(lambda: jax.make_jaxpr(fn)(params, x))
    infer, structure = seconds(lambda: jp.infer_structure(fn, params, x))
    scores = jax.tree.map(np.abs, params)
    structured, masks = seconds(lambda: jp.structured(structure)(scores, 0.5))
    compact, small = seconds(lambda: jp.compact(fn, params, masks, x))
    small_trace, _ = seconds(lambda: jax.make_jaxpr(small.fn)(small.params, x))
    return {
        "equations": len(closed.jaxpr.eqns), "dimensions": len(structure.dims), "trace": trace,
        "infer_structure": infer, "structured": structured, "compact": compact,
        "trace_small": small_trace,
    }  # fmt: skip


def training(name: str, size: int) -> Row:
    """The seconds that one step takes to trace and to compile."""
    jax.clear_caches()
    rng = np.random.default_rng(0)
    shapes = [SHAPES[i % len(SHAPES)] for i in range(size)]
    params = {str(i): np.asarray(rng.normal(size=s), np.float32) for i, s in enumerate(shapes)}
    inner = optax.adamw(1e-3)
    tx = inner if name == "adamw" else jp.prune(inner, jp.magnitude, 0.5)
    state = tx.init(params)
    trace, lowered = seconds(lambda: jax.jit(tx.update).lower(params, state, params))
    compile_, _ = seconds(lowered.compile)
    return {"trace": trace, "compile": compile_}


def least(rows: Sequence[Row]) -> Row:
    return {key: min(row[key] for row in rows) for key in rows[0]}


def growth(rows: dict[str, Row]) -> dict[str, dict[str, float]]:
    """For each network how many times longer a job takes at the double size."""
    found: dict[str, dict[str, float]] = {}
    for label, row in rows.items():
        name, size = label.rsplit(" ", 1)
        half = rows.get(f"{name} {int(size) // 2}")
        if half is not None:
            pairs = {key: (row[key], half[key]) for key in row if isinstance(row[key], float)}
            found[label] = {key: round(a / max(b, 1e-9), 2) for key, (a, b) in pairs.items()}
    return found


def jobs(scale: float) -> dict[str, Callable[[], Row]]:
    """Label -> measurement, the half of each size first."""
    found: dict[str, Callable[[], Row]] = {}
    for name, whole in SIZES.items():
        for size in (int(whole * scale) // 2, int(whole * scale) // 2 * 2):
            found[f"{name} {size}"] = functools.partial(network, name, size)
    for name in TRAINING:
        for size in (int(LEAVES * scale) // 2, int(LEAVES * scale) // 2 * 2):
            found[f"{name} {size}"] = functools.partial(training, name, size)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("scale", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    path = results.folder(args.results) / "scale.json"
    found = results.load(path) if path.exists() else results.header("scale") | {"rows": {}}
    network("branches", 4)  # What is compiled or imported once is no row's.
    for label, measure in jobs(args.scale).items():
        if label not in found["rows"]:
            rounds = 1 if label.split()[0] in TRAINING else args.rounds
            found["rows"][label] = least([measure() for _ in range(rounds)])
            results.save(found | {"growth": growth(found["rows"])}, path)
            print(label, found["rows"][label], flush=True)
    print(growth(found["rows"]))
