"""What training methods cost: ``python -m benchmarks training``.

First the whole train step of a multilayer perceptron under plain AdamW, and under each method
around the same AdamW, at a step that leaves the masks alone and at one that renews them. Rounds are
interleaved and a ratio is taken within a round, so that what slows the machine slows both sides.
Then a mask update alone, against a full argsort and a full sort, in time and in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.studies.speed import selection
from jaxprune import training

WIDTHS = (784, 1024, 1024, 10)
BATCH = 128
SPARSITY = 0.9
EVERY = 1000
PLAIN = "adamw"
LIMIT = 1.03  # of a step that leaves the masks alone
SIZES = (1_000_000, 10_000_000, 100_000_000)
SORTED = 20_000_000  # entries above which a sort takes minutes: those of more are counted alone
WANTED = 20.0  # times faster than argsort, on a CPU, at ten million entries
UPDATES = (selection.COUNTING, "cut by jnp.sort", selection.ARGSORT)

Step = Callable[..., tuple[Any, Any]]
ADAMW = optax.adamw(1e-3)


class Method(NamedTuple):
    tx: optax.GradientTransformation
    dense: bool = False  # stores dense weights, and renews masks after the step
    forward: bool = False  # computes with masked copies of them
    always: bool = False  # renews them at each step


METHODS = {
    "static": Method(training.static(ADAMW, SPARSITY)),
    "prune": Method(jp.prune(ADAMW, jp.magnitude, SPARSITY, every=EVERY)),
    "set": Method(training.set(ADAMW, SPARSITY, every=EVERY)),
    "rigl": Method(training.rigl(ADAMW, SPARSITY, every=EVERY)),
    "snfs": Method(training.snfs(ADAMW, SPARSITY, every=EVERY)),
    "top_kast": Method(training.top_kast(ADAMW, SPARSITY, backward=0.5, every=EVERY), True, True),
    "admm": Method(training.admm(ADAMW, SPARSITY, every=EVERY), dense=True),
    "ste": Method(training.ste(ADAMW, SPARSITY), dense=True, forward=True, always=True),
    "sr_ste, 2:4": Method(training.sr_ste(ADAMW), dense=True, forward=True, always=True),
}


def network(key: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        {"kernel": jax.random.normal(k, (i, o)) / jnp.sqrt(i), "bias": jnp.zeros(o)}
        for k, i, o in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


def loss(params: list[dict[str, jax.Array]], images: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = images
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
    logits = hidden @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(method: Method) -> Step:
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        used = training.forward_params(params, state) if method.forward else params
        grads = jax.grad(loss)(used, images, labels)
        updates, state = method.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def entries(names: tuple[str, ...]) -> dict[str, tuple[Step, tuple[Any, ...]]]:
    """The steps to time, each with the arguments at which it is what its name says."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = network(keys[0])
    batch = (
        jax.random.normal(keys[1], (BATCH, WIDTHS[0])),
        jax.random.randint(keys[2], (BATCH,), 0, WIDTHS[-1]),
    )
    found = {PLAIN: (train_step(Method(ADAMW)), (params, ADAMW.init(params), *batch))}
    for name in names:
        method = METHODS[name]
        step = train_step(method)
        sparse, state = step(params, method.tx.init(params), *batch)
        at = {"renewed" if method.always else "kept": 1}
        if not method.always and name != "static":
            at["renewed"] = EVERY - method.dense
        for what, count in at.items():
            counted = state._replace(count=jnp.int32(count))
            found[f"{name}, masks {what}"] = step, (sparse, counted, *batch)
    return found


def measure(names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Returns seconds per step of each entry, and its ratio to plain AdamW (quartiles)."""
    compared = jp.compare(entries(names), repeats=rounds, baseline=PLAIN)
    base = np.asarray(compared.timings[PLAIN].samples)
    found = {}
    for name, timing in compared.timings.items():
        ratios = np.asarray(timing.samples) / base
        found[name] = {
            "median_seconds": timing.median,
            "quartiles_seconds": list(timing.quartiles),
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
            "samples_seconds": list(timing.samples),
        }
    return found


def measure_update(size: int, rounds: int) -> dict[str, Any]:
    """Returns seconds and temporary bytes per entry of one mask update, for each way."""
    scores = selection.leaf(size, jnp.float32)
    updates = {name: selection.UPDATES[name] for name in UPDATES}
    if size > SORTED:
        updates = {selection.COUNTING: updates[selection.COUNTING]}
        args = (scores, jnp.float32(SPARSITY))
        timing = jp.benchmark(updates[selection.COUNTING], *args, repeats=rounds)
        found: dict[str, Any] = {selection.COUNTING: timing.to_json()}
    else:
        found = selection.measure(updates, scores, rounds)
    for name, update in updates.items():
        memory = jax.jit(update).lower(scores, jnp.float32(SPARSITY)).compile().memory_analysis()
        temporary = None if memory is None else memory.temp_size_in_bytes / scores.size
        found[name]["temporary_bytes_per_entry"] = temporary
    return found


def show(found: dict[str, Any]) -> None:
    for name, row in found.items():
        low, high = row["ratio_quartiles"]
        print(
            f"{name:<28} {row['median_seconds'] * 1e3:8.2f} ms   x {row['ratio']:.3f} of {PLAIN} "
            f"[{low:.3f}, {high:.3f}]"
        )
    kept = {name: row["ratio"] for name, row in found.items() if name.endswith("kept")}
    print(
        f"a step that leaves the masks alone: at most x {max(kept.values()):.3f} "
        f"({max(kept, key=lambda name: kept[name])}), wanted at most x {LIMIT:.2f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("training", __doc__)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--update-rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="of mask updates")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    steps = measure(tuple(args.methods), args.rounds)
    show(steps)
    updates: dict[str, Any] = {}
    for size in args.sizes:
        updates[str(size)] = measure_update(size, args.update_rounds)
        print(f"one mask update of {size:.0e} entries, float32")
        for name, row in updates[str(size)].items():
            print(
                f"  {name:<20} {row['median_seconds'] * 1e3:10.2f} ms, argsort takes "
                f"{row.get('argsort_over_this', 'not measured')} times that, "
                f"{row['temporary_bytes_per_entry']} temporary bytes per entry"
            )
    settings = {
        "widths": WIDTHS,
        "batch": BATCH,
        "sparsity": SPARSITY,
        "every": EVERY,
        "rounds": args.rounds,
        "update_rounds": args.update_rounds,
        "wanted": {"masks kept": LIMIT, "argsort_over_this at 1e7": WANTED},
    }
    path = results.folder(args.results) / "training.json"
    found = {"settings": settings, "steps": steps, "updates": updates}
    results.save(results.header("training") | found, path)
    print(f"written to {path}")
