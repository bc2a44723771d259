"""Which leaves a metric can't bear in few bits; the oracle rounds in NumPy, channel by channel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp

RNG = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def slowly(w, bits, axis):
    """Each channel alone."""
    moved = np.moveaxis(np.array(w), axis, 0)
    for channel in moved:
        scale = np.abs(channel).max() / np.float32(2 ** (bits - 1) - 1)
        channel[...] = np.round(channel / (scale or 1)) * scale
    return np.moveaxis(moved, 0, axis)


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    bits=st.integers(2, 10),
    axis=st.integers(-2, 1),
)
def test_each_channel_has_its_own_scale(shape, bits, axis):
    w, seen = floats(*shape).at[0].multiply(100.0), []

    def metric(p):
        seen.append(p["w"])
        return 0.0

    jp.runtimes.sensitivity({"w": w}, metric, bits=bits, axis=axis)
    np.testing.assert_allclose(seen[0], slowly(w, bits, axis), rtol=1e-5, atol=1e-6)


def test_leaves_are_rounded_alone_and_sorted():
    p = {
        "a": floats(8, 8),
        "b": 100 * floats(8, 8),
        "bias": floats(8),
        "steps": jnp.ones((2, 2), int),
    }

    def metric(q):
        assert q["bias"] is p["bias"] and q["steps"] is p["steps"]
        return -sum(jnp.abs(x - y).sum() for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q)))

    found = jp.runtimes.sensitivity(p, metric)
    assert list(found.leaves) == ["b", "a"] and found.exact == 0
    assert found.every == pytest.approx(sum(found.leaves.values()), rel=1e-4)
    assert found.keep_float(-1e9) == ()
    assert found.keep_float(found.leaves["a"] - 1e-3) == ("b",)
    assert found.keep_float(0.0) == ("b", "a")
    assert str(found).splitlines()[3].startswith("b ")
    with pytest.raises(ValueError, match="is -0 in float, below the floor of 1 already"):
        found.keep_float(1.0)


def test_what_is_asked_for_is_checked():
    with pytest.raises(ValueError, match="wants 2 to 16 bits, got 1"):
        jp.runtimes.sensitivity({"w": floats(2, 2)}, lambda p: 0.0, bits=1)
    with pytest.raises(ValueError, match="no floating array of two axes"):
        jp.runtimes.sensitivity({"b": floats(2)}, lambda p: 0.0)
    with pytest.raises(TypeError, match="metric returned"):
        jp.runtimes.sensitivity({"w": floats(2, 2)}, lambda p: p)


def test_a_runtime_that_quantises_nothing():
    with pytest.raises(ValueError, match=r"<runtime xla> quantises nothing; give quantize="):
        jp.runtimes.sensitivity({"w": floats(2, 2)}, lambda r: 0.0, runtime=jp.runtimes.xla())
