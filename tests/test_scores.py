"""Scores over every kind of tree, and what they say when evidence is missing."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import TREES

import jaxprune as jp
from jaxprune.scores.weights import is_float, is_norm_scale

KEY = jax.random.key(1)
SCORES = {
    "magnitude": jp.magnitude,
    "l2": jp.scores.l2,
    "random": functools.partial(jp.random, key=KEY),
    "saliency": jp.saliency,
    "taylor": jp.scores.taylor,
    "batch_norm_scale": functools.partial(jp.batch_norm_scale, where=lambda p, x: is_float(x)),
}


def gradients(params):
    return jax.tree.map(lambda w: w * 2 if is_float(w) else w, params)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", SCORES)
def test_any_tree_and_unknown_evidence(name, tree):
    params = TREES[tree]
    scores = SCORES[name](params, grad=gradients(params), step=jnp.int32(3), foreign="ignored")
    assert jax.tree.structure(scores) == jax.tree.structure(params)
    for w, score in zip(jax.tree.leaves(params), jax.tree.leaves(scores), strict=True):
        if is_float(w):
            assert score.shape == w.shape and jnp.issubdtype(score.dtype, jnp.floating)
        else:
            assert score is w  # counters, random keys and functions pass through


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("tree", ["dict", "tuple", "dataclass", "nnx"])
def test_jit_gives_the_same(name, tree):
    params = TREES[tree]
    score = lambda p: SCORES[name](p, grad=gradients(p))  # noqa: E731
    for eager, jitted in zip(*map(jax.tree.leaves, (score(params), jax.jit(score)(params)))):
        if is_float(eager):
            np.testing.assert_allclose(jitted, eager, rtol=1e-6)


def test_every_public_score_is_tested_here():
    public = {n for n, f in vars(jp.scores).items() if inspect.isfunction(f) and n[0] != "_"}
    assert public == set(SCORES)


def test_values_against_the_formula():
    w, g = np.array([-2.0, 0.5, 3.0]), np.array([1.0, -4.0, 0.0])
    params, grad = {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)}
    np.testing.assert_array_equal(jp.magnitude(params)["w"], np.abs(w))
    np.testing.assert_array_equal(jp.scores.l2(params)["w"], w**2)
    np.testing.assert_array_equal(jp.saliency(params, grad=grad)["w"], np.abs(w * g))
    np.testing.assert_array_equal(jp.scores.taylor(params, grad=grad)["w"], w * g)


def test_taylor_is_the_first_order_change_of_the_loss_complex_weights_too():
    def loss(p):
        return jnp.sum(jnp.abs(p["w"] - 1) ** 2)

    for w in (jnp.array([2.0, -1.0]), jnp.array([1 + 2j, -1j])):
        params, small = {"w": w}, 1e-3
        score = jp.scores.taylor(params, grad=jax.grad(loss)(params))["w"]
        shrunk = [loss({"w": w.at[i].multiply(1 - small)}) for i in range(2)]
        change = (loss(params) - jnp.stack(shrunk)) / small
        np.testing.assert_allclose(score, change, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_products_of_half_precision_do_not_underflow(dtype):
    params = {"w": jnp.array([1e-3, 2e-3], dtype)}
    scores = jp.saliency(params, grad={"w": jnp.full(2, 1e-6, dtype)})["w"]
    assert scores.dtype == jnp.float32 and 0 < scores[0] < scores[1]
    assert jp.scores.l2({"w": jnp.array([1e-4], jnp.float16)})["w"][0] > 0


def test_random_depends_on_key_step_and_leaf_alone():
    params = {"a": jnp.ones((20, 5)), "b": jnp.ones((20, 5), jnp.bfloat16)}
    first = jp.random(params, key=KEY)
    np.testing.assert_array_equal(first["a"], jp.random(params, key=KEY)["a"])
    assert not jnp.allclose(first["a"], first["b"])
    for other in (
        jp.random(params, key=jax.random.key(2)),
        jp.random(params, key=KEY, step=0),
        jax.jit(lambda s: jp.random(params, key=KEY, step=s))(1),
    ):
        assert not jnp.allclose(first["a"], other["a"])
    assert 0.4 < first["a"].mean() < 0.6


def test_random_prunes_inside_optax():
    params = {"w": jnp.ones((10, 10))}
    tx = jp.prune(optax.sgd(0.1), functools.partial(jp.random, key=KEY), 0.7)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jnp.sum(optax.apply_updates(params, updates)["w"] != 0) == 30
    assert optax.tree_utils.tree_get(state, "masks")["w"].sum() == 30


def test_batch_norm_scale_finds_the_norms_of_each_framework():
    nnx_scores = jp.batch_norm_scale(TREES["nnx"])
    flat = {jp.path_str(p): s for p, s in jax.tree_util.tree_leaves_with_path(nnx_scores)}
    assert flat["norm/scale/value"].sum() == 12 and flat["up/kernel/value"].sum() == 0
    norm = eqx.nn.LayerNorm(3)
    params = {"norm": norm, "linear": eqx.nn.Linear(3, 2, key=KEY)}
    scores = jp.batch_norm_scale(params)
    assert scores["norm"].weight.sum() == 3
    assert scores["norm"].bias.sum() == scores["linear"].weight.sum() == 0
    assert is_norm_scale("bn/gamma", jnp.ones(3)) and not is_norm_scale("bn/beta", jnp.ones(3))
    mine = jp.batch_norm_scale({"g": -jnp.ones(2)}, where=lambda path, leaf: path == "g")
    np.testing.assert_array_equal(mine["g"], [1, 1])


def test_batch_norm_scale_ranks_the_channels_of_a_structure():
    params = {
        "conv": jax.random.normal(KEY, (3, 8)),
        "norm": {"scale": jnp.arange(8.0) - 4},
        "head": jax.random.normal(KEY, (8, 2)),
    }
    fn = lambda p, x: jnp.tanh((x @ p["conv"]) * p["norm"]["scale"]) @ p["head"]  # noqa: E731
    structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
    masks = jp.structured(structure, reduce="sum")(jp.batch_norm_scale(params), 0.5)
    (kept,) = (k for n, k in structure.keep(masks).items() if not structure.dims[n].frozen)
    np.testing.assert_array_equal(kept, [1, 1, 1, 0, 0, 0, 0, 1])  # |-4|, |-3|, |-2|, |3|


W = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: jp.saliency(W), TypeError, "grad"),
        (lambda: jp.scores.taylor(W), TypeError, "grad"),
        (lambda: jp.random(W), TypeError, "key"),
        (
            lambda: jp.saliency(W, grad={"layer": {"kernel": 1}}),
            ValueError,
            r"tree of grad does not match params: it has no leaf 'layer/bias'; pass grad=jax.grad",
        ),
        (
            lambda: jp.saliency(
                W, grad={"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}}
            ),
            ValueError,
            r"gradient of layer/kernel has shape \(2, 3\), the leaf \(3, 2\); pass grad=",
        ),
        (
            lambda: jp.batch_norm_scale(W),
            ValueError,
            "finds no scale of a normalisation among the leaves .*layer/bias.*where=lambda",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_nnx_gradients_match_their_state():
    graphdef, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    grad = jax.grad(lambda s: nnx.merge(graphdef, s)(jnp.ones((1, 3))).sum())(state)
    scores = jp.saliency(state, grad=grad)
    np.testing.assert_allclose(*(jax.tree.leaves(t)[1] for t in (scores, jp.magnitude(state))))
