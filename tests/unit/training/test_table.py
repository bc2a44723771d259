"""Two tables: wrappers around jp.prune over kinds of trees and types, and scores x patterns.

Every cell runs a schedule to its end and looks at each step: pruned entries are bitwise zero, and
each leaf keeps the scheduled number of entries within one. Optimizers inside of methods are in
test_methods_table.py.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune._leaf import widen

pytestmark = pytest.mark.slow  # Each row compiles an update of its own.

STEPS = 12
END = 7  # no multiple of EVERY
EVERY = 2
SCHEDULE = jp.schedules.cubic(0.0, 0.75, begin=1, end=END)


def prune(inner: Any, sparsity: Any = SCHEDULE) -> optax.GradientTransformationExtraArgs:
    return jp.prune(inner, jp.magnitude, sparsity, every=EVERY)


# ---- wrappers -------------------------------------------------------------------------------


class Row(NamedTuple):
    tx: optax.GradientTransformation
    updates_done: Callable[[int], int] = lambda step: step + 1  # by prune, after this step
    rests_at: int = END  # the step at which the masks have the final sparsity


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def injected_prune() -> optax.GradientTransformation:
    make = optax.inject_hyperparams(
        jp.prune, static_args=("score", "pattern", "every"), hyperparam_dtype=jnp.float32
    )
    return make(optax.adam(1e-2), jp.magnitude, SCHEDULE, pattern=jp.unstructured(), every=EVERY)


ADAM = optax.adam(1e-2)
BAD_STEP = 4  # its gradients are NaN where a row can take it
ROWS = {
    "MultiSteps of prune": Row(
        optax.MultiSteps(prune(ADAM), 2).gradient_transformation(), lambda step: (step + 1) // 2
    ),
    "prune of apply_if_finite": Row(prune(optax.apply_if_finite(ADAM, 3))),
    "inject_hyperparams of prune": Row(injected_prune(), rests_at=END + 1),
    "prune of plateau": Row(prune(optax.chain(ADAM, optax.contrib.reduce_on_plateau()))),
    "partition of prune": Row(
        optax.partition({"matrix": prune(ADAM), "vector": optax.sgd(1e-2)}, by_rank)
    ),
    "masked prune": Row(optax.masked(prune(ADAM), is_matrix)),
}

# ---- trees ----------------------------------------------------------------------------------


def as_dict() -> Any:
    return {"layers": [{"kernel": jax.random.normal(jax.random.key(0), (5, 7)), "b": jnp.ones(7)}]}


def as_tuple() -> Any:
    return (jax.random.normal(jax.random.key(1), (2, 3, 7)), (jnp.ones(7), None))


def as_nnx_state() -> Any:
    return nnx.state(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.Param)


def as_equinox() -> Any:
    return eqx.filter(eqx.nn.Linear(5, 7, key=jax.random.key(2)), eqx.is_inexact_array)


TREES = {"dict": as_dict, "tuple": as_tuple, "nnx": as_nnx_state, "equinox": as_equinox}

# Half the time to compile; the passes that could touch a zero's bits run before this one.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# ---- the run and what must hold -------------------------------------------------------------


def run(tx: Any, params: Any, grads_at: Callable[[Any, Any], Any], **extra: Any) -> Any:
    """Params and masks after each step, stacked."""

    def body(carry: Any, step: Any) -> Any:
        params, state = carry
        value = 1.0 / (step + 1)
        updates, state = tx.update(grads_at(params, step), state, params, value=value, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optax.tree_utils.tree_get(state, "masks"))

    return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(STEPS))[1]


def by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jp.typing.path_str(path): np.asarray(leaf) for path, leaf in leaves}


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_pruned_are_zero(params: dict[str, np.ndarray], masks: dict[str, np.ndarray]) -> None:
    for path, mask in masks.items():
        if mask.ndim > 1:  # stacked over steps; ndim 1 is a dense leaf
            pruned = ~np.broadcast_to(mask, params[path].shape)
            assert not bits(params[path])[pruned].any(), f"{path} has pruned entries that are not 0"
        else:
            assert mask.all(), path


def assert_scheduled(masks: dict[str, np.ndarray], row: Row) -> None:
    """Each leaf keeps the scheduled count within one, renewed every EVERY updates and at END."""
    matrices = {path: mask for path, mask in masks.items() if mask.ndim > 1}
    assert matrices, "no leaf was pruned at all"
    for path, mask in matrices.items():
        for step in range(STEPS):
            last = row.updates_done(step) - 1
            renewed = last if last >= row.rests_at else last - last % EVERY
            sparsity = float(SCHEDULE(renewed)) if last >= 0 else 0.0
            wanted = (1 - sparsity) * mask[step].size
            assert abs(mask[step].sum() - wanted) <= 1, (path, step, mask[step].sum(), wanted)


@pytest.mark.parametrize("name", ROWS)
def test_wrapped_updates_land_on_masked_parameters(name: str) -> None:
    """All kinds of trees in one, which compiles faster; two of them in bfloat16."""
    row = ROWS[name]

    def gradient(params: Any, step: Any) -> Any:
        scale = jnp.where((step == BAD_STEP) & ("apply_if_finite" in name), jnp.nan, 1.0)
        return jax.tree.map(lambda p: ((p - 0.1) * scale).astype(p.dtype), params)

    trees = {kind: make() for kind, make in TREES.items()}
    for kind in ("tuple", "nnx"):
        trees[kind] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), trees[kind])
    params, masks = map(by_path, jit(lambda trees: run(row.tx, trees, gradient))(trees))
    for path, before in by_path(trees).items():
        assert params[path].dtype == before.dtype and np.isfinite(params[path]).all(), path
    assert_pruned_are_zero(params, masks)
    assert_scheduled(masks, row)


# ---- scores x patterns ----------------------------------------------------------------------

SCORES = {
    "magnitude": jp.magnitude,
    "random": functools.partial(jp.random, key=jax.random.key(3)),
    "saliency": jp.saliency,
    "taylor": jp.scores.taylor,
    "batch_norm_scale": jp.scores.batch_norm_scale,  # 0 for each kernel: nothing but ties
}
INPUTS = jax.random.normal(jax.random.key(4), (5, 8))


def network(params: Any, x: Any) -> Any:
    x = jax.nn.relu(x @ params["up"]["kernel"] * params["norm"]["scale"])
    return jnp.tanh(x @ params["down"]["kernel"]) @ params["out"]["kernel"]


def network_params() -> Any:
    k = jax.random.split(jax.random.key(5), 4)
    return {
        "up": {"kernel": jax.random.normal(k[0], (8, 16))},
        "norm": {"scale": jax.random.uniform(k[1], (16,))},
        "down": {"kernel": jax.random.normal(k[2], (16, 8))},
        "out": {"kernel": jax.random.normal(k[3], (8, 4))},
    }


STRUCTURE = jp.infer_structure(network, network_params(), INPUTS)

Units = list[tuple[np.ndarray, float]]  # kept or not, one entry a unit; and the wanted sparsity


def entries(masks: Any, sparsity: float) -> Units:
    return [(mask, sparsity) for mask in masks.values() if mask.ndim > 0]


def columns(masks: Any, sparsity: float) -> Units:
    return [(col, sparsity) for mask, _ in entries(masks, sparsity) for col in mask.T]


def by_erk(masks: Any, sparsity: float) -> Units:
    sparsities = by_path(jp.erk({p: m for p, m in masks.items() if m.ndim > 0}, sparsity))
    return [(masks[path], float(s)) for path, s in sparsities.items()]


def groups_of_4(masks: Any, sparsity: float) -> Units:
    """A unit is a group that is still whole; on the way to 1/2 the others are 2:4 already."""
    found = []
    for mask, _ in entries(masks, sparsity):
        kept = np.moveaxis(mask, -2, -1).reshape(-1, 4).sum(axis=1)
        assert set(kept) <= {2, 4}
        found.append((kept == 4, sparsity / 0.5))
    return found


def blocks(masks: Any, sparsity: float) -> Units:
    kernels = [mask for mask, _ in entries(masks, sparsity)]
    for mask in kernels:
        assert (mask == np.kron(mask[::2, ::4], np.ones((2, 4), bool))).all()
    return [(mask[::2, ::4], sparsity) for mask in kernels]


def dimensions(masks: Any, sparsity: float) -> Units:
    tree = jax.tree.unflatten(jax.tree.structure(network_params()), list(masks.values()))
    keep = STRUCTURE.keep(tree)
    return [
        (np.asarray(keep[name]), sparsity) for name, d in STRUCTURE.dims.items() if not d.frozen
    ]


PATTERNS: dict[str, tuple[Any, Callable[[Any, float], Units]]] = {
    "unstructured": (jp.unstructured(), entries),
    "per output": (jp.unstructured(per_output=True), columns),
    "erk": (jp.unstructured(jp.erk), by_erk),
    "n_m": (jp.n_m(2, 4), groups_of_4),
    "block": (jp.block((2, 4)), blocks),
    "channel": (jp.channel(), entries),
    "structured": (jp.structured(STRUCTURE), dimensions),
}


def either(scores: list[Any]) -> Any:
    """The score that the evidence ``which`` tells, and that the others know of nothing."""

    def score(params: Any, *, which: Any, **evidence: Any) -> Any:
        def branch(one: Any) -> Any:
            return lambda: jax.tree.map(widen, one(params, **evidence))

        return jax.lax.switch(which, [branch(one) for one in scores])

    return score


def run_scores(pattern: Any, schedule: Any) -> Any:
    """Params and masks of every step, for every score; compiled once."""
    tx = jp.prune(ADAM, either(list(SCORES.values())), schedule, pattern=pattern)

    def gradient(params: Any, step: Any) -> Any:
        return jax.grad(lambda p: jnp.mean(network(p, INPUTS + step) ** 2))(params)

    train = jit(lambda params, which: run(tx, params, gradient, which=which))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "channel", UserWarning)  # it says so once a trace
        return {name: train(network_params(), i) for i, name in enumerate(SCORES)}


@pytest.mark.parametrize("name", PATTERNS)
def test_scores_and_patterns_keep_the_scheduled_units(name: str) -> None:
    pattern, units = PATTERNS[name]
    target = 0.5 if name == "n_m" else 0.75
    schedule = jp.schedules.cubic(0.0, target, begin=1, end=END)
    for score, (params, masks) in run_scores(pattern, schedule).items():
        params, masks = by_path(params), by_path(masks)
        assert_pruned_are_zero(params, masks)
        for step in range(STEPS):
            now = units({p: m[step] for p, m in masks.items()}, float(schedule(step)))
            assert now, "nothing was pruned"
            for unit, sparsity in now:
                kept, wanted = unit.sum(), (1 - sparsity) * unit.size
                assert abs(kept - wanted) <= 1, (score, step, kept, wanted)


def test_global_ranking_keeps_the_scheduled_number_over_all_leaves() -> None:
    runs = run_scores(jp.unstructured(jp.global_threshold), SCHEDULE)
    for score, run in runs.items():
        params, masks = map(by_path, run)
        assert_pruned_are_zero(params, masks)
        kernels = [mask for mask in masks.values() if mask.ndim > 1]
        for step in range(STEPS):
            kept, size = sum(m[step].sum() for m in kernels), sum(m[step].size for m in kernels)
            assert abs(kept - (1 - float(SCHEDULE(step))) * size) <= len(kernels), (score, step)


def test_a_threshold_prunes_what_falls_below_it_for_good() -> None:
    tau = 0.3
    params, masks = map(by_path, run_scores(jp.threshold(tau), 0.0)["magnitude"])
    assert_pruned_are_zero(params, masks)
    before, kept = by_path(network_params()), True
    for step in range(STEPS):
        for path in ("up/kernel", "down/kernel", "out/kernel"):
            wanted = (np.abs(before[path]) >= tau) & (kept[path] if step else True)
            np.testing.assert_array_equal(masks[path][step], wanted)
        before, kept = ({p: x[step] for p, x in tree.items()} for tree in (params, masks))
    assert masks["up/kernel"][0].sum() > masks["up/kernel"][-1].sum(), "nothing fell below it"
