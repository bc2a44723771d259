"""One table: training methods x optimizers and wrappers, over kinds of trees and types.

Every method meets every optimizer, every tree and every type, and so does every optimizer. Each
cell trains for a few steps under one jitted step, and looks at each: pruned entries are bitwise
zero, the leaf keeps the scheduled number of entries, and nothing is compiled twice.
"""

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
from jaxprune import training
from tests.test_training_table import assert_pruned_are_zero, by_path, by_rank, jit

STEPS = 9
BAD_STEP = 4  # its gradients are NaN under apply_if_finite
CUBIC = jp.schedules.cubic(0.0, 0.5, begin=0, end=6)


def ranked(scores: Any, sparsity: Any) -> Any:
    """Unstructured, by counting for each entry which are ahead of it: compiles fast."""

    def leaf(score: Any) -> Any:
        if score.ndim < 2:
            return jnp.asarray(True)
        x, place = score.ravel().astype(jnp.float32), jnp.arange(score.size)
        ahead = (x > x[:, None]) | ((x == x[:, None]) & (place < place[:, None]))
        kept = jnp.sum(ahead, axis=1) < jnp.round((1 - sparsity) * score.size)
        return kept.reshape(score.shape)

    return jax.tree.map(leaf, scores)


# ---- methods --------------------------------------------------------------------------------


class Method(NamedTuple):
    make: Callable[[Any], optax.GradientTransformation]
    sparsity: Callable[[int], float] | None  # of the masks after the update of a step
    stores: str = "sparse"  # what params hold between steps, or "dense"


def half(step: int) -> float:
    return 0.5


def phases(step: int) -> float:
    return 0.5 if step >= 7 or 1 <= step < 7 and (step - 1) % 4 < 2 else 0.0


# one_shot is prune, ste is sr_ste without decay, soft_movement is movement with another pattern.
METHODS = {
    "static": Method(lambda o: training.static(o, 0.5, pattern=ranked), half),
    "prune": Method(
        lambda o: jp.prune(o, jp.saliency, CUBIC, every=2, pattern=ranked),
        lambda t: float(CUBIC(t - t % 2)),
    ),
    "set": Method(lambda o: training.set(o, 0.5, every=2, pattern=ranked), half),
    "rigl": Method(lambda o: training.rigl(o, 0.5, every=2, pattern=ranked), half),
    "snfs": Method(lambda o: training.snfs(o, 0.5, every=2), half),
    "ac_dc": Method(
        lambda o: training.ac_dc(
            o, 0.5, begin=1, end=7, sparse_steps=2, dense_steps=2, pattern=ranked
        ),
        phases,
    ),
    "regularised": Method(
        lambda o: training.regularised(
            o, 0.5, penalty=training.l1(), strength=0.01, at=3, pattern=ranked
        ),
        lambda t: 0.5 * (t >= 3),
    ),
    "sr_ste": Method(
        lambda o: training.sr_ste(o, 0.5, decay=0.1, pattern=jp.n_m(1, 2)), half, "dense"
    ),
    "top_kast": Method(
        lambda o: training.top_kast(o, 0.5, backward=0.25, pattern=ranked), half, "dense"
    ),
    "movement": Method(
        lambda o: training.movement(o, CUBIC, pattern=ranked),
        lambda t: float(CUBIC(t + 1)),
        "dense",
    ),
    "soft_threshold": Method(lambda o: training.soft_threshold(o, 0.1, rate=1.0), None, "shrunk"),
    "admm": Method(
        lambda o: training.admm(o, 0.5, rho=0.1, every=2, pattern=ranked), half, "dense"
    ),
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

TREES: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"a": [{"kernel": jax.random.normal(jax.random.key(0), (4, 6))}], "b": ONES},
    "tuple": lambda: (jax.random.normal(jax.random.key(1), (2, 2, 6)), (ONES, None)),
    "nnx": lambda: nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param),
    "equinox": lambda: eqx.filter(eqx.nn.Linear(4, 6, key=jax.random.key(2)), eqx.is_inexact_array),
}
ONES = jnp.ones(6)
KINDS, TYPES = list(TREES), [jnp.float32, jnp.bfloat16]


def cell(i: int, j: int) -> tuple[str, Any]:
    """The kind of tree and the type of method i with optimizer j."""
    return KINDS[(i + j) % 4], TYPES[(i + j) // 4 % 2]


def test_every_method_and_every_optimizer_meets_every_tree_and_type() -> None:
    cells = {(i, j): cell(i, j) for i in range(len(METHODS)) for j in range(len(OPTIMIZERS))}
    for at, count in ((0, len(METHODS)), (1, len(OPTIMIZERS))):
        for index in range(count):
            kinds, types = zip(*(c for k, c in cells.items() if k[at] == index), strict=True)
            assert set(kinds) == set(KINDS) and set(types) == set(TYPES)


# ---- the run --------------------------------------------------------------------------------


def gradient(params: Any, step: Any, bad: bool) -> Any:
    scale = jnp.where((step == BAD_STEP) & bad, jnp.nan, 1.0)
    return jax.tree.map(lambda p: ((p - 0.1 * jnp.sin(step)) * scale).astype(p.dtype), params)


def run(tx: Any, params: Any, bad: bool) -> Any:
    """Params, what the network computes with, and masks after each step; one compilation."""

    @jit
    def one(params: Any, state: Any, step: Any) -> Any:
        grads = gradient(training.forward_params(params, state), step, bad)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, training.forward_params(params, state)

    state, seen = tx.init(params), []
    for step in range(STEPS):
        params, state, used = one(params, state, jnp.float32(step))
        masks = optax.tree_utils.tree_get(state, "masks")
        seen.append((params, used, masks))
    assert one._cache_size() == 1
    return map(by_path, jax.tree.map(lambda *leaves: np.stack(leaves), *seen))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_methods_meet_optimizers(name: str, optimizer: str) -> None:
    method, bad = METHODS[name], optimizer == "apply_if_finite"
    kind, dtype = cell(list(METHODS).index(name), list(OPTIMIZERS).index(optimizer))
    params = jax.tree.map(lambda p: p.astype(dtype), TREES[kind]())
    params, used, masks = run(OPTIMIZERS[optimizer](method.make), params, bad)
    assert all(p.dtype == dtype and np.isfinite(p).all() for p in (params | used).values())
    assert_pruned_are_zero(params if method.stores == "sparse" else used, masks)
    (path, mask), *rest = [(p, m) for p, m in masks.items() if m.ndim > 1]
    assert not rest
    kept = np.broadcast_to(mask, params[path].shape)
    if method.stores != "shrunk":
        np.testing.assert_array_equal(params[path][kept], used[path][kept])
    if method.stores != "sparse":
        assert (params[path][~kept] != 0).any() or kept.all(), "params were not kept"
    for step, now in enumerate(kept):
        done = step - (bad and step >= BAD_STEP)  # the last step that was taken
        if method.sparsity is not None:
            assert abs(now.sum() - (1 - method.sparsity(done)) * now.size) <= 1, step
