"""Ask for speed: how fast are the networks that ``jp.search`` finds, and what do others keep?

``python -m benchmarks speed`` times networks of published sizes (random weights suffice for time)
in one interleaved run each: dense; masks applied at run time; half of the FLOPs by the largest
magnitudes, widths as they fall; every width halved, by ``jp.compact`` and written by hand; and
what ``jp.search`` finds for 1.25, 1.5, 2 and 3 times the speed, beside one fraction for all
dimensions (uniform). Sparse formats follow, each beside the dense network in a run of its own.
The search's own measurement isn't used: its networks are measured again.

Rows are kept in ``speed.json`` one network at a time, so that the job can go on where it was.
"""

from __future__ import annotations

import fnmatch
import glob
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import sparse
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average
from benchmarks.models.speed import CASES, QUICK, Case

matplotlib.use("Agg")  # files only

DENSE, MASKED, NAIVE, HALVED, NATIVE = (
    "dense", "masks at run time", "half the FLOPs, widths as they fall", "widths halved",
    "halved by hand",
)  # fmt: skip
SPEEDUPS = {"float32": (1.25, 1.5, 2.0, 3.0), "bfloat16": (2.0,)}
UNIFORM = {"float32": (1.5, 3.0), "bfloat16": (2.0,)}
FORMATS = {"BCOO": sparse.BCOO.fromdense, "BCSR": sparse.BCSR.fromdense}
SPARSITY = 0.9  # of the weights, for sparse formats
ROUNDS, SPARSE_ROUNDS = 15, 5
MIN_ROUND = 0.05  # seconds: a round of one short call measures cold caches

Fn = Callable[..., Any]
Entry = tuple[Fn, tuple[Any, ...]]


class Network:
    """A case in one dtype: its function, parameters and structure."""

    def __init__(self, case: Case, dtype: str):
        self.case, self.fn = case, case.module.apply
        self.x = case.example(jnp.dtype(dtype))
        params = jax.jit(case.module.init)(jax.random.key(1), self.x)
        self.params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        self.structure = jp.infer_structure(self.fn, self.params, self.x)
        self.dims = [
            name
            for name, dim in self.structure.dims.items()
            if not dim.frozen and not fnmatch.fnmatch(name, case.fixed)
        ]
        self.scores = jp.magnitude(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

    def search(self, **options: Any) -> jp.Search:
        return jp.Search(
            self.fn,
            self.params,
            self.structure,
            self.scores,
            self.x,
            dims=[glob.escape(d) for d in self.dims],
            **options,
        )

    def compact(self, masks: Any) -> jp.typing.Compact:
        return jp.compact(self.fn, self.params, masks, self.x)

    def half(self) -> Any:
        """Masks that keep the first half of every dimension, as ``case.half`` is written."""
        sizes = {name: self.structure.dims[name].size for name in self.dims}
        return self.structure.masks({d: np.arange(n) < n // 2 for d, n in sizes.items()})


def entries(network: Network, asked: dict[str, Sequence[float]]) -> tuple[dict[str, Entry], Any]:
    """The functions to time, and what is known of each beside its time."""
    fn, params, x = network.fn, network.params, network.x
    half = network.compact(network.half())
    native = jax.eval_shape(network.case.half.init, jax.random.key(1), x)
    shapes = [jax.tree.map(np.shape, tree) for tree in (native, half.params)]
    assert shapes[0] == shapes[1], "the network written by hand has other shapes"
    masked: Fn = lambda params, masks, x: fn(jp.apply_masks(params, masks), x)  # noqa: E731
    found: dict[str, Entry] = {
        DENSE: (fn, (params, x)),
        MASKED: (masked, (params, network.half(), x)),
        NAIVE: _small(network, network.search(round_to=1).plan(jp.Target(flops=0.5))),
        HALVED: (half.fn, (half.params, x)),
        NATIVE: (network.case.half.apply, (half.params, x)),
    }
    about: dict[str, Any] = {}
    for way, speedups in asked.items():
        start = time.perf_counter()
        search = network.search()
        for speedup in speedups:
            plan = _plan(search, speedup, way == "uniform")
            if plan is not None:
                found[f"{way} {speedup:g} x"] = _small(network, plan)
                about[f"{way} {speedup:g} x"] = _about(plan, speedup)
        about[f"seconds, {way}"] = time.perf_counter() - start
    return found, about


def _plan(search: jp.Search, speedup: float, uniform: bool) -> jp.budget.SearchResult | None:
    """The plan, or None where every dimension at its least isn't fast enough."""
    try:
        return search.plan(jp.Target(speedup=speedup), uniform=uniform)
    except ValueError as error:
        print(f"  {error}", flush=True)
        return None


def _small(network: Network, plan: jp.budget.SearchResult) -> Entry:
    small = network.compact(plan.masks)
    return small.fn, (small.params, network.x)


def _about(plan: jp.budget.SearchResult, asked: float) -> dict[str, Any]:
    return {
        "asked": asked,
        "predicted": plan.predicted.speedup,
        "measured_by_search": plan.measured.speedup,
        "score": plan.score,
        "kept": {name: [int(v.sum()), v.size] for name, v in plan.keep.items()},
        "notes": list(plan.notes),
    }


def cost(entry: Entry) -> dict[str, int]:
    total = jp.cost(entry[0], *entry[1])
    return {name: getattr(total, name) for name in ("flops", "bytes", "params")}


def sparse_entries(network: Network) -> Iterator[tuple[str, Entry | None]]:
    """Kernels of dense layers in a sparse format; None where there are none."""
    masks = jp.unstructured()(network.scores, SPARSITY)
    params = jp.apply_masks(network.params, masks)
    for name, convert in FORMATS.items():
        held, count = _converted(params, convert)
        entry = (_with_sparse_kernels(network.fn), (held, network.x))
        yield f"{name} in dense layers, {SPARSITY:.0%} removed", entry if count else None


def _converted(params: Any, convert: Callable[[Any], Any]) -> tuple[Any, int]:
    """Kernels of dense layers, transposed and converted, and how many there are."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    dense = [fnmatch.fnmatch(jp.typing.path_str(path), "*Dense_*/kernel") for path, _ in flat]
    leaves = [convert(w.T) if found else w for (_, w), found in zip(flat, dense)]
    return jax.tree.unflatten(treedef, leaves), sum(dense)


def _with_sparse_kernels(fn: Fn) -> Fn:
    def layer(next_fn: Fn, args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
            return next_fn(*args, **kwargs)
        params, x = context.module.variables["params"], args[0]
        y = (params["kernel"] @ x.reshape(-1, x.shape[-1]).T).T
        return y.reshape(*x.shape[:-1], y.shape[-1]) + params["bias"]

    def sparse_fn(params: Any, x: jax.Array) -> Any:
        with nn.intercept_methods(layer):
            return fn(params, x)

    return sparse_fn


def measure(
    case: Case, dtype: str, asked: dict[str, Sequence[float]], rounds: int
) -> dict[str, Any]:
    """All rows of one network."""
    start, before = time.perf_counter(), load_average()
    network = Network(case, dtype)
    found, about = entries(network, asked)
    rows = _rows(found, rounds)
    for name, known in about.items():
        if isinstance(known, dict):
            rows[name] |= known
    for name, entry in sparse_entries(network):
        if entry is not None:
            two = {DENSE: found[DENSE], name: entry}
            rows[name] = _rows(two, SPARSE_ROUNDS, counted=False)[name]
    _over_native(rows)
    return {
        "date": results.today(),
        "rows": rows,
        "search_seconds": {k.split(", ")[1]: v for k, v in about.items() if ", " in k},
        "load_average": {"before": before, "after": load_average()},
        "seconds": time.perf_counter() - start,
    }


def _rows(found: dict[str, Entry], rounds: int, counted: bool = True) -> dict[str, Any]:
    compared = jp.compare(found, repeats=rounds, baseline=DENSE, min_round=MIN_ROUND)
    rows = {
        name: timing.to_json() | {"speedup": compared.ratios[name]._asdict()}
        for name, timing in compared.timings.items()
    }
    if counted:
        dense = cost(found[DENSE])
        for name, entry in found.items():
            rows[name] |= cost(entry)
            rows[name]["flops_ratio"] = dense["flops"] / rows[name]["flops"]
    return rows


def _over_native(rows: dict[str, Any]) -> None:
    """Time of the compact network over the one written by hand, within rounds."""
    ratios = np.divide(rows[HALVED]["samples_seconds"], rows[NATIVE]["samples_seconds"])
    rows[HALVED]["over_native"] = [float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75])]


def equal_time(rows: dict[str, Any]) -> list[dict[str, float]]:
    """The score of each searched network beside what uniform ones keep in its measured time.

    Between two uniform networks (the dense one is one of them) the score goes along a straight
    line over the time; beyond the fastest one nothing is compared.
    """
    uniform = [row for name, row in rows.items() if name.startswith("uniform")]
    points = [(1.0, 1.0), *((1 / row["speedup"]["median"], row["score"]) for row in uniform)]
    x, y = np.transpose(sorted(points))
    searched = [row for name, row in rows.items() if name.startswith("search")]
    return [
        {
            "speedup": row["speedup"]["median"],
            "search": row["score"],
            "uniform": float(np.interp(1 / row["speedup"]["median"], x, y)),
        }
        for row in searched
        if 1 / row["speedup"]["median"] >= x[0]
    ]


def table(title: str, found: dict[str, Any]) -> Table:
    shown = Table(
        "row", "median", "speed-up [quartiles]", "FLOPs", "parameters", "score", "predicted",
        title=title, title_justify="left",
    )  # fmt: skip
    for name, row in found["rows"].items():
        low, middle, high = row["speedup"].values()
        shown.add_row(
            name,
            f"{row['median_seconds'] * 1e3:.2f} ms",
            f"{middle:.2f} x [{low:.2f}, {high:.2f}]",
            f"{row['flops_ratio']:.2f} x fewer" if "flops_ratio" in row else "",
            f"{row['params']:,}" if "params" in row else "",
            f"{row['score']:.1%}" if "score" in row else "",
            f"{row['predicted']:.2f} x" if "predicted" in row else "",
        )
    return shown


def picture(networks: dict[str, Any], path: Path) -> None:
    """A line per network, its rows at their measured speed-ups; what was asked for is grey."""
    kinds = {
        "search": "found by search", HALVED: HALVED, NATIVE: NATIVE, NAIVE: NAIVE,
        MASKED: MASKED, "BCOO": "BCOO, 90 % removed", "BCSR": "BCSR, 90 % removed",
    }  # fmt: skip
    height = 1.6 + 0.5 * len(networks)
    figure, ax = plt.subplots(figsize=(12, height), layout="constrained")
    for asked in SPEEDUPS["float32"]:
        ax.axvline(asked, color="0.8", linewidth=1, zorder=0)
    ax.axvline(1, color="0.4", linewidth=1, linestyle="--", zorder=0)
    for k, (start, label) in enumerate(kinds.items()):
        points = [
            (row["speedup"]["median"], y)
            for y, found in enumerate(networks.values())
            for name, row in found["rows"].items()
            if name.startswith(start)
        ]
        marker = jp.plot.curves.MARKERS[k]
        ax.plot(*np.transpose(points), marker, color=jp.plot.curves.COLORS[k], label=label,
                markersize=7, markeredgecolor="white", alpha=0.9, zorder=9 - k)  # fmt: skip
    ax.set_xscale("log", base=2)
    ticks = [0.125, 0.25, 0.5, 1, *SPEEDUPS["float32"], 4, 6]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize="small")
    ax.minorticks_off()
    ax.set_yticks(range(len(networks)), networks)
    ax.set_ylim(len(networks) - 0.5, -0.5)
    ax.set_xlabel("measured speed-up over dense [x]; grey: asked of the search")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("speed", __doc__)
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--only", default="*", help="networks whose names match, with wildcards")
    parser.add_argument("--dtype", default="float32", choices=list(SPEEDUPS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    path = results.folder(args.results) / ("speed-quick.json" if args.quick else "speed.json")
    kept = results.load(path)["networks"] if path.exists() else {}
    for name, make in (QUICK if args.quick else CASES).items():
        title = f"{name}, {args.dtype}"
        if title in kept or not fnmatch.fnmatch(name, args.only):
            continue
        asked: dict[str, Sequence[float]] = {
            "search": SPEEDUPS[args.dtype],
            "uniform": UNIFORM[args.dtype],
        }
        kept[title] = measure(make(), args.dtype, asked, args.rounds)
        Console(width=120).print(table(title, kept[title]))
        jax.clear_caches()
        results.save(results.header("speed") | {"rounds": args.rounds, "networks": kept}, path)
    titles = [f"{name}, {dtype}" for dtype in SPEEDUPS for name in [*CASES, *QUICK]]
    kept = {title: kept[title] for title in titles if title in kept}
    for found in kept.values():
        found["score_at_equal_time"] = equal_time(found["rows"])
    results.save(results.header("speed") | {"rounds": args.rounds, "networks": kept}, path)
    picture(kept, path.with_suffix(".png"))
    print(path)
