"""Training methods against the slow way, and what each promises beyond the common table."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.training.dynamic import shares
from tests.helpers import oracles

fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
tree_get = optax.tree_utils.tree_get
RATE, MOMENTUM = np.float32(0.25), np.float32(0.5)


def make_params(dtype: Any = jnp.float32) -> Any:
    k = jax.random.split(jax.random.key(0), 2)
    return {
        "a": jax.random.normal(k[0], (9, 7), dtype),
        "b": jnp.ones(7, dtype),
        "c": jax.random.normal(k[1], (8, 5), dtype),
    }


def gradients(steps: int, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), make_params())
        for _ in range(steps)
    ]


def train(tx: Any, params: Any, grads: Any) -> list[tuple[Any, Any]]:
    """Params and state after each step, as numpy arrays."""

    @fast_jit
    def one(params: Any, state: Any, grad: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for grad in grads:
        params, state = one(params, state, grad)
        seen.append(jax.tree.map(np.asarray, (params, state)))
    return seen


# ---- dynamic methods, step by step in numpy -------------------------------------------------


def least(scores: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """The mask without the ``count`` kept entries of lowest score; of equals the later go."""
    order = sorted(np.flatnonzero(mask), key=lambda i: (scores.ravel()[i], -i))
    kept = mask.copy()
    kept.ravel()[order[:count]] = False
    return kept


def most(scores: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """The mask and the ``count`` other entries of highest score; of equals the earlier come."""
    order = sorted(np.flatnonzero(~mask), key=lambda i: (-scores.ravel()[i], i))
    kept = mask.copy()
    kept.ravel()[order[:count]] = True
    return kept


def by_gradient(params: Any, grad: Any, step: int) -> Any:
    return jax.tree.map(np.abs, grad)


def at_random(params: Any, grad: Any, step: int) -> Any:
    key = jax.random.fold_in(jax.random.key(0), 1)
    return jax.tree.map(np.asarray, jp.random(params, key=key, step=step))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "growth"), [("rigl", by_gradient), ("set", at_random)], ids=["rigl", "set"]
)
def test_dynamic_methods_match_the_papers_in_numpy(method: str, growth: Any) -> None:
    """SGD with momentum on masked weights; every third step 30 % of each leaf is replaced."""
    tx = getattr(jp.training, method)(optax.sgd(RATE, MOMENTUM), 0.6, every=3)
    grads = gradients(11)
    seen = train(tx, make_params(), grads)
    slow = jax.tree.map(np.array, make_params())
    masks = jax.tree.map(np.array, tx.init(make_params()).masks)
    trace = jax.tree.map(np.zeros_like, slow)
    replaced = 0
    for step, (grad, (params, state)) in enumerate(zip(grads, seen, strict=True)):
        if step and step % 3 == 0:
            grown = growth(slow, grad, step)
            for name in "ac":
                before = masks[name]
                count = int(before.sum()) - oracles.kept_count(before.size, 1 - 0.7 * 0.4)
                kept = least(np.abs(slow[name]), before, count)
                masks[name] = most(grown[name], kept, count)
                replaced += int((masks[name] & ~before).sum())
                trace[name][masks[name] & ~before] = 0
        for name in slow:
            trace[name] = MOMENTUM * trace[name] + np.where(masks[name], grad[name], 0)
            slow[name] = np.where(masks[name], slow[name] - RATE * trace[name], 0)
            np.testing.assert_array_equal(state.masks[name], masks[name])
            np.testing.assert_allclose(params[name], slow[name], rtol=1e-5, atol=1e-6)
            assert int(np.sum(masks[name])) == {"a": 25, "b": 1, "c": 16}[name]
    assert replaced > 10


@pytest.mark.slow
def test_sparse_momentum_matches_the_paper_in_numpy() -> None:
    tx = jp.training.snfs(optax.sgd(RATE), 0.6, every=3, drop_fraction=0.5, decay=0.75)
    grads = gradients(11)
    for grad in grads:
        grad["c"] *= 2  # where the momentum is, density goes
    seen = train(tx, make_params(), grads)
    slow = jax.tree.map(np.array, make_params())
    masks = jax.tree.map(np.array, tx.init(make_params()).masks)
    mean = jax.tree.map(np.zeros_like, slow)
    for step, (grad, (params, state)) in enumerate(zip(grads, seen, strict=True)):
        mean = jax.tree.map(lambda v, g: 0.75 * v + 0.25 * g, mean, grad)
        if step and step % 3 == 0:
            kept = {n: least(np.abs(slow[n]), masks[n], round(0.5 * masks[n].sum())) for n in "ac"}
            freed = 25 + 16 - sum(int(m.sum()) for m in kept.values())
            weight = {n: np.abs(mean[n])[kept[n]].mean() for n in "ac"}
            to_a = round(freed * weight["a"] / (weight["a"] + weight["c"]))
            masks["a"] = most(np.abs(mean["a"]), kept["a"], to_a)
            masks["c"] = most(np.abs(mean["c"]), kept["c"], freed - to_a)
        for name in slow:
            slow[name] = np.where(masks[name], slow[name] - RATE * grad[name], 0)
            np.testing.assert_array_equal(state.masks[name], masks[name])
            np.testing.assert_allclose(params[name], slow[name], rtol=1e-5, atol=1e-6)
    assert masks["c"].sum() > 18, "density did not move"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("total", "weights", "room", "wanted"),
    [
        (10, [1.0, 1.0], [20, 20], [5, 5]),
        (10, [3.0, 1.0, 1.0], [2, 20, 20], [2, 4, 4]),  # what exceeds the room goes on
        (10, [8.0, 4.0, 1.0], [2, 3, 20], [2, 3, 5]),
        (6, [0.0, 0.0], [4, 4], [3, 3]),  # no momentum anywhere
        (0, [1.0, 2.0], [4, 4], [0, 0]),
    ],
)
def test_shares_fill_the_room(total: int, weights: Any, room: Any, wanted: Any) -> None:
    assert shares(total, jnp.array(weights), np.array(room)).tolist() == wanted


# ---- drop and grow under every pattern ------------------------------------------------------


def by_number(scores: Any, sparsity: Any) -> Any:
    return jp.distributions.by_path({"a": 0.4, "c": 0.6})(scores, sparsity)


def network(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["a"]) @ params["c"]


def patterned_params() -> Any:
    return {"a": jax.random.normal(jax.random.key(2), (16, 8)), "c": jnp.ones((8, 12))}


STRUCTURE = jp.infer_structure(network, patterned_params(), jnp.ones((1, 16)))
PATTERNS = {
    "unstructured": (jp.unstructured(), 0.5),
    "erk": (jp.unstructured(jp.erk), 0.5),
    "global": (jp.unstructured(jp.global_threshold), 0.5),
    "a fixed number a leaf": (jp.unstructured(by_number), 0.5),
    "n_m": (jp.n_m(1, 4), 0.75),
    "block": (jp.block((2, 2)), 0.5),
    "structured": (jp.structured(STRUCTURE), 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_rigl_replaces_entries_under_every_pattern(name: str) -> None:
    """And no entry that the pattern can't express: n:m stays n:m, blocks stay blocks."""
    pattern, sparsity = PATTERNS[name]
    params = patterned_params()
    tx = jp.training.rigl(optax.sgd(0.1), sparsity, every=1, pattern=pattern)
    state = tx.init(params)
    update, gone = fast_jit(tx.update), dict.fromkeys("ac", 0)
    for step in range(3):
        old = state.masks
        key = jax.random.key(step)
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for leaf in "ac":
            gone[leaf] += int((old[leaf] & ~state.masks[leaf]).sum())
            if name != "global":
                assert int(state.masks[leaf].sum()) == int(old[leaf].sum())
    assert all(0 < n <= 0.8 * old[leaf].size for leaf, n in gone.items()), gone
    mask = np.asarray(state.masks["a"])
    if name == "n_m":
        assert (mask.reshape(4, 4, 8).sum(axis=1) == 1).all()
    if name == "block":
        assert (mask == np.kron(mask[::2, ::2], np.ones((2, 2), bool))).all()
    if name == "structured":
        assert (mask[0] == np.asarray(state.masks["c"])[:, 0]).all()


@pytest.mark.slow
def test_a_drop_fraction_of_zero_changes_nothing() -> None:
    fraction = optax.cosine_decay_schedule(0.3, 4)
    tx = jp.training.rigl(optax.sgd(0.1), 0.6, drop_fraction=fraction, every=1)
    seen = train(tx, make_params(), gradients(8))
    changed = [
        bool((now[1].masks["a"] != before[1].masks["a"]).any())
        for before, now in zip(seen, seen[1:], strict=False)
    ]
    assert changed == [True, True, True, False, False, False, False]


@pytest.mark.slow
def test_a_schedule_thins_out_a_dynamic_method() -> None:
    rising = jp.schedules.cubic(0.3, 0.8, begin=0, end=6)
    tx = jp.training.rigl(optax.sgd(0.1), rising, every=2)
    for step, (_, state) in enumerate(train(tx, make_params(), gradients(9))):
        sparsity = float(rising(6 if step == 5 else step - step % 2))  # 6 is its end
        assert state.masks["a"].sum() == oracles.kept_count(63, sparsity), step


# ---- the moments of entries that come back --------------------------------------------------


@pytest.mark.slow
def test_moments_are_reset_or_inherited() -> None:
    """At the step of a renewal: entries that come back know this gradient only, or all of them."""
    grads = [jax.tree.map(jnp.ones_like, make_params())] * 3 + gradients(1)
    for moments in ("reset", "inherit"):
        tx = jp.training.rigl(optax.adam(0.1), 0.6, every=3, moments=moments)
        seen = train(tx, make_params(), grads)
        old, (_, state) = seen[2][1].masks["a"], seen[3]
        back = state.masks["a"] & ~old
        mu = tree_get(state, "mu")["a"]
        assert back.sum() > 3
        earlier = np.float32(0.9 * (1 - 0.9**3) if moments == "inherit" else 0)
        np.testing.assert_allclose(mu[back], earlier + 0.1 * grads[3]["a"][back], rtol=1e-5)
        never = ~state.masks["a"] & ~old
        assert (mu[never] == 0).all() == (moments == "reset")
