"""Is a compact program as fast as the same module written at the small size by hand?

``python -m benchmarks native`` halves every dimension of the networks in ``native_models.py``
(random weights suffice for time) and sets the compact program beside the native module: FLOPs,
operations of the optimized program, seconds to trace and to compile, seconds to run forward and
with the gradient. Every time is a ratio to the native module's, taken within an interleaved round
of one run. The native module runs twice, under two names: the second one shows the noise.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average
from benchmarks.models import transformers as native_models
from benchmarks.models.transformers import Case

NATIVE, AGAIN, COMPACT, DENSE = "native", "native again", "compact", "dense"
BATCHES = (1, 8)
STAGES = ("trace", "lower", "compile")
ROUNDS, REPETITIONS = 21, 7
LAYOUT = r"\{[^}]*\}|/\*.*?\*/"  # memory order, and comments in tuples

Fn = Callable[..., Any]
Entries = dict[str, tuple[Fn, tuple[Any, ...]]]


def build(case: Case, batch: int) -> Entries:
    """The functions with their arguments; the native module takes the compact parameters."""
    x = case.example(batch)
    params = jax.jit(case.dense.init)(jax.random.key(1), x)
    fresh = jax.eval_shape(case.native.init, jax.random.key(1), x)
    structure = jp.infer_structure(case.dense.apply, params, x)
    free = [d for d in structure.dims.values() if not (d.frozen or d.label.endswith("layers"))]
    masks = structure.masks({d.name: np.arange(d.size) % 2 == 0 for d in free})
    small = jp.compact(case.dense.apply, params, masks, x)
    shapes = [jax.tree.map(np.shape, tree) for tree in (fresh, small.params)]
    assert shapes[0] == shapes[1], "the native module has other shapes than the compact one"
    assert small.certificate.exact, f"masked units stay:\n{small.certificate}"
    return {
        NATIVE: (case.native.apply, (small.params, x)),
        AGAIN: (case.native.apply, (small.params, x)),
        COMPACT: (small.fn, (small.params, x)),
        DENSE: (case.dense.apply, (params, x)),
    }


def forward(fn: Fn) -> Fn:
    """The same function under a new identity: nothing of it is traced or compiled yet."""
    return lambda params, x: fn(params, x)


def gradient(fn: Fn) -> Fn:
    """A step's work: the results, and the gradient of their mean square in all parameters."""
    return jax.grad(lambda params, x: jnp.mean(fn(params, x) ** 2))


WAYS = {"forward": forward, "gradient": gradient}


def differing(native: Mapping[str, int], compact: Mapping[str, int]) -> dict[str, list[int]]:
    """What the two count differently: ``{name: [native, compact]}``."""
    both = {name: [native.get(name, 0), compact.get(name, 0)] for name in {*native, *compact}}
    return {name: pair for name, pair in sorted(both.items()) if pair[0] != pair[1]}


def flops(entries: Entries) -> dict[str, Any]:
    costs = {name: jp.cost(fn, *args) for name, (fn, args) in entries.items() if name != AGAIN}
    found = {name: cost.flops for name, cost in costs.items()}
    return found | {"differing": differing(costs[NATIVE].by_primitive, costs[COMPACT].by_primitive)}


def operations(program: str) -> Counter[str]:
    """How often each operation stands in a program's text, as ``add f32[2,3]``."""
    found = re.findall(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?[\]})]) ([a-z][\w\-]*)\(", program, re.M)
    return Counter(f"{name} {_short(re.sub(LAYOUT, '', shape))}" for shape, name in found)


def _short(shape: str) -> str:
    """What a loop carries is a long tuple."""
    return f"({shape.count('[')} arrays)" if shape.startswith("(") else shape


def optimized(compiled: Mapping[str, Any]) -> dict[str, Any]:
    """Operations of the native and of the compact program after the compiler's work."""
    counts = {name: operations(compiled[name].as_text()) for name in (NATIVE, COMPACT)}
    found: dict[str, Any] = {name: count.total() for name, count in counts.items()}
    return found | {"differing": differing(counts[NATIVE], counts[COMPACT])}


def ratios(samples: Mapping[str, Sequence[float]], to: str = NATIVE) -> dict[str, Any]:
    """Medians in seconds, and quartiles of the ratio to one of them within a round."""
    base = np.asarray(samples[to])
    found = {}
    for name, seconds in samples.items():
        low, middle, high = np.quantile(np.asarray(seconds) / base, [0.25, 0.5, 0.75])
        found[name] = {
            "median_seconds": float(np.median(seconds)),
            "ratio": float(middle),
            "ratio_quartiles": [float(low), float(high)],
            "samples_seconds": list(seconds),
        }
    return found


def stages(entries: Entries, repetitions: int) -> dict[str, Any]:
    """Seconds to trace, to lower and to compile, turn by turn; the first turn isn't counted."""
    seconds: dict[str, list[Any]] = {name: [] for name in entries}
    for turn in range(repetitions + 1):
        for name in _turn(list(entries), turn):
            seconds[name].append(_stages(*entries[name]))
    each = {name: np.transpose(rows[1:]) for name, rows in seconds.items()}
    samples = {
        stage: {name: rows[i].tolist() for name, rows in each.items()}
        for i, stage in enumerate(STAGES)
    }
    samples["lower + compile"] = {name: rows[1:].sum(0).tolist() for name, rows in each.items()}
    samples["all three"] = {name: rows.sum(0).tolist() for name, rows in each.items()}
    return {stage: ratios(found) for stage, found in samples.items()}


def _stages(fn: Fn, args: tuple[Any, ...]) -> list[float]:
    """Of a new function; nothing of it is remembered, nor of ``fn`` that ``small.fn`` traces."""
    jax.clear_caches()
    clock = [time.perf_counter()]
    traced = jax.jit(forward(fn)).trace(*args)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    return list(np.diff(clock))


def _turn(names: list[str], turn: int) -> list[str]:
    """A new order each turn: none always follows the same."""
    return [names[i] for i in np.random.default_rng(turn).permutation(len(names))]


def run_times(entries: Entries, way: str, rounds: int) -> dict[str, Any]:
    """Seconds to run, and what the compiled programs consist of."""
    compiled = {
        name: jax.jit(WAYS[way](fn)).lower(*args).compile() for name, (fn, args) in entries.items()
    }
    timed = jp.compare(
        {name: (compiled[name], args) for name, (_, args) in entries.items()},
        repeats=rounds,
        baseline=NATIVE,
    )
    samples = {name: timing.samples for name, timing in timed.timings.items()}
    return {"operations": optimized(compiled), "times": ratios(samples)}


def measure(case: Case, rounds: int, repetitions: int, batches: Sequence[int]) -> dict[str, Any]:
    """All that is known of one network."""
    first = build(case, batches[0])
    found: dict[str, Any] = {"settings": case.settings, "batches": {}}
    found["stages"] = stages(first, repetitions)
    tracing = {name: rows["samples_seconds"] for name, rows in found["stages"]["trace"].items()}
    found["trace_compact_over_dense"] = ratios(tracing, DENSE)[COMPACT]["ratio"]
    for batch in batches:
        entries = first if batch == batches[0] else build(case, batch)
        rows = {way: run_times(entries, way, rounds) for way in WAYS}
        found["batches"][str(batch)] = {"flops": flops(entries)} | rows
    return found


def table(found: Mapping[str, Any]) -> str:
    """Lines of one network: each time as a multiple of the native module's."""
    lines = [_line(stage, rows) for stage, rows in found["stages"].items()]
    lines.append(f"  trace: compact x {found['trace_compact_over_dense']:.2f} of dense")
    for batch, rows in found["batches"].items():
        lines += [_line(f"{way}, batch {batch}", rows[way]["times"]) for way in WAYS]
    for batch, rows in found["batches"].items():
        counted = {"FLOPs": rows["flops"]} | {
            f"operations, {way}": rows[way]["operations"] for way in WAYS
        }
        lines += [
            f"  batch {batch}, {what}: native {count[NATIVE]:,}, compact {count[COMPACT]:,}"
            f"{f', differing {diff}' if (diff := count['differing']) else ''}"
            for what, count in counted.items()
        ]
    return "\n".join(lines)


def _line(what: str, rows: Mapping[str, Any]) -> str:
    cells = [f"  {what:<18}{rows[NATIVE]['median_seconds'] * 1e3:>9.2f} ms"]
    for name in (AGAIN, COMPACT, DENSE):
        low, high = rows[name]["ratio_quartiles"]
        cells.append(f"{name} x {rows[name]['ratio']:.3f} [{low:.3f}, {high:.3f}]")
    return "   ".join(cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("native", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of compilations")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    before, start, rows = load_average(), time.perf_counter(), {}
    for case in native_models.cases():
        rows[case.name] = measure(case, args.rounds, args.repetitions, BATCHES)
        print(f"{case.name}: native, and others as multiples of it [quartiles]")
        print(table(rows[case.name]), flush=True)
    about = {
        "settings": {"rounds": args.rounds, "repetitions": args.repetitions, "batches": BATCHES},
        "load_average": {"before": before, "after": load_average()},
        "seconds": time.perf_counter() - start,
    }
    path = results.folder(args.results) / "native.json"
    results.save(results.header("native") | about | {"networks": rows}, path)
    print(f"{about['seconds']:.0f} s, load average {before} before; written to {path}")
