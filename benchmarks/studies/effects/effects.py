"""Known effects of pruning while training, on real images: ``python -m benchmarks effects``.

Every run is trained as long as the dense network, from the same initial weights and through the
same batches as all others of its seed, and judged once, on the whole test set. The learning rate is
the one that suits the dense network best, on images set apart. Each run is saved as soon as it is
done: a job that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import data, results
from benchmarks.studies.effects import claims as effects_claims
from benchmarks.studies.effects.claims import SPARSITIES, controlled, name
from benchmarks.studies.effects.training import (
    QUICK,
    Images,
    Run,
    Settings,
    Trainer,
    collapse,
    on_device,
)

COLLAPSE = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
LONGER = 3  # times as many epochs, for what may need more steps
# name -> (network, times as many epochs, times fewer rounds of tickets)
NETWORKS = {
    "perceptron": ("perceptron", 1, 1),
    "convolutional": ("convolutional", 1, 2),
    "perceptron, longer": ("perceptron", LONGER, 1),
}
Result = dict[str, Any]


class Job(NamedTuple):
    """Runs that are made in one go: name -> test accuracy, and names known beforehand."""

    names: tuple[str, ...]
    runs: Callable[[], Iterator[tuple[str, float]]]


def jobs(trainer: Trainer, brief: bool, at: Sequence[float] = SPARSITIES) -> Iterator[Job]:
    """What one network and one seed are compared on, or less to be brief."""
    yield lottery(trainer)
    for s in at:
        yield scheduled(trainer, "gradual, magnitude", s)
        yield scheduled(trainer, "one-shot, magnitude", s)
        yield masked(trainer, "SNIP", s)
        yield masked(trainer, "SNIP", s, shuffled=True)
    if brief:
        return
    for s in at:
        yield scheduled(trainer, "gradual, random", s)
        yield scheduled(trainer, "one-shot, random", s)
    yield from dynamic(trainer, at)
    yield from (masked(trainer, m, at[-1]) for m in ("random, uniform", "GraSP", "SynFlow"))


def dynamic(trainer: Trainer, at: Sequence[float] = SPARSITIES) -> Iterator[Job]:
    """Masks that move, and one that stays, where there is little left to lose."""
    for s in (s for s in at if s > SPARSITIES[0]):
        yield scheduled(trainer, "rigl", s)
        yield scheduled(trainer, "set", s)
        yield masked(trainer, "random, ERK", s)


def scheduled(trainer: Trainer, method: str, sparsity: float) -> Job:
    here = name(method, sparsity)
    run = lambda: trainer.test_accuracy(trainer.train(method, sparsity))  # noqa: E731
    return Job((here,), lambda: iter([(here, run())]))


def masked(trainer: Trainer, method: str, sparsity: float, shuffled: bool = False) -> Job:
    """Masks that are made before training, and stay; all kept for a dense network."""
    here = name(f"{method}, shuffled" if shuffled else method, sparsity)

    def runs() -> Iterator[tuple[str, float]]:
        masks = trainer.masks(method, sparsity)
        masks = jp.sanity.shuffle(masks, key=trainer.key) if shuffled else masks
        yield here, fixed(trainer, masks)

    return Job((here,), runs)


def fixed(trainer: Trainer, masks: Any, params: Any = None) -> float:
    """Test accuracy after training under these masks."""
    return trainer.test_accuracy(trainer.train_masked(masks, params))


def lottery(trainer: Trainer) -> Job:
    """The dense network, all tickets, and at some of them the same masks with other weights."""
    rounds = trainer.settings.tickets
    names = [name("dense", 0.0), *(name("ticket", 1 - 0.5**r) for r in range(1, rounds + 1))]
    for r in controlled(rounds):
        names += [name(f"ticket, {what}", 1 - 0.5**r) for what in ("re-initialised", "random mask")]

    def runs() -> Iterator[tuple[str, float]]:
        start = trainer.params()
        fresh = trainer.params(jax.random.fold_in(trainer.key, 3))  # drawn by the initialiser
        for ticket in trainer.tickets():
            r = int(ticket.index)
            done = trainer.test_accuracy(Run(ticket.params, ticket.opt_state))
            yield name("ticket", 1 - 0.5**r) if r else name("dense", 0.0), done
            if r in controlled(rounds):
                drawn = jp.sanity.random_like(start, ticket.masks, key=trainer.key)
                again = fixed(trainer, ticket.masks, fresh)
                yield name("ticket, re-initialised", 1 - 0.5**r), again
                yield name("ticket, random mask", 1 - 0.5**r), fixed(trainer, drawn)

    return Job(tuple(names), runs)


# ---- the whole ------------------------------------------------------------------------------


def choose_rate(images: Images, settings: Settings, network: str, found: Result) -> None:
    """The learning rate of the dense network, seed 0, that is best on validation images."""
    for rate in settings.rates:
        trainer = Trainer(settings, images, network, 0, rate)
        if str(rate) not in found["rates"]:
            found["rates"][str(rate)] = trainer.valid_accuracy(trainer.train("fixed", 0.0))
    best = max(settings.rates, key=lambda rate: found["rates"][str(rate)])
    if best != found.get("rate"):
        found.update(rate=best, accuracy={})


def measure(
    images: Images,
    settings: Settings,
    seeds: Sequence[int],
    networks: Sequence[str],
    result: Result,
    save: Callable[[], None],
    brief: bool = False,
    at: Sequence[float] = SPARSITIES,
) -> None:
    """Fills in what the result lacks, and saves after each run."""
    for seed in seeds:
        for method in ("SNIP", "SynFlow") if brief else ("magnitude", "GraSP", "SNIP", "SynFlow"):
            for sparsity in COLLAPSE:
                found = result["collapse"].setdefault(name(method, sparsity), {})
                if str(seed) not in found:
                    found[str(seed)] = collapse(method, sparsity, settings, images, seed)
    save()
    for network in networks:
        here = result["networks"].setdefault(network, {"rates": {}, "accuracy": {}})
        kind, longer, fewer = NETWORKS[network]
        choose_rate(images, settings, kind, here)
        save()
        own = dataclasses.replace(
            settings, epochs=longer * settings.epochs, tickets=settings.tickets // fewer
        )
        for seed in seeds:
            trainer = Trainer(own, images, kind, seed, here["rate"])
            for job in jobs(trainer, brief, at) if longer == 1 else dynamic(trainer, at):
                _fill(job, here["accuracy"], str(seed), save)


def _fill(job: Job, found: dict[str, Any], seed: str, save: Callable[[], None]) -> None:
    if all(seed in found.get(name, {}) for name in job.names):
        return
    begin = time.perf_counter()
    for run, accuracy in job.runs():
        found.setdefault(run, {})[seed] = round(accuracy, 4)
        print(f"seed {seed}  {run:<36} {accuracy:.4f}  {time.perf_counter() - begin:5.1f} s",
              flush=True)  # fmt: skip
        begin = time.perf_counter()
        save()


def opened(path: Path, settings: Settings, images: data.Data, again: bool) -> Result:
    """The result so far, if it was made with these settings and images, or an empty one."""
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.__dict__.items()}
    here = {"settings": listed, "data": images.describe()}
    if path.exists() and not again:
        found = results.load(path)
        found["settings"]["rates"] = listed["rates"]  # those that are new are tried
        if {key: found.get(key) for key in here} == here:
            return found
    return results.header("effects") | here | {"collapse": {}, "networks": {}}


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    images = data.load("digits" if args.quick else args.data)
    settings = QUICK if args.quick else Settings()
    stem = "effects-quick" if args.quick else "effects"
    path = results.folder(args.results) / f"{stem}.json"
    result = opened(path, settings, images, args.again)
    seeds = range(2 if args.quick else args.seeds)
    print(images.describe())
    save = lambda: results.save(result, path)  # noqa: E731
    arrays = on_device(images, settings, 500 if args.quick else None)
    measure(arrays, settings, seeds, args.networks, result, save, args.quick, args.at)
    result["rule"] = effects_claims.RULE
    result["effects"] = effects_claims.judged(result)
    save()
    print(effects_claims.text(result["effects"]))
    print("written:", path, *effects_claims.draw(result, path.parent, stem), sep="\n  ")


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = studies.parser("effects", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks on digits, in seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=["perceptron"], choices=list(NETWORKS))
    parser.add_argument("--at", nargs="*", type=float, default=SPARSITIES, choices=SPARSITIES)
    parser.add_argument("--again", action="store_true", help="forget what an earlier job has done")
    parser.add_argument("--data", choices=["auto", *data.SOURCES], default="auto")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    return parser.parse_args(argv)
