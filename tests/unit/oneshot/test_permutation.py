"""Channel permutation: the same function, never a lower kept score, near the best of all orders."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from benchmarks.models.transformers import GPT, Widths
from jaxprune.oneshot import permutation


def mlp(hidden=16, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "up": jax.random.normal(keys[0], (4, hidden)),
        "bias": jax.random.normal(keys[1], (hidden,)),
        "down": jax.random.normal(keys[2], (hidden, 6)),
    }
    fn = lambda p, x: jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]  # noqa: E731
    return fn, params, jnp.linspace(-1, 1, 12).reshape(3, 4)


def kept(lines, order, n, m):
    """The slow way, in numpy."""
    groups = np.asarray(lines, np.float64)[np.asarray(order)].reshape(-1, m, lines.shape[1])
    return np.sort(groups, axis=1)[:, -n:].sum()


# -- how good


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 2), (2, 4), (1, 4)]))
def test_never_worse_and_a_permutation(seed, n_m):
    n, m = n_m
    lines = np.random.default_rng(seed).exponential(size=(16, 3))
    order = permutation._order(jnp.asarray(lines), n, m, 10, jax.random.key(seed))
    assert sorted(order.tolist()) == list(range(16))
    assert kept(lines, order, n, m) >= kept(lines, np.arange(16), n, m) * (1 - 1e-5)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8)]), st.booleans())
def test_gains_of_exchanges_equal_sorting_anew(seed, n_m, ties):
    n, m = n_m
    a, b = np.random.default_rng(seed).exponential(size=(2, m, 5)).astype(np.float32)
    if ties:
        a, b = np.ceil(a), np.ceil(b)
    both, plain = np.concatenate([a, b]), np.arange(2 * m)
    want = np.zeros((m, m))
    for i, j in itertools.product(range(m), repeat=2):
        swapped = plain.copy()
        swapped[[i, m + j]] = m + j, i
        want[i, j] = kept(both, swapped, n, m) - kept(both, plain, n, m)
    found = permutation._gains(a, b, n) + permutation._gains(b, a, n).T
    np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.slow
def test_near_the_best_of_all_orders():
    """Of eight units there are 35 ways to make two groups of four."""
    found, best, plain = [], [], []
    for seed in range(10):
        lines = np.random.default_rng(seed).exponential(size=(8, 2))
        splits = (
            [0, *rest, *sorted({*range(8)} - {0, *rest})]
            for rest in itertools.combinations(range(1, 8), 3)
        )
        best.append(max(kept(lines, split, 2, 4) for split in splits))
        found.append(
            kept(lines, permutation._order(jnp.asarray(lines), 2, 4, 20, jax.random.key(0)), 2, 4)
        )
        plain.append(kept(lines, np.arange(8), 2, 4))
    gained = (np.sum(found) - np.sum(plain)) / (np.sum(best) - np.sum(plain))
    assert 0.9 <= gained <= 1 + 1e-6


@pytest.mark.slow
def test_units_that_would_be_lost_together_are_spread():
    fn, params, x = mlp()
    params["down"] = jnp.where(jnp.arange(16)[:, None] < 8, 10.0, 0.1) * jnp.ones((16, 6))
    structure, pattern = jp.infer_structure(fn, params, x), jp.n_m(2, 4)
    better, orders = jp.oneshot.permute(fn, params, structure, params, x)
    whole = [jnp.abs(p["down"] * pattern(p, 0.5)["down"]).sum() for p in (params, better)]
    assert whole[0] == pytest.approx(0.5 * 480 + 0.5 * 4.8) and whole[1] == pytest.approx(480)
    assert list(orders) == ["up:1"]


# -- the same function


@pytest.mark.slow
def test_a_transformer_stays_what_it_is():
    """The residual width runs through norms, embeddings and both sides of every kernel."""
    module = GPT(50, Widths(16, 2, 4, 24), 2, 12)
    x = jax.random.randint(jax.random.key(0), (2, 12), 0, 50)
    params = jax.jit(module.init)(jax.random.key(1), x)
    structure = jp.infer_structure(module.apply, params, x)
    scores = jp.magnitude(params)
    better, orders = jp.oneshot.permute(module.apply, params, structure, scores, x, sweeps=5)
    assert {16, 24} <= {structure.dims[name].size for name in orders}
    want, got = (jax.jit(module.apply)(p, x) for p in (params, better))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert any((order != np.arange(len(order))).any() for order in orders.values())
    chex.assert_trees_all_equal(
        jp.oneshot.permuted(scores, structure, orders), jp.magnitude(better)
    )


@pytest.mark.slow
def test_masks_and_scalars_follow():
    fn, params, x = mlp(4)
    structure = jp.infer_structure(fn, params, x)
    masks = structure.masks({"up:1": np.array([True, False, True, True])})
    order = {"up:1": [1, 0, 3, 2]}
    moved = jp.oneshot.permuted(masks, structure, order)
    assert moved["up"].tolist() == [[False, True, True, True]]
    assert moved["down"].tolist() == [[False], [True], [True], [True]]
    want = fn(jp.apply_masks(params, masks), x)
    tree = jp.apply_masks(jp.oneshot.permuted(params, structure, order), moved)
    np.testing.assert_allclose(fn(tree, x), want, atol=1e-5)
    scalars = jax.tree.map(lambda _: True, params)
    assert jp.oneshot.permuted(scalars, structure, order) == scalars


def test_an_axis_of_several_dimensions_moves_by_units():
    units = np.array([0, 0, 1, 1, 2, 2, -1])  # three units of two, and one that carries none
    assert permutation._places(units, np.array([2, 0, 1])).tolist() == [4, 5, 0, 1, 2, 3, 6]


def test_one_group_keeps_its_order():
    assert permutation._order(jnp.ones((4, 1)), 2, 4, 5, jax.random.key(0)).tolist() == [0, 1, 2, 3]


# -- bad input


def ordered():
    """A table by unit: the order of units matters."""
    _, params, x = mlp()
    fn = lambda p, x: (jax.nn.gelu(x @ p["up"]) * jnp.arange(16.0)) @ p["down"]  # noqa: E731
    return fn, params, x


BAD = {
    "order matters": (ordered, {}, r"the order of up:1 \(.*hidden\) matters to fn.*leave it out"),
    "n": (mlp, {"n": 4}, r"permute\(n=4, m=4\): wanted 0 < n < m"),
    "nothing to order": (mlp, {"m": 5}, "no dimension is the whole input axis .* that 5 divides"),
    "unknown dims": (mlp, {"dims": "conv*"}, "matches no prunable dimension"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_clear_errors(name):
    make, options, text = BAD[name]
    fn, params, x = make()
    structure = jp.infer_structure(fn, params, x)
    with pytest.raises(ValueError, match=text):
        jp.oneshot.permute(fn, params, structure, jp.magnitude(params), x, **options)


def test_scores_and_orders_that_do_not_fit():
    fn, params, x = mlp()
    structure = jp.infer_structure(fn, params, x)
    with pytest.raises(ValueError, match="permute: the tree of scores .* has no leaf .*; wanted"):
        jp.oneshot.permute(fn, params, structure, [1.0], x)
    with pytest.raises(ValueError, match=r"order of up:1 has shape \(2,\).*0 to 15 once"):
        jp.oneshot.permuted(params, structure, {"up:1": [0, 0]})
    with pytest.raises(ValueError, match="permuted: the tree does not match .* unknown leaf 'b'"):
        jp.oneshot.permuted({**params, "b": 1}, structure, {})


def test_orders_that_matter_only_together(monkeypatch):
    """Each alone within the tolerance, all of them beyond."""
    fn, params, x = mlp()
    structure = jp.infer_structure(fn, params, x)
    apart = iter([1.0, 0.0])
    monkeypatch.setattr(permutation, "_apart", lambda want, got: next(apart))
    with pytest.raises(ValueError, match="outputs change with the orders of its units"):
        jp.oneshot.permute(fn, params, structure, jp.magnitude(params), x)
