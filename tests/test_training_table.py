"""One table: optimizers and wrappers x kinds of trees x types, and scores x patterns.

Every cell runs a schedule to its end and looks at each step: pruned entries are bitwise zero, and
each leaf keeps the scheduled number of entries within one.
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

STEPS = 12
SCHEDULE = jp.schedules.cubic(0.0, 0.75, begin=1, end=7)


def prune(inner: Any, sparsity: Any = SCHEDULE) -> optax.GradientTransformationExtraArgs:
    return jp.prune(inner, jp.magnitude, sparsity, every=2)


# ---- optimizers -----------------------------------------------------------------------------


class Row(NamedTuple):
    tx: optax.GradientTransformation
    updates_done: Callable[[int], int] = lambda step: step + 1  # by prune, after this step


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def injected_prune() -> optax.GradientTransformation:
    make = optax.inject_hyperparams(
        jp.prune, static_args=("score", "pattern", "every"), hyperparam_dtype=jnp.float32
    )
    return make(optax.adam(1e-2), jp.magnitude, SCHEDULE, pattern=jp.unstructured(), every=2)


ADAM = optax.adam(1e-2)
BAD_STEP = 4  # its gradients are NaN where a row can take it
ROWS = {
    "sgd+momentum": Row(prune(optax.sgd(1e-2, momentum=0.9, nesterov=True))),
    "adam": Row(prune(ADAM)),
    "adamw": Row(prune(optax.adamw(1e-2, weight_decay=0.1))),
    "lion": Row(prune(optax.lion(1e-3, weight_decay=0.1))),
    "adafactor": Row(prune(optax.adafactor(1e-2, min_dim_size_to_factor=2))),
    "rmsprop": Row(prune(optax.rmsprop(1e-3, momentum=0.9))),
    "muon": Row(prune(optax.contrib.muon(1e-2, weight_decay=0.1))),
    "MultiSteps of prune": Row(
        optax.MultiSteps(prune(ADAM), 2).gradient_transformation(), lambda step: (step + 1) // 2
    ),
    "prune of MultiSteps": Row(prune(optax.MultiSteps(ADAM, 2))),
    "apply_if_finite of prune": Row(
        optax.apply_if_finite(prune(ADAM), 3), lambda step: step + 1 - (step >= BAD_STEP)
    ),
    "prune of apply_if_finite": Row(prune(optax.apply_if_finite(ADAM, 3))),
    "inject_hyperparams of prune": Row(injected_prune()),
    "prune of inject_hyperparams": Row(
        prune(optax.inject_hyperparams(optax.adamw)(optax.cosine_decay_schedule(1e-2, STEPS)))
    ),
    "clip, prune": Row(optax.chain(optax.clip_by_global_norm(1.0), prune(ADAM))),
    "prune of a chain": Row(prune(optax.chain(optax.clip_by_global_norm(1.0), ADAM))),
    "prune of plateau": Row(prune(optax.chain(ADAM, optax.contrib.reduce_on_plateau()))),
    "partition of prune": Row(
        optax.partition({"matrix": prune(ADAM), "vector": optax.sgd(1e-2)}, by_rank)
    ),
    "prune of partition": Row(
        prune(optax.partition({"matrix": ADAM, "vector": optax.sgd(1e-2)}, by_rank))
    ),
    "masked prune": Row(optax.masked(prune(ADAM), is_matrix)),
}

# ---- trees ----------------------------------------------------------------------------------


def as_dict() -> Any:
    k = jax.random.split(jax.random.key(0), 2)
    return {
        "layers": [
            {"kernel": jax.random.normal(k[0], (4, 7)), "bias": jnp.ones(7)},
            {"kernel": jax.random.normal(k[1], (7, 3)), "bias": jnp.ones(3)},
        ]
    }


def as_tuple() -> Any:
    k = jax.random.split(jax.random.key(1), 2)
    return (jax.random.normal(k[0], (4, 7)), (jnp.ones(7), jax.random.normal(k[1], (7, 3))))


def as_nnx_state() -> Any:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(4, 7, rngs=rngs)
            self.norm = nnx.BatchNorm(7, rngs=rngs)
            self.second = nnx.Linear(7, 3, rngs=rngs)

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def as_equinox() -> Any:
    return eqx.filter(eqx.nn.MLP(4, 3, 7, 1, key=jax.random.key(2)), eqx.is_inexact_array)


TREES = {"dict": as_dict, "tuple": as_tuple, "nnx": as_nnx_state, "equinox": as_equinox}

# ---- the run and what must hold -------------------------------------------------------------


def run(tx: Any, params: Any, grads_at: Callable[[Any, Any], Any], steps: int = STEPS) -> Any:
    """Params and masks after each step, stacked."""

    def body(carry: Any, step: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads_at(params, step), state, params, value=1.0 / (step + 1))
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optax.tree_utils.tree_get(state, "masks"))

    return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))[1]


def by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jp.path_str(path): np.asarray(leaf) for path, leaf in leaves}


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_pruned_are_zero(params: dict[str, np.ndarray], masks: dict[str, np.ndarray]) -> None:
    for path, mask in masks.items():
        if mask.ndim > 1:  # stacked over steps; ndim 1 is a dense leaf
            pruned = ~np.broadcast_to(mask, params[path].shape)
            assert not bits(params[path])[pruned].any(), f"{path} has pruned entries that are not 0"
        else:
            assert mask.all(), path


def assert_scheduled(masks: dict[str, np.ndarray], updates_done: Callable[[int], int]) -> None:
    """Each leaf keeps the scheduled count within one; renewals come every 2 updates."""
    checked = 0
    for path, mask in masks.items():
        for step in range(STEPS) if mask.ndim > 1 else ():
            last = updates_done(step) - 1
            renewed = last if last >= 7 else last - last % 2
            sparsity = float(SCHEDULE(renewed)) if last >= 0 else 0.0
            wanted = (1 - sparsity) * mask[step].size
            assert abs(mask[step].sum() - wanted) <= 1, (path, step, mask[step].sum(), wanted)
            checked += 1
    assert checked >= STEPS, "no leaf was pruned at all"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ROWS)
def test_optimizers_land_on_masked_parameters(name: str, dtype: Any) -> None:
    row = ROWS[name]

    def gradient(params: Any, step: Any) -> Any:
        scale = jnp.where((step == BAD_STEP) & ("apply_if_finite" in name), jnp.nan, 1.0)
        return jax.tree.map(lambda p: ((p - 0.1) * scale).astype(p.dtype), params)

    def all_trees(trees: Any) -> Any:
        return {kind: run(row.tx, tree, gradient) for kind, tree in trees.items()}

    trees = {kind: make() for kind, make in TREES.items()}
    trees = jax.tree.map(lambda p: p.astype(dtype), trees)
    for kind, (params, masks) in jax.jit(all_trees)(trees).items():
        params, masks = by_path(params), by_path(masks)
        assert all(p.dtype == dtype and np.isfinite(p).all() for p in params.values()), kind
        assert_pruned_are_zero(params, masks)
        assert_scheduled(masks, row.updates_done)
