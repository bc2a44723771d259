"""Functions with derivatives of their own: compact has the masked model's gradients, too.

A rule need not be the derivative of its function. Then a result that is zero whatever the inputs
are may still pass a gradient on, which has to arrive where the masked model takes it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
TABLE = jnp.linspace(-1.0, 1.0, 8)


@jax.custom_vjp
def gate(h, scale):
    """``h * scale``, with the gradient for h passed straight through."""
    return h * scale


gate.defvjp(lambda h, s: (h * s, (h, s)), lambda saved, ct: (ct, (ct * saved[0]).sum(0)))


@jax.custom_jvp
def gate_forward(h, scale):
    return h * scale


@gate_forward.defjvp
def _(primals, tangents):
    return gate_forward(*primals), tangents[0] + primals[0] * tangents[1]


@jax.custom_jvp
def counted(h, scale):
    """Two results; the second is a number that never moves."""
    return h * scale, jnp.int32(h.shape[0])


@counted.defjvp
def _(primals, tangents):
    (h, scale), (th, ts) = primals, tangents
    return counted(h, scale), (th * scale + h * ts, np.zeros((), jax.dtypes.float0))


@jax.custom_vjp
def shifted(h):
    """A function whose both rules close over an array."""
    return jnp.sin(h) * TABLE


shifted.defvjp(lambda h: (jnp.sin(h) * TABLE, h), lambda h, ct: (0.5 * ct * jnp.cos(h) * TABLE,))


def params(seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"in": (3, 4), "up": (4, 8), "scale": (8,), "down": (8, 2)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def model(function):
    def fn(p, x):
        return function(jnp.tanh(x @ p["in"]) @ p["up"], p["scale"]) @ p["down"]

    return fn


KEEP = np.arange(8) % 3 > 0
MASKS = {
    "scale only": {"scale": KEEP},
    "all but up": {"scale": KEEP, "down": KEEP[:, None]},
    "all": {"up": KEEP[None], "scale": KEEP, "down": KEEP[:, None]},
}


FUNCTIONS = [gate, gate_forward, lambda h, s: shifted(h * s), lambda h, s: counted(h, s)[0]]


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_the_masked_models(function, name):
    fn, p = model(function), params()
    masks = {k: jnp.asarray(MASKS[name].get(k, True)) for k in p}
    small = jp.compact(fn, p, masks, X)

    def loss(fn):
        return lambda p, x: jnp.sum(jnp.sin(fn(p, x)))

    expected = jax.grad(loss(fn), (0, 1))(jp.apply_masks(p, masks), X)
    got = jax.grad(loss(small.fn), (0, 1))(small.params, X)
    for a, b in zip(
        jax.tree.leaves((small.restrict(expected[0]), expected[1])), jax.tree.leaves(got)
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    if name == "all":
        assert small.params["up"].shape == (4, KEEP.sum())


def test_a_zero_result_whose_cotangent_counts_keeps_its_units():
    """The masked model trains ``in`` through units that give zero: they can't go."""
    p = params()
    masks = {k: jnp.asarray(MASKS["scale only"].get(k, True)) for k in p}
    small = jp.compact(model(gate), p, masks, X)
    assert small.params["up"].shape == (4, 8)
    assert "masked value is not zero" in str(small.certificate)
    ordinary = jp.compact(model(lambda h, s: h * s), p, masks, X)
    assert ordinary.params["up"].shape == (4, KEEP.sum())


@pytest.mark.slow
def test_a_rule_with_square_parameters_that_dimensions_own_twice():
    """Both axes of ``twice`` are one concatenation: its blocks hold entries of several."""
    rng = np.random.default_rng(2)
    shapes = {"a": (3, 4), "b": (3, 4), "twice": (8, 8), "down": (8, 2)}
    p = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}

    def plain(w, h):
        return jnp.tanh(h @ w) @ w

    again = jax.custom_vjp(plain)
    again.defvjp(
        lambda w, h: (plain(w, h), (w, h)),
        lambda saved, ct: (jax.vjp(plain, *saved)[1](ct)[0], ct),
    )

    def fn(p, x):
        h = jnp.concatenate([jnp.cos(x @ p["a"]), x @ p["b"]], 1)
        return again(p["twice"], h) @ p["down"]

    structure = jp.infer_structure(fn, p, X)
    free = [d for d in structure.dims.values() if not d.frozen]
    masks = structure.masks({d.name: np.arange(d.size) % 2 == 0 for d in free})
    small = jp.compact(fn, p, masks, X)
    assert small.params["twice"].shape == (4, 4)
    masked = jp.apply_masks(p, masks)
    np.testing.assert_allclose(fn(masked, X), small.fn(small.params, X), rtol=1e-4, atol=1e-5)
    expected = small.restrict(jax.grad(lambda p: fn(p, X).sum())(masked))
    got = jax.grad(lambda p: small.fn(p, X).sum())(small.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, got)
