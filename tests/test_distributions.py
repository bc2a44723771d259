"""Distributions: the mean is the target, sizes don't matter where they should not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.distributions import by_depth, by_path

SHAPES = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6
)
FRACTION = st.floats(0, 1)
ALL = {
    "uniform": jp.uniform,
    "erk": jp.erk,
    "global": jp.global_threshold,
    "by_path": by_path({"*": lambda s: s / 2}),
    "by_depth": by_depth(lambda depth, s: s * depth),
}


def ones(shapes):
    return {f"w{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}


def mean_density(shapes, sparsities):
    sizes = np.array([np.prod(shape) for shape in shapes], float)
    return float(np.sum(sizes * (1 - np.array([float(s) for s in sparsities]))) / sizes.sum())


@settings(max_examples=100)
@given(SHAPES, FRACTION, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_erk_is_the_iterative_solution_and_averages_to_the_target(shapes, sparsity, power):
    got = jp.erk(ones(shapes), sparsity, power=power)
    got = [float(got[f"w{i}"]) for i in range(len(shapes))]
    np.testing.assert_allclose(got, oracles.erk(shapes, sparsity, power), atol=1e-9)
    assert mean_density(shapes, got) == pytest.approx(1 - sparsity, abs=1e-9)


def test_erk_with_a_traced_sparsity():
    shapes = [(3, 3, 1, 16), (3, 3, 16, 64), (1024, 10), (10,), ()]
    erk = jax.jit(lambda s: jp.erk(ones(shapes), s))
    for sparsity in (0.0, 0.3, 0.8, 0.95, 1.0):
        got = [float(s) for s in erk(sparsity).values()]
        np.testing.assert_allclose(got, oracles.erk(shapes[:-1] + [(1,)], sparsity, 1), atol=1e-5)
        assert min(got) >= 0 and max(got) <= 1
    assert erk._cache_size() == 1


def test_erk_power_0_is_uniform():
    half = functools.partial(jp.erk, power=0.0)(ones([(10, 10), (2, 300)]), 0.7)
    np.testing.assert_allclose([float(s) for s in half.values()], [0.7, 0.7])


@pytest.mark.parametrize("name", ALL)
def test_any_tree_one_scalar_a_leaf_traced_or_not(name):
    for tree in ((jnp.ones((3, 4)), [jnp.ones(5), None]), {"a": {"b": jnp.ones((2, 2))}}):
        known = ALL[name](tree, 0.5)
        traced = jax.jit(lambda t, s: ALL[name](t, s))(tree, 0.5)
        for sparsities in (known, traced):
            assert jax.tree.structure(sparsities) == jax.tree.structure(tree)
            assert all(np.shape(s) == () for s in jax.tree.leaves(sparsities))
        np.testing.assert_allclose(*map(jax.tree.leaves, (known, traced)), atol=1e-6)


def test_uniform_hands_a_number_on_unrounded():
    assert float(jp.uniform({"w": jnp.ones(3)}, 0.9)["w"]) == 0.9


NORMAL = {
    "big": jax.random.normal(jax.random.key(0), (1000, 1000)),
    "small": jax.random.normal(jax.random.key(1), (100, 100)),
}


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_global_is_free_of_size_and_scale(scale):
    scores = jp.magnitude({**NORMAL, "small": NORMAL["small"] * scale})
    for sparsity in jax.jit(jp.global_threshold)(scores, 0.9).values():
        assert float(sparsity) == pytest.approx(0.9, abs=0.01)


def test_global_counts_pruned_entries_as_zeros_of_the_scale():
    """An entry that was pruned has score -inf; the others must compare as before."""
    scores = jp.magnitude(NORMAL)
    before = jp.global_threshold(scores, 0.6)
    masks = jp.unstructured(jp.global_threshold)(scores, 0.5)
    marked = jax.tree.map(lambda s, m: jnp.where(m, s, -jnp.inf), scores, masks)
    after = jp.global_threshold(marked, 0.6)
    for path in scores:
        assert float(after[path]) == pytest.approx(float(before[path]), abs=0.02)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), FRACTION, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.booleans())
def test_global_hits_the_target_and_empties_no_leaf(seed, sparsity, floor, normalize):
    rng = np.random.default_rng(seed)
    shapes = [(30, 20), (7, 3), (2, 2)]
    scores = {
        f"w{i}": jnp.asarray(np.abs(rng.normal(size=s)) * 10.0**-i, jnp.float32)
        for i, s in enumerate(shapes)
    }
    rule = functools.partial(jp.global_threshold, floor=floor, normalize=normalize)
    masks = jp.unstructured(rule)(scores, sparsity)
    kept = [int(masks[path].sum()) for path in scores]
    shares = [oracles.kept_count(x.size, sparsity) for x in scores.values()]
    assert sum(kept) == sum(shares)
    for n, share in zip(kept, shares, strict=True):
        assert n >= min(share, max(1, np.ceil(floor * share)))


def test_global_without_scaling_is_one_cut_over_all_leaves():
    rule = functools.partial(jp.global_threshold, normalize=False, floor=0.0)
    masks = jp.unstructured(rule)(jp.magnitude(NORMAL), 0.9)
    every = np.abs(np.concatenate([np.ravel(x) for x in NORMAL.values()]))
    cut = np.sort(every)[-round(every.size * 0.1)]
    for path, mask in masks.items():
        assert abs(int(mask.sum()) - int((np.abs(NORMAL[path]) >= cut).sum())) <= 1


def test_by_path_first_match_holds_and_functions_follow_the_schedule():
    scores = {
        "conv_0": jnp.ones(2),
        "conv_1": jnp.ones(2),
        "dense": jnp.ones(2),
        "out": jnp.ones(2),
    }
    rule = by_path({"conv_0": 0, "conv*": lambda s: s / 2, "dense": 0.7})
    assert {p: float(s) for p, s in rule(scores, 0.8).items()} == {
        "conv_0": 0.0,
        "conv_1": 0.4,
        "dense": 0.7,
        "out": 0.8,
    }
    with_erk = by_path({"conv*": 0.5}, default=jp.erk)(scores, 0.8)
    assert float(with_erk["out"]) == pytest.approx(0.8)
    everything = by_path({"*": 0.5}, default=lambda scores, s: 1 / 0)  # has nothing left to do
    assert float(everything(scores, 0.8)["out"]) == 0.5


def test_a_mapping_is_a_distribution():
    scores = {"conv": jnp.arange(8.0).reshape(2, 4), "dense": jnp.arange(8.0).reshape(2, 4)}
    for pattern in (jp.unstructured({"conv": 0.25}), jp.block((1, 1), {"conv": 0.25})):
        masks = jax.jit(pattern)(scores, 0.5)
        assert [int(m.sum()) for m in masks.values()] == [6, 4]


def test_by_depth_counts_numbers_as_numbers_or_takes_an_order():
    scores = {"block_10/w": jnp.ones(2), "block_9/w": jnp.ones(2), "stem": jnp.ones(2)}
    rule = lambda depth, s: depth  # noqa: E731
    assert [float(s) for s in by_depth(rule)(scores, 0.0).values()] == [0.5, 0.0, 1.0]
    order = {"stem": 0, "block_9/w": 1, "block_10/w": 2}.get
    assert [float(s) for s in by_depth(rule, order=order)(scores, 0.0).values()] == [1.0, 0.5, 0.0]
    assert float(by_depth(rule)({"one": jnp.ones(2)}, 0.5)["one"]) == 0.0


W = {"conv": jnp.ones((2, 2)), "dense": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: by_path({"x*": 0.5})(W, 0.5),
            r"'x\*' is the first match of none .*'conv', 'dense'",
        ),
        (
            lambda: by_path({"*": 0.5, "conv": 0.1})(W, 0.5),
            "'conv' is the first match of none .*up",
        ),
        (lambda: by_path({"conv": 1.5}), "'conv' has sparsity 1.5; wanted a fraction in"),
        (lambda: jp.global_threshold(W, 0.5, floor=2.0), "floor is 2.0; wanted the fraction"),
        (
            lambda: jp.unstructured(lambda scores, s: {"conv": s})(W, 0.5),
            r"distribution returned .*wanted one sparsity for each of \['conv', 'dense'\]",
        ),
        (
            lambda: jp.unstructured({"conv": lambda s: s * 3})(W, 0.5),
            "distribution gives conv sparsity 1.5; wanted one number",
        ),
        (
            lambda: jp.unstructured(lambda scores, s: jax.tree.map(jnp.ones_like, scores))(W, 0.5),
            "(?s)distribution gives conv sparsity .*; wanted one number",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_strict_promotion_and_64_bit_types(x64):
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.float64):
            scores = {"w": jnp.arange(12.0).astype(jnp.bfloat16), "v": jnp.arange(5.0, dtype=dtype)}
            for name, distribution in ALL.items():
                known, traced = distribution(scores, 0.5), jax.jit(distribution)(scores, 0.5)
                assert float(known["w"]) == pytest.approx(float(traced["w"])), name
