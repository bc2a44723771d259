"""Scores, distributions, selection, patterns, masks, schedules: laws and clear errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import keep_largest, n_of_m

import jaxprune as jp
from jaxprune import selection

few = settings(max_examples=25, deadline=None)
floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
    elements=st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 3.0, np.inf])
    | st.floats(-5, 5, width=32, allow_subnormal=False),
)


def trees():
    """One network's parameters as a dict, a tuple, an NNX state and an Equinox module."""
    w, b = jax.random.normal(jax.random.key(0), (8, 6)), jnp.ones(6)
    yield {"dense": {"kernel": w, "bias": b}}
    yield (w, b)
    yield nnx.state(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    yield eqx.filter(eqx.nn.Linear(8, 6, key=jax.random.key(0)), eqx.is_array)


# ---------------------------------------------------------------------------- selection


@few
@given(floats, st.data())
def test_keep_largest_is_a_stable_sort(scores, data):
    k = data.draw(st.integers(0, scores.size))
    got = selection.keep_largest(jnp.asarray(scores), k)
    np.testing.assert_array_equal(got, keep_largest(scores, k))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_exact_under_massive_ties_and_traced_k(dtype):
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 3, 5000), dtype)
    kept = jax.jit(selection.keep_largest)
    for k in (0, 1, 2500, 4999, 5000):
        assert int(kept(scores, k).sum()) == k


def test_nan_ranks_lowest():
    mask = selection.keep_largest(jnp.array([jnp.nan, -jnp.inf, 1.0]), 2)
    np.testing.assert_array_equal(mask, [False, True, True])


@few
@given(hnp.arrays(np.float32, (8, 3), elements=st.sampled_from([0.0, 1.0, 2.0, 3.0])))
def test_n_of_m_against_the_slow_way(scores):
    mask = jp.n_m(2, 4)({"w": jnp.asarray(scores)}, 0.5)["w"]
    np.testing.assert_array_equal(mask, n_of_m(scores, 2, 4))


# ---------------------------------------------------------------------------- patterns


@few
@given(st.floats(0, 1), st.floats(0, 1))
def test_density_is_the_target_and_masks_nest(a, b):
    low, high = sorted([a, b])
    params = {"w": jax.random.normal(jax.random.key(1), (13, 7))}
    masks = [jp.unstructured()(jp.magnitude(params), s)["w"] for s in (low, high)]
    for mask, sparsity in zip(masks, (low, high), strict=True):
        assert abs(int(mask.sum()) - 91 * (1 - sparsity)) <= 1
    assert not bool(jnp.any(masks[1] & ~masks[0]))


@few
@given(floats)
def test_masks_are_invariant_under_monotone_maps(scores):
    params = {"w": jnp.asarray(scores)}
    pattern = jp.unstructured(where=lambda path, leaf: True)
    doubled = {"w": params["w"] * 2}  # exact in floating point, so that order and ties stay
    np.testing.assert_array_equal(pattern(params, 0.4)["w"], pattern(doubled, 0.4)["w"])


def test_every_pytree_works():
    for params in trees():
        masks = jp.unstructured()(jp.magnitude(params), 0.5)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        assert float(jp.density(masks, params)) == 0.5
        kept = jp.apply_masks(params, masks)
        again = jp.apply_masks(kept, masks)
        for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(x, y)


def test_per_output_keeps_the_same_number_in_each_column():
    scores = {"w": jax.random.uniform(jax.random.key(0), (10, 7))}
    mask = jp.unstructured(per_output=True)(scores, 0.7)["w"]
    np.testing.assert_array_equal(mask.sum(0), [3] * 7)


def test_blocks_act_on_the_last_axes():
    scores = {"w": jax.random.uniform(jax.random.key(0), (3, 3, 4, 8))}
    mask = np.asarray(jp.block((2, 4))(scores, 0.5)["w"])
    tiles = mask.reshape(3, 3, 2, 2, 2, 4).transpose(0, 1, 2, 4, 3, 5).reshape(-1, 8)
    assert (tiles.all(1) | ~tiles.any(1)).all() and mask.mean() == 0.5


def test_threshold_by_path():
    params = {"conv": jnp.array([[1.0, 2.0]]), "dense": jnp.array([[1.0, 2.0]])}
    masks = jp.threshold(lambda path: 1.5 if "conv" in path else 0.5)(params)
    assert masks["conv"].tolist() == [[False, True]] and masks["dense"].tolist() == [[True, True]]


def test_channel_warns_that_consumers_stay():
    with pytest.warns(UserWarning, match="consumers stay uncoupled"):
        mask = jp.channel()({"w": jnp.array([[1.0, 4.0], [0.0, 0.0]])}, 0.5)["w"]
    assert mask.tolist() == [[False, True]]


# ------------------------------------------------------------------------ distributions


def test_global_threshold_is_free_of_size():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "big": jax.random.normal(keys[0], (1000, 1000)),
        "small": jax.random.normal(keys[1], (100, 100)) * 0.01,
    }
    masks = jp.unstructured(jp.global_threshold)(jp.magnitude(params), 0.9)
    for mask in masks.values():
        assert abs(float(mask.mean()) - 0.1) < 0.02


def test_global_threshold_leaves_no_leaf_empty():
    params = {"a": jnp.full((100, 100), 5.0), "b": jnp.full((4, 4), 1e-3)}
    distribution = lambda s, f: jp.global_threshold(s, f, normalize=False)  # noqa: E731
    masks = jp.unstructured(distribution)(params, 0.5)
    assert int(masks["b"].sum()) == 1


@few
@given(st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=5),
       st.floats(0.05, 0.98))  # fmt: skip
def test_erk_averages_to_the_target(shapes, sparsity):
    scores = {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}
    wanted = jax.jit(jp.erk)(scores, sparsity)
    sizes = np.array([np.prod(s) for s in shapes])
    densities = np.array([1 - float(wanted[str(i)]) for i in range(len(shapes))])
    assert abs((sizes * densities).sum() / sizes.sum() - (1 - sparsity)) < 1e-4


# ----------------------------------------------------------------------- masks, schedules


def test_nan_cannot_leak_and_bits_come_back():
    masks = {"w": jnp.array([True, False, True])}
    params = {"w": jnp.array([1.0, jnp.nan, 3.0])}
    np.testing.assert_array_equal(jp.apply_masks(params, masks)["w"], [1.0, 0.0, 3.0])
    packed = jp.masks.pack(masks)
    np.testing.assert_array_equal(jp.masks.unpack(packed)["w"], masks["w"])
    assert float(jp.masks.overlap(masks, masks, params)) == 1.0


@few
@given(st.integers(0, 50), st.integers(1, 50), st.floats(0, 1, width=32, allow_subnormal=False))
def test_cubic_starts_and_ends_where_it_says(begin, length, final):
    schedule = jax.jit(jp.schedules.cubic(0.0, final, begin=begin, end=begin + length))
    assert float(schedule(begin)) == 0.0
    assert float(schedule(begin + length)) == np.float32(final)


# ----------------------------------------------------------------------------- bad input

W = {"layer": {"kernel": jnp.ones((3, 3, 3, 6))}}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: jp.unstructured()(W, 1.5), "sparsity is 1.5; wanted a fraction"),
        (lambda: jp.unstructured()({}, 0.5), "scores is an empty tree"),
        (lambda: jp.unstructured(where=lambda p, x: False)(W, 0.5), "selects none of the leaves"),
        (lambda: jp.unstructured()({"w": jnp.full((2, 2), jnp.nan)}, 0.5), "scores of w, .*NaN"),
        (lambda: jp.n_m(4, 2), "wanted 0 < n < m"),
        (lambda: jp.n_m(2, 4)(W, 0.5), "layer/kernel, shape .*4 does not divide axis -2"),
        (lambda: jp.n_m(1, 3)(W, 0.8), "can't express 0.8"),
        (lambda: jp.block((4, 4))(W, 0.5), r"block\(\(4, 4\)\) does not tile layer/kernel"),
        (
            lambda: jp.apply_masks(W, {"layer": True}),
            "tree of masks does not match params: it has no leaf",
        ),
        (lambda: jp.apply_masks({"w": jnp.ones(3)}, {"w": jnp.ones(2, bool)}), "the mask of w is"),
        (
            lambda: jp.distributions.by_path({"x*": 0.5})(W, 0.5),
            "'x\\*' is the first match of none",
        ),
        (lambda: jp.schedules.cubic(0, 0.5, begin=3, end=3), "wanted end > begin"),
        (lambda: jp.schedules.cubic(0, 1.5, begin=0, end=3), "final is 1.5; wanted a sparsity in"),
        (lambda: jp.schedules.one_shot(-0.5, at=3), "final is -0.5"),
        (lambda: jp.batch_norm_scale(W), "finds no scale of a normalisation"),
        (lambda: jp.saliency(W, grad={"w": 1}), "tree of grad does not match params"),
    ],
)
def test_clear_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_missing_evidence_is_named():
    with pytest.raises(TypeError, match="grad"):
        jp.saliency(W)


def test_counters_and_random_keys_pass_through():
    params = {"w": -jnp.ones((2, 2)), "count": jnp.int32(3), "key": jax.random.key(0)}
    scores = jp.magnitude(params)
    masks = jp.unstructured()(scores, 0.5)
    kept = jp.apply_masks(params, masks)
    assert int(kept["count"]) == 3 and kept["key"] is params["key"]
