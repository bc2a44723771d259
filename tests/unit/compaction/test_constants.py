"""Producers masked alone: the removed units are constants, folded into what reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

RNG = np.random.default_rng(0)


def random_params(shapes):
    return {k: jnp.asarray(RNG.normal(0, 0.5, s), jnp.float32) for k, s in shapes.items()}


def image(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def conv(x, w, padding):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def dense(activation):
    return lambda p, x: activation(x @ p["up"] + p["bias"]) @ p["down"] + p["last"]


def deep(p, x):
    """Two constants in a row, with a branch beside."""
    h = jax.nn.relu(x @ p["up"] + p["bias"])
    h = jnp.tanh(h @ p["middle"]) + 0.5 * jax.nn.gelu(x @ p["beside"])
    return h @ p["down"]


def convolutional(padding):
    def fn(p, x):
        h = jax.nn.relu((conv(x, p["one"], "SAME") - p["mean"]) * p["scale"] + p["shift"])
        return conv(h, p["two"], padding).mean((1, 2))

    return fn


def by_head(p, x):
    """A value bias: softmax weights add up to one, but nobody knows that: the units stay."""
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"] + p["bias"]
    return jax.nn.softmax(q @ k.T) @ v @ p["out"]


MLP = {"up": (6, 8), "bias": (8,), "down": (8, 3), "last": (3,)}
CONV = {
    "one": (3, 3, 2, 8), "mean": (8,), "scale": (8,), "shift": (8,), "two": (3, 3, 8, 4),
}  # fmt: skip
CASES = {
    "relu": (dense(jax.nn.relu), MLP, "up", image(5, 6), True),
    "gelu": (dense(jax.nn.gelu), MLP, "up", image(5, 6), True),
    "silu under vmap": (
        jax.vmap(dense(jax.nn.silu), (None, 0)), MLP, "up", image(2, 5, 6), True,
    ),
    "two layers": (
        deep,
        {"up": (6, 8), "bias": (8,), "middle": (8, 4), "beside": (6, 4), "down": (4, 3)},
        "up", image(5, 6), True,
    ),
    "convolution without border": (convolutional("VALID"), CONV, "one", image(2, 7, 7, 2), True),
    "convolution with border": (convolutional("SAME"), CONV, "one", image(2, 7, 7, 2), False),
    "attention": (
        by_head,
        {"q": (6, 4), "k": (6, 4), "v": (6, 8), "bias": (8,), "out": (8, 3)},
        "v", image(5, 6), False,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_producers_masked_alone(name, tmp_path):
    fn, shapes, producer, x, folded = CASES[name]
    params, keep = random_params(shapes), np.arange(8) % 3 == 0
    masks = {k: jnp.asarray(keep if k == producer else True) for k in params}
    masks[producer] = masks[producer].reshape((1,) * (params[producer].ndim - 1) + (8,))
    small = jp.compact(fn, params, masks, x)
    assert small.params[producer].shape[-1] == (keep.sum() if folded else 8)
    assert ("folded into what reads them" in str(small.certificate)) == folded
    assert small.certificate.check() < 1e-12

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    masked = jp.apply_masks(params, masks)
    close(jax.jit(small.fn)(small.params, x), fn(masked, x))
    total = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x)))  # noqa: E731
    expected = jax.grad(total(fn), (0, 1))(masked, x)
    got = jax.grad(total(small.fn), (0, 1))(small.params, x)
    jax.tree.map(close, (small.restrict(expected[0]), expected[1]), got)

    jp.save(small, tmp_path)
    again = jp.load(tmp_path, fn, params, x)
    close(again.fn(again.params, x), fn(masked, x))
    if name == "relu":
        jp.export(small, tmp_path / "program", x)
        model = jp.load_exported(tmp_path / "program")
        close(model.fn(model.params, x), fn(masked, x))


@pytest.mark.slow
def test_folding_costs_next_to_nothing():
    """The program has the FLOPs of the small one and a vector's worth more."""
    params = random_params({"up": (64, 256), "bias": (256,), "down": (256, 64), "last": (64,)})
    fn, x, keep = dense(jax.nn.relu), image(32, 64), np.arange(256) < 128
    masks = {k: jnp.asarray(keep if k == "up" else True) for k in params}
    small = jp.compact(fn, params, masks, x)
    assert small.params["down"].shape == (128, 64)
    assert small.certificate.overhead < 1.01
    half, full = (jp.cost(f, p, x).flops for f, p in ((small.fn, small.params), (fn, params)))
    assert half < 0.51 * full
    big = image(64, 64)
    np.testing.assert_allclose(
        small.fn(small.params, big), fn(jp.apply_masks(params, masks), big), rtol=1e-4, atol=1e-4
    )
