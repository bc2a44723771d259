"""``python -m benchmarks oneshot``: prunes SmolLM2 in one shot, and measures perplexities.

Block by block: each block is calibrated on what the already pruned blocks before it give, on pages
of Python's documentation and on WordNet's verb glosses: fit to one domain alone, reconstruction
loses more on another than no reconstruction. All attention and MLP kernels are pruned; embedding,
head and norms are not. Rows that the result file has are kept, so that a run that was cut short
goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results, texts
from benchmarks.models import smollm2

SEQUENCES, LENGTH, SEED = 32, 256, 0  # calibration, of each domain
BATCH = 8  # sequences
HIDDEN = "gate:1"  # a block's dimension of hidden units
EXCERPT = "tutorial/classes.rst.txt"
PATTERNS = {
    "50%": (jp.unstructured(), jp.unstructured(per_output=True), 0.5),
    "2:4": (jp.n_m(2, 4), jp.n_m(2, 4), 0.5),
    "30%": (jp.unstructured(), jp.unstructured(per_output=True), 0.3),
    "60%": (jp.unstructured(), jp.unstructured(per_output=True), 0.6),
    "70%": (jp.unstructured(), jp.unstructured(per_output=True), 0.7),
    "4:8": (jp.n_m(4, 8), jp.n_m(4, 8), 0.5),
}
Prune = Callable[[Any, Any, str, float], tuple[Any, Any]]  # params, stats, sparsity's name, damping


def magnitude(p: Any, stats: Any, at: str, damping: float) -> tuple[Any, Any]:
    masks = PATTERNS[at][0](jp.magnitude(p), PATTERNS[at][2])
    return jp.apply_masks(p, masks), masks


def by_score(score: Callable[..., Any]) -> Prune:
    def prune(p: Any, stats: Any, at: str, damping: float) -> tuple[Any, Any]:
        masks = PATTERNS[at][1](score(p, input_norms=stats.norms), PATTERNS[at][2])
        return jp.apply_masks(p, masks), masks

    return prune


def permuted_wanda(p: Any, stats: Any, at: str, damping: float) -> tuple[Any, Any]:
    """Wanda after the hidden units of the MLP are reordered; the dense function stays."""
    x = jax.random.normal(jax.random.key(0), (1, 8, p["q"].shape[0]))
    structure = jp.infer_structure(smollm2.block, p, x)
    scores = jp.wanda(p, input_norms=stats.norms)
    n, m = map(int, at.split(":"))
    permuted, orders = jp.oneshot.permute(
        smollm2.block, p, structure, scores, x, n=n, m=m, dims=HIDDEN
    )
    masks = PATTERNS[at][1](jp.oneshot.permuted(scores, structure, orders), PATTERNS[at][2])
    return jp.apply_masks(permuted, masks), masks


def sparsegpt(p: Any, stats: Any, at: str, damping: float) -> tuple[Any, Any]:
    pattern, _, sparsity = PATTERNS[at]
    return jp.oneshot.sparsegpt(p, stats, sparsity, pattern=pattern, damping=damping)


def alps(p: Any, stats: Any, at: str, damping: float) -> tuple[Any, Any]:
    pattern, _, sparsity = PATTERNS[at]
    return jp.oneshot.alps(p, stats, sparsity, pattern=pattern, damping=damping)


def refitted(prune: Prune) -> Prune:
    def both(p: Any, stats: Any, at: str, damping: float) -> tuple[Any, Any]:
        pruned, masks = prune(p, stats, at, damping)
        return jp.oneshot.refit(p, masks, stats, start=pruned, damping=damping), masks

    return both


METHODS: dict[str, Prune] = {
    "wanda": by_score(jp.wanda),
    "sparsegpt": sparsegpt,
    "wanda + refit": refitted(by_score(jp.wanda)),
    "sparsegpt + refit": refitted(sparsegpt),
    "alps": alps,
    "magnitude": magnitude,
    "ria": by_score(jp.scores.ria),
    "ria + refit": refitted(by_score(jp.scores.ria)),
    "magnitude + refit": refitted(magnitude),
    "wanda + permutation": permuted_wanda,  # N:M only
}
# These need norms, no Gram matrix; magnitude needs no statistics at all.
SCORES = ("wanda", "ria", "wanda + permutation")
UNCORRECTED = ("magnitude", "ria", "wanda", "wanda + permutation")  # they keep weights as they are


def prune_model(
    params: Any, tokens: np.ndarray, method: str, at: str, damping: float, drift: float
) -> tuple[Any, dict[str, Any]]:
    """Pruned parameters, with seconds, and mean relative output errors where Gram matrices are."""
    states = [params["embedding"][rows] for rows in np.array_split(tokens, len(tokens) // BATCH)]
    prune, errors, solving, begin = METHODS[method], [], 0.0, time.perf_counter()
    if method == "magnitude":
        blocks = [prune(p, None, at, damping)[0] for p in params["blocks"]]
        jax.block_until_ready(blocks)
        seconds = round(time.perf_counter() - begin, 1)
        return params | {"blocks": blocks}, {"solver_s": seconds, "calibration_s": 0.0}
    grams = method not in SCORES

    def timed(p: Any, stats: Any) -> tuple[Any, Any]:
        nonlocal solving
        jax.block_until_ready((stats.norms, stats.grams))
        start = time.perf_counter()
        pruned, masks = prune(p, stats, at, damping)
        jax.block_until_ready(pruned)
        solving += time.perf_counter() - start
        found = jp.oneshot.output_error(p, pruned, stats)
        errors.append({k: float(e) for k, e in found.items() if e is not None})
        return pruned, masks

    blocks, _ = jp.oneshot.sequential(
        smollm2.block, params["blocks"], states, timed, error_propagation=drift, grams=grams,
        progress=functools.partial(tqdm, desc=f"{method}, {at}", leave=False),
    )  # fmt: skip
    calibrating = time.perf_counter() - begin - solving
    about: dict[str, Any] = {
        "solver_s": round(solving, 1),
        "calibration_s": round(calibrating, 1),
    }
    if grams:
        names = {k for each in errors for k in each}
        about["layer_error"] = {
            k: float(np.mean([e[k] for e in errors if k in e])) for k in sorted(names)
        }
    return params | {"blocks": blocks}, about


def corpora(tokenizer: Any) -> dict[str, np.ndarray]:
    """What perplexity is measured on; the calibration pages are none of these."""
    excerpt = (texts.DOCS / EXCERPT).read_text()
    others = [p for p in texts.docs("tutorial") + texts.docs("howto") if EXCERPT not in str(p)]
    return {
        "excerpt": texts.sequences(tokenizer, excerpt, 4, 512),
        "docs": texts.samples(tokenizer, others, 4, 512, seed=1),
        "glosses": texts.sequences(tokenizer, texts.glosses(), 4, 512),
    }


def calibration(tokenizer: Any, mixed: bool, count: int, seed: int = SEED) -> np.ndarray:
    """Stretches of the library's pages; mixed: half of them verb glosses (nouns are evaluated)."""
    half = count // 2 if mixed else 0
    rows = texts.samples(tokenizer, texts.docs("library"), count - half, LENGTH, seed)
    more = texts.sequences(tokenizer, texts.verb_glosses(), half, LENGTH) if half else rows[:0]
    return np.concatenate([rows, more])


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for at in args.at:
        for method in args.methods:
            fits = ":" in at or method != "wanda + permutation"
            if fits and not (args.drift and method in UNCORRECTED):
                yield at, method


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("at", "method", "damping", "calibration", "sequences", "drift")
    return *(row[k] for k in names), row.get("seed", SEED)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    params, tokenizer = smollm2.load()
    evaluated = corpora(tokenizer)
    count = args.sequences or SEQUENCES * (2 if args.mixed else 1)
    tokens = calibration(tokenizer, args.mixed, count, args.seed)
    path = results.begun("oneshot.json", args.results)
    result = (
        results.load(path)
        if path.exists()
        else results.header("oneshot")
        | {
            "model": "SmolLM2-135M-Instruct, weights on a 4-bit grid",
            "calibration_tokens": "per row: sequences x 256",
            "rows": [],
        }
    )
    result.setdefault("dense", measure(params, evaluated))
    for at, method in jobs(args):
        row = {
            "at": at,
            "method": method,
            "damping": args.damping,
            "calibration": "docs + glosses" if args.mixed else "docs",
            "sequences": count,
            "drift": args.drift,
            "seed": args.seed,
        }
        if key(row) in [key(r) for r in result["rows"]]:
            continue
        pruned, about = prune_model(params, tokens, method, at, args.damping, args.drift)
        row |= measure(pruned, evaluated) | about
        row |= {"device": results.device_name(), "date": results.today()}
        result["rows"].append(row)
        results.save(result, path)
        print({k: v for k, v in row.items() if k != "layer_error"}, flush=True)


def measure(params: Any, evaluated: dict[str, np.ndarray]) -> dict[str, float]:
    return {k: round(smollm2.perplexity(params, x), 3) for k, x in evaluated.items()}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = studies.parser("oneshot", __doc__)
    parser.add_argument("--at", nargs="+", choices=PATTERNS, default=["50%", "2:4"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument(
        "--mixed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="calibrate on glosses, too: half of the sequences",
    )
    parser.add_argument(
        "--drift",
        type=float,
        default=0.0,
        help="share of the outputs' drift from the dense model that kernels make up for, in order",
    )
    parser.add_argument("--sequences", type=int, help=f"default: {SEQUENCES} of each domain")
    parser.add_argument("--seed", type=int, default=SEED, help="of the pages that are drawn")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    return parser.parse_args(argv)
