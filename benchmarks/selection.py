"""What a mask update costs against sorting: ``python -m benchmarks.selection``.

One leaf of scores becomes a mask, at a traced sparsity of 90 %: by the pattern of this library, by
its two ways of counting, by a full argsort (exact, like counting), and by the value that a full
sort finds (ties beyond the count are kept). Then 2:4 by pairwise comparison against the argsort of
each group. Rounds are interleaved and a ratio is taken within a round, so that what slows the
machine slows all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import results
from jaxprune import selection

SPARSITY = 0.9
SIZES = (1_000_000, 10_000_000)
WANTED = 10.0  # times faster than argsort, on a CPU, for the largest leaf
COUNTING = "jp.unstructured"
ARGSORT = "argsort"

Update = Callable[[jax.Array, jax.Array], jax.Array]


def by_pattern(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    return jp.unstructured()({"w": scores}, sparsity)["w"]


def by_argsort(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    k = selection.kept_count(scores.size, sparsity)
    order = jnp.argsort(-scores.reshape(-1), stable=True)
    mask = jnp.zeros(scores.size, bool).at[order].set(jnp.arange(scores.size) < k)
    return mask.reshape(scores.shape)


def by_sort(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    k = selection.kept_count(scores.size, sparsity)
    return scores >= jnp.sort(scores.reshape(-1))[scores.size - k]


def by_cut(find: Callable[..., jax.Array], scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    """One way of counting, without breaking ties."""
    bits = selection.ordered_bits(scores)
    return bits >= find([bits], selection.kept_count(scores.size, sparsity), [0])


def two_of_four_by_argsort(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    groups = scores.reshape(-1, 4, scores.shape[1])
    ranks = jnp.argsort(jnp.argsort(-groups, axis=1, stable=True), axis=1)
    return (ranks < 2).reshape(scores.shape)


def two_of_four(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    return jp.n_m(2, 4)({"w": scores}, None)["w"]


UPDATES: dict[str, Update] = {
    COUNTING: by_pattern,
    "cut by histograms": partial(by_cut, selection._by_histograms),
    "cut by bits": partial(by_cut, selection._by_bits),
    "cut by jnp.sort": by_sort,
    ARGSORT: by_argsort,
}
TWO_OF_FOUR: dict[str, Update] = {"jp.n_m(2, 4)": two_of_four, ARGSORT: two_of_four_by_argsort}
EXACT = (COUNTING, ARGSORT, "jp.n_m(2, 4)")


def leaf(size: int, dtype: Any) -> jax.Array:
    """Scores of a kernel of about ``size`` entries; in bfloat16 most of them are ties."""
    side = round(size**0.5 / 4) * 4
    return jnp.abs(jax.random.normal(jax.random.key(0), (side, side))).astype(dtype)


def measure(updates: dict[str, Update], scores: jax.Array, rounds: int) -> dict[str, Any]:
    """Returns seconds of each update, and how many times slower argsort is (quartiles)."""
    args = (scores, jnp.float32(SPARSITY))
    masks = {name: np.asarray(jax.jit(fn)(*args)) for name, fn in updates.items() if name in EXACT}
    for name, mask in masks.items():
        if not np.array_equal(mask, masks[ARGSORT]):
            raise AssertionError(f"{name} keeps other entries than {ARGSORT} does")
    entries = {name: (fn, args) for name, fn in updates.items()}
    compared = jp.compare(entries, rounds=rounds, baseline=ARGSORT)
    return {
        name: {
            "median_seconds": timing.median,
            "argsort_over_this": compared.ratios[name].median,
            "argsort_over_this_quartiles": [
                compared.ratios[name].low,
                compared.ratios[name].high,
            ],
            "samples_seconds": list(timing.samples),
        }
        for name, timing in compared.timings.items()
    }


def show(title: str, rows: dict[str, Any]) -> None:
    print(title)
    for name, row in rows.items():
        low, high = row["argsort_over_this_quartiles"]
        milliseconds, ratio = row["median_seconds"] * 1e3, row["argsort_over_this"]
        print(
            f"  {name:<20} {milliseconds:10.2f} ms   {ratio:7.1f} x faster than argsort "
            f"[{low:.1f}, {high:.1f}]"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for size in args.sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            scores = leaf(size, dtype)
            name = f"{jnp.dtype(dtype).name}, {scores.shape[0]} x {scores.shape[1]}"
            found[name] = measure(UPDATES, scores, args.rounds)
            show(name, found[name])
        name = f"2:4, float32, {scores.shape[0]} x {scores.shape[1]}"
        found[name] = measure(TWO_OF_FOUR, leaf(size, jnp.float32), args.rounds)
        show(name, found[name])
    largest = leaf(max(args.sizes), jnp.float32).shape
    ratio = found[f"float32, {largest[0]} x {largest[1]}"][COUNTING]["argsort_over_this"]
    print(f"the largest leaf: {ratio:.1f} x faster than argsort, on a CPU wanted {WANTED:.0f} x")
    settings = {"sparsity": SPARSITY, "rounds": args.rounds, "sizes": list(args.sizes)}
    path = results.folder(args.results) / "selection.json"
    results.save(results.header("selection") | {"settings": settings, "updates": found}, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
