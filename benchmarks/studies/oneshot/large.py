"""``python -m benchmarks stream_large``: a checkpoint of Llama-7B's shape, cut from disk to disk.

Random weights in bfloat16, 13.5 GB in shards, are made in ``--work``, which needs 35 GB. A quarter
of the hidden units and of the key-value groups goes, by magnitude and by activations. Then two
blocks of the result are loaded, and their hidden states compared with those of the masked ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.models import checkpoints
from benchmarks.studies.oneshot.streaming import resident, watched
from jaxprune.streaming import shards

SIZES = {"width": 4096, "hidden": 11008, "heads": 32, "layers": 32, "words": 32000}
SMALL = {"width": 1024, "hidden": 2752, "heads": 8, "layers": 10, "words": 4000}  # 0.27 GB
HEAD, THETA, EPSILON = 128, 1e4, 1e-5
SPARSITY, TOKENS = 0.25, (4, 128)
DIMS = ("gate:1", "q:1.0*")
block = checkpoints.llama_block(HEAD, THETA, EPSILON)
EMBED = (checkpoints.llama_embed, {"embedding": "model.embed_tokens.weight"})


def make(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """A shard for each layer, and one for the rest, a tensor in memory at a time."""
    rng, (d, h) = np.random.default_rng(seed), (sizes["width"], sizes["hidden"])
    shapes = dict.fromkeys("qkvo", (d, d)) | {"gate": (h, d), "up": (h, d), "down": (d, h)}
    norms = dict.fromkeys(("attention_norm", "mlp_norm"), (d,))
    others = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (sizes["words"], d))
    every = [others | {"model.norm.weight": (d,)}] + [
        {f"model.layers.{k}.{checkpoints.LLAMA[n]}": s for n, s in (shapes | norms).items()}
        for k in range(sizes["layers"])
    ]
    folder.mkdir(parents=True)
    placed: dict[str, str] = {}
    for k, named in enumerate(every):
        file = f"model-{k + 1:05}-of-{len(every):05}.safetensors"
        rows = [(n, "BF16", s, 2 * int(np.prod(s)), _random(rng, s)) for n, s in named.items()]
        shards.write(folder / file, rows, {"format": "pt"})
        placed |= dict.fromkeys(named, file)
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """The bytes of a tensor, made when they are asked for; norms are ones."""
    if len(shape) == 1:
        yield shards.raw(np.ones(shape, ml_dtypes.bfloat16))
        return
    x = (rng.random(shape, np.float32) - 0.5) * (4 / shape[1] ** 0.5)
    yield shards.raw(x.astype(ml_dtypes.bfloat16))


def pruner(source: Path, names: Any, method: str) -> Any:
    """``prune`` of a method; both take the same share of each block's units."""
    shapes = jp.oneshot.Checkpoint(source).shapes(names[0])
    x = jax.ShapeDtypeStruct((*TOKENS, shapes["q"].shape[0]), jnp.float32)
    structure = jp.infer_structure(block, shapes, x)
    units = jp.structured(structure, dims=DIMS, reduce=jp.reduce.sum)

    def magnitude(p: Any, stats: Any) -> tuple[Any, Any]:
        masks = units(jax.tree.map(jnp.square, p), SPARSITY)
        return jp.apply_masks(p, masks), masks

    def activations(p: Any, stats: Any) -> tuple[Any, Any]:
        masks = units(jp.scores.activation_energy(p, stats=stats), SPARSITY)
        return jp.apply_masks(p, masks), masks

    return {"magnitude": magnitude, "activations": activations}[method]


def is_consumer(path: str, leaf: Any) -> bool:
    return path in ("o", "down")


def row(source: Path, target: Path, layers: int, words: int, method: str) -> dict[str, Any]:
    """Streams; resident memory in megabytes, and seconds."""
    names, prune = (
        checkpoints.llama_names(layers),
        pruner(source, checkpoints.llama_names(1), method),
    )
    tokens: Any = np.random.default_rng(1).integers(0, words, TOKENS)
    known = method != "magnitude"
    batches = [tokens if known else jax.ShapeDtypeStruct(TOKENS, jnp.int32)]
    begin = time.perf_counter()
    with watched() as memory:
        jp.oneshot.stream(
            source, target, block, names, batches, prune, cut=True, embed=EMBED,
            where=is_consumer, grams=False, settings=f"{method}, {SPARSITY}",
        )  # fmt: skip
    return memory | {
        "seconds": round(time.perf_counter() - begin, 1),
        "resident_peak_MB": round(memory["start_MB"] + memory["peak_MB"], 1),
        "resident_end_MB": round(resident(), 1),
        "relative_error_of_two_blocks": compared(source, target, prune, tokens, known),
        "widths": {
            n: jp.oneshot.Checkpoint(target).shapes(names[0])[n].shape for n in ("gate", "q", "k")
        },
        "target_MB": round(sum(p.stat().st_size for p in target.iterdir()) / 1e6, 1),
    }


def compared(source: Path, target: Path, prune: Any, tokens: Any, known: bool) -> float:
    """How far two blocks of the result are from the masked ones, of the largest hidden state."""
    full, small = jp.oneshot.Checkpoint(source), jp.oneshot.Checkpoint(target)
    x = y = EMBED[0](full.load(EMBED[1]), tokens)
    for names in checkpoints.llama_names(2):
        p = full.load(names)
        stats = jp.calibrate(block, p, [x], where=is_consumer, grams=False) if known else None
        x = block(prune(p, stats)[0], x)
        y = block(small.load(names), y)
    return float(jnp.abs(x - y).max() / jnp.abs(x).max())


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("stream_large", __doc__)
    parser.add_argument("--small", action="store_true", help="0.27 GB in place of 13.5")
    parser.add_argument("--methods", nargs="*", default=["magnitude", "activations"])
    parser.add_argument("--work", type=Path, required=True, help="a folder that stays, to go on in")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    sizes = SMALL if args.small else SIZES
    path = results.folder(args.results) / "stream_large.json"
    result = results.load(path) if path.exists() else results.header("stream_large")
    source = args.work / "source"
    if not (source / shards.INDEX).exists():
        make(source, sizes)
    found = result.setdefault("rows", {}).setdefault("small" if args.small else "7B", {})
    size = sum(p.stat().st_size for p in source.iterdir())
    for method in args.methods:
        told = row(source, args.work / method, sizes["layers"], sizes["words"], method)
        found[method] = {"source_MB": round(size / 1e6, 1)} | told
        results.save(result, path)
        print(method, found[method], flush=True)
