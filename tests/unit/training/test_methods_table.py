"""One table: scores x training methods x optimizers x kinds of trees x types.

Every two values meet in a row (scores come two to a row). It trains for a few steps under one
jitted step, and looks at each: everything is finite, pruned entries are bitwise +0, the leaf keeps
the scheduled number of entries, nothing is compiled twice.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune import training
from tests.helpers.covering import Row, Value, all_pairs, pairwise
from tests.helpers.oracles import ranked
from tests.unit.training.test_table import assert_pruned_are_zero, by_path, by_rank, either, jit

pytestmark = pytest.mark.slow  # Each row compiles an update of its own.

STEPS = 6
BAD_STEP = 3  # its gradients are NaN under apply_if_finite
CUBIC = jp.schedules.cubic(0.0, 0.5, begin=0, end=4)

# ---- scores, and where their evidence comes from --------------------------------------------


def squares(params: Any) -> Any:
    return sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params))


EVIDENCE: dict[str, Callable[[Any], Any]] = {
    "grad": lambda w: w - 1,
    "hvp": lambda w: w - 1,
    "hessian": lambda w: w - 1,
    "fisher": jnp.square,
    "nu": jnp.square,
    "grads": lambda w: jnp.stack([w, -w, w / 2]),
    "zeros": lambda w: jnp.linspace(0, 1, w.shape[-1], dtype=w.dtype),
    "means": lambda w: jnp.linspace(0, 1, w.shape[-1], dtype=w.dtype),
    "input_norms": lambda w: 1 + jnp.square(w),
}
KEY = jax.random.key(1)
SCORES: dict[str, tuple[Any, str | None]] = {  # the score, and the evidence that it needs
    "magnitude": (jp.magnitude, None),
    "l2": (jp.scores.l2, None),
    "rms_normalized": (jp.scores.rms_normalized, None),
    "lamp": (jp.scores.lamp, None),
    "random": (functools.partial(jp.random, key=KEY), None),
    "smallest": (jp.scores.smallest, None),
    "inverted": (jp.scores.inverted(jp.magnitude), None),
    "saliency": (jp.saliency, "grad"),
    "snip": (jp.scores.snip, "grad"),
    "taylor": (jp.scores.taylor, "grad"),
    "movement": (jp.scores.movement, "grad"),
    "grasp": (jp.scores.grasp, "hvp"),
    "obd": (jp.scores.obd, "hessian"),
    "fisher": (jp.scores.fisher, "fisher"),
    "adam_fisher": (jp.scores.adam_fisher, "nu"),
    "woodfisher": (jp.scores.woodfisher, "grads"),
    "synflow": (functools.partial(jp.scores.synflow, fn=squares), None),
    "apoz": (jp.scores.apoz, "zeros"),
    "mean_activation": (jp.scores.mean_activation, "means"),
    "wanda": (jp.scores.wanda, "input_norms"),
    "ria": (jp.scores.ria, "input_norms"),
    "flap": (jp.scores.flap, "stats"),
    "activation_energy": (jp.scores.activation_energy, "stats"),
    "fpgm": (jp.scores.fpgm, None),
    "batch_norm_scale": (
        functools.partial(jp.scores.batch_norm_scale, where=lambda p, w: True),
        None,
    ),
}
OF_BLOCKS = {"block_divergence", "block_influence", "block_loss"}
# Statistics; a driver; scores of units, experts and blocks.
OF_UNITS = {"taylor_units", "loss_units"}
NO_SCORES = {"activity", "in_rounds", "experts", *OF_UNITS, *OF_BLOCKS}
OWN = "its own"  # the score of a method that takes none


# ---- methods --------------------------------------------------------------------------------


class Method(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # of the optimizer and the score
    sparsity: Callable[[int], float] | None  # of the masks after the update of a step
    stores: str = "sparse"  # what params hold between steps; "dense", "shrunk" where kept are, too


def half(step: int) -> float:
    return 0.5


def phases(step: int) -> float:
    return 0.5 if step in (1, 3) or step >= 4 else 0.0


def of_rounds(step: int) -> float:
    return 1 - 0.5 ** (step // 2 / 2)


def fixed_masks(inner: Any, params: Any) -> Any:
    return optax.chain(inner, jp.keep_params_sparse(ranked(jp.magnitude(params), 0.5)))


HALF: Any = {"sparsity": 0.5, "pattern": ranked}
METHODS = {
    "static": Method(lambda o, s: training.static(o, **HALF, score=s), half),
    "one_shot": Method(
        lambda o, s: training.one_shot(o, **HALF, score=s, at=2),
        lambda t: 0.5 * (t >= 2),
    ),
    "prune": Method(
        lambda o, s: jp.prune(o, s, CUBIC, every=3, pattern=ranked),
        lambda t: float(CUBIC(t if t >= 4 else t - t % 3)),
    ),
    "iterative": Method(lambda o, s: training.static(o, 0.0, pattern=ranked), of_rounds),
    "set": Method(lambda o, s: training.set(o, **HALF, every=2, score=s), half),
    "rigl": Method(lambda o, s: training.rigl(o, **HALF, every=2, score=s), half),
    "snfs": Method(lambda o, s: training.snfs(o, 0.5, every=2, score=s), half),
    "ac_dc": Method(
        lambda o, s: training.ac_dc(
            o, **HALF, begin=1, end=4, sparse_steps=1, dense_steps=1, score=s
        ),
        phases,
    ),
    "regularized": Method(
        lambda o, s: training.regularized(
            o, **HALF, penalty=training.l1(), strength=0.01, at=2, score=s
        ),
        lambda t: 0.5 * (t >= 2),
    ),
    "ste": Method(lambda o, s: training.ste(o, **HALF, score=s), half, "dense"),
    "sr_ste": Method(
        lambda o, s: training.sr_ste(o, decay=0.1, pattern=jp.n_m(1, 2), score=s), half, "dense"
    ),
    "admm": Method(lambda o, s: training.admm(o, **HALF, rho=0.1, every=2, score=s), half, "dense"),
    "top_kast": Method(lambda o, _: training.top_kast(o, **HALF, backward=0.25), half, "dense"),
    "movement": Method(
        lambda o, _: training.movement(o, CUBIC, pattern=ranked),
        lambda t: float(CUBIC(t + 1)),
        "dense",
    ),
    "soft_movement": Method(lambda o, _: training.soft_movement(o, 0.5, tau=-0.25), None, "dense"),
    "soft_threshold": Method(
        lambda o, _: training.soft_threshold(o, 0.1, rate=1.0), None, "shrunk"
    ),
    "keep_params_sparse": Method(fixed_masks, half),
}
WITHOUT_SCORE = {
    "top_kast": "ranks by magnitude",
    "movement": "ranks by what it remembers of gradients",
    "soft_movement": "ranks by what it remembers of gradients",
    "soft_threshold": "compares magnitudes with a learned threshold",
    "keep_params_sparse": "is given masks",
}
NO_ROWS = {
    "method": "the core of those that have rows",
    "dense_method": "the core of those that have rows",
    "packed": "wraps a method: test_packed_masks_are_the_same_masks",
    "add_penalty": "makes no masks",
    "network_slimming": "regularized, with the score and the pattern of a structure",
}

# ---- optimizers -----------------------------------------------------------------------------

ADAM = optax.adam(1e-2)
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd+momentum": lambda method: method(optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    "adam": lambda method: method(ADAM),
    "adamw": lambda method: method(optax.adamw(1e-2, weight_decay=0.1)),
    "nadamw": lambda method: method(optax.nadamw(1e-2, weight_decay=0.1)),
    "lion": lambda method: method(optax.lion(1e-3, weight_decay=0.1)),
    "adafactor": lambda method: method(optax.adafactor(1e-2, min_dim_size_to_factor=2)),
    "rmsprop": lambda method: method(optax.rmsprop(1e-3, momentum=0.9)),
    "inject_hyperparams": lambda method: method(
        optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(
            optax.cosine_decay_schedule(1e-2, STEPS)
        )
    ),
    "MultiSteps": lambda method: method(optax.MultiSteps(ADAM, 2)),
    "muon": lambda method: method(optax.contrib.muon(1e-2, ns_steps=2)),
    "partition": lambda method: method(
        optax.partition({"matrix": ADAM, "vector": optax.sgd(1e-2, momentum=0.9)}, by_rank)
    ),
    "apply_if_finite": lambda method: optax.apply_if_finite(method(ADAM), 3),
    "clip chain": lambda method: optax.chain(optax.clip_by_global_norm(1.0), method(ADAM)),
}

# ---- trees ----------------------------------------------------------------------------------

ONES = jnp.ones(4)
TREES: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"a": [{"kernel": jax.random.normal(jax.random.key(0), (4, 4))}], "b": ONES},
    "tuple": lambda: (jax.random.normal(jax.random.key(1), (2, 2, 4)), (ONES, None)),
    "nnx": lambda: nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Param),
    "equinox": lambda: eqx.filter(eqx.nn.Linear(4, 4, key=jax.random.key(2)), eqx.is_inexact_array),
}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}

# ---- the rows -------------------------------------------------------------------------------


def twos(names: list[str]) -> dict[str, list[str]]:
    """Scores two by two, far ones together: both run in one compiled step."""
    n = (len(names) + 1) // 2
    return {"+".join(names[i::n]): names[i::n] for i in range(n)}


PAIRS_OF_SCORES = twos(list(SCORES)) | {OWN: [OWN]}
FACTORS = {
    "scores": list(PAIRS_OF_SCORES),
    "method": list(METHODS),
    "optimizer": list(OPTIMIZERS),
    "tree": list(TREES),
    "dtype": list(DTYPES),
}


def fit(a: Value, b: Value) -> bool:
    """A method without a score meets none, and each other method meets all."""
    values = dict((a, b))
    if not {"scores", "method"} <= set(values):
        return True
    return (values["scores"] == OWN) == (values["method"] in WITHOUT_SCORE)


ROWS = pairwise(FACTORS, fit)


def test_every_pair_of_values_has_a_row() -> None:
    met = {frozenset(pair) for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    assert met == {frozenset(pair) for pair in all_pairs(FACTORS, fit)}
    assert {name for names in PAIRS_OF_SCORES.values() for name in names} == {*SCORES, OWN}
    for scores, method in itertools.product(PAIRS_OF_SCORES, METHODS):
        meet = frozenset({("scores", scores), ("method", method)}) in met
        assert meet == ((scores == OWN) == (method in WITHOUT_SCORE))
    assert len(ROWS) <= 1.15 * len(METHODS) * len(OPTIMIZERS), "that many are needed"


def test_every_public_score_and_method_has_rows_or_a_reason() -> None:
    scores = {n for n, f in vars(jp.scores).items() if inspect.isfunction(f) and n[0] != "_"}
    assert scores == set(SCORES) | NO_SCORES
    functions = [f for f in vars(training).values() if inspect.isfunction(f)]
    wrappers = {
        f.__name__
        for f in functions
        if "GradientTransformation" in str(inspect.signature(f).return_annotation)
    }
    assert wrappers - set(NO_ROWS) == set(METHODS) - {"iterative"}


# ---- the run --------------------------------------------------------------------------------


class Run(NamedTuple):
    """What was seen after each step, stacked; path -> array."""

    params: dict[str, np.ndarray]
    used: dict[str, np.ndarray]  # what the network computes with
    masks: dict[str, np.ndarray]


def gradient(params: Any, step: Any, bad: bool) -> Any:
    scale = jnp.where((step == BAD_STEP) & bad, jnp.nan, 1.0)
    return jax.tree.map(lambda p: ((p - 0.1 * jnp.sin(step)) * scale).astype(p.dtype), params)


def bound(name: str, params: Any) -> Any:
    """The score with its evidence; a method's own gradient wins."""
    score, needs = SCORES[name]
    if needs is None:
        return score
    tree = jax.tree.map(EVIDENCE.get(needs, jnp.square), params)
    return functools.partial(
        score, **{needs: jp.typing.Stats(*[tree] * 5) if needs == "stats" else tree}
    )


def run(row: Row, params: Any) -> Iterator[Run]:
    """One run for each score of the row, all with one compiled step."""
    method, bad = METHODS[row["method"]], row["optimizer"] == "apply_if_finite"
    dense = method.stores != "sparse"
    names = PAIRS_OF_SCORES[row["scores"]]
    scores = [bound(n, params) if n != OWN else params for n in names]

    def optimizer(score: Any) -> Any:
        return OPTIMIZERS[row["optimizer"]](lambda inner: method.make(inner, score))

    used = training.forward_params if dense else (lambda params, state: params)
    shared = optimizer(scores[0] if names == [OWN] else either(scores))

    @jit
    def one(params: Any, state: Any, step: Any, which: Any) -> Any:
        grads = gradient(used(params, state), step, bad)
        updates, state = shared.update(grads, state, params, which=which)
        params = optax.apply_updates(params, updates)
        return params, state, used(params, state)

    for which, score in enumerate(scores):
        seen: list[Any] = []

        def train(params: Any, state: Any, start: int, stop: int) -> Any:
            for step in range(start, stop):
                params, state, now = one(params, state, jnp.float32(step), which)  # noqa: B023
                seen.append((params, now, optax.tree_utils.tree_get(state, "masks")))  # noqa: B023
            return params, state

        tx = optimizer(score)
        if row["method"] == "iterative":
            rounds: Any = {"rounds": 2, "steps": 2, "score": score, "pattern": ranked}
            list(training.iterative(train, tx, params, 0.5, **rounds))
        else:
            train(params, tx.init(params), 0, STEPS)
        yield Run(*map(by_path, jax.tree.map(lambda *leaves: np.stack(leaves), *seen)))
    assert one._cache_size() == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_row(row: Row) -> None:
    method, dtype = METHODS[row["method"]], DTYPES[row["dtype"]]
    start = jax.tree.map(lambda p: p.astype(dtype), TREES[row["tree"]]())
    for params, used, masks in run(row, start):
        for p in (*params.values(), *used.values()):
            assert len(p) == STEPS and p.dtype == dtype and np.isfinite(p).all()
        assert_pruned_are_zero(used, masks)
        (path,) = (p for p, mask in masks.items() if mask.ndim > 1)
        kept = np.broadcast_to(masks[path], params[path].shape)
        if method.stores == "dense":
            np.testing.assert_array_equal(params[path][kept], used[path][kept])
        if method.stores != "sparse":
            assert (params[path][~kept] != 0).any() or kept.all(), "params were not kept"
        bad = row["optimizer"] == "apply_if_finite" and row["method"] != "iterative"
        assert_scheduled(kept, method.sparsity, bad)


def assert_scheduled(kept: Any, sparsity: Any, bad: bool) -> None:
    """Within one entry; ``bad``: a step is not taken, and masks wait for the next."""
    for step, now in enumerate(kept):
        done = step - (bad and step >= BAD_STEP)  # the last step that was taken
        if sparsity is not None:
            assert abs(now.sum() - (1 - sparsity(done)) * now.size) <= 1, step
