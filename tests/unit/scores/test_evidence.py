"""Evidence from a loss and batches, against dense matrices and Python loops."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.scores import evidence
from tests.helpers.arrays import normal

KEY = jax.random.key(0)
PARAMS = {
    "w": normal(0, 3, 2),
    "b": jnp.array([0.1, -0.2]),
    "step": jnp.int32(3),
}
BATCHES = [(normal(1 + i, 4, 3), normal(9 + i, 4, 2)) for i in range(2)]


def loss(p, x, y):
    return jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) - y) ** 2)


def floats(tree):
    return jnp.concatenate([jnp.ravel(tree["b"]), jnp.ravel(tree["w"])])


def unflat(v):
    return {"b": v[:2], "w": v[2:].reshape(3, 2), "step": PARAMS["step"]}


def total(v):
    return sum(loss(unflat(v), *batch) for batch in BATCHES) / len(BATCHES)


@functools.cache
def gradient():
    return jax.jit(jax.grad(total))(floats(PARAMS))


@functools.cache
def hessian():
    return jax.jit(jax.hessian(total))(floats(PARAMS))


@functools.cache
def gradients_of_examples():
    one = jax.jit(jax.grad(lambda v, x, y: loss(unflat(v), x[None], y[None])))
    pairs = [pair for batch in BATCHES for pair in zip(*batch)]
    return np.stack([one(floats(PARAMS), x, y) for x, y in pairs])


@pytest.mark.slow
def test_gradient_and_its_flow_are_those_of_the_mean_loss():
    grad = evidence.mean_gradient(loss, PARAMS, BATCHES)
    np.testing.assert_allclose(floats(grad), gradient(), rtol=1e-4, atol=1e-6)
    flow = evidence.gradient_flow(loss, PARAMS, BATCHES)
    np.testing.assert_allclose(floats(flow), hessian() @ gradient(), rtol=1e-4, atol=1e-6)
    assert grad["step"] == flow["step"] == 3


@pytest.mark.slow
def test_gradient_flow_is_half_the_gradient_of_the_squared_norm():
    half = jax.grad(lambda v: jnp.sum(jax.grad(total)(v) ** 2) / 2)(floats(PARAMS))
    flow = evidence.gradient_flow(loss, PARAMS, BATCHES)
    np.testing.assert_allclose(floats(flow), half, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_grasp_is_what_the_norm_of_the_gradient_loses_with_an_entry():
    """To first order: shrink one entry, and look at half the squared norm of the gradient."""
    hvp = evidence.gradient_flow(loss, PARAMS, BATCHES)
    scores, v, small = floats(jp.scores.grasp(PARAMS, hvp=hvp)), floats(PARAMS), 1e-2
    norm = lambda v: float(jnp.sum(jax.grad(total)(v) ** 2) / 2)  # noqa: E731
    for i in range(v.size):
        loss_of_norm = norm(v * (1 + small * (jnp.arange(v.size) == i))) - norm(
            v * (1 - small * (jnp.arange(v.size) == i))
        )
        assert loss_of_norm / (2 * small) == pytest.approx(float(scores[i]), rel=2e-2, abs=1e-4)


@pytest.mark.slow
def test_hessian_diagonal_converges_and_is_exact_where_the_hessian_is_diagonal():
    got = evidence.hessian_diagonal(loss, PARAMS, BATCHES, key=KEY, samples=2000)
    np.testing.assert_allclose(floats(got), jnp.diag(hessian()), atol=0.05)
    separate = lambda p, x: jnp.sum(p["w"] ** 4) + 0 * jnp.sum(x)  # noqa: E731
    one = evidence.hessian_diagonal(separate, {"w": PARAMS["w"]}, [(jnp.ones(1),)], key=KEY)
    np.testing.assert_allclose(one["w"], 12 * PARAMS["w"] ** 2, rtol=1e-5)


@pytest.mark.slow
def test_fisher_and_gradients_of_single_examples():
    fisher = evidence.fisher_diagonal(loss, PARAMS, BATCHES)
    examples = gradients_of_examples()
    np.testing.assert_allclose(floats(fisher), (examples**2).mean(0), rtol=1e-4)
    grads = evidence.example_gradients(loss, PARAMS, BATCHES[0])
    for i in range(4):
        one = {"w": grads["w"][i], "b": grads["b"][i]}
        np.testing.assert_allclose(floats(one), examples[i], rtol=1e-4, atol=1e-6)
    assert fisher["step"] == grads["step"] == 3
    assert jp.scores.woodfisher(PARAMS, grads=grads)["w"].shape == (3, 2)


@pytest.mark.slow
def test_optimal_brain_damage_predicts_the_loss_of_a_quadratic_in_full():
    """At the minimum of a quadratic with a diagonal Hessian the score is what removal costs."""
    best = jnp.array([3.0, -1.0, 0.5])
    quadratic = lambda p, h: jnp.sum(h * (p["w"] - best) ** 2) / 2  # noqa: E731
    params, h = {"w": best}, jnp.array([0.1, 2.0, 1.0])
    diagonal = evidence.hessian_diagonal(quadratic, params, [(h,)], key=KEY)
    scores = jp.scores.obd(params, hessian=diagonal)["w"]
    costs = [quadratic({"w": best.at[i].set(0)}, h) for i in range(3)]
    np.testing.assert_allclose(scores, jnp.stack(costs), rtol=1e-6)


@pytest.mark.slow
def test_half_precision_is_accumulated_in_float32():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    linear = lambda p, x: jnp.mean(p["w"].astype(jnp.float32) * x)  # noqa: E731
    batches = [(jnp.full((1, 2), 2.0),)] * 3 + [(jnp.full((1, 2), 2.0**-7),)]
    grad = evidence.mean_gradient(linear, params, batches)["w"]
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, (3 + 2.0**-8) / 4, rtol=1e-6)
    many = (jnp.full((600, 2), 2.0),)  # a bfloat16 sum of ones ends at 256
    fisher = evidence.fisher_diagonal(linear, params, [many])["w"]
    np.testing.assert_allclose(fisher, 1.0, rtol=1e-6)
    for tree in (
        evidence.gradient_flow(linear, params, batches),
        evidence.hessian_diagonal(linear, params, batches, key=KEY),
        evidence.example_gradients(linear, params, batches[0]),
    ):
        assert tree["w"].dtype == jnp.float32


@pytest.mark.slow
def test_any_tree_and_inside_of_jit():
    model, x = eqx.nn.MLP(3, 2, 4, 1, key=KEY), BATCHES[0][0]
    loss = lambda m, x: jnp.sum(jax.vmap(m)(x) ** 2)  # noqa: E731
    arrays, rest = eqx.partition(model, eqx.is_array)
    flow = jax.jit(
        lambda a: evidence.gradient_flow(lambda m, x: loss(eqx.combine(m, rest), x), a, [(x,)])
    )(arrays)
    whole = evidence.gradient_flow(loss, model, [(x,)])
    assert jax.tree.structure(whole) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(flow), jax.tree.leaves(eqx.filter(whole, eqx.is_array))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_activity_counts_over_batches_and_positions():
    fn = lambda p, x: {"conv": jax.nn.relu(x * p["w"]), "head": None}  # noqa: E731
    xs = [np.random.default_rng(i).normal(size=(2 + i, 3, 5)) for i in range(2)]
    w = np.linspace(-1, 1, 5)
    seen = jp.scores.activity(fn, {"w": jnp.asarray(w)}, [(jnp.asarray(x),) for x in xs])
    every = np.maximum(np.concatenate([(x * w).reshape(-1, 5) for x in xs]), 0)
    np.testing.assert_allclose(seen.zeros["conv"], (every == 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(seen.means["conv"], every.mean(0), rtol=1e-5)
    np.testing.assert_allclose(seen.norms["conv"], np.sqrt((every**2).sum(0)), rtol=1e-5)
    assert seen.zeros["head"] is None


@pytest.mark.slow
def test_activity_feeds_the_scores_of_a_structure():
    """The unit that never fires goes first, in all its slots."""
    params = {"up": jnp.array([[1.0, -1.0, 2.0]]), "down": jnp.ones((3, 1))}
    fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]  # noqa: E731
    acts = lambda p, x: {"up": jax.nn.relu(x @ p["up"]), "down": None}  # noqa: E731
    x = jnp.array([[1.0], [2.0]])
    structure, seen = jp.infer_structure(fn, params, x), jp.scores.activity(acts, params, [(x,)])
    for scores in (
        jp.scores.apoz(params, zeros=seen.zeros),
        jp.scores.mean_activation(params, means=seen.means),
    ):
        masks = jp.structured(structure)(scores, 1 / 3)
        assert masks["up"].tolist() == [[True, False, True]]
        assert masks["down"].tolist() == [[True], [False], [True]]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: evidence.mean_gradient(loss, PARAMS, []), ValueError, r"batches is empty; pass"),
        (
            lambda: evidence.gradient_flow(loss, PARAMS, iter(BATCHES)),
            TypeError,
            r"batches is a list_iterator, used up after one pass; write list\(batches\)",
        ),
        (
            lambda: evidence.mean_gradient(loss, PARAMS, [jnp.ones(3)]),
            TypeError,
            r"a batch is a .*; wanted a tuple of what follows params in loss\(params, \*batch\)",
        ),
        (
            lambda: evidence.example_gradients(loss, PARAMS, (jnp.ones((4, 3)), jnp.ones((5, 2)))),
            ValueError,
            r"have the shapes \[\(4, 3\), \(5, 2\)\]; wanted one first axis, the examples",
        ),
        (
            lambda: evidence.fisher_diagonal(loss, PARAMS, [(jnp.ones(()), jnp.ones(()))]),
            ValueError,
            r"have the shapes \[\(\), \(\)\]; wanted one first axis",
        ),
        (
            lambda: evidence.hessian_diagonal(loss, PARAMS, BATCHES, key=KEY, samples=0),
            ValueError,
            "samples is 0; wanted the number of random vectors, 1 or more",
        ),
        (
            lambda: jp.scores.activity(lambda p, x: x, PARAMS, []),
            ValueError,
            "batches is empty; pass at least one tuple",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
