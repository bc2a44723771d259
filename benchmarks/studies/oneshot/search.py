"""In stages: which hidden units, heads and blocks of SmolLM2 go, for a measured speed.

What a cut costs depends on what has gone before: the losses of single cuts of the dense model don't
add up to that of all of them. So a stage takes a little: on top of what has gone, further cuts of
each block are tried, one at a time, and judged by how far the model's predictions move from the
dense ones (Kullback-Leibler divergence, which scatters less over texts than the loss does). Then
the solver of ``jp.search`` takes what costs least divergence for the time that it saves, all
blocks are cut and refit, one after another, and the next stage begins.

``python -m benchmarks oneshot_search`` adds a row per stage to ``oneshot_structured.json``, and
goes on after the last one that is there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
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
from benchmarks.studies.oneshot import structured
from benchmarks.studies.oneshot import weights as oneshot
from benchmarks.studies.oneshot.structured import HEADS, HIDDEN, Keep, Units

STAGES = (1.12, 1.25, 1.37, 1.5, 1.62, 1.75, 1.87, 2.0)  # speed-ups
JUDGED, LENGTH = 8, 128  # sequences and tokens of each on which cuts are judged
TRIED = {HIDDEN: (1 / 8, 1 / 4), HEADS: (1 / 3, 1.0)}  # of a dimension, taken by one stage
ALIGNED = 96  # widths are multiples of it: 16 candidates of 1,536 hidden units

Curves = list[dict[str, dict[int, float]]]  # per block and dimension: units kept -> divergence


def searching(params: Any) -> jp.Search:
    """The search over all widths; each operation is timed now, once for all stages."""
    x = jnp.zeros((1, structured.TOKENS), jnp.int32)
    structure = jp.infer_structure(smollm2.apply, params, x)
    names = [f"blocks/{k}/{dim}" for k in range(len(params["blocks"])) for dim in TRIED]
    ones = {name: np.ones(structure.dims[name].size) for name in names}
    found = jp.Search(
        smollm2.apply, params, structure, ones, x, dims=names, minimum={"*": 0},
        round_to=ALIGNED, progress=functools.partial(tqdm, desc="timing operations"),
    )  # fmt: skip
    return found.stage(ones)


def everything(params: Any) -> Keep:
    """Nothing has gone yet."""
    dims = structured._structure(params).dims
    return [{dim: np.ones(dims[dim].size, bool) for dim in TRIED} for _ in params["blocks"]]


def stage(
    params: Any,
    now: Any,
    keep: Keep,
    tokens: np.ndarray,
    judged: np.ndarray,
    found: jp.Search,
    target: jp.Target,
) -> tuple[Keep, jp.budget.SearchResult]:
    """Fewer units for a target, and the solver's plan.

    ``now`` is the model with what has gone. ``judged``: tokens that it was not calibrated on.
    """
    curves, order = tried(params, now, keep, tokens, judged)
    scores, least = worth(order, curves)
    plan = found.stage(scores, minimum=least).plan(target, verify=False)
    new = of_plan(plan, len(keep))
    return [{d: old[d] & units[d] for d in old} for old, units in zip(keep, new)], plan


def of_plan(plan: jp.budget.SearchResult, blocks: int) -> Keep:
    return [{dim: plan.keep[f"blocks/{k}/{dim}"] for dim in TRIED} for k in range(blocks)]


def tried(
    params: Any, now: Any, keep: Keep, tokens: np.ndarray, judged: np.ndarray
) -> tuple[Curves, list[Units]]:
    """Divergences after further cuts of each block, and the importance of the units left.

    Units that have gone are less important than all others.
    """
    structure, states = structured._structure(params), structured.states_of(params, tokens)
    dense = divergence_from(params, judged)
    x = params["embedding"][judged]
    begin, curves, order = dense(now, 0, x), Curves(), []
    for k, p in enumerate(tqdm(params["blocks"], desc="further cuts")):
        stats = jp.calibrate(smollm2.block, p, states, where=structured.is_consumer)
        units = structured.importance(structure, p, jp.scores.flap(p, stats=stats))
        order.append({d: np.where(keep[k][d], units[d], -1.0) for d in TRIED})
        curves.append({})
        for dim in TRIED:
            curves[k][dim] = {int(keep[k][dim].sum()): begin}
            for count in further(keep[k][dim], TRIED[dim]):
                less = keep[k] | {dim: structured._best(order[k][dim], count)}
                cut = structured.cut(structure, p, stats, less, True, False)[0]
                curves[k][dim][count] = dense(now, k + 1, smollm2._block_jit(cut, x))
        states = [smollm2._block_jit(now["blocks"][k], s) for s in states]
        x = smollm2._block_jit(now["blocks"][k], x)
    return curves, order


def further(keep: np.ndarray, parts: Sequence[float]) -> list[int]:
    """Counts below the present one that are tried."""
    present = int(keep.sum())
    return sorted({max(0, present - round(part * keep.size)) for part in parts} - {present})


def divergence_from(params: Any, judged: np.ndarray) -> Any:
    """A function (model, first block, hidden states before it) -> divergence from ``params``."""
    rows = [_rest(params, 0, params["embedding"][row][None]) for row in judged]
    dense = [_log_probabilities(params, row) for row in rows]

    def divergence(model: Any, first: int, x: jax.Array) -> float:
        out = _rest(model, first, x)
        each = [_divergence(params, d, row[None]) for d, row in zip(dense, out)]
        return float(np.mean(each))

    return divergence


def _rest(model: Any, first: int, x: jax.Array) -> jax.Array:
    for p in model["blocks"][first:]:
        x = smollm2._block_jit(p, x)
    return x


@jax.jit
def _log_probabilities(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(smollm2.norm(x, params["norm"]) @ params["embedding"].T)


@jax.jit
def _divergence(params: Any, dense: jax.Array, x: jax.Array) -> jax.Array:
    """Mean over tokens, in nats."""
    return jnp.mean(jnp.sum(jnp.exp(dense) * (dense - _log_probabilities(params, x)), -1))


def worth(order: list[Units], curves: Curves) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Scores of units, which add up to the divergence avoided; and the least counts tried."""
    scores, least = {}, {}
    for k, rows in enumerate(curves):
        for dim, row in rows.items():
            name = f"blocks/{k}/{dim}"
            least[name] = min(row)
            scores[name] = _scores(order[k][dim], row)
    return scores, least


def _scores(order: np.ndarray, row: Mapping[int, float]) -> np.ndarray:
    """Between counts that were tried along the lower convex hull: the best unit is worth most.

    What is better than all that were tried must stay: it is worth more than any of them.
    """
    counts = np.array(sorted(row))
    falling = np.maximum.accumulate([row[c] for c in counts[::-1]])[::-1]
    between = np.interp(np.arange(counts[0], counts[-1] + 1), counts, falling)
    gained = -np.diff(hull(between))
    units = np.zeros(order.size)
    best_first = np.argsort(-order, kind="stable")
    units[best_first[counts[0] : counts[-1]]] = np.maximum(gained, 0) + 1e-12
    units[best_first[: counts[0]]] = 2 * (gained.max(initial=0) + 1e-12)
    return units


def hull(y: np.ndarray) -> np.ndarray:
    """The largest convex sequence that is nowhere above y."""
    corners: list[int] = []
    for i in range(len(y)):
        while len(corners) > 1 and _above(y, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    return np.interp(np.arange(len(y)), corners, y[corners])


def _above(y: np.ndarray, a: int, b: int, c: int) -> bool:
    return (y[b] - y[a]) * (c - a) >= (y[c] - y[a]) * (b - a)


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("oneshot_search", __doc__)
    parser.add_argument("--until", type=float, default=2.0, help="the last speed-up")
    parser.add_argument("--streamed", nargs="*", type=float, help="stages; default: all there are")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    path = results.begun("oneshot_structured.json", args.results)
    result = results.load(path)
    params, tokenizer = smollm2.load()
    tokens = oneshot.calibration(tokenizer, True, structured.SEQUENCES)
    evaluated = oneshot.corpora(tokenizer)

    def add(name: str, keep: Keep, repair: str, more: dict[str, Any]) -> Any:
        row, pruned = structured.row(params, tokens, evaluated, keep, repair)
        result["rows"][name] = row | more
        results.save(result, path)
        print(name, structured._short(row), flush=True)
        return pruned

    saved = result.setdefault("stages", {})
    missing = [s for s in STAGES if s <= args.until and str(s) not in saved]
    if missing:
        found, judged, now, keep = searching(params), unseen(tokenizer), params, everything(params)
    if missing and saved:
        keep = _unpacked(list(saved.values())[-1], keep)
        now, _ = structured.pruned_model(params, tokens, keep, True, False)
    for speedup in missing:
        target = jp.Target(speedup=speedup)
        keep, plan = stage(params, now, keep, tokens[::4], judged, found, target)
        saved[str(speedup)] = _packed(keep)
        more = {"predicted": plan.predicted.speedup}
        now = add(f"search {speedup:g} x", keep, "refit", more)
    for speedup in saved if args.streamed is None else args.streamed:
        keep = _unpacked(saved[str(speedup)], everything(params))
        name = f"search {float(speedup):g} x"
        more = {"predicted": result["rows"][name]["predicted"]}
        add(f"{name} + stream", keep, "stream", more)


def unseen(tokenizer: Any) -> np.ndarray:
    """Half documentation, half verb glosses, behind what is calibrated on."""
    half = structured.SEQUENCES // 2
    more = oneshot.calibration(tokenizer, True, 2 * (half + JUDGED // 2))
    rows = np.concatenate([more[half : half + JUDGED // 2], more[-JUDGED // 2 :]])
    return rows[:, :LENGTH]


def _packed(keep: Keep) -> list[dict[str, str]]:
    return [{d: np.packbits(units).tobytes().hex() for d, units in block.items()} for block in keep]


def _unpacked(saved: list[dict[str, str]], like: Keep) -> Keep:
    def units(text: str, size: int) -> np.ndarray:
        return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:size].astype(bool)

    return [{d: units(text[d], block[d].size) for d in block} for text, block in zip(saved, like)]
