"""Masks: applying, counting, combining, packing, on every kind of tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import masks as mk
from tests.helpers.oracles import TREES, Layer

BIT = st.booleans()


def leaves(tree):
    return [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert bool(jnp.all(x == y))


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_apply_is_idempotent_and_density_is_the_target(tree):
    params = TREES[tree]
    masks = jp.unstructured()(jp.magnitude(params), 0.75)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    once = jp.apply_masks(params, masks)
    same(jp.apply_masks(once, masks), once)
    assert abs(float(jp.density(params, masks)) - 0.25) < 0.01
    assert sum(int(jnp.sum(x == 0)) for x in leaves(once) if jnp.ndim(x) > 1) >= 0.7 * (8 + 4) * 12


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_all_true_masks_change_nothing(tree):
    params = TREES[tree]
    same(jp.apply_masks(params, jax.tree.map(lambda _: jnp.asarray(True), params)), params)
    full = jax.tree.map(lambda x: jnp.ones(np.shape(x), bool), params)
    same(jp.apply_masks(params, full), params)


def test_apply_under_jit_with_traced_masks_and_random_keys():
    params = {"w": jnp.ones((2, 2)), "key": jax.random.key(0), "count": jnp.int32(2)}
    masks = {"w": jnp.eye(2, dtype=bool), "key": jnp.asarray(True), "count": jnp.asarray(True)}
    out = jax.jit(jp.apply_masks)(params, masks)
    np.testing.assert_array_equal(out["w"], np.eye(2))
    assert out["count"] == 2 and jnp.all(out["key"] == params["key"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nothing_leaks_through_a_mask(bad):
    params, masks = {"w": jnp.array([bad, 1.0])}, {"w": jnp.array([False, True])}
    np.testing.assert_array_equal(jp.apply_masks(params, masks)["w"], [0, 1])
    loss = lambda p: jnp.sum(jp.apply_masks(p, masks)["w"] ** 2)  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(params)["w"], [0, 2])


def test_masks_broadcast_and_keep_the_type():
    params = {"w": jnp.ones((3, 4), jnp.bfloat16), "n": jnp.arange(3)}
    masks = {"w": jnp.array([[True], [False], [True]]), "n": jnp.array([True, False, True])}
    out = jp.apply_masks(params, masks)
    assert out["w"].dtype == jnp.bfloat16 and out["w"].sum() == 8
    assert out["n"].dtype == params["n"].dtype and out["n"].tolist() == [0, 0, 2]


def test_density_counts_entries_and_leaves_dense_leaves_out():
    params = {"w": jnp.ones((4, 6)), "v": jnp.ones((2, 2)), "b": jnp.ones(99)}
    masks = {
        "w": jnp.array([[True], [False], [False], [False]]),  # one row of four, over six columns
        "v": jnp.ones((2, 2), bool),
        "b": jnp.asarray(True),
    }
    assert float(jp.density(params, masks)) == pytest.approx((6 + 4) / (24 + 4))
    dense = jax.tree.map(lambda _: jnp.asarray(True), params)
    assert float(jp.density(params, dense)) == 1.0
    assert float(jax.jit(jp.density)(params, masks)) == pytest.approx(10 / 28)


@pytest.mark.slow
def test_density_of_many_entries():
    size = 2**24 + 2**22
    masks = {"w": jnp.ones((1, size), bool).at[0, : 2**22].set(False)}
    assert float(jp.density({"w": masks["w"].astype(jnp.int8)}, masks)) == pytest.approx(
        0.8, abs=1e-7
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(BIT, min_size=6, max_size=6), st.lists(BIT, min_size=6, max_size=6), BIT)
def test_union_intersection_overlap_are_those_of_sets(a, b, dense):
    params = [jnp.ones((2, 3)), jnp.ones((5, 3)), jnp.ones(4)]
    lists = [
        [jnp.array(x).reshape(2, 3), jnp.array(x[:3]).reshape(1, 3), jnp.asarray(dense or True)]
        for x in (a, b)
    ]
    sets = [
        {("w", i) for i in range(6) if x[i]}
        | {("v", r, i) for r in range(5) for i in range(3) if x[i]}
        for x in (a, b)
    ]
    either, both = mk.union(*lists), mk.intersection(*lists)
    np.testing.assert_array_equal(np.ravel(either[0]), np.array(a) | np.array(b))
    np.testing.assert_array_equal(np.ravel(both[0]), np.array(a) & np.array(b))
    union, common = sets[0] | sets[1], sets[0] & sets[1]
    wanted = len(common) / len(union) if union else 1.0
    assert float(mk.overlap(params, *lists)) == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_packing_is_lossless_and_eight_times_smaller(tree):
    params = TREES[tree]
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    packed = mk.pack(masks)
    same(mk.unpack(packed), masks)
    same(jax.jit(lambda m: mk.unpack(mk.pack(m)))(masks), masks)
    for bits, mask in zip(jax.tree.leaves(packed), jax.tree.leaves(masks), strict=True):
        assert bits.dtype == jnp.uint8 and bits.size == -(-mask.size // 8)


@pytest.mark.slow
def test_packing_keeps_all_axes_but_the_last_where_eight_divides_it():
    masks = {n: np.random.default_rng(n).random((3, 2, n)) < 0.5 for n in (7, 8, 24)}
    packed = mk.pack(masks)
    assert [x.shape for x in jax.tree.leaves(packed)] == [(6,), (3, 2, 1), (3, 2, 3)]
    same(mk.unpack(packed), masks)


W = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
FULL = jax.tree.map(lambda x: jnp.ones(x.shape, bool), W)


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ({"layer": {"kernel": True}}, "does not match params: it has no leaf 'layer/bias'; build"),
        (
            {"layer": {**FULL["layer"], "extra": True}},
            "it has an unknown leaf 'layer/extra'; build masks with a pattern",
        ),
        (
            {"layer": {"kernel": jnp.ones((2, 3), bool), "bias": True}},
            r"mask of layer/kernel is bool\(2, 3\); wanted booleans that broadcast to .*\(3, 2\)",
        ),
        ({"layer": {"kernel": jnp.ones((3, 2)), "bias": True}}, r"layer/kernel is float32\(3, 2\)"),
        ({"layer": {"kernel": True, "bias": jnp.ones((4, 2), bool)}}, "layer/bias is bool"),
    ],
)
def test_masks_that_do_not_fit_are_named(masks, text):
    for call in (
        jp.apply_masks,
        lambda p, m: jp.density(p, m),
        lambda p, m: mk.overlap(p, m, FULL),
    ):
        with pytest.raises(ValueError, match=text):
            call(W, masks)


def test_other_containers_and_other_masks_are_named():
    with pytest.raises(ValueError, match="it has a tuple at its root where a list is wanted"):
        jp.apply_masks([jnp.ones(2)], (True,))
    with pytest.raises(ValueError, match="it has an unknown leaf 'bias'|no leaf"):
        jp.apply_masks({"kernel": jnp.ones(2)}, Layer(True, True))
    with pytest.raises(
        ValueError, match="tree of the second masks does not match .*has no leaf 'a'"
    ):
        mk.union({"a": jnp.asarray(True)}, {"b": jnp.asarray(True)})


@pytest.mark.parametrize(
    "call",
    [
        lambda p, m: mk.check_masks(m, p),
        lambda p, m: mk.overlap(m, m, p),
        lambda p, m: jp.sanity.random_like(m, p, key=jax.random.key(0)),
        lambda p, m: jp.sanity.active(lambda p, x: x @ p["w"], m, p, jnp.ones((1, 2))),
        lambda p, m: jp.sanity.overlap_over_time(m, [p, p]),
    ],
)
def test_params_come_first(call):
    params, masks = {"w": jnp.ones((2, 2))}, {"w": jnp.eye(2, dtype=bool)}
    with pytest.raises(TypeError, match=r"params come first: write \(params, masks\)"):
        call(params, masks)
