"""``python -m benchmarks oneshot_time``: SparseGPT beside the products that it can't do without.

The Gram matrix of the tokens and its Cholesky factorisation, in one interleaved run; how the time
to compile grows with the number of inputs; and time and memory of the largest kernel of a network
of 7 billion parameters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from jaxprune.oneshot._run import within
from jaxprune.oneshot._sparsegpt import _matrix

TOKENS, SIZE, COMPILED = 4096, 2048, (512, 1024, 2048)
LARGE = (11008, 4096)  # in, out
WITHIN = within("sparsegpt", jp.unstructured(), 0.5)


def gram(x: jax.Array) -> jax.Array:
    return jnp.matmul(x.T, x, precision="highest")


def gram_and_factor(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = gram(x)
    return h, jnp.linalg.cholesky(h + 0.01 * jnp.mean(jnp.diagonal(h)) * jnp.eye(len(h)))


def solve(w: jax.Array, h: jax.Array) -> Any:
    return _matrix(w, h, 0.5, 0.01, within=WITHIN, group=None, block=128)


def compile_seconds(size: int) -> float:
    w = jax.ShapeDtypeStruct((size, size), jnp.float32)
    begin = time.perf_counter()
    jax.jit(lambda w, h: solve(w, h)).lower(w, w).compile()
    return time.perf_counter() - begin


def study(size: int = SIZE, tokens: int = TOKENS, rounds: int = 10) -> dict[str, Any]:
    """SparseGPT's time over that of Gram product and factorisation, and both times."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (tokens, size)), jax.random.normal(keys[1], (size, size))
    h = jax.jit(gram)(x)
    runs: dict[str, Any] = {
        "gram and factor": (gram_and_factor, (x,)),
        "sparsegpt": (solve, (w, h)),
    }
    found = jp.compare(runs, repeats=rounds)
    ratio = 1 / found.ratios["sparsegpt"].median
    return {"size": size, "tokens": tokens, "sparsegpt_over_gram_and_factor": ratio} | {
        "timings": found.to_json()["timings"]
    }


def large(shape: tuple[int, int] = LARGE) -> dict[str, Any]:
    """One run on random numbers, and what the program holds: operands, results, what is between."""
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], shape)
    h = jax.jit(gram)(jax.random.normal(keys[1], (2 * shape[0], shape[0])))
    program = jax.jit(lambda w, h: solve(w, h)).lower(w, h).compile()
    held = program.memory_analysis()
    parts = ("argument", "output", "temp")
    begin = time.perf_counter()
    _, mask = jax.block_until_ready(program(w, h))
    return {
        "shape": list(shape),
        "seconds": time.perf_counter() - begin,
        "bytes": {part: getattr(held, f"{part}_size_in_bytes") for part in parts},
        "density": float(jnp.mean(mask)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("oneshot_time", __doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    found = study(rounds=args.rounds)
    found["compile_seconds"] = {str(n): compile_seconds(n) for n in COMPILED}
    found["large"] = large()
    path = results.folder(args.results) / "oneshot_time.json"
    results.save(results.header("oneshot_time") | found, path)
    print(found)
