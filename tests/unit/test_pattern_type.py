"""The type of patterns: what a method may ask of one, and functions in their place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.patterns import Pattern, as_pattern

WEIGHTS = {"w": jnp.array([[1.0, 4.0], [3.0, 2.0], [0.5, 6.0], [5.0, 0.1]])}


def own(scores, sparsity):
    return jax.tree.map(lambda s: s > jnp.quantile(s, sparsity), scores)


def calibrated():
    x = jax.random.normal(jax.random.key(0), (20, 4))
    return jp.calibrate(lambda p, x: x @ p["w"], WEIGHTS, [x])


def test_a_pattern_tells_how_it_chooses():
    found = {p.name: p for p in (jp.unstructured(), jp.n_m(2, 4), jp.block((2, 2)), jp.channel())}
    assert [p.group for p in found.values()] == [None, 4, None, None]
    assert [p.rows for p in found.values()] == [None, None, 2, None]
    assert [p.within is None for p in found.values()] == [False, False, False, True]
    assert all(p.where is jp.is_kernel for p in found.values())
    assert repr(found["jp.n_m(2, 4)"]) == "jp.n_m(2, 4)"
    choose = found["jp.n_m(2, 4)"].within(0.5)
    assert (choose(WEIGHTS["w"], 0.5) == jp.n_m(2, 4)(WEIGHTS, 0.5)["w"]).all()


def test_a_function_is_wrapped_once_and_called_the_same():
    pattern = as_pattern(own)
    assert isinstance(pattern, Pattern) and as_pattern(pattern) is pattern
    assert (pattern(WEIGHTS, 0.5)["w"] == own(WEIGHTS, 0.5)["w"]).all()


@pytest.mark.parametrize(
    "pattern",
    [own, functools.partial(own), as_pattern(own)],
    ids=["function", "partial", "pattern"],
)
def test_training_takes_any_function(pattern):
    tx = jp.prune(optax.sgd(0.1), jp.magnitude, 0.5, pattern=pattern)
    state = tx.init(WEIGHTS)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, WEIGHTS), state, WEIGHTS)
    masks = optax.tree_utils.tree_get(state, "masks")
    np.testing.assert_array_equal(masks["w"], own(WEIGHTS, 0.5)["w"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [jp.oneshot.sparsegpt, jp.oneshot.alps, jp.oneshot.obc])
def test_a_method_that_chooses_within_a_matrix_says_what_to_pass(method):
    message = f"{method.__name__}: .* can't choose within one matrix.*pass jp.unstructured.*refit"
    for pattern in (own, lambda s, p: jp.unstructured()(s, p), jp.channel()):
        with pytest.raises(TypeError, match=message):
            method(WEIGHTS, calibrated(), 0.5, pattern=pattern)
    with pytest.raises(TypeError, match=r"pattern is jp.n_m itself.*call it: jp.n_m\(2, 4\)"):
        method(WEIGHTS, calibrated(), 0.5, pattern=jp.n_m)


@pytest.mark.slow
def test_a_pattern_of_ones_own_that_chooses_within_a_matrix_is_followed():
    """It says no ``where``, and its masks have no order of inputs."""

    def half(scores, sparsity):
        return scores >= jnp.sort(scores.ravel())[scores.size // 2]

    mine = Pattern(lambda scores, sparsity: jax.tree.map(lambda s: half(s, 0.5), scores), "mine",
                   within=lambda sparsity: half)  # fmt: skip
    found = jp.oneshot.sparsegpt(WEIGHTS, calibrated(), 0.5, pattern=mine)
    assert isinstance(found, jp.oneshot.Pruned)
    params, masks = found
    assert params is found.params and int(masks["w"].sum()) == 4
    assert not params["w"][~masks["w"]].any()
