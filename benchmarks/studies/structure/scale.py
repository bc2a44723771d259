"""``python -m benchmarks scale``: what finding, cutting and tracing cost when a network doubles.

Networks of :mod:`benchmarks.models.deep` at a size and at its half, and the compilation of one
training step of a tree of leaves of twelve shapes, beside that of the optimizer alone. Seconds of
the processor, the least of some rounds; compiled programs are forgotten before each. Rows that the
file has are not measured again.
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
SHAPES = [(4, 4), (4, 8), (8, 4), (8, 8), (16, 4), (4, 16), (3, 3, 2, 4), (16, 8), (8, 16), (8, 2),
          (2, 8), (16, 2)]  # fmt: skip
COUNTS = (1000, 2000, 4000)  # of leaves
ALONE, INNER = "adamw", optax.adamw(1e-3)
TRAINING = {
    ALONE: (INNER, COUNTS),
    "jp.prune": (jp.prune(INNER, jp.magnitude, 0.9), COUNTS),
}

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
    """The seconds that one step takes to trace and to compile, and its operations."""
    jax.clear_caches()
    rng = np.random.default_rng(0)
    shapes = [SHAPES[i % len(SHAPES)] for i in range(size)]
    params = {str(i): np.asarray(rng.normal(size=s), np.float32) for i, s in enumerate(shapes)}
    tx, _ = TRAINING[name]
    state = tx.init(params)
    trace, traced = seconds(lambda: jax.jit(tx.update).trace(params, state, params))
    lower, lowered = seconds(traced.lower)
    compile_, _ = seconds(lowered.compile)
    equations = operations(traced.jaxpr.jaxpr)
    return {"equations": equations, "trace": trace + lower, "compile": compile_}


def operations(jaxpr: Any) -> int:
    """Equations, with those of the programs within them."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params, is_leaf=is_program)]
    programs = [getattr(x, "jaxpr", x) for x in inner if is_program(x)]
    return len(jaxpr.eqns) + sum(map(operations, programs))


def is_program(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


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


def beside(rows: dict[str, Row]) -> dict[str, dict[str, float]]:
    """For each training step how many times as much it takes as the optimizer's alone."""
    found: dict[str, dict[str, float]] = {}
    for label, row in rows.items():
        name, size = label.rsplit(" ", 1)
        alone = rows.get(f"{ALONE} {size}")
        if name in TRAINING and name != ALONE and alone is not None:
            found[label] = {key: round(row[key] / alone[key], 2) for key in row}
    return found


def jobs(scale: float) -> dict[str, Callable[[], Row]]:
    """Label -> measurement, the half of each size first."""
    found: dict[str, Callable[[], Row]] = {}
    for name, whole in SIZES.items():
        for size in (int(whole * scale) // 2, int(whole * scale) // 2 * 2):
            found[f"{name} {size}"] = functools.partial(network, name, size)
    for name, (_, sizes) in TRAINING.items():
        for size in (int(most * scale) for most in sizes):
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
            rounds = 1 if label.rsplit(" ", 1)[0] in TRAINING else args.rounds
            found["rows"][label] = least([measure() for _ in range(rounds)])
            told = {"growth": growth(found["rows"]), "beside adamw": beside(found["rows"])}
            results.save(found | told, path)
            print(label, found["rows"][label], flush=True)
    print(growth(found["rows"]), beside(found["rows"]))
