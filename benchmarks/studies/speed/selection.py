"""What a mask update costs against sorting: ``python -m benchmarks selection``.

One leaf of scores becomes a mask, at a traced sparsity of 90 %: by the pattern of this library, by
the cut that its counting finds (ties beyond the count are kept), by a full argsort (exact, like
the pattern), and by the value that a full sort finds. Then 2:4 by pairwise comparison against the
argsort of each group. Rounds are interleaved and a ratio is taken within a round, so that what
slows the machine slows all. At 1e8 entries argsort takes minutes: there it is called once, and
neither repeated nor interleaved. Last, what mask updates of several patterns keep in memory besides
the masks, |w| included, as XLA has compiled them, and how long that took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from jaxprune import selection

SPARSITY = 0.9
SIZES = (1_000_000, 10_000_000)
HUGE = 100_000_000
WANTED = 20.0  # times faster than argsort, on a CPU, for the largest leaf
COUNTING = "jp.unstructured"
ARGSORT = "argsort"
SORT = "cut by jnp.sort"

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


def by_cut(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    """Without breaking ties."""
    cut = selection.kth_largest([scores], selection.kept_count(scores.size, sparsity))
    return selection.ordered_bits(scores) >= cut


def two_of_four_by_argsort(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    groups = scores.reshape(-1, 4, scores.shape[1])
    ranks = jnp.argsort(jnp.argsort(-groups, axis=1, stable=True), axis=1)
    return (ranks < 2).reshape(scores.shape)


def two_of_four(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    return jp.n_m(2, 4)({"w": scores}, None)["w"]


UPDATES: dict[str, Update] = {
    COUNTING: by_pattern,
    "cut by counting": by_cut,
    SORT: by_sort,
    ARGSORT: by_argsort,
}
TWO_OF_FOUR: dict[str, Update] = {"jp.n_m(2, 4)": two_of_four, ARGSORT: two_of_four_by_argsort}
EXACT = (COUNTING, ARGSORT, "jp.n_m(2, 4)")


def side_of(size: int) -> int:
    """Rows, and columns, of a leaf of about ``size`` entries; groups of 4 fit."""
    return round(size**0.5 / 4) * 4


def leaf(size: int, dtype: Any) -> jax.Array:
    """Scores of a kernel of about ``size`` entries; in bfloat16 most of them are ties."""
    side = side_of(size)
    return jnp.abs(jax.random.normal(jax.random.key(0), (side, side))).astype(dtype)


def measure(updates: dict[str, Update], scores: jax.Array, rounds: int) -> dict[str, Any]:
    """Returns seconds of each update, and how many times slower argsort is (quartiles)."""
    args = (scores, jnp.float32(SPARSITY))
    masks = {name: np.asarray(jax.jit(fn)(*args)) for name, fn in updates.items() if name in EXACT}
    for name, mask in masks.items():
        if not np.array_equal(mask, next(iter(masks.values()))):
            raise AssertionError(f"{name} keeps other entries than {next(iter(masks))} does")
    entries = {name: (fn, args) for name, fn in updates.items()}
    compared = jp.compare(entries, repeats=rounds, baseline=ARGSORT)
    return {
        name: {
            "median_seconds": timing.median,
            "argsort_over_this": compared.ratios[name].median,
            "argsort_over_this_quartiles": [compared.ratios[name].low, compared.ratios[name].high],
            "samples_seconds": list(timing.samples),
        }
        for name, timing in compared.timings.items()
    }


def measure_huge(size: int, rounds: int) -> dict[str, Any]:
    """Returns what ``measure`` does, of the pattern and one single call of argsort."""
    args = (leaf(size, jnp.float32), jnp.float32(SPARSITY))
    update = jax.jit(by_pattern)
    timing = jp.benchmark(update, *args, repeats=rounds)
    argsort = jax.jit(by_argsort).lower(*args).compile()
    start = time.perf_counter()
    mask = jax.block_until_ready(argsort(*args))
    seconds = time.perf_counter() - start
    if not bool(jnp.all(mask == update(*args))):
        raise AssertionError(f"{COUNTING} keeps other entries than {ARGSORT} does")
    ratios = np.quantile(np.divide(seconds, timing.samples), [0.25, 0.5, 0.75]).tolist()
    return {
        COUNTING: {
            "median_seconds": timing.median,
            "argsort_over_this": ratios[1],
            "argsort_over_this_quartiles": [ratios[0], ratios[2]],
            "samples_seconds": list(timing.samples),
        },
        ARGSORT: {
            "median_seconds": seconds,
            "argsort_over_this": 1.0,
            "argsort_over_this_quartiles": [1.0, 1.0],
            "samples_seconds": [seconds],
        },
    }


def trees() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Parameters whose masks are made; shapes alone."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "one leaf": [(3164, 3164)],
        "five leaves": [(3, 3, 256, 512), (784, 1024), (1024, 1024), (1024, 4096), (4096, 1024)],
    }
    return {
        f"{name}, {jnp.dtype(dtype).name}": {
            str(i): jax.ShapeDtypeStruct(shape, dtype) for i, shape in enumerate(each)
        }
        for name, each in shapes.items()
        for dtype in (jnp.float32, jnp.bfloat16)
    }


PATTERNS: dict[str, Callable[[Any, jax.Array], Any]] = {
    "jp.unstructured()": jp.unstructured(),
    "jp.unstructured(jp.erk)": jp.unstructured(jp.erk),
    "jp.unstructured(per_output=True)": jp.unstructured(per_output=True),
    "jp.unstructured(jp.global_threshold)": jp.unstructured(jp.global_threshold),
    "jp.n_m(2, 4)": lambda scores, sparsity: jp.n_m(2, 4)(scores, None),
    "jp.n_m(2, 4) on a schedule": jp.n_m(2, 4),
}


def compiled(pattern: Callable[[Any, jax.Array], Any], params: Any) -> tuple[Any, float]:
    """One mask update by magnitude, and the seconds that it takes to compile; not run."""
    update = jax.jit(lambda params, sparsity: pattern(jp.magnitude(params), sparsity))
    lowered = update.lower(params, jax.ShapeDtypeStruct((), jnp.float32))
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def memory() -> dict[str, dict[str, dict[str, float]]]:
    """Returns bytes per parameter: the masks, what else XLA stores to make them; compile times."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for tree, params in trees().items():
        size = sum(x.size for x in params.values())
        for name, pattern in PATTERNS.items():
            program, seconds = compiled(pattern, params)
            stored = program.memory_analysis()
            if stored is None:
                continue
            found.setdefault(tree, {})[name] = {
                "masks": stored.output_size_in_bytes / size,
                "besides": stored.temp_size_in_bytes / size,
                "compile_seconds": seconds,
            }
            print(
                f"{tree:<22} {name:<38} {found[tree][name]['besides']:.3f} bytes besides masks, "
                f"compiled in {seconds:.1f} s"
            )
    return found


def show(title: str, rows: dict[str, Any]) -> None:
    print(title)
    for name, row in rows.items():
        low, high = row["argsort_over_this_quartiles"]
        print(
            f"  {name:<20} {row['median_seconds'] * 1e3:10.2f} ms   "
            f"{row['argsort_over_this']:7.1f} x faster than argsort [{low:.1f}, {high:.1f}]"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("selection", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--huge", type=int, default=HUGE, help="entries of the last leaf; 0: none")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
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
    huge: dict[str, Any] = {}
    if args.huge:
        side = side_of(args.huge)
        name = f"float32, {side} x {side}"
        huge[name] = measure_huge(args.huge, args.rounds)
        show(name, huge[name])
    settings = {"sparsity": SPARSITY, "rounds": args.rounds, "sizes": list(args.sizes)}
    settings["huge"] = args.huge
    settings["huge_argsort"] = "one call, as it takes a minute or more; not interleaved"
    measured = {"updates": found, "huge": huge, "bytes_per_parameter": memory()}
    path = results.folder(args.results) / "selection.json"
    results.save(results.header("selection") | {"settings": settings} | measured, path)
    print(f"written to {path}")
