"""Whole units removed in one shot: refit and bias compensation, then compact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def setting(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    params = {
        "up": jax.random.normal(keys[0], (6, 16)),
        "up_bias": jax.random.normal(keys[1], (16,)),
        "down": jax.random.normal(keys[2], (16, 5)),
        "down_bias": jnp.zeros(5),
    }
    x = jax.random.normal(keys[3], (300, 6)) + 0.5
    return params, x, jp.calibrate(mlp, params, [x])


def masks_of(score, params, stats, x, sparsity=0.25):
    structure = jp.infer_structure(mlp, params, x)
    return jp.structured(structure, reduce=jp.reduce.sum)(score(params, stats=stats), sparsity)


@pytest.mark.slow
@pytest.mark.parametrize("score", [jp.scores.flap, jp.scores.activation_energy])
def test_repairs_help_and_compact_equals_masked(score):
    params, x, stats = setting()
    masks = masks_of(score, params, stats, x)
    masked = jp.apply_masks(params, masks)
    refit = jp.oneshot.refit(params, masks, stats)
    both = jp.oneshot.compensate(params, refit, masks, stats, biases={"down": "down_bias"})

    def error(p):
        return float(jnp.mean((mlp(p, x) - mlp(params, x)) ** 2))

    assert error(both) < error(refit) < error(masked)
    np.testing.assert_allclose(  # the mean of each output is the dense one's
        jnp.mean(mlp(both, x), 0), jnp.mean(mlp(params, x), 0), atol=1e-4
    )
    small = jp.compact(mlp, both, masks, x)
    assert small.params["down"].shape == (12, 5)
    np.testing.assert_allclose(small.fn(small.params, x), mlp(both, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_flap_chooses_what_fluctuates():
    params, x, stats = setting()
    hidden = np.asarray(jax.nn.relu(x @ params["up"] + params["up_bias"]), np.float64)
    slow = hidden.var(0) * (np.asarray(params["down"]) ** 2).sum(1)
    kept = np.asarray(masks_of(jp.scores.flap, params, stats, x)["down"])
    gone = ~np.broadcast_to(kept, (16, 5)).any(1)
    scores = np.asarray(jp.scores.flap(params, stats=stats)["down"]).sum(1)
    np.testing.assert_allclose(scores, slow, rtol=1e-4)
    assert gone.sum() == 4


ERRORS = {
    "no leaf": ({"downs": "down_bias"}, "params has no leaf 'downs'"),
    "other bias": ({"down": "up_bias"}, r"outputs of down, shape \(16, 5\), are not .* up_bias"),
    "no statistics": ({"up_bias": "up_bias"}, "up_bias, shape .* has no statistics"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    params, x, stats = setting()
    masks = masks_of(jp.scores.flap, params, stats, x)
    biases, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        jp.oneshot.compensate(params, params, masks, stats, biases=biases)
