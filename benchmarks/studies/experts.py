"""Which experts of a mixture may go: scores of whole experts compared in held-out loss.

A small language model of characters, two layers of causal attention and of eight experts of which
each token uses two, is trained on the sources of Python's standard library. Then half of the
experts of each layer go, those of least score, and the loss on files that it has not seen is
measured, without any tuning. ``python -m benchmarks experts`` takes some minutes;
``--seeds 1 --steps 50`` is a look.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from benchmarks.common import results

CHARACTERS = 96  # printable ones, and one for all others
LENGTH, BATCH, HELD_OUT = 32, 32, 20  # every so manyth file is held out
WIDTH, HEADS, LAYERS, EXPERTS, TOP_K, HIDDEN = 48, 4, 2, 8, 2, 64
BALANCE = 0.01  # of the loss that keeps experts in use
CALIBRATED, JUDGED = 32, 64  # batches
Params = Any


def characters(held_out: bool) -> np.ndarray:
    """The sources of the standard library's modules, as numbers below ``CHARACTERS``."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    chosen = [p for k, p in enumerate(files) if (k % HELD_OUT == 0) == held_out]
    codes = np.frombuffer("".join(p.read_text() for p in chosen).encode("ascii", "replace"), "u1")
    return np.where((codes >= 32) & (codes < 127), codes - 31, 0).astype(np.int32)


def batches(text: np.ndarray, count: int, seed: int) -> list[tuple[jax.Array]]:
    rng = np.random.default_rng(seed)
    begins = rng.integers(0, len(text) - LENGTH - 1, (count, BATCH))
    return [(jnp.asarray(text[row[:, None] + np.arange(LENGTH + 1)]),) for row in begins]


def init(seed: int) -> Params:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, shape[-2] ** -0.5, shape), jnp.float32)

    layers = [
        {"qkv": normal(WIDTH, 3 * WIDTH), "proj": normal(WIDTH, WIDTH),
         "router": normal(WIDTH, EXPERTS), "up": normal(EXPERTS, WIDTH, HIDDEN),
         "down": normal(EXPERTS, HIDDEN, WIDTH), "norms": jnp.ones((2, WIDTH))}
        for _ in range(LAYERS)
    ]  # fmt: skip
    embed, place = normal(CHARACTERS, WIDTH), normal(LENGTH, WIDTH)
    return {"embed": embed, "place": place, "layers": layers, "out": normal(WIDTH, CHARACTERS)}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attention(p: Params, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split((x @ p["qkv"]).reshape(*x.shape[:2], HEADS, -1), 3, -1)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["proj"]


def mixture(p: Params, x: jax.Array) -> tuple[jax.Array, tuple[Any, ...], jax.Array]:
    """The layer's result, what each token chose, and how evenly; gates are renormalised."""
    count = p["router"].shape[-1]
    shares = jax.nn.softmax(x @ p["router"])
    gates, chosen = jax.lax.top_k(shares, TOP_K)
    gates = gates / gates.sum(-1, keepdims=True)
    every = jnp.einsum("btef,efd->bted", jax.nn.gelu(jnp.einsum("btd,edf->btef", x, p["up"])),
                       p["down"])  # fmt: skip
    hot = jax.nn.one_hot(chosen, count)
    outputs = jnp.einsum("btke,bted->btkd", hot, every)
    balance = count * jnp.sum(hot.mean((0, 1, 2)) * shares.mean((0, 1)))
    return jnp.einsum("btk,btkd->btd", gates, outputs), (chosen, gates, outputs), balance


def forward(params: Params, ids: jax.Array) -> tuple[jax.Array, dict[str, Any], jax.Array]:
    x, routed, balance = params["embed"][ids] + params["place"], {}, jnp.zeros(())
    for k, p in enumerate(params["layers"]):
        x = x + attention(p, norm(x, p["norms"][0]))
        y, routed[f"layers/{k}/router"], even = mixture(p, norm(x, p["norms"][1]))
        x, balance = x + y, balance + even
    return norm(x, jnp.ones(WIDTH)) @ params["out"], routed, balance


def route(params: Params, ids: jax.Array) -> dict[str, Any]:
    return forward(params, ids[:, :-1])[1]


def loss(params: Params, ids: jax.Array) -> jax.Array:
    logits = forward(params, ids[:, :-1])[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def trained(text: np.ndarray, steps: int, seed: int) -> Params:
    params = init(seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: Any, ids: jax.Array) -> Any:
        def whole(p: Params) -> jax.Array:
            return loss(p, ids) + BALANCE * forward(p, ids[:, :-1])[2]

        updates, state = optimizer.update(jax.grad(whole)(params), state)
        return optax.apply_updates(params, updates), state

    for (ids,) in tqdm(batches(text, steps, seed), desc=f"training, seed {seed}"):
        params, state = step(params, state, ids)
    return params


def scores_of(params: Params, given: Sequence[tuple[Any]], seed: int) -> dict[str, dict[str, Any]]:
    """{score: {layer: (experts,)}}."""
    found = jp.experts.find(loss, params, *given[0])
    routed = jp.scores.experts(route, params, given, count=EXPERTS)
    rng = np.random.default_rng(seed)
    scores = {
        name: {layer: getattr(x, field) for layer, x in routed.items()}
        for name, field in (("REAP", "reap"), ("frequency", "frequency"), ("output norm", "norm"))
    }
    scores["magnitude"] = found.scores(jp.scores.l2(params))
    steep = jax.jit(jax.grad(loss))
    each = [
        found.scores(jp.scores.taylor(params, grad=steep(params, *batch)), jp.reduce.taylor)
        for batch in given
    ]
    scores["loss (Taylor)"] = {n: np.mean([row[n] for row in each], 0) for n in found.layers}
    scores["random"] = {n: rng.uniform(size=EXPERTS) for n in found.layers}
    return scores


def of_seed(seed: int, steps: int) -> dict[str, Any]:
    seen, unseen = characters(held_out=False), characters(held_out=True)
    params = trained(seen, steps, seed)
    judged, given = batches(unseen, JUDGED, 1), batches(seen, CALIBRATED, 2)
    value = jax.jit(loss)

    def held_out(p: Params) -> float:
        return float(np.mean([value(p, *batch) for batch in judged]))

    found = jp.experts.find(loss, params, *given[0])
    row: dict[str, Any] = {"seed": seed, "loss": {"dense": held_out(params)}, "residual": {}}
    for name, scores in scores_of(params, given, seed).items():
        best = {n: np.argsort(-np.asarray(x))[: EXPERTS // 2] for n, x in scores.items()}
        keep = {n: np.isin(np.arange(EXPERTS), kept) for n, kept in best.items()}
        small = found.remove(params, keep, *given[0])
        row["loss"][name] = held_out(small)
        row["residual"][name] = found.check(params, keep, *given[0])
        if name == "REAP":
            cost = [jp.cost(loss, p, *given[0]) for p in (params, small)]
            row["params"] = [c.params for c in cost]
            row["active_params"] = [c.active_params for c in cost]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=None, help="a folder for the JSON")
    given = parser.parse_args(argv)
    rows = [of_seed(seed, given.steps) for seed in range(given.seeds)]
    settings = {"steps": given.steps, "width": WIDTH, "layers": LAYERS, "experts": EXPERTS,
                "top_k": TOP_K, "hidden": HIDDEN, "kept": EXPERTS // 2}  # fmt: skip
    saved = results.header("experts") | {"settings": settings, "rows": rows}
    results.save(saved, (given.results or results.folder()) / "experts.json")
    for name in rows[0]["loss"]:
        each = [row["loss"][name] for row in rows]
        print(f"{name:14} {np.mean(each):.3f}  {' '.join(f'{x:.3f}' for x in each)}")
