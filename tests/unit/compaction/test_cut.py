"""Other functions of the same parameters at a compact model's cut, and tuned parameters in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jax.random.normal(jax.random.key(9), (6, 4))
KEEP = np.arange(8) % 2 == 0


def draw():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": jax.random.normal(keys[0], (4, 8)),
        "mean": jax.random.normal(keys[1], (8,)),
        "scale": jnp.ones(8),
        "down": jax.random.normal(keys[2], (8, 2)),
    }


def evaluated(params, x):
    h = (x @ params["up"] - params["mean"]) * params["scale"]
    return jax.nn.relu(h) @ params["down"]


def trained(params, x, key):
    """Train mode: statistics of the batch, dropout, and the running mean as a result."""
    h = x @ params["up"]
    mean = h.mean(0)
    h = jax.nn.relu((h - mean) * params["scale"])
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0.0)
    running = {"mean": 0.9 * params["mean"] + 0.1 * mean}
    return h @ params["down"], params | running


def masks_of(params):
    return {"up": KEEP[None], "mean": KEEP, "scale": KEEP, "down": KEEP[:, None]}


def loss(params, x, key):
    out, _ = trained(params, x, key)
    return jnp.mean(out**2)


@pytest.fixture(scope="module")
def small():
    params = draw()
    return jp.compact(evaluated, params, masks_of(params), X)


def test_train_mode_equals_the_masked_model_in_value_statistics_and_gradient(small):
    masked = small.expand(small.params)
    key = jax.random.key(3)
    out, params = small.cut(trained, X, key)(small.params, X, key)
    expected, full = trained(masked, X, key)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert params["mean"].shape == (4,)
    jax.tree.map(np.testing.assert_array_equal, params["up"], small.restrict(full)["up"])
    np.testing.assert_allclose(params["mean"], small.restrict(full)["mean"], rtol=1e-5)
    gradient = jax.jit(jax.grad(small.cut(loss, X, key)))(small.params, X, key)
    wanted = small.restrict(jax.grad(loss)(masked, X, key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, wanted)


def test_shapes_do_for_arguments_and_other_batches_pass(small):
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    predict = small.cut(evaluated, shape)
    np.testing.assert_array_equal(predict(small.params, X[:2]), small.fn(small.params, X[:2]))


def test_a_function_that_ties_the_cut_dimension_is_refused_at_once(small):
    with pytest.raises(ValueError, match=r"can't be had at the cut .* jp.compact\(other_fn"):
        small.cut(lambda p, x: x @ p["up"] @ p["mean"].reshape(2, 4).sum(0).repeat(2), X)


def test_a_function_that_reads_what_was_removed_is_refused():
    params = draw()
    only_read = {"up": True, "mean": True, "scale": True, "down": KEEP[:, None]}
    small = jp.compact(evaluated, params, only_read, X)
    assert small.params["up"].shape == (4, 4)
    with pytest.raises(ValueError, match="can't be had .*not zero where .* up is not masked there"):
        small.cut(lambda p, x: (x @ p["up"]).sum(1), X)


def test_a_call_that_takes_another_path_is_refused_where_it_reads_what_was_removed():
    """The path was once taken to need of removed units what the first one needed: nothing."""

    def fn(params, x):
        return evaluated(params, x) if len(x) > 1 else jax.nn.relu(x @ params["up"]).sum(1)

    params = draw()
    small = jp.compact(
        fn, params, {**jax.tree.map(lambda _: True, params), "down": KEEP[:, None]}, X
    )
    np.testing.assert_allclose(
        small.fn(small.params, X[:2]), evaluated(small.expand(small.params), X[:2]), rtol=1e-5
    )
    with pytest.raises(ValueError, match="these arguments .*not zero where .* up is not masked"):
        small.fn(small.params, X[:1])


def test_a_path_that_counts_removed_units_is_carried():
    def fn(params, x):
        h = x @ params["up"]
        return jnp.tanh(h) @ params["down"] if len(x) > 1 else jax.nn.softmax(h) @ params["down"]

    params = draw()
    small = jp.compact(fn, params, masks_of(params), X)
    np.testing.assert_allclose(
        small.fn(small.params, X[:1]), fn(small.expand(small.params), X[:1]), rtol=1e-5
    )


def test_a_branch_that_is_gone_is_not_there_for_another_function():
    def fn(params, x):
        return x + jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 4))}
    small = jp.compact(fn, params, jax.tree.map(lambda w: np.zeros(w.shape, bool), params), X)
    assert small.params["a"].shape == (4, 0)
    assert small.sizes["hidden"] == 0
    assert not np.asarray(small.masks["b"]).any()
    with pytest.raises(ValueError, match="all of its units are gone"):
        small.cut(lambda p, x: jax.nn.softmax(x @ p["a"]).sum(1), X)
    assert not small.cut(lambda p, x: (x @ p["a"]).max(1), X)(small.params, X).any()


def shifted_and_read():
    """Of the removed units 1, 3, 5, 7 the first function carries 3 and 7 alone."""

    def first(params, x):
        return jax.nn.sigmoid(x @ params["up"] + params["mean"]) @ params["down"]

    params, read = draw(), ~np.isin(np.arange(8), [1, 5])
    masks = masks_of(params) | {"mean": True, "down": read[:, None], "scale": True}
    return params, masks, first, lambda p, x: first(p, x).sum() + jnp.sum(p["mean"] ** 2)


def test_removed_constants_of_another_function_stand_at_their_units():
    params, masks, first, other = shifted_and_read()
    masks = masks | {"mean": masks["down"][:, 0]}
    small = jp.compact(first, params, masks, X)
    got = small.cut(other, X)(small.params, X)
    np.testing.assert_allclose(got, other(jp.apply_masks(params, masks), X), rtol=1e-5)


def test_a_function_that_needs_removed_constants_that_the_model_does_not_hold_is_refused():
    params, masks, first, other = shifted_and_read()
    small = jp.compact(first, params, masks, X)
    with pytest.raises(ValueError, match="needs the removed part of mean, which is not zero"):
        small.cut(other, X)


def test_replaced_parameters_are_checked_and_the_certificate_stays(small):
    tuned = small.replace(jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params))
    assert tuned.params["up"].dtype == jnp.bfloat16
    assert tuned.certificate is small.certificate
    with pytest.raises(ValueError, match=r"\(8, 2\) for down, wanted \(4, 2\)"):
        small.replace(draw())
    with pytest.raises(ValueError, match="structure"):
        small.replace({"up": small.params["up"]})


def test_masks_and_sizes_are_those_of_the_cut(small):
    again = jp.compact(evaluated, draw(), small.masks, X)
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert small.sizes == {"hidden": 4, "inputs of up": 4, "outputs of down": 2}


def test_masks_of_units_that_differ_under_a_parent():
    def fn(params, x):
        step = lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None)  # noqa: E731
        return jax.lax.scan(step, x, params)[0]

    keys = jax.random.split(jax.random.key(1))
    params = {
        "up": jax.random.normal(keys[0], (3, 4, 8)),
        "down": jax.random.normal(keys[1], (3, 8, 4)),
    }
    structure = jp.infer_structure(fn, params, X)
    rows = np.stack([np.roll(KEEP, i) for i in range(3)])
    (hidden,) = (name for name, dim in structure.dims.items() if dim.label == "hidden")
    (layers,) = (name for name, dim in structure.dims.items() if dim.label == "layers")
    masks = structure.masks({hidden: {layers: rows}})
    small = jp.compact(fn, params, masks, X)
    assert small.sizes["hidden"] == 4
    jax.tree.map(
        lambda mine, given, leaf: np.testing.assert_array_equal(
            np.broadcast_to(mine, leaf.shape), np.broadcast_to(given, leaf.shape)
        ),
        small.masks,
        masks,
        params,
    )


def test_equal_labels_give_way_to_names():
    def fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"] + jnp.tanh(x @ params["c"]) @ params["d"]

    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2)), "c": jnp.ones((4, 5)),
              "d": jnp.ones((5, 2))}  # fmt: skip
    small = jp.compact(fn, params, jax.tree.map(lambda x: True, params), X)
    assert sorted(small.sizes.values()) == [2, 3, 4, 5]
