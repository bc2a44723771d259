"""``python -m benchmarks oneshot_structured``: SmolLM2 with fewer hidden units, heads and blocks.

Nothing is trained. Block by block, calibrated on what the blocks before it give, whole units go and
their consumers' kept rows are refit. Here units go by known recipes; hidden units, heads and blocks
are chosen together in the study
oneshot_search, which adds its rows to the same file.

Rows that the result file has are kept. The study oneshot_structured_time times them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.models import smollm2
from benchmarks.studies.oneshot import stream as oneshot_stream
from benchmarks.studies.oneshot import weights as oneshot

SEQUENCES = 64  # of calibration, half of them documentation, half verb glosses
TOKENS = 256  # of the prefill that is timed
HIDDEN, HEADS = "gate:1", "q:1.0.0"  # names of a block's dimensions
CONSUMERS = {HIDDEN: "down", HEADS: "o"}

Units = dict[str, np.ndarray]  # dimension -> a number, or whether it is kept, per unit
Keep = list[Units]  # per block
Found = Mapping[str, list[Units]]  # importance by its name, per block


def is_consumer(path: str, leaf: Any) -> bool:
    return path in CONSUMERS.values()


def _structure(params: Any) -> jp.typing.Structure:
    x = jnp.zeros((1, TOKENS, params["embedding"].shape[1]))
    return jp.infer_structure(smollm2.block, params["blocks"][0], x)


def importance(structure: jp.typing.Structure, p: Any, scores: Any) -> Units:
    """Of each unit, the sum of its consumer's scores: what it makes isn't asked."""
    silent = jax.tree.map(jnp.zeros_like, p)
    read = silent | {name: scores[name] for name in CONSUMERS.values()}
    return {d: np.asarray(structure.unit_scores(read, jp.reduce.sum)[d]) for d in CONSUMERS}


# ---- recipes: which hidden units stay ----------------------------------------------------------


def magnitude(p: Any, stats: Any) -> Any:
    return jax.tree.map(jnp.square, p)


def energy(p: Any, stats: Any) -> Any:
    return jp.scores.activation_energy(p, stats=stats)


def flap(p: Any, stats: Any) -> Any:
    return jp.scores.flap(p, stats=stats)


def uniform(found: list[Units], kept: float) -> Keep:
    """The best hidden units of each block, equally many."""
    count = round(kept * found[0][HIDDEN].size)
    return [{HIDDEN: _best(units[HIDDEN], count)} for units in found]


def by_z_score(found: list[Units], kept: float) -> Keep:
    """The best hidden units of all blocks, by how far they are from their block's mean (FLAP)."""
    z = [(u[HIDDEN] - u[HIDDEN].mean()) / u[HIDDEN].std() for u in found]
    cut = np.quantile(np.concatenate(z), 1 - kept)
    return [{HIDDEN: units > cut} for units in z]


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.isin(np.arange(scores.size), np.argsort(-scores, kind="stable")[:count])


def ffn(score: str, percent: int, found: Found) -> Keep:
    choose = by_z_score if score == "FLAP" else uniform
    return choose(found[score], 1 - percent / 100)


def heads(found: Found) -> Keep:
    """Every block without the key-value head, and its queries, whose outputs are smallest."""
    return [{HEADS: _best(u[HEADS], u[HEADS].size - 1)} for u in found["activations"]]


def depth(count: int, found: Found) -> Keep:
    """Without the blocks that turn their input least."""
    turns = np.array([units["cosine"] for units in found["cosine"]])
    gone = np.argsort(turns)[:count]
    blocks = found["activations"]
    return [{d: np.full(u[d].size, k not in gone) for d in CONSUMERS} for k, u in enumerate(blocks)]


def by_hand(found: Found) -> Keep:
    """A fifth of the hidden units, a head and its queries of each block, and three blocks."""
    each = zip(ffn("FLAP", 20, found), heads(found), depth(3, found))
    return [
        {HIDDEN: units[HIDDEN] & stays[HIDDEN], HEADS: some[HEADS] & stays[HEADS]}
        for units, some, stays in each
    ]


SCORES = {"magnitude": magnitude, "activations": energy, "FLAP": flap}
# ---- one pass over the blocks ------------------------------------------------------------------


def states_of(params: Any, tokens: np.ndarray) -> list[jax.Array]:
    return [params["embedding"][rows] for rows in np.array_split(tokens, 4)]


def scored(params: Any, tokens: np.ndarray) -> dict[str, list[Units]]:
    """The importance of every block's units by each score, in the dense model; and its cosine."""
    structure, states = _structure(params), states_of(params, tokens)
    found: dict[str, list[Units]] = {name: [] for name in (*SCORES, "cosine")}
    for p in tqdm(params["blocks"], desc="calibrating"):
        stats = jp.calibrate(smollm2.block, p, states, where=is_consumer, grams=False)
        for name, score in SCORES.items():
            found[name].append(importance(structure, p, score(p, stats)))
        states = [smollm2._block_jit(p, x) for x in states]
    turned = jp.scores.block_influence(smollm2.block, params["blocks"], states_of(params, tokens))
    found["cosine"] = [{"cosine": one} for one in turned]
    return found


def cut(
    structure: jp.typing.Structure, p: Any, stats: Any, keep: Units, refit: bool, bias: bool
) -> Any:
    """One block without some units: (the dense block's tree with zeros, masks)."""
    masks = structure.traced_masks(keep)
    pruned = jp.apply_masks(p, masks)
    if refit:
        rows = {CONSUMERS[dim] for dim, kept in keep.items() if kept.any() and not kept.all()}
        still = {name: jnp.asarray(True) for name in p}
        only = still | {name: masks[name] for name in rows}
        solved = jp.oneshot.refit(p, only, stats) if rows else p
        pruned |= {name: solved[name] for name in rows}
    if bias and HIDDEN in keep:
        biased = {"down_bias": jnp.zeros(p["down"].shape[1])}
        masks |= {"down_bias": jnp.asarray(True)}
        pruned = jp.oneshot.compensate(
            p | biased, pruned | biased, masks, _with_bias(stats), biases={"down": "down_bias"}
        )
    return pruned, masks


def _with_bias(stats: Any) -> Any:
    """Statistics for a tree that has one more leaf."""
    trees = ("means", "norms", "variances", "grams", "count")
    more = {name: getattr(stats, name) | {"down_bias": None} for name in trees}
    return dataclasses.replace(stats, **more)


def pruned_model(params: Any, tokens: np.ndarray, keep: Keep, refit: bool, bias: bool) -> Any:
    """All blocks cut, each calibrated on what the cut ones before it give; and their masks."""
    structure, left = _structure(params), iter(keep)

    def one(p: Any, stats: Any) -> tuple[Any, Any]:
        return cut(structure, p, stats, next(left), refit, bias)

    blocks, masks = jp.oneshot.sequential(
        smollm2.block, params["blocks"], states_of(params, tokens), one,
        where=is_consumer, grams=refit,
        progress=functools.partial(tqdm, desc="pruning"),
    )  # fmt: skip
    return params | {"blocks": blocks}, masks


def streamed_model(params: Any, tokens: np.ndarray, keep: Keep) -> tuple[Any, Any]:
    """All blocks cut, refit toward the dense model's stream; and their masks."""
    states = states_of(params, tokens)
    blocks, masks = oneshot_stream.pruned_blocks(_structure(params), params["blocks"], states, keep)
    return params | {"blocks": blocks}, masks


# ---- rows --------------------------------------------------------------------------------------


Build = Callable[[Any, np.ndarray, Keep], tuple[Any, Any]]  # params, tokens, what stays
REPAIRS: dict[str, Build] = {
    "": functools.partial(pruned_model, refit=False, bias=False),
    "refit": functools.partial(pruned_model, refit=True, bias=False),
    "bias": functools.partial(pruned_model, refit=False, bias=True),
    "refit + bias": functools.partial(pruned_model, refit=True, bias=True),
    "stream": streamed_model,
}
# name -> (what stays, how its consumers are repaired)
ROWS: dict[str, tuple[Callable[[Found], Keep], str]] = {
    f"{score}{repair and ' + '}{repair} -{percent} %": (
        functools.partial(ffn, score, percent),
        repair,
    )
    for score, repair, percents in (
        ("magnitude", "", (20,)),
        ("activations", "", (20,)),
        ("FLAP", "bias", (20,)),
        ("activations", "refit", (10, 20, 30, 50)),
        ("FLAP", "refit + bias", (10, 20, 30, 50)),
        ("FLAP", "stream", (10, 20, 30, 50)),
    )
    for percent in percents
}
ROWS |= {
    "heads, activations -1/3": (heads, ""),
    "heads, activations + refit -1/3": (heads, "refit"),
    "heads, activations + stream -1/3": (heads, "stream"),
    "blocks, cosine -3": (functools.partial(depth, 3), ""),
    "blocks, cosine -6": (functools.partial(depth, 6), ""),
    "all three by hand + refit": (by_hand, "refit"),
    "all three by hand + stream": (by_hand, "stream"),
}


def counts(keep: Keep) -> dict[str, list[int]]:
    return {dim: [int(u[dim].sum()) for u in keep] for dim in keep[0]}


def first(params: Any, kept: Mapping[str, list[int]]) -> Any:
    """Masks of the whole model that keep the first so many units."""
    structure = _structure(params)
    sizes = {dim: structure.dims[dim].size for dim in kept}
    blocks = [
        structure.traced_masks({d: np.arange(sizes[d]) < kept[d][k] for d in kept})
        for k in range(len(params["blocks"]))
    ]
    return {"embedding": True, "norm": True, "blocks": blocks}


def recipe(name: str, found: Found) -> tuple[Keep, str]:
    """The units that stay, and how the consumers are repaired."""
    choose, repair = ROWS[name]
    return choose(found), repair


def row(
    params: Any, tokens: np.ndarray, evaluated: Any, keep: Keep, repair: str
) -> tuple[dict[str, Any], Any]:
    """What is known about a cut model, and the model."""
    begin = time.perf_counter()
    pruned, masks = REPAIRS[repair](params, tokens, keep)
    seconds = time.perf_counter() - begin
    x = evaluated["excerpt"][:1, :TOKENS]
    every = {"embedding": True, "norm": True, "blocks": masks}
    small = jp.compact(smollm2.apply, pruned, every, x)
    want, got = (jax.jit(f)(p, x) for f, p in ((smollm2.apply, pruned), (small.fn, small.params)))
    about = {
        "seconds": round(seconds, 1),
        "params": sum(leaf.size for leaf in jax.tree.leaves(small.params)),
        "flops": jp.cost(small.fn, small.params, x).flops,
        "exact": small.certificate.exact,
        "max_relative_error": float(jnp.abs(got - want).max() / jnp.abs(want).max()),
        "kept": counts(keep),
        "device": results.device_name(),
        "date": results.today(),
    }
    return oneshot.measure(pruned, evaluated) | about, pruned


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("oneshot_structured", __doc__)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    path = results.begun("oneshot_structured.json", args.results)
    result = results.load(path) if path.exists() else results.header("oneshot_structured")
    params, tokenizer = smollm2.load()
    tokens = oneshot.calibration(tokenizer, True, SEQUENCES)
    evaluated = oneshot.corpora(tokenizer)
    rows = result.setdefault("rows", {})
    result.setdefault("dense", oneshot.measure(params, evaluated))
    found = scored(params, tokens)
    for name in args.rows:
        if name not in rows:
            rows[name], _ = row(params, tokens, evaluated, *recipe(name, found))
            results.save(result, path)
            print(name, _short(rows[name]), flush=True)


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k != "kept"}
