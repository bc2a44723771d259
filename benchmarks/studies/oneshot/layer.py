"""``python -m benchmarks oneshot_layer``: methods on one linear layer, by held-out output error.

Inputs are correlated (few directions carry most of their energy) and some features are outliers.
The relative output error ||XW - XV||^2 / ||XW||^2 is measured on the calibration tokens and on
fresh ones; means over three draws.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results

POINTS = {"2:4": jp.n_m(2, 4), "50%": jp.unstructured(per_output=True)}


def layer(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def draw(seed: int, inputs: int, outputs: int, tokens: int) -> tuple[jax.Array, jax.Array, Any]:
    """Calibration tokens, twice as many fresh ones, and a layer's weights."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs)) * (np.arange(1, inputs + 1) ** -0.8)[:, None]
    mix /= np.sqrt(np.sum(mix**2, 0))
    scale = np.exp(0.4 * rng.normal(size=inputs))
    scale[rng.choice(inputs, inputs // 64, replace=False)] *= 7
    noise = 0.3 * rng.normal(size=(3 * tokens, inputs))
    x = (rng.normal(size=(3 * tokens, inputs)) @ mix + noise) * scale
    w = rng.normal(size=(inputs, outputs))
    x32 = jnp.asarray(x, jnp.float32)
    return x32[:tokens], x32[tokens:], {"w": jnp.asarray(w, jnp.float32)}


def study(
    seed: int, inputs: int = 512, outputs: int = 256, tokens: int = 4096, exact: bool = False
) -> dict[str, Any]:
    """{point: {method: {"in": error, "held out": error, "seconds": ...}}}."""
    x, fresh, params = draw(seed, inputs, outputs, tokens)
    stats, held = (jp.calibrate(layer, params, [rows]) for rows in (x, fresh))
    return {
        at: {
            name: _judged(params, method, stats, held)
            for name, method in _methods(params, stats, pattern, exact).items()
        }
        for at, pattern in POINTS.items()
    }


def _judged(params: Any, method: Any, stats: Any, held: Any) -> dict[str, float]:
    begin = time.perf_counter()
    pruned = jax.block_until_ready(method())
    seconds = time.perf_counter() - begin
    errors = [jp.oneshot.output_error(params, pruned, s)["w"] for s in (stats, held)]
    return {"in": float(errors[0]), "held out": float(errors[1]), "seconds": round(seconds, 2)}


def _methods(params: Any, stats: Any, pattern: Any, exact: bool) -> dict[str, Any]:
    """Each as a function of nothing -> pruned params."""
    masks = {
        "magnitude": pattern(jp.magnitude(params), 0.5),
        "wanda": pattern(jp.wanda(params, input_norms=stats.norms), 0.5),
        "sparsegpt": jp.oneshot.sparsegpt(params, stats, 0.5, pattern=pattern)[1],
    }
    found = {
        "magnitude": lambda: jp.apply_masks(params, masks["magnitude"]),
        "wanda": lambda: jp.apply_masks(params, masks["wanda"]),
        "sparsegpt": lambda: jp.oneshot.sparsegpt(params, stats, 0.5, pattern=pattern)[0],
        "alps": lambda: jp.oneshot.alps(params, stats, 0.5, pattern=pattern)[0],
    }
    for name, mask in masks.items():
        found[f"{name} + refit"] = functools.partial(jp.oneshot.refit, params, mask, stats)
    if exact:
        found["wanda + least squares"] = lambda: jp.oneshot.least_squares(
            params, masks["wanda"], stats
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("oneshot_layer", __doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    runs = [study(seed, exact=seed == 0) for seed in range(3)]
    path = results.folder(args.results) / "oneshot_layer.json"
    results.save(results.header("oneshot_layer") | {"seeds": runs, "mean": _means(runs)}, path)
    for at, rows in _means(runs).items():
        for name, row in rows.items():
            print(f"{at:>4} {name:<24} in {row['in']:.4f}  held out {row['held out']:.4f}")


def _means(runs: list[Any]) -> dict[str, Any]:
    return {
        at: {
            name: {k: float(np.mean([r[at][name][k] for r in runs if name in r[at]])) for k in row}
            for name, row in rows.items()
        }
        for at, rows in runs[0].items()
    }
