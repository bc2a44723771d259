"""Known effects of pruning whole units, and of repairs: ``python -m benchmarks effects_units``.

A residual network on Fashion-MNIST is cut in pairs of ways that differ in one thing, and recovered
alike (``jp.recover``, as many steps). FLOPs are counted, no time is measured. The sixth effect cuts
single weights of a perceptron, and trains nothing afterwards. Each claim is judged by the rule of
``python -m benchmarks effects``; movement against magnitude, by ``python -m benchmarks text``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import data, results
from benchmarks.studies.effects import claims as rules
from benchmarks.studies.effects import training
from benchmarks.studies.effects.claims import ABOVE, NOTHING, Claim, name
from benchmarks.studies.recovery import recovery
from benchmarks.studies.recovery.recovery import Case
from jaxprune.training import add_penalty, group_lasso

PyTree = Any
WHOLE, PERCEPTRON = "residual", "perceptron"
DEEP, SHALLOW, MIXED = 0.25, 0.87, 0.5  # of the FLOPs
WIDTHS = (0.75, 0.25)  # of each dimension's units stay


@dataclasses.dataclass(frozen=True)
class Settings(recovery.Settings):
    """How much of everything; the whole of it goes into the result file."""

    penalty_steps: int = 600  # of training on, with and without group lasso
    penalty: float = 3e-4
    rate: float = 0.02
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)  # of the perceptron's weights
    calibrated: int = 2000  # images
    effects: tuple[str, ...] = ("group lasso", "curvature", "search", "depth and width")


QUICK = Settings(
    seeds=1, dense_steps=30, tune_steps=10, evidence=2, test_images=200, timed=16, penalty_steps=3,
    sparsities=(0.5, 0.9), calibrated=100, effects=("depth and width",),
)  # fmt: skip

CLAIMS = (
    Claim("group lasso", "group lasso", ABOVE, "no penalty", 1 - DEEP),
    Claim("curvature", "curvature", ABOVE, "magnitude", 1 - WIDTHS[0]),
    Claim("curvature", "curvature", ABOVE, "magnitude", 1 - WIDTHS[1]),
    Claim("search", "search", ABOVE, "the same fraction of all", 1 - DEEP),
    Claim("search", "the same fraction of all", NOTHING, "search", 1 - SHALLOW),
    Claim("depth and width", "depth and width", ABOVE, "width alone", 1 - MIXED),
    Claim("depth and width", "depth and width", ABOVE, "depth alone", 1 - MIXED),
)
GAINS = Claim("reconstruction", "gain of SparseGPT, deepest", ABOVE, "gain of SparseGPT, mildest",
              0.0)  # fmt: skip


# ---- whole units ----------------------------------------------------------------------------


def by_search(
    case: Case, scores: Any, flops: float, dense: PyTree = None, uniform: bool = False, **more: Any
) -> jp.typing.Compact:
    """The most of the score at a part of the FLOPs."""
    dense = case.dense if dense is None else dense
    search = jp.Search(case.fn, dense, case.structure, scores, case.x, progress=False, **more)
    plan = search.plan(jp.Target(flops=flops), uniform=uniform)
    return jp.compact(case.fn, dense, plan.masks, case.x)


def by_width(case: Case, score: str, kept: float) -> jp.typing.Compact:
    """The same part of the units of each dimension."""
    pattern = jp.structured(case.structure, round_to=4, reduce=jp.reduce.sum)
    scores = case.scores("fisher") if score == "curvature" else _weights_only(case.dense)
    return jp.compact(case.fn, case.dense, pattern(scores, 1 - kept), case.x)


def _weights_only(variables: PyTree) -> PyTree:
    """Magnitudes, where running statistics have no vote."""
    return _still(jp.magnitude(variables))


def _still(variables: PyTree) -> PyTree:
    """With zeros for running statistics."""
    return {**variables, "batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}


def trained_on(case: Case, settings: Settings, strength: float) -> PyTree:
    """The dense variables after some more steps, under group lasso or not."""
    tx = optax.sgd(optax.cosine_decay_schedule(settings.rate, settings.penalty_steps), 0.9)
    if strength:
        penalty = group_lasso(case.structure)
        tx = optax.chain(add_penalty(lambda v: penalty(_still(v)), strength), tx)

    @jax.jit
    def step(variables: PyTree, state: Any, x: Any, y: Any) -> Any:
        grads, new = jax.grad(case.loss, has_aux=True)(variables, x, y)
        updates, state = tx.update(grads, state, variables)
        moved = optax.apply_updates(variables, updates)
        return {**moved, "batch_stats": new["batch_stats"]}, state

    variables, state = case.dense, tx.init(case.dense)
    for x, y in itertools.islice(itertools.cycle(case.batches), settings.penalty_steps):
        variables, state = step(variables, state, x, y)
    return variables


def lasso(case: Case, settings: Settings, strength: float) -> jp.typing.Compact:
    dense = trained_on(case, settings, strength)
    return by_search(case, _weights_only(dense), DEEP, dense, objective="balanced")


def depth_alone(case: Case) -> jp.typing.Compact:
    """Whole branches, those whose loss of score is least, until the FLOPs are met."""
    dims, scores = branches(case), case.scores("taylor")
    whole = jp.cost(case.fn, case.dense, case.x).flops
    best: tuple[float, Any] | None = None
    for gone in _subsets(dims):
        keep = {n: np.full(case.structure.dims[n].size, n not in gone) for n in dims}
        small = jp.compact(case.fn, case.dense, case.structure.masks_of(keep), case.x)
        lost = float(sum(np.sum(scores[n]) for n in gone))
        met = jp.cost(small.fn, small.params, case.x).flops <= MIXED * whole
        if met and (best is None or lost < best[0]):
            best = lost, small
    if best is None:
        raise ValueError("no set of branches meets the FLOPs")
    return best[1]


def branches(case: Case) -> list[str]:
    """Dimensions inside of one residual branch: without them it is gone."""
    return [n for n in case.structure.dims if "/Block_" in n and n.endswith("Conv_0/kernel:3")]


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for count in range(1, len(names) + 1):
        yield from itertools.combinations(names, count)


def ways(case: Case, settings: Settings) -> dict[str, Callable[[], jp.typing.Compact]]:
    """run -> what it leaves of the network."""
    part = functools.partial
    taylor = functools.cache(lambda: case.scores("taylor"))
    found: dict[str, Callable[[], jp.typing.Compact]] = {
        name("group lasso", 1 - DEEP): part(lasso, case, settings, settings.penalty),
        name("no penalty", 1 - DEEP): part(lasso, case, settings, 0.0),
        name("depth alone", 1 - MIXED): part(depth_alone, case),
        name("width alone", 1 - MIXED): lambda: by_search(case, taylor(), MIXED),
        name("depth and width", 1 - MIXED): lambda: by_search(
            case, taylor(), MIXED, minimum=dict.fromkeys(branches(case), 0)
        ),
    }
    for kept, score in itertools.product(WIDTHS, ("curvature", "magnitude")):
        found[name(score, 1 - kept)] = part(by_width, case, score, kept)
    for flops in (DEEP, SHALLOW):
        for way, uniform in (("search", False), ("the same fraction of all", True)):
            found[name(way, 1 - flops)] = part(
                lambda f, u: by_search(case, taylor(), f, uniform=u), flops, uniform
            )
    return found


def whole_units(case: Case, settings: Settings, found: Any, seed: str) -> Iterator[None]:
    """Adds the accuracies of the ways that one seed lacks."""
    if seed not in found.setdefault(name("dense", 0), {}):
        found[name("dense", 0)][seed] = case.accuracy(case.fn, case.dense)
        yield
    wanted = {
        name(method, claim.sparsity)
        for claim in CLAIMS if claim.effect in settings.effects
        for method in (claim.first, claim.second)
    }  # fmt: skip
    for run, make in ways(case, settings).items():
        if run not in wanted or seed in found.get(run, {}):
            continue
        small = make()
        tuned = jp.recover(
            small, case.loss, case.batches, steps=settings.tune_steps, progress=False
        )
        found.setdefault(run, {})[seed] = case.accuracy(tuned.fn, tuned.params)
        print(f"seed {seed}  {run:<40} {found[run][seed]:.4f}", flush=True)
        yield


# ---- reconstruction -------------------------------------------------------------------------


def reconstruction(
    images: training.Images, settings: Settings, own: training.Settings, found: Any, seed: str
) -> Iterator[None]:
    """Adds accuracies of a perceptron cut at once, by magnitude and by SparseGPT."""
    wanted = [name(m, s) for s in settings.sparsities for m in ("magnitude", "SparseGPT")]
    if all(seed in found.get(run, {}) for run in wanted):
        return
    trainer = training.Trainer(own, images, PERCEPTRON, int(seed), own.rates[0])
    params = trainer.train("fixed", 0.0).params
    stats = jp.calibrate(training.logits, params, [images.train_x[: settings.calibrated]])
    judged = lambda p: float(training.accuracy(p, images.test_x, images.test_y))  # noqa: E731
    for s in settings.sparsities:
        cut = jp.apply_masks(params, jp.unstructured()(jp.magnitude(params), s))
        repaired, _ = jp.oneshot.sparsegpt(params, stats, s, progress=False)
        found.setdefault(name("magnitude", s), {})[seed] = judged(cut)
        found.setdefault(name("SparseGPT", s), {})[seed] = judged(repaired)
    print(f"seed {seed}  reconstruction", {run: found[run][seed] for run in wanted}, flush=True)
    yield


def gains(found: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Whether reconstruction gains more at the highest sparsity than at the lowest."""
    ends = []
    for s in (max(settings["sparsities"]), min(settings["sparsities"])):
        a, b = (found.get(name(m, s), {}) for m in ("SparseGPT", "magnitude"))
        ends.append([a[seed] - b[seed] for seed in sorted(a) if seed in b])
    if not all(ends):
        return None
    claim = GAINS._replace(sparsity=max(settings["sparsities"]))
    return {"network": PERCEPTRON} | rules.judge(claim, *ends)


# ---- the whole ------------------------------------------------------------------------------


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per claim whose runs are there."""
    networks = result["networks"]
    rows = rules.compared(WHOLE, networks.get(WHOLE, {}).get("accuracy", {}), CLAIMS)
    found = gains(networks.get(PERCEPTRON, {}).get("accuracy", {}), result["settings"])
    return rows + ([found] if found else [])


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each claim's difference with its standard error."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8.5, 0.6 * len(rows) + 1.4), layout="constrained")
    for k, row in enumerate(rows):
        sign = 1 if row["says"] == ABOVE else -1
        ax.errorbar(sign * 100 * row["difference"], k, xerr=100 * row["standard_error"],
                    marker="o", capsize=4, color="C0" if row["appears"] else "C3")  # fmt: skip
    pairs = [(r["first"], r["second"])[:: 1 if r["says"] == ABOVE else -1] for r in rows]
    texts = [f"{a}\nagainst {b}, {r['sparsity']:.0%}" for r, (a, b) in zip(rows, pairs)]
    ax.set_yticks(range(len(rows)), texts, fontsize="small")
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.invert_yaxis()
    ax.set(xlabel="points of test accuracy, mean ± standard error (red: the claim doesn't appear)")
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("effects_units", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, hardly trained")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    args = parser.parse_args(argv)
    settings, images = QUICK if args.quick else Settings(), data.load()
    own = training.QUICK if args.quick else dataclasses.replace(training.Settings(), rates=(0.03,))
    few = slice(settings.test_images)
    images = dataclasses.replace(images, test_x=images.test_x[few], test_y=images.test_y[few])
    stem = "effects_units-quick" if args.quick else "effects_units"
    path = results.folder(args.results) / f"{stem}.json"
    result = results.header("effects_units") | {
        "settings": dataclasses.asdict(settings), "data": images.describe(), "rule": rules.RULE,
    }  # fmt: skip
    result["networks"] = results.continued(path, result["settings"])

    def keep(made: Iterator[None]) -> None:
        for _ in made:
            result["effects"] = judged(result)
            results.save(result, path)

    accuracy = {
        network: result["networks"].setdefault(network, {}).setdefault("accuracy", {})
        for network in (PERCEPTRON, WHOLE)
    }
    arrays = training.on_device(images, own, 500 if args.quick else None)
    seeds = range(settings.first_seed, settings.first_seed + min(args.seeds, settings.seeds))
    for seed in seeds:
        keep(reconstruction(arrays, settings, own, accuracy[PERCEPTRON], str(seed)))
        weights = args.weights / ("effects_units-quick" if args.quick else "recovery")
        case = Case(WHOLE, images, settings, seed, weights)
        keep(whole_units(case, settings, accuracy[WHOLE], str(seed)))
    result["effects"] = judged(result)
    print(rules.text(result["effects"]))
    picture(result["effects"], path.with_suffix(".png"))
    print(path)
