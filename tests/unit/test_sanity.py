"""The controls keep what they must keep and change the rest; collapse is seen where it happens."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import sanity
from tests.helpers.arrays import normal
from tests.helpers.oracles import TREES

KEY = jax.random.key(0)
PARAMS = {
    "in": normal(0, 6, 20),
    "mid": normal(1, 20, 10),
    "bias": jnp.full(10, 0.5),
}
PATTERN = jp.unstructured({"in": 0.9, "mid": 0.5})
MASKS = jax.jit(lambda params: PATTERN(jp.magnitude(params), 0.0))(PARAMS)


def relu_net(p, x):
    return jax.nn.relu(x @ p["in"]) @ p["mid"]


def counts(masks):
    return [int(jnp.sum(m)) for m in jax.tree.leaves(masks)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "control",
    [
        sanity.shuffle,
        functools.partial(sanity.random_like, PARAMS),
        jax.jit(lambda masks, key: sanity.shuffle(masks, key=key)),
        jax.jit(lambda masks, key: sanity.random_like(PARAMS, masks, key=key)),
    ],
)
def test_masks_move_and_densities_stay(control):
    one, other = (control(MASKS, key=jax.random.key(i)) for i in range(2))
    for masks in (one, other):
        jp.masks.check_masks(PARAMS, masks)
        assert counts(masks) == counts(MASKS)
        assert np.shape(masks["bias"]) == ()  # a dense leaf stays one
    assert (one["in"] != other["in"]).any() and (one["in"] != MASKS["in"]).any()
    again = control(MASKS, key=jax.random.key(0))
    assert (again["mid"] == one["mid"]).all()


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 2**31 - 1))
def test_a_shuffle_is_as_likely_to_keep_each_entry(seed):
    masks = {"w": jnp.arange(40) < 10}
    keys = jax.random.split(jax.random.key(seed), 400)
    mean = jax.vmap(lambda key: sanity.shuffle(masks, key=key)["w"])(keys).mean(0)
    assert float(mean.min()) > 0.1 and float(mean.max()) < 0.4  # 0.25 within 6 deviations


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_any_tree(tree):
    params = TREES[tree]
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    for changed in (sanity.shuffle(masks, key=KEY), sanity.random_like(params, masks, key=KEY)):
        assert jax.tree.structure(changed) == jax.tree.structure(params)
        assert counts(changed) == counts(masks)
    fresh = sanity.reinitialize(params, key=KEY)
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    assert sanity.collapsed(masks) == []


@pytest.mark.slow
def test_random_like_scatters_whole_channels():
    params = {"w": jnp.ones((10, 20))}
    channels = {"w": jnp.arange(20)[None] < 5}
    drawn = sanity.random_like(params, channels, key=KEY)["w"]
    assert drawn.shape == (10, 20) and int(drawn.sum()) == 50
    dense = {"w": jnp.asarray(True)}
    assert sanity.random_like(params, dense, key=KEY) is dense


@pytest.mark.slow
def test_reinitialized_leaves_have_the_same_entries_in_another_order():
    params = {**PARAMS, "key": KEY, "step": jnp.int32(3), "half": jnp.arange(9, dtype=jnp.bfloat16)}
    fresh = sanity.reinitialize(params, key=jax.random.key(7))
    for name in ("in", "mid", "half"):
        assert fresh[name].dtype == params[name].dtype
        assert (fresh[name] != params[name]).any()
        np.testing.assert_array_equal(jnp.sort(fresh[name].ravel()), jnp.sort(params[name].ravel()))
    np.testing.assert_array_equal(fresh["bias"], params["bias"])
    assert fresh["key"] is KEY and fresh["step"] is params["step"]
    # one order per leaf, not one for all
    twins = sanity.reinitialize({"a": PARAMS["in"], "b": PARAMS["in"]}, key=KEY)
    assert (twins["a"] != twins["b"]).any()


def test_collapse_is_found_and_raised():
    masks = {
        "dense": jnp.asarray(True),
        "few": jnp.arange(10) < 2,
        "gone": jnp.zeros((3, 4), bool),
        "empty": jnp.zeros((0, 4), bool),
        "one": jnp.ones((1, 1), bool),
    }
    assert sanity.collapsed(masks) == [("gone", 0, 12)]
    assert [c.path for c in sanity.collapsed(masks, least=3)] == ["few", "gone"]
    with pytest.raises(ValueError, match=r"collapse: gone keeps 0 of 12; .*lower the sparsity"):
        sanity.check_collapse(masks)
    with pytest.raises(ValueError, match="few keeps 2 of 10; gone keeps 0 of 12"):
        sanity.check_collapse(masks, least=3)
    sanity.check_collapse(MASKS)
    assert sanity.collapsed({"off": jnp.asarray(False)}) == [("off", 0, 1)]


@pytest.mark.slow
def test_active_entries_are_those_on_a_path():
    """Against walking the graph: an entry needs a live unit on either side."""
    kept = {n: np.asarray(jax.random.bernoulli(KEY, 0.06, PARAMS[n].shape)) for n in ("in", "mid")}
    fed, read = kept["in"].any(0), kept["mid"].any(1)
    masks = {**jax.tree.map(jnp.asarray, kept), "bias": jnp.asarray(True)}
    got = sanity.active(relu_net, PARAMS, masks, jnp.ones((1, 6)))
    np.testing.assert_array_equal(got["in"], kept["in"] & read)
    np.testing.assert_array_equal(got["mid"], kept["mid"] & fed[:, None])
    assert got["bias"] is masks["bias"] and counts(got) < counts(masks)
    assert not read.all() and not fed.all()


@pytest.mark.slow
def test_a_network_that_is_cut_in_two_is_seen_though_no_layer_is_empty():
    masks = {
        "in": jnp.zeros((6, 20), bool).at[:, :5].set(True),
        "mid": jnp.zeros((20, 10), bool).at[5:].set(True),
        "bias": jnp.asarray(True),
    }
    assert sanity.collapsed(masks) == []
    alive = sanity.active(relu_net, PARAMS, masks, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    assert [c.path for c in sanity.collapsed(alive)] == ["in", "mid"]


@pytest.mark.slow
def test_paths_do_not_under_or_overflow_in_deep_and_wide_networks():
    """A hundred layers, dense or with one path left."""
    width, depth = 64, 100

    def chain(p, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(3 * h @ w), None), x, p["w"])[0]

    params, x = {"w": jnp.full((depth, width, width), 1e-3)}, jnp.ones((1, width))
    for mask in (jnp.ones((depth, width, width), bool), jnp.zeros((depth, width, width), bool)):
        mask = mask.at[:, 3, 3].set(True)
        assert counts(sanity.active(chain, params, {"w": mask}, x)) == counts({"w": mask})


@pytest.mark.slow
def test_active_in_jit_and_in_a_framework():
    model = eqx.nn.MLP(4, 2, 8, 2, key=KEY, use_bias=False, use_final_bias=False)
    arrays, rest = eqx.partition(model, eqx.is_array)
    fn = lambda a, x: jax.vmap(eqx.combine(a, rest))(x)  # noqa: E731
    masks = jp.unstructured(functools.partial(jp.erk, power=0.0))(jp.magnitude(arrays), 0.95)
    active = lambda m: sanity.active(fn, arrays, m, jnp.ones((1, 4)))  # noqa: E731
    alive = active(masks)
    assert counts(alive) == counts(jax.jit(active)(masks)) != counts(masks)
    x = jax.random.normal(KEY, (3, 4))  # what is not active has no effect
    np.testing.assert_allclose(
        fn(jp.apply_masks(arrays, masks), x), fn(jp.apply_masks(arrays, alive), x), rtol=1e-6
    )


@pytest.mark.slow
def test_overlap_over_time():
    history = [{**MASKS, "in": jnp.roll(MASKS["in"], i, 1)} for i in (0, 0, 1, 2)]
    got = sanity.overlap_over_time(PARAMS, history)
    pair = lambda i, j: float(jp.masks.overlap(PARAMS, history[i], history[j]))  # noqa: E731
    np.testing.assert_allclose(got.previous, [1, pair(1, 2), pair(2, 3)], rtol=1e-6)
    np.testing.assert_allclose(got.first, [1, pair(0, 2), pair(0, 3)], rtol=1e-6)


@pytest.mark.slow
def test_independent_masks_overlap_as_stated():
    params = {"w": jnp.ones((200, 200))}
    masks = {"w": jnp.arange(40_000).reshape(200, 200) < 10_000}
    drawn = [sanity.shuffle(masks, key=jax.random.key(i)) for i in range(2)]
    found = float(sanity.overlap_over_time(params, drawn).previous[0])
    assert found == pytest.approx(0.25 / 1.75, abs=0.01)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jax.jit(sanity.collapsed)(MASKS),
            TypeError,
            "the mask of bias is traced; call it outside of jax.jit, on masks that a step returned",
        ),
        (
            lambda: sanity.random_like(PARAMS, {"in": MASKS["in"]}, key=KEY),
            ValueError,
            "tree of masks does not match params: it has no leaf 'bias'",
        ),
        (
            lambda: sanity.active(relu_net, PARAMS, {"in": MASKS["in"]}, jnp.ones((1, 6))),
            ValueError,
            "tree of masks does not match params: it has no leaf 'bias'",
        ),
        (
            lambda: sanity.overlap_over_time(PARAMS, [MASKS]),
            ValueError,
            "history holds 1 masks; wanted those of two times or more",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
