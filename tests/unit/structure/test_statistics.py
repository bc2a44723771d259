"""Running statistics are told by what programs do with them, and have no vote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (3, 4))


def draw():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "kernel": jax.random.normal(keys[0], (4, 6)),
        "mean": jax.random.normal(keys[1], (6,)),
        "var": jnp.arange(1.0, 7.0),
        "scale": jnp.ones(6),
        "bias": jnp.zeros(6),
        "head": jax.random.normal(keys[2], (6, 2)),
    }


def as_flax(p, h):
    return (h - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"]) + p["bias"]


def as_equinox(p, h):
    return (h - p["mean"]) / jnp.sqrt(jnp.maximum(p["var"], 0.0) + 1e-5) * p["scale"] + p["bias"]


def by_hand(p, h):
    root = jnp.sqrt(p["var"][None] + 1e-3).astype(jnp.float32)
    return p["scale"] * ((h - p["mean"].reshape(1, -1)) / root) + p["bias"]


def fn_of(norm):
    return lambda p, x: jax.nn.relu(norm(p, x @ p["kernel"])) @ p["head"]


@pytest.mark.parametrize("norm", [as_flax, as_equinox, by_hand])
@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
def test_a_mean_and_a_variance_that_normalize_are_found(norm, wrap):
    structure = jp.infer_structure(wrap(fn_of(norm)), draw(), X)
    assert structure.statistics == ("mean", "var")


def layer_norm(p, h):
    h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    return h * p["scale"] + p["bias"] - p["mean"] + p["var"]


def divided(p, h):
    return (h - p["mean"]) / p["var"] * p["scale"] + p["bias"]


def root_of_kernel_norm(p, h):
    return (h - p["mean"]) * jax.lax.rsqrt(jnp.sum(p["kernel"] ** 2, 0)) * p["scale"] + p["var"]


@pytest.mark.parametrize("norm", [layer_norm, divided, root_of_kernel_norm])
def test_biases_and_learned_scales_are_none(norm):
    assert jp.infer_structure(fn_of(norm), draw(), X).statistics == ()


def test_of_each_layer_of_a_scan():
    def fn(params, x):
        def layer(h, p):
            return h + jax.nn.relu(as_flax(p, h @ p["kernel"])) @ p["head"], None

        return jax.lax.scan(layer, x, params)[0]

    params = jax.tree.map(lambda w: jnp.stack([w, w]), draw() | {"head": jnp.ones((6, 4))})
    assert jp.infer_structure(fn, params, X).statistics == ("mean", "var")


def test_linen_and_nnx():
    nn, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x))
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    images = jnp.ones((2, 5, 5, 1))
    variables = Net().init(jax.random.key(0), images)
    found = jp.infer_structure(Net().apply, variables, images).statistics
    assert found == ("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var")

    module = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(6, use_running_average=True, rngs=nnx.Rngs(0)),
        nnx.Linear(6, 2, rngs=nnx.Rngs(0)),
    )
    graph, state = nnx.split(module)
    found = jp.infer_structure(lambda s, x: nnx.merge(graph, s)(x), state, X).statistics
    assert len(found) == 2
    assert all("mean" in path or "var" in path for path in found)


def test_they_have_no_vote_unless_asked():
    """The variance would keep the last units: by all other leaves the first one counts most."""
    params = draw()
    params["kernel"] = params["kernel"] * jnp.array([9.0, 1, 1, 1, 1, 1])
    structure = jp.infer_structure(fn_of(as_flax), params, X)
    scores = jp.magnitude(params)
    (name,) = (n for n, d in structure.dims.items() if d.label == "hidden")
    without = scores | {"mean": jnp.zeros(6), "var": jnp.zeros(6)}
    got = structure.unit_scores(scores, jp.reduce.sum)[name]
    np.testing.assert_allclose(got, structure.unit_scores(without, jp.reduce.sum)[name], rtol=1e-6)
    every = structure.unit_scores(scores, jp.reduce.sum, statistics=True)[name]
    wanted = got + params["var"] + jnp.abs(params["mean"])
    np.testing.assert_allclose(every, wanted, rtol=1e-6)


def test_search_leaves_them_out_of_the_score_that_is_kept():
    params = draw()
    structure = jp.infer_structure(fn_of(as_flax), params, X)
    scores = jp.magnitude(params)
    loud = scores | {"var": 100 * scores["var"], "mean": 100 * jnp.ones(6)}
    plans = [
        jp.search(fn_of(as_flax), params, structure, s, X, target=jp.Target(params=0.5), round_to=1)
        for s in (scores, loud)
    ]
    jax.tree.map(np.testing.assert_array_equal, *(plan.masks for plan in plans))
    assert plans[0].score == plans[1].score
