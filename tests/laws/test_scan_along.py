"""Scans along an axis of which units are masked, also where it is made of several dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 4)), "k": RNG.normal(size=(4, 2))}
X = RNG.normal(size=(2, 3))

# Each makes four channels; what a masked column gives is zero, a constant, or one of both.
CHANNELS = {
    "zero": jnp.tanh,
    "constant": jnp.cos,
    "sum of parts": lambda h: jnp.concatenate([jnp.cos(h[:, :3]), jnp.tanh(h[:, 3:])], 1),
    "sum, zero first": lambda h: jnp.concatenate([jnp.tanh(h[:, :2]), jnp.cos(h[:, 2:])], 1),
    "product": lambda h: jnp.cos(h.reshape(2, 2, 2)).reshape(2, 4),
    "turned": lambda h: jnp.cos(h)[:, ::-1],
}


def added(h, k):
    return lax.scan(
        lambda t, row: (t + row[0][:, None] * row[1], None), jnp.zeros((2, 2)), (h.T, k)
    )[0]


def stacked(h, k):
    return lax.scan(lambda c, row: (c + 1, jnp.cos(row[0])[:, None] * row[1]), 0, (h.T, k))[1].sum(
        0
    )


def mapped(h, k):
    return lax.map(lambda row: jnp.cos(row[0])[:, None] * row[1], (h.T, k)).max(0)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [added, stacked, mapped])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("gone", [[1], [3], [1, 3], [0, 1]])
def test_a_step_that_counts_is_not_left_out(loop, channels, gone):
    fn = lambda p, x: loop(CHANNELS[channels](x @ p["w"]), p["k"])  # noqa: E731
    masks = {"w": ~np.isin(np.arange(4), gone), "k": np.array(True)}
    small = jp.compact(fn, PARAMS, masks, X)
    masked = jp.apply_masks(PARAMS, masks)
    np.testing.assert_allclose(small.fn(small.params, X), fn(masked, X), rtol=1e-12, atol=1e-12)
    slope = lambda f: jax.grad(lambda p: jnp.sin(f(p, X)).sum())  # noqa: E731
    wanted, got = small.restrict(slope(fn)(masked)), slope(small.fn)(small.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, wanted)
