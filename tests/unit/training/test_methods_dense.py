"""Methods that keep all weights, phases and penalties: each against the same in numpy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.helpers import oracles

fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
training = jp.training
SHAPE, RATE, DECAY = (6, 4), np.float32(0.25), np.float32(0.125)
STEPS = 8
GRADS = np.random.default_rng(0).normal(size=(STEPS, *SHAPE)).astype(np.float32)
START = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


def train(tx: Any, grads: Any = GRADS, start: Any = START) -> list[tuple[Any, Any, Any]]:
    """Params, state, and what the network computes with after each step."""

    @fast_jit
    def one(params: Any, state: Any, grad: Any) -> Any:
        updates, state = tx.update({"w": grad}, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, training.forward_params(params, state)

    params, seen = {"w": jnp.asarray(start)}, []
    state = tx.init(params)
    for grad in grads:
        params, state, used = one(params, state, grad)
        seen.append(jax.tree.map(np.asarray, (params, state, used)))
    return seen


def top(scores: Any, sparsity: float) -> np.ndarray:
    return oracles.keep_largest(scores, oracles.kept_count(np.size(scores), sparsity))


def assert_close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


# ---- straight-through -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_straight_through_matches_numpy(decay: Any) -> None:
    tx = training.sr_ste(optax.sgd(RATE), decay=float(decay), pattern=jp.n_m(1, 2))
    if decay == 0:
        tx = training.ste(optax.sgd(RATE), 0.5, pattern=jp.n_m(1, 2))
    w = START
    mask = oracles.n_of_m(np.abs(w), 1, 2)
    changes = 0
    for grad, (params, state, used) in zip(GRADS, train(tx), strict=True):
        w = w - RATE * (grad + decay * np.where(mask, 0, w))
        old, mask = mask, oracles.n_of_m(np.abs(w), 1, 2)
        changes += int((old != mask).sum())
        assert_close(params["w"], w)
        np.testing.assert_array_equal(state.masks["w"], mask)
        np.testing.assert_array_equal(used["w"], np.where(mask, params["w"], 0))
    assert changes, "no weight came back"


@pytest.mark.slow
def test_the_gradient_of_the_masked_network_reaches_pruned_weights() -> None:
    params = {"w": jnp.array([[3.0, 2.0]])}
    state = training.ste(optax.sgd(1.0), 0.5).init(params)
    loss = lambda p: jnp.sum(p["w"] ** 2 + p["w"])  # noqa: E731
    grads = jax.grad(loss)(training.forward_params(params, state))
    assert grads["w"].tolist() == [[7.0, 1.0]]


@pytest.mark.slow
def test_masks_may_be_renewed_less_often() -> None:
    tx = training.ste(optax.sgd(RATE), jp.schedules.cubic(0.0, 0.5, begin=0, end=5), every=3)
    kept = [int(state.masks["w"].sum()) for _, state, _ in train(tx)]
    at = [0, 0, 3, 3, 5, 6, 6, 6]  # the step whose sparsity the next forward pass has
    schedule = jp.schedules.cubic(0.0, 0.5, begin=0, end=5)
    assert kept == [oracles.kept_count(24, float(schedule(step))) for step in at]


def test_top_kast_matches_numpy() -> None:
    tx = training.top_kast(optax.sgd(RATE), 0.75, backward=0.5, decay=float(DECAY))
    w = START
    for grad, (params, state, _) in zip(GRADS, train(tx), strict=True):
        used, learning = top(np.abs(w), 0.75), top(np.abs(w), 0.5)
        pull = DECAY * np.where(used, 1, 4) * w
        w = np.where(learning, w - RATE * (grad + pull), w)
        assert_close(params["w"], w)
        np.testing.assert_array_equal(state.masks["w"], top(np.abs(w), 0.75))
        np.testing.assert_array_equal(state.memory["w"], top(np.abs(w), 0.5))


# ---- movement -------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_movement_matches_numpy(soft: bool) -> None:
    schedule = jp.schedules.cubic(0.0, 0.5, begin=0, end=5)
    if soft:
        tx = training.soft_movement(optax.sgd(RATE), 0.5, tau=-0.25, rate=0.5)
    else:
        tx = training.movement(optax.sgd(RATE), schedule)
    w, scores, mask = START, np.zeros(SHAPE, np.float32), np.ones(SHAPE, bool)
    for step, (grad, (params, state, _)) in enumerate(zip(GRADS, train(tx), strict=True)):
        slope = np.exp(-scores) / (1 + np.exp(-scores)) ** 2
        scores = scores - (0.5 * (w * grad + 0.5 * slope) if soft else w * grad)
        w = np.where(mask, w - RATE * grad, w)
        mask = scores >= -0.25 if soft else top(scores, float(schedule(step + 1)))
        assert_close(state.memory["w"], scores)
        assert_close(params["w"], w)
        np.testing.assert_array_equal(state.masks["w"], mask)
    assert 0 < mask.sum() < 24


# ---- soft thresholds ------------------------------------------------------------------------


def test_soft_thresholds_match_numpy() -> None:
    tx = training.soft_threshold(optax.sgd(RATE), 0.5, init=-2.0, rate=0.25)
    w, s = START, np.float32(-2)
    logistic = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for grad, (params, state, used) in zip(GRADS, train(tx), strict=True):
        mask = np.abs(w) > logistic(s)
        ds = -logistic(s) * logistic(-s) * (np.sign(w) * grad)[mask].sum()
        w, s = np.where(mask, w - RATE * grad, w), s - np.float32(0.25) * (ds + 0.5 * s)
        assert_close(params["w"], w)
        assert_close(state.memory.thresholds["w"], s)
        assert_close(used["w"], np.sign(w) * np.maximum(np.abs(w) - logistic(s), 0))
        np.testing.assert_array_equal(state.masks["w"], np.abs(w) > logistic(s))


@pytest.mark.slow
def test_the_threshold_follows_the_gradient_of_the_shrunk_weights() -> None:
    """That of the loss with respect to s, by automatic differentiation."""
    from jaxprune.training._soft_threshold import shrink

    w = jnp.asarray(START)
    loss = lambda w: jnp.sum(jnp.sin(w))  # noqa: E731
    masks = jnp.abs(w) > jax.nn.sigmoid(-1.0)
    by_jax = jax.grad(lambda s: loss(shrink(w, masks, s)))(-1.0)
    tx = training.soft_threshold(optax.sgd(0.0), 0.0, init=-1.0, rate=1.0)
    grad = jax.grad(loss)(shrink(w, masks, -1.0))
    (_, state, _), *_ = train(tx, [grad])
    assert_close(state.memory.thresholds["w"], -1 - by_jax)


# ---- ADMM -----------------------------------------------------------------------------------


def test_admm_matches_numpy() -> None:
    tx = training.admm(optax.sgd(RATE), 0.5, rho=0.5, every=3)
    w, u = START, np.zeros(SHAPE, np.float32)
    z = np.where(top(np.abs(w), 0.5), w, 0)
    for step, (grad, (params, state, _)) in enumerate(zip(GRADS, train(tx), strict=True)):
        w = w - RATE * (grad + np.float32(0.5) * (w - z + u))
        if (step + 1) % 3 == 0:
            z = np.where(top(np.abs(w + u), 0.5), w + u, 0)
            u = u + w - z
        assert_close(params["w"], w)
        mask, total = state.masks["w"], state.memory["w"]
        assert_close(jnp.where(mask, total, 0), z)
        assert_close(jnp.where(mask, 0, total), u)
        np.testing.assert_array_equal(state.masks["w"], z != 0)


@pytest.mark.slow
def test_admm_brings_params_to_the_sparse_network() -> None:
    tx = training.admm(optax.sgd(0.1), 0.75, rho=2.0, every=5)

    @fast_jit
    def many(params: Any) -> Any:
        def body(carry: Any, step: Any) -> Any:
            params, state = carry
            grads = jax.tree.map(lambda w: w - START, params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(300))[0]

    params, state = many({"w": jnp.asarray(START)})
    pruned = training.forward_params(params, state)["w"]
    np.testing.assert_allclose(params["w"], pruned, atol=0.05)
    np.testing.assert_allclose(pruned, np.where(top(np.abs(START), 0.75), START, 0), atol=0.05)


# ---- phases ---------------------------------------------------------------------------------


def test_phases_take_turns() -> None:
    tx = training.ac_dc(
        optax.sgd(RATE, momentum=0.5), 0.75, begin=1, end=6, sparse_steps=2, dense_steps=1
    )
    w, trace, mask = START, np.zeros(SHAPE, np.float32), np.ones(SHAPE, bool)
    for step, (grad, (params, state, _)) in enumerate(zip(GRADS, train(tx), strict=True)):
        if step in (1, 4, 7):
            mask = top(np.abs(w), 0.75)
        elif step in (3,):
            trace[~mask] = 0
            mask = np.ones(SHAPE, bool)
        elif step == 6:
            assert not mask.all()  # the last dense phase would be now
        trace = np.float32(0.5) * trace + np.where(mask, grad, 0)
        w = np.where(mask, w - RATE * trace, 0)
        assert_close(params["w"], w)
        np.testing.assert_array_equal(state.masks["w"], mask)


# ---- penalties ------------------------------------------------------------------------------


def mlp(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["up"] * params["scale"]) @ params["down"]


def mlp_params() -> Any:
    rng = np.random.default_rng(2)
    return {
        "up": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32),
        "scale": jnp.asarray(rng.uniform(0.5, 1, size=8), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
    }


STRUCTURE = jp.infer_structure(mlp, mlp_params(), jnp.ones((1, 3)))


def unit_norms(params: Any) -> np.ndarray:
    units = np.concatenate([params["up"], params["scale"][None], params["down"].T])
    return np.linalg.norm(units, axis=0)


@pytest.mark.slow
def test_group_lasso_is_the_sum_of_norms_over_units() -> None:
    params = mlp_params()
    penalty = training.group_lasso(STRUCTURE)
    assert_close(penalty(params), np.sqrt(6) * unit_norms(params).sum())
    gone = jax.tree.map(jnp.zeros_like, params)
    assert all(not g.any() for g in jax.tree.leaves(jax.grad(penalty)(gone))), "NaN at 0"


def test_a_penalty_is_added_to_the_gradient() -> None:
    strength = optax.piecewise_constant_schedule(0.5, {2: 0.0})
    tx = training.add_penalty(training.l1(), strength)
    params, grads = mlp_params(), jax.tree.map(jnp.ones_like, mlp_params())
    state, update = tx.init(params), fast_jit(tx.update)
    for step in range(4):
        updates, state = update(grads, state, params)
        pull = 0.5 * np.sign(params["up"]) * (step < 2)
        np.testing.assert_array_equal(updates["up"], 1 + pull)
        np.testing.assert_array_equal(updates["scale"], 1)  # no kernel


def train_mlp(tx: Any, steps: int) -> Any:
    def body(carry: Any, step: Any) -> Any:
        params, state = carry
        grads = jax.tree.map(lambda p: 0.01 * p, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), params

    params = mlp_params()
    (params, state), seen = fast_jit(
        lambda params: jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))
    )(params)
    return params, state, seen


@pytest.mark.slow
def test_group_lasso_ends_in_structured_masks_that_compact() -> None:
    tx = training.regularized(
        optax.sgd(0.1),
        0.5,
        penalty=training.group_lasso(STRUCTURE),
        strength=0.1,
        at=6,
        score=jp.scores.l2,
        pattern=jp.structured(STRUCTURE, reduce=jp.reduce.sum),
    )
    params, state, seen = train_mlp(tx, 8)
    norms = [unit_norms(jax.tree.map(lambda x, t=t: x[t], seen)) for t in range(7)]
    for before, after in zip(norms, norms[1:], strict=False):
        assert_close(after, 0.999 * before - 0.1 * 0.1 * np.sqrt(6))
    masks = optax.tree_utils.tree_get(state, "masks")
    small = jp.compact(mlp, params, masks, jnp.ones((1, 3)))
    assert small.params["up"].shape == (3, 4)
    x = jax.random.normal(jax.random.key(0), (5, 3))
    assert_close(small.fn(small.params, x), mlp(params, x))


@pytest.mark.slow
def test_network_slimming_prunes_the_channels_of_small_scales() -> None:
    tx = training.network_slimming(optax.sgd(0.1), 0.5, STRUCTURE, at=3, strength=0.1)
    params, state, seen = train_mlp(tx, 5)
    scales = np.asarray(seen["scale"])
    assert_close(scales[1], scales[0] - 0.1 * (0.01 * scales[0] + 0.1))
    wanted = top(scales[3], 0.5)
    np.testing.assert_array_equal(params["scale"] != 0, wanted)
    np.testing.assert_array_equal((params["up"] != 0).any(axis=0), wanted)
    assert_close(params["scale"], np.where(wanted, scales[3] * 0.999**2, 0))
