"""Is a compact program as fast as the same module written at the small size by hand?

``python -m benchmarks.native`` halves every dimension of the main job's network (random weights
suffice for time) and times dense, compact and native in interleaved rounds of one run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from benchmarks import results
from benchmarks.model import ResNet

WIDTHS = (64, 128)
BATCHES = (1, 64)


def build(batch: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The three functions with their arguments, and the FLOPs of each."""
    big, native = ResNet(10, WIDTHS), ResNet(10, [width // 2 for width in WIDTHS])
    x = jax.random.normal(jax.random.key(0), (batch, 28, 28, 1))
    params = big.init(jax.random.key(1), x)
    structure = jp.infer_structure(big.apply, params, x)
    free = [d for d in structure.dims.values() if not d.frozen]
    masks = structure.masks({d.name: np.arange(d.size) % 2 == 0 for d in free})
    small = jp.compact(big.apply, params, masks, x)
    fresh = native.init(jax.random.key(1), x)
    shapes = [jax.tree.map(np.shape, tree) for tree in (fresh, small.params)]
    assert shapes[0] == shapes[1], "the native module has other shapes than the compact one"
    entries = {
        "native": (native.apply, (fresh, x)),
        "compact": (small.fn, (small.params, x)),
        "dense": (big.apply, (params, x)),
    }
    return entries, {name: jp.cost(fn, *args).flops for name, (fn, args) in entries.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    rows = {}
    for batch in BATCHES:
        entries, flops = build(batch)
        timed = jp.compare(entries, rounds=args.rounds, baseline="native")
        print(f"batch {batch}, FLOPs {flops}\n{timed}")
        rows[str(batch)] = {"flops": flops} | {
            name: {
                "native_over_this": timed.ratios[name],
                "median_seconds": timed.timings[name].median,
                "samples_seconds": list(timed.timings[name].samples),
            }
            for name in entries
        }
    path = results.folder(args.results) / "native.json"
    settings = {"widths": WIDTHS, "rounds": args.rounds}
    results.save(results.header("native") | {"settings": settings, "batches": rows}, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
