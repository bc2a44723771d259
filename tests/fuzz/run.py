"""Random programs through ``jp.compact``: ``python -m tests.fuzz --programs 10000``.

Each program of ``tests.fuzz.programs`` is compacted under several masks of
``tests.fuzz.masks`` and compared with the masked model in float64. Whether all masked units
went or some had to stay, the results must be equal: a difference that the certificate does not
announce is a silent one, and there may be none. So must every law of ``tests.fuzz.laws``: a
broken one counts as a difference, too, and is named. ``--show SEED`` prints one program, its
dimensions and what becomes of it; 10,000 programs take about an hour on two cores.
``--again fuzz.json`` checks only the programs of which an earlier result names failures;
``--resume FILE`` keeps what is done in a file, and goes on from there when called again.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks.common import results
from jaxprune.ir import compat
from tests.fuzz import laws as fuzz_laws
from tests.fuzz import others
from tests.fuzz.laws import Case, computed, run, trace
from tests.fuzz.masks import MASKS, draw_masks, masked_params
from tests.fuzz.numpy_eval import BOUND, watching, widened
from tests.fuzz.programs import Program, gradient, random_program

RESULTS = results.ROOT / "tests" / "results"
TOLERANCE = 1e-9  # of the largest result
SMALLEST = 1e-3  # results below this are compared with an absolute error of TOLERANCE times it
ROUNDING = 100  # a larger error passes up to this times what one rounding of params makes
MOVES = 8  # draws of such a rounding: a branch on a number that is zero but for rounding may jump
COARSE, OF_COARSE = 1e-5, 8  # ... and up to this where programs compute in types as coarse as these
PATIENCE = 120  # seconds of processor time for one program
XLA_SHARE = 50  # one program in so many is run by XLA, too, to check numpy's evaluation
ROUND = 25  # chunks for each worker, then it is replaced
CHUNK = 20  # programs that a worker takes at once, before it clears JAX's caches


class Outcome(NamedTuple):
    """One program under one mask."""

    seed: int
    mask: str  # which kind of mask
    verdict: str  # "equal", "different", "crash", or "nothing" to prune
    whole: bool = False  # all masked units are gone
    corrected: bool = False  # ... and removed parts are carried somewhere
    stayed: bool = False  # the certificate says that masked units stay
    gradient: bool = False  # gradients were compared, too
    not_finite: bool = False  # the masked model itself has NaN or infinity somewhere
    error: float = 0.0
    detail: str = ""
    ill_conditioned: bool = False  # the masked model's own rounding is larger than the tolerance
    by_nan: bool = False  # it differs where the masked model compares NaN; the certificate warns


# -------------------------------------------------------------------------------------- property


def rounding_of(jaxpr: Any) -> float:
    """Of the narrowest floats in a program: attention in ``jax.nn`` has its softmax in float32."""
    inner, _ = compat.open_jaxpr(jaxpr)
    dtypes = [v.aval.dtype for eqn in inner.eqns for v in eqn.outvars if hasattr(v.aval, "dtype")]
    floats = [t for t in dtypes if jnp.issubdtype(t, jnp.floating)]
    within = [rounding_of(sub) for eqn in inner.eqns for sub in compat.sub_jaxprs(eqn)]
    return max([float(jnp.finfo(t).eps) for t in floats] + within, default=0.0)


def allowed(eps: float) -> float:
    """How many times the masked model's own rounding a difference may be."""
    return OF_COARSE if eps > COARSE else ROUNDING


def moved(params: Any, seed: int, eps: float) -> Any:
    """Parameters moved by one rounding; integers stay."""
    rng = np.random.default_rng(seed)

    def move(w: Any) -> Any:
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            return w
        step = max(eps, float(jnp.finfo(w.dtype).eps)) * rng.choice([-1, 1], np.shape(w))
        return widened(w) * (1 + step)

    return jax.tree.map(move, params)


def gradient_of(fn: Any) -> Any:
    """The gradient of one number made of all results."""
    return gradient(lambda params, *args: sum(map(_energy, jax.tree.leaves(fn(params, *args)))))


def _energy(y: Any) -> Any:
    parts = [y.real, y.imag] if jnp.iscomplexobj(y) else [y.astype(float)]
    return sum(jnp.sum(jnp.sin(part)) for part in parts)


def difference(expected: Any, got: Any) -> tuple[float, bool]:
    """The largest error relative to the largest result, and whether the masked model is finite.

    Where the masked model has no number, the compact one may have any.
    """
    a, b = ([_numbers(leaf) for leaf in jax.tree.leaves(tree)] for tree in (expected, got))
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf"), True
    known = [np.isfinite(x) for x in a]
    scale = max([SMALLEST, *(np.abs(x[k]).max(initial=0.0) for x, k in zip(a, known))])
    errors = [np.abs(x[k] - y[k]).max(initial=0.0) for x, y, k in zip(a, b, known)]
    worst = float("inf") if any(np.isnan(errors)) else float(max(errors, default=0.0) / scale)
    return worst, all(k.all() for k in known)


def _numbers(leaf: Any) -> np.ndarray:
    array = widened(leaf)
    return array if np.iscomplexobj(array) else array.astype(float)


def _types(traced: Any) -> list[Any]:
    return [np.dtype(aval.dtype) for aval in traced[0].out_avals]


class Checker:
    """One program: what all its masks share is traced once."""

    def __init__(self, program: Program):
        self.program = program
        self.structure = jp.infer_structure(program.fn, program.params, *program.args)
        self.full = trace(program.fn, program.params, *program.args)
        self.gradient: Any = None

    def check(self, name: str, masks: Any, gradients: bool, another: bool = False) -> Outcome:
        program = self.program
        if all(np.all(mask) for mask in jax.tree.leaves(masks)):
            return Outcome(program.seed, name, "nothing")
        masked = masked_params(program.params, masks)
        small = jp.compact(program.fn, program.params, masks, *program.args)
        gradients = gradients and program.differentiable
        with watching() as decided:
            expected = [small.restrict_outputs(run(self.full, masked, *program.args))]
            if gradients:
                expected.append(small.restrict(run(self._steep(), masked, *program.args)))
        functions = [small.fn, gradient_of(small.fn)][: len(expected)]
        traced = [trace(f, small.params, *program.args) for f in functions]
        got = [run(one, small.params, *program.args) for one in traced]
        pairs = [difference(a, b) for a, b in zip(expected, got)]
        error, finite = max(e for e, _ in pairs), all(f for _, f in pairs)
        case = Case(program.fn, program.params, program.args, masks, masked, small, program.seed)
        lines = fuzz_laws.broken(case)
        if _types(traced[0]) != _types(self.full):
            lines.append(f"results have types {_types(traced[0])}, wanted {_types(self.full)}")
        if another:
            lines += self._another(small, masked)
        apart = error > TOLERANCE
        by_nan = apart and bool(decided and small.certificate.hazards)
        shaken = apart and error <= self._rounding(small, masked, expected)
        equal = (not apart or shaken or by_nan) and not lines
        verdict = "equal" if equal else "different"
        states = {entry.status for entry in small.certificate.entries}
        exact = bool(small.certificate.exact)
        return Outcome(
            program.seed, name, verdict if small.certificate.entries else _idle(verdict), exact,
            "corrected" in states, not exact, gradients, not finite, error,
            "\n".join(lines), shaken, by_nan,
        )  # fmt: skip

    def _another(self, small: Any, params: Any) -> list[str]:
        """Other functions of the same parameters at the same cut are equal, or refused."""
        fn, args = self.program.fn, self.program.args
        names = list(others.FUNCTIONS)
        name = names[self.program.seed % len(names)]
        other = others.FUNCTIONS[name](fn)
        try:
            cut = small.cut(other, *args)
        except ValueError as error:
            if "can't be had at the cut" not in str(error):
                raise
            return []
        traced = trace(other, params, *args)
        with watching() as decided:
            expected = small.restrict_outputs(run(traced, params, *args))
        got = computed(cut, small.params, *args)
        error, _ = difference(expected, got)
        if error <= TOLERANCE or decided:
            return []
        eps = rounding_of(traced[0])
        near = [run(traced, moved(params, k, eps), *args) for k in range(MOVES)]
        rounding = max(difference(expected, small.restrict_outputs(out))[0] for out in near)
        if error <= allowed(eps) * rounding:
            return []
        return [f"small.cut of {name} differs by {error:.1e}"]

    def _rounding(self, small: Any, masked: Any, expected: Sequence[Any]) -> float:
        """How far a result may be off, since the masked model moves as its last digits do."""
        eps = rounding_of(self.full[0])
        moves = [self._moved_by(small, masked, expected, eps, k) for k in range(MOVES)]
        return allowed(eps) * max(moves)

    def _moved_by(
        self, small: Any, masked: Any, expected: Sequence[Any], eps: float, draw: int
    ) -> float:
        near = moved(masked, self.program.seed + draw, eps)
        found = [small.restrict_outputs(run(self.full, near, *self.program.args))]
        if len(expected) > 1:
            found.append(small.restrict(run(self._steep(), near, *self.program.args)))
        return max(difference(*pair)[0] for pair in zip(expected, found))

    def _steep(self) -> Any:
        if self.gradient is None:
            program = self.program
            self.gradient = trace(gradient_of(program.fn), program.params, *program.args)
        return self.gradient


def _idle(verdict: str) -> str:
    return "nothing" if verdict == "equal" else verdict


def check_program(seed: int, count: int) -> list[Outcome]:
    """All masks of one program; what is raised on the way is a crash."""
    with jax.enable_x64(True):
        program = random_program(seed)
        try:
            checker = Checker(program)
            masks = list(draw_masks(checker.structure, program.params, seed, count))
            lines = fuzz_laws.all_true_is_the_identity(program.fn, program.params, program.args)
        except Exception:
            return [Outcome(seed, "no mask", "crash", detail=traceback.format_exc(limit=-6))]
        found = [Outcome(seed, "no mask", "different", detail="\n".join(lines))] if lines else []
        for i, (name, mask) in enumerate(masks):
            try:
                found.append(checker.check(name, mask, i == seed % count, i == (seed + 1) % count))
            except Exception:
                text = traceback.format_exc(limit=-6)
                found.append(Outcome(seed, name, "crash", detail=text))
        return found


def agrees_with_xla(seed: int) -> bool:
    """Whether numpy's evaluation of the unmasked program is XLA's."""
    with jax.enable_x64(True):
        program = random_program(seed)
        return _as_xla_does(program.fn, program.params, program.args, seed)


def compiled_agrees(seed: int) -> list[Outcome]:
    """Whether the compact function, eager and under ``jax.jit``, gives what numpy makes of it."""
    with jax.enable_x64(True):
        program = random_program(seed)
        try:
            checker = Checker(program)
            name, masks = next(draw_masks(checker.structure, program.params, seed, 1))
            small = jp.compact(program.fn, program.params, masks, *program.args)
            for how, wrap in (("jit", jax.jit), ("eager", _eager)):
                if not _as_xla_does(small.fn, small.params, program.args, seed, wrap):
                    return [Outcome(seed, name, "different", detail=f"small.fn by {how}")]
        except Exception:
            return [Outcome(seed, "compiled", "crash", detail=traceback.format_exc(limit=-6))]
    return []


def _eager(fn: Any) -> Any:
    return fn


def _as_xla_does(fn: Any, params: Any, args: Any, seed: int, wrap: Any = jax.jit) -> bool:
    traced = trace(fn, params, *args)
    ours, theirs = run(traced, params, *args), wrap(fn)(params, *args)
    error = difference(theirs, ours)[0]
    if error <= TOLERANCE:
        return True
    near = run(traced, moved(params, seed, rounding_of(traced[0])), *args)
    return error <= ROUNDING * difference(ours, near)[0]


# --------------------------------------------------------------------------------------- running


class Chunk(NamedTuple):
    """What a worker found in its share."""

    seeds: list[int]
    outcomes: list[Outcome]
    xla: list[tuple[int, bool]]
    bound: dict[str, int] = {}  # primitives that numpy's evaluation left to JAX


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"a program took more than {PATIENCE} s of processor time")


def work(seeds: Sequence[int], count: int) -> Chunk:
    """Runs in a process of its own."""
    signal.signal(signal.SIGPROF, _too_slow)
    outcomes, xla = [], []
    BOUND.clear()
    for seed in seeds:
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        try:
            outcomes += check_program(seed, count)
            if seed % XLA_SHARE == 0:
                xla.append((seed, agrees_with_xla(seed)))
                outcomes += compiled_agrees(seed)
        except TimeoutError as error:
            outcomes.append(Outcome(seed, "no mask", "crash", detail=str(error)))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    jax.clear_caches()
    return Chunk(list(seeds), outcomes, xla, dict(BOUND))


def run_all(seeds: Sequence[int], count: int, workers: int) -> Iterator[Chunk]:
    """Chunks as they are done. Workers are new for each round, so that memory stays bounded."""
    shares = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    context = multiprocessing.get_context("spawn")
    for start in range(0, len(shares), ROUND * workers):
        some = shares[start : start + ROUND * workers]
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for future in as_completed([pool.submit(work, share, count) for share in some]):
                yield future.result()


def resumed(file: Path, seeds: Sequence[int], count: int, workers: int) -> Iterator[Chunk]:
    """As :func:`run_all`; each chunk is a line of a file, what stands there is not run again."""
    done: set[int] = set()
    for line in file.read_text().splitlines() if file.exists() else ():
        shares, outcomes, xla, bound = json.loads(line)
        done.update(shares)
        agree = [(s, agrees) for s, agrees in xla]
        yield Chunk(shares, [Outcome(*o) for o in outcomes], agree, bound)
    for chunk in run_all([s for s in seeds if s not in done], count, workers):
        with file.open("a") as lines:
            lines.write(json.dumps(chunk) + "\n")
        yield chunk


def summary(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Counts over everything; a program counts as exact when all its masks are."""
    outcomes = [o for chunk in chunks for o in chunk.outcomes]
    bound = collections.Counter[str]()
    for chunk in chunks:
        bound.update(chunk.bound)
    verdicts = collections.Counter(o.verdict for o in outcomes)
    active = [o for o in outcomes if o.verdict != "nothing"]
    xla = [agreed for chunk in chunks for _, agreed in chunk.xla]
    good = [o for o in outcomes if o.verdict == "equal" and not (o.ill_conditioned or o.by_nan)]
    equal = [o.error for o in good if not o.not_finite]
    return {
        "programs": sum(len(chunk.seeds) for chunk in chunks),
        "masks": len(outcomes),
        "crashes": verdicts["crash"],
        "silent_differences": verdicts["different"],
        "nothing_to_prune": verdicts["nothing"],
        "all_masked_units_removed": sum(o.whole for o in active),
        "of_these_with_a_carried_part": sum(o.whole and o.corrected for o in active),
        "some_masked_units_kept": sum(o.stayed for o in active),
        "gradients_compared": sum(o.gradient for o in active),
        "larger_error_from_rounding_alone": sum(o.ill_conditioned for o in active),
        "differ_where_masked_nan_is_compared": sum(o.by_nan for o in active),
        "masked_model_not_finite": sum(o.not_finite for o in active),
        "largest_relative_error": max(equal, default=0.0),
        "checked_with_xla": len(xla),
        "numpy_differs_from_xla": len(xla) - sum(xla),
        "laws_broken": _laws(outcomes),
        "evaluated_by_jax": dict(bound),
        "by_mask": _by_mask(active),
    }


def _laws(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How often each law is broken."""
    lines = [line for o in outcomes if o.verdict == "different" for line in o.detail.splitlines()]
    return dict(collections.Counter(line.partition(":")[0] for line in lines))


def _by_mask(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = {}
    for name in MASKS:
        mine = [o for o in outcomes if o.mask == name]
        rows[name] = {"masks": len(mine), "all_removed": sum(o.whole for o in mine)}
    return rows


def failures(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """What went wrong, smallest program first to look at."""
    bad = [o for chunk in chunks for o in chunk.outcomes if o.verdict in ("crash", "different")]
    return [
        {
            "seed": o.seed,
            "mask": o.mask,
            "verdict": o.verdict,
            "error": str(o.error),
            "detail": o.detail,
        }
        for o in sorted(bad)
    ]


def excused(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """Differences that are none of compaction's, and why."""
    why = {"rounding": lambda o: o.ill_conditioned, "masked NaN is compared": lambda o: o.by_nan}
    outcomes = sorted(o for chunk in chunks for o in chunk.outcomes)
    return [
        {"seed": o.seed, "mask": o.mask, "why": name, "error": str(o.error)}
        for o in outcomes
        for name, holds in why.items()
        if holds(o)
    ]


def show(seed: int, count: int) -> None:
    """Prints a program, its dimensions, and what becomes of it under each mask."""
    with jax.enable_x64(True):
        program = random_program(seed)
        print(program)
        print(jp.infer_structure(program.fn, program.params, *program.args))
    for outcome in check_program(seed, count):
        print(outcome._replace(detail=""))
        print(outcome.detail)


def _progress(chunks: Iterator[Chunk], total: int) -> Iterator[Chunk]:
    from tqdm import tqdm

    bad = 0
    with tqdm(total=total, unit="program", mininterval=5) as bar:
        for chunk in chunks:
            failed = [o for o in chunk.outcomes if o.verdict in ("crash", "different")]
            bad += len(failed)
            for o in failed:
                bar.write(f"{o.verdict}: --show {o.seed}, {o.mask}, error {o.error}")
            bar.update(len(chunk.seeds))
            bar.set_postfix(failures=bad)
            yield chunk


def _seeds(args: argparse.Namespace) -> list[int]:
    if not args.again:
        return list(range(args.seed, args.seed + args.programs))
    return sorted({row["seed"] for row in results.load(args.again)["failures"]})


def _print(counts: dict[str, Any], bad: Sequence[dict[str, Any]]) -> None:
    for row in bad:
        print(f"{row['verdict']}: --show {row['seed']}, {row['mask']}, error {row['error']}")
        print(row["detail"])
    for name, value in counts.items():
        print(f"{name:<36} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--masks", type=int, default=4, help="for each program")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--again", type=Path, default=None, help="failures of an earlier result")
    parser.add_argument("--resume", type=Path, default=None, help="what is done of the same call")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--show", type=int, default=None, metavar="SEED")
    args = parser.parse_args()
    if args.show is not None:
        return show(args.show, args.masks)
    begin, seeds = time.monotonic(), _seeds(args)
    workload = seeds, args.masks, args.workers
    chunks = resumed(args.resume, *workload) if args.resume else run_all(*workload)
    found = list(_progress(chunks, len(seeds)))
    counts, bad = summary(found), failures(found)
    _print(counts, bad)
    settings: dict[str, Any] = {"seeds": seeds} if args.again else {"first_seed": args.seed}
    settings |= {"masks_per_program": args.masks, "tolerance": TOLERANCE}
    if not args.resume:
        settings["seconds"] = round(time.monotonic() - begin)
    report = results.header("fuzz") | {"settings": settings, "counts": counts}
    report |= {"failures": bad, "excused": excused(found)}
    name = "fuzz_again.json" if args.again else "fuzz.json"
    results.save(report, args.json or results.folder(RESULTS) / name)
    sys.exit(bool(bad) or counts["numpy_differs_from_xla"] > 0)


if __name__ == "__main__":
    main()
