"""What ``jp.prune`` costs in a train step: ``python -m benchmarks.training_overhead``.

One run, interleaved rounds: the whole train step of a multilayer perceptron under plain AdamW, and
under ``jp.prune`` around the same AdamW at a step that leaves the masks alone, and at one that
renews them. A ratio is taken within a round, so that what slows the machine slows both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from benchmarks import results

WIDTHS = (784, 1024, 1024, 10)
BATCH = 128
SPARSITY = 0.9
EVERY = 1000
PLAIN = "adamw"
LIMIT = 1.03  # of a step that leaves the masks alone

Step = Callable[..., tuple[Any, Any]]


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


def train_step(tx: optax.GradientTransformation) -> Step:
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def entries() -> dict[str, tuple[Step, tuple[Any, ...]]]:
    """The three steps to time, each with the arguments at which it is what its name says."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = network(keys[0])
    batch = (
        jax.random.normal(keys[1], (BATCH, WIDTHS[0])),
        jax.random.randint(keys[2], (BATCH,), 0, WIDTHS[-1]),
    )
    adamw = optax.adamw(1e-3)
    pruning = jp.prune(adamw, jp.magnitude, SPARSITY, every=EVERY)
    plain, pruned = train_step(adamw), train_step(pruning)
    before, after = pruning.init(params), pruned(params, pruning.init(params), *batch)
    return {
        PLAIN: (plain, (params, adamw.init(params), *batch)),
        "prune, masks kept": (pruned, (*after, *batch)),
        "prune, masks renewed": (pruned, (params, before, *batch)),
    }


def measure(rounds: int) -> dict[str, Any]:
    """Returns seconds per step of each entry, and its ratio to plain AdamW (quartiles)."""
    compared = jp.compare(entries(), rounds=rounds, baseline=PLAIN)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    found = measure(args.rounds)
    for name, row in found.items():
        low, high = row["ratio_quartiles"]
        print(
            f"{name:<22} {row['median_seconds'] * 1e3:8.2f} ms   x {row['ratio']:.3f} of {PLAIN} "
            f"[{low:.3f}, {high:.3f}]"
        )
    kept = found["prune, masks kept"]["ratio"]
    print(f"a step that leaves the masks alone: x {kept:.3f}, wanted at most x {LIMIT:.2f}")
    settings = {"widths": WIDTHS, "batch": BATCH, "sparsity": SPARSITY, "rounds": args.rounds}
    path = results.folder(args.results) / "training_overhead.json"
    results.save(results.header("training_overhead") | {"settings": settings, "steps": found}, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
