"""``python -m benchmarks solver_speed``: how long choosing the widths of a deep network takes.

The transformer of :mod:`benchmarks.studies.structure.networks`, from shapes alone, with an H100's
published peaks in place of measured times: what is timed is building the tables once, and the
solver for each speed-up, in seconds of the processor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.studies.structure.networks import of_transformer

SPEEDUPS = (1.25, 1.5, 2.0, 3.0)


def study(layers: int, speedups: Sequence[float] = SPEEDUPS) -> dict[str, Any]:
    """Seconds for the tables, and for each speed-up; and how much there is to choose."""
    fn, params, tokens = of_transformer(layers)
    structure = jp.infer_structure(fn, params, tokens)
    rng = np.random.default_rng(0)
    scores = {name: rng.random(dim.size) for name, dim in structure.dims.items() if not dim.frozen}
    begin = time.process_time()
    search = jp.Search(fn, params, structure, scores, tokens, device="H100")
    search.plan(jp.Target(speedup=speedups[0]), verify=False)  # the tables of time, too
    tables = time.process_time() - begin
    return {
        "layers": layers,
        "dimensions": len(search.model.names),
        "candidates": sum(map(len, search.model.counts)),
        "seconds_for_tables_and_first": tables,
        "seconds": {f"{s:g} x": _solved(search, s) for s in speedups},
    }


def _solved(search: jp.Search, speedup: float) -> float:
    budgets = jp.Target(speedup=speedup).budgets(search.dense)
    begin = time.process_time()
    assert search.choices.solved(budgets) is not None
    return time.process_time() - begin


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("solver_speed", __doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    found = study(args.layers)
    results.save(
        results.header("solver_speed") | found,
        results.folder(args.results) / "solver_speed.json",
    )
    print(found)
