"""``python -m benchmarks stream``: SmolLM2 pruned from disk to disk, a block at a time.

Each method runs twice in processes of its own: by ``jp.oneshot.stream``, whose resident memory is
watched, and by ``jp.oneshot.sequential`` with all parameters in memory. Their tensors are compared
by digests. One more stream is killed at random moments and made again, until it ends; its files are
compared with those of the one that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.models import checkpoints, smollm2
from jaxprune.streaming import shards
from jaxprune.streaming.checkpoint import plain
from jaxprune.streaming.memory import give_back

LAYERS, SEQUENCES, BATCHES, KILLS = 30, 16, 8, 10
SPARSITY, CUT = 0.5, 0.25
DIMS = ("gate:1", "q:1.0.0")  # hidden units, key-value groups
EMBED = (checkpoints.llama_embed, {"embedding": "model.embed_tokens.weight"})
# Fewer pages that are free and yet kept, and smaller programs; both ways of pruning have these.
SPARING = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}  # fmt: skip

PER_OUTPUT = jp.unstructured(per_output=True)


def wanda(p: Any, stats: Any) -> tuple[Any, Any]:
    masks = PER_OUTPUT(jp.wanda(p, input_norms=stats.norms), SPARSITY)
    return jp.oneshot.refit(p, masks, stats), masks


def sparsegpt(p: Any, stats: Any) -> tuple[Any, Any]:
    return jp.oneshot.sparsegpt(p, stats, SPARSITY)


UNITS = "FLAP units + refit"
METHODS: dict[str, Any] = {"Wanda + refit": wanda, "SparseGPT": sparsegpt, UNITS: None}


def is_consumer(path: str, leaf: Any) -> bool:
    return path in ("o", "down")


def planned(source: Path, names: Sequence[Any], batches: list[Any]) -> list[Any]:
    """Masks of all blocks by one plan: FLAP's scores, compared across blocks by z-scores."""
    shapes = jp.oneshot.Checkpoint(source).shapes(names[0])
    x = jax.ShapeDtypeStruct((*batches[0].shape, shapes["q"].shape[0]), jnp.float32)
    structure = jp.infer_structure(smollm2.block, shapes, x)

    def look(p: Any, stats: Any) -> dict[str, np.ndarray]:
        units = structure.unit_scores(jp.scores.flap(p, stats=stats), jp.reduce.sum)
        return {d: np.asarray(units[d]) for d in DIMS}

    found = jp.oneshot.survey(
        source, smollm2.block, names, batches, look, embed=EMBED, where=is_consumer
    )
    keep: list[dict[str, Any]] = [{} for _ in names]
    for d in DIMS:
        z = [(u[d] - u[d].mean()) / u[d].std() for u in found]
        cut = np.quantile(np.concatenate(z), CUT)
        for units, score in zip(keep, z):
            units[d] = (score >= cut) | (score == score.max())
    return [structure.masks(units) for units in keep]


# ---- what runs in a process of its own -----------------------------------------------------------


def worker(told: dict[str, Any]) -> None:
    """One way of pruning; what was measured is printed as the last line."""
    source, target = Path(told["source"]), Path(told["target"])
    names = checkpoints.llama_names(told["layers"])
    batches = np.array_split(np.load(told["tokens"]), BATCHES)
    jax.block_until_ready(jnp.ones(3) + 1)
    with watched() as memory:
        begin = time.perf_counter()
        run = streamed if told["way"] == "stream" else in_memory
        found = run(source, target, names, batches, told["method"])
        memory["seconds"] = round(time.perf_counter() - begin, 1)
    give_back()
    before = resident()
    jax.clear_caches()
    give_back()
    memory["compiled_programs_MB"] = round(before - resident(), 1)
    print(json.dumps(memory | found))


def streamed(
    source: Path, target: Path, names: Any, batches: list[Any], method: str
) -> dict[str, Any]:
    how: dict[str, Any] = {"prune": METHODS[method]}
    if METHODS[method] is None:
        masks = planned(source, names, batches)
        how = {"masks": masks, "repair": jp.oneshot.refit, "cut": True, "where": is_consumer}
    done = jp.oneshot.stream(source, target, smollm2.block, names, batches, embed=EMBED, **how)
    return {"density": round(float(np.mean(done.densities)), 4)}


def in_memory(
    source: Path, target: Path, names: Any, batches: list[Any], method: str
) -> dict[str, Any]:
    """By ``sequential``: digests of the tensors as they would stand in a file."""
    checkpoint, where, prune = jp.oneshot.Checkpoint(source), None, METHODS[method]
    table = checkpoint.load(EMBED[1])
    embed = jax.jit(lambda p, x: EMBED[0](p, x))
    states = [embed(table, x) for x in batches]
    if prune is None:
        left, where = iter(planned(source, names, batches)), is_consumer

        def prune(p: Any, stats: Any) -> tuple[Any, Any]:
            masks = next(left)
            return jp.oneshot.refit(p, masks, stats), masks

    blocks, masks = jp.oneshot.sequential(
        smollm2.block, [checkpoint.load(each) for each in names], states, prune, where=where
    )
    if METHODS[method] is None:
        cut = [jp.compact(smollm2.block, p, m, states[0]) for p, m in zip(blocks, masks)]
        blocks = [small.params for small in cut]
    return {"digests": dict(_digests(names, blocks))}


def _digests(names: Any, blocks: Any) -> Iterator[tuple[str, str]]:
    for each, p in zip(names, blocks, strict=True):
        for leaf, name in each.items():
            array = np.asarray(p[leaf]) if name == plain(name) else np.asarray(p[leaf]).T
            yield plain(name), hashlib.sha256(shards.raw(array)).hexdigest()


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Resident memory above what it is now, in megabytes: the most that was seen."""
    start, found, over = resident(), {"peak_MB": 0.0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            found["peak_MB"] = max(found["peak_MB"], round(resident() - start, 1))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
    found["start_MB"] = round(start, 1)


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---- the study -----------------------------------------------------------------------------------


def start(told: dict[str, Any]) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "benchmarks.studies.oneshot.streaming", json.dumps(told)]
    env = os.environ | SPARING
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=env, cwd=results.ROOT)


def run(told: dict[str, Any]) -> dict[str, Any]:
    process = start(told)
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{told['way']}, {told['method']}: the process ended with an error")
    return json.loads(out.splitlines()[-1])


def killed(told: dict[str, Any], kills: int, seconds: float, seed: int = 0) -> list[int]:
    """Kills the stream at random moments, then lets it end; parts that were done at each kill."""
    rng, done = random.Random(seed), list[int]()
    state = Path(told["target"]) / "stream.json"
    for _ in range(kills):
        process = start(told)
        before = done[-1] if done else 0
        while process.poll() is None and _done(state) <= before:  # it has come a block further
            time.sleep(0.05)
        with_luck = rng.uniform(0, seconds / 15)
        try:
            process.wait(with_luck)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        done.append(_done(state))
    run(told)
    return done


def _done(state: Path) -> int:
    return len(json.loads(state.read_text())["parts"]) if state.exists() else 0


def tensors(folder: Path) -> dict[str, str]:
    """Name -> digest of each tensor of a checkpoint."""
    checkpoint = jp.oneshot.Checkpoint(folder)
    read: Callable[[str], np.ndarray] = checkpoint.store.read
    return {n: hashlib.sha256(shards.raw(read(n))).hexdigest() for n in checkpoint.names}


def files(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.iterdir() if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def loaded(folder: Path, layers: int) -> dict[str, Any]:
    """Perplexity of what was written, on one text that calibration has not seen."""
    from benchmarks.studies.oneshot import weights

    evaluated = weights.corpora(smollm2.load()[1])["excerpt"]
    checkpoint = jp.oneshot.Checkpoint(folder)
    params = checkpoint.load(checkpoints.LLAMA_OTHERS)
    params |= {"blocks": [checkpoint.load(each) for each in checkpoints.llama_names(layers)]}
    return {
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "perplexity": round(smollm2.perplexity(params, evaluated), 3),
    }


def prepare(folder: Path, sequences: int) -> None:
    """SmolLM2 in shards of 100 MB, and tokens to calibrate on."""
    from benchmarks.studies.oneshot import weights

    params, tokenizer = smollm2.load()
    checkpoints.save_llama(params, folder / "source")
    np.save(folder / "tokens.npy", weights.calibration(tokenizer, True, sequences))


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("stream", __doc__)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, default=LAYERS, help="that are pruned")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of 256 tokens")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--work", type=Path, help="a folder that stays, to go on in")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    work = args.work or Path(tempfile.mkdtemp(prefix="jaxprune-"))
    path = results.folder(args.results) / "stream.json"
    result = results.load(path) if path.exists() else results.header("stream")
    if not (work / "tokens.npy").exists():
        prepare(work, args.sequences)
    size = sum(p.stat().st_size for p in (work / "source").glob("*.safetensors"))
    result |= {"source_MB": round(size / 1e6, 1), "environment": SPARING, "layers": args.layers}
    result |= {"calibration_tokens": args.sequences * 256}
    rows = result.setdefault("rows", {})
    for method in args.methods:
        row = rows.setdefault(method, {})
        for step in steps(row, work, method, args, size):
            results.save(result, path)
            print(method, step, {k: v for k, v in row.items() if k != "digests"}, flush=True)


def steps(row: dict[str, Any], work: Path, method: str, args: Any, size: int) -> Iterator[str]:
    """Fills what a row lacks; yields after each step."""
    short = method.split()[0].lower()
    told = {
        "source": str(work / "source"), "tokens": str(work / "tokens.npy"), "method": method,
        "layers": args.layers, "target": str(work / short), "way": "stream",
    }  # fmt: skip
    target = Path(told["target"])
    if "stream" not in row:
        row["stream"] = run(told)
        row["peak_share"] = round(row["stream"]["peak_MB"] * 1e6 / size, 3)
        yield "streamed"
    if "sequential" not in row:
        row["sequential"] = run(told | {"way": "sequential"})
        want, got = row["sequential"].pop("digests"), tensors(target)
        row["equal_tensors"] = sum(got[name] == digest for name, digest in want.items())
        row["compared_tensors"] = len(want)
        yield "compared"
    if "loaded" not in row:
        row["loaded"] = loaded(target, args.layers)
        yield "loaded"
    if "killed_at_parts" not in row:
        again = told | {"target": str(work / f"{short}-killed")}
        row["killed_at_parts"] = killed(again, args.kills, row["stream"]["seconds"])
        row["same_files_after_kills"] = files(Path(again["target"])) == files(target)
        yield "killed"


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
