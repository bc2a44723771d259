"""Least programs of what random ones found: each was a silent difference, or raised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.ir import axes
from jaxprune.structure import infer
from tests.fuzz.programs import random_program
from tests.models.zoo import ENTRIES

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)


def random_params(**shapes):
    return {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in shapes.items()}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def compared(fn, params, masks):
    """The compact model; its values and gradients are the masked model's."""
    small = jp.compact(fn, params, masks, X)
    masked = jp.apply_masks(params, masks)
    close(small.fn(small.params, X), fn(masked, X))

    def gradient(fn, params):
        return jax.grad(lambda p, x: jnp.sum(jnp.sin(fn(p, x))), (0, 1))(params, X)

    (expected, along), got = gradient(fn, masked), gradient(small.fn, small.params)
    jax.tree.map(close, (small.restrict(expected), along), got)
    return small


def all_masked(fn, params):
    """Masks that keep the first unit of every dimension."""
    structure = jp.infer_structure(fn, params, X)
    free = [d for d in structure.dims.values() if not d.frozen]
    return structure.masks({d.name: np.arange(d.size) < 1 for d in free})


@pytest.mark.slow
def test_a_constant_that_comes_out_of_a_difference_reaches_a_called_program():
    """At a removed unit ``1 - tanh(0)^2`` is the 1 unchanged; the checkpoint goes on with it."""

    def fn(p, x):
        inner = jax.checkpoint(lambda h: h * (1 + jax.nn.relu(h @ p["in"]) @ p["out"]))
        slope = jax.grad(lambda h: jnp.sum(jnp.tanh(inner(h))))(x @ p["up"])
        return jnp.sin(slope).mean(-1)

    params = random_params(up=(3, 4), out=(2, 4)) | {"in": jnp.ones((4, 2))}
    small = compared(fn, params, all_masked(fn, params))
    assert small.params["up"].shape == (3, 1) and small.certificate.exact


def plain(p, h):
    return jnp.cos(h @ p["kernel"]) * p["gain"]


def with_rule(passes_on):
    """Whether the cotangent of h is passed straight on or multiplied."""
    function = jax.custom_vjp(plain)

    def backward(saved, ct):
        by_params, by_h = jax.vjp(plain, *saved)[1](ct)
        return by_params, ct if passes_on else 0.5 * by_h

    function.defvjp(lambda p, h: (plain(p, h), (p, h)), backward)
    return function


forward_rule = jax.custom_jvp(plain)


@forward_rule.defjvp
def _(primals, tangents):
    return plain(*primals), tangents[1]


KEEP = np.arange(4) < 2


def repeated(function):
    """Units that all have one value of the input's, and a bias of their own."""

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])[:, :1] + p["bias"]
        return function({k: p[k] for k in ("kernel", "gain")}, h) @ p["down"]

    params = random_params(bias=(4,), kernel=(4, 4), gain=(4,), down=(4, 2))
    params |= {"in": jnp.ones((3, 5)) / 5}
    keep = {"bias": KEEP, "kernel": KEEP[:, None] & KEEP}
    return fn, params, {k: jnp.asarray(keep.get(k, True)) for k in params}


@pytest.mark.slow
def test_the_result_of_a_rule_may_be_a_constant():
    """Its kernel masked, the function gives ``cos(0)`` at the units that go."""
    small = compared(*repeated(with_rule(passes_on=False)))
    assert small.params["down"].shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("function", [with_rule(passes_on=True), forward_rule])
def test_a_constant_whose_gradient_is_passed_on_is_none(function):
    """The masked model trains ``in`` through what gives a constant: its units can't go."""
    small = compared(*repeated(function))
    assert small.params["down"].shape == (4, 2) and not small.certificate.exact


@pytest.mark.slow
def test_an_entry_that_two_blocks_show_gets_one_cotangent():
    """Padding stands beside the kept and the removed channels, its gradient counts once."""

    @jax.custom_vjp
    def scaled(h):
        return h - jax.nn.logsumexp(h, -1, keepdims=True)

    body = scaled.__wrapped__
    scaled.defvjp(lambda h: (body(h), h), lambda h, ct: (0.5 * jax.vjp(body, h)[1](ct)[0],))

    def fn(p, x):
        h = jnp.pad(x @ p["up"] + jnp.arange(4.0), ((0, 0), (0, 2)), constant_values=0.5)
        return jnp.sin(scaled(h / jnp.sqrt(1 + jnp.sum(h * h, -1, keepdims=True)))).mean(-1)

    params = random_params(up=(3, 4))
    assert compared(fn, params, all_masked(fn, params)).params["up"].shape == (3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("extreme", [jnp.max, jnp.min])
def test_units_that_tie_share_the_gradient_of_an_extreme(extreme):
    """Of six zeros each gets a sixth, whether it stays or goes."""

    def fn(p, x):
        return extreme(x @ p["up"], -1) * p["scale"]

    params = {"up": jnp.zeros((3, 6)), "scale": jnp.asarray(2.0)}
    masks = {"up": jnp.arange(6) < 2, "scale": jnp.asarray(True)}
    assert compared(fn, params, masks).params["up"].shape == (3, 2)


# ---------------------------------------------------------------------- axes that are cut twice


def rolled(p, x):
    """Four units and eight more are three tokens of four; then a token is 3 + 1."""
    h = x @ p["up"]
    tokens = jnp.concatenate([h, h @ p["more"]], -1).reshape(-1, 3, 4)
    return jnp.roll(tokens, 1, -1).sum(1) @ p["down"]


ROLLED = {"up": (3, 4), "more": (4, 8), "down": (4, 2)}


@pytest.mark.slow
def test_layouts_that_nest_do_so_when_they_meet_again():
    params = random_params(**ROLLED)
    small = compared(rolled, params, all_masked(rolled, params))
    assert small.certificate.exact and small.params["up"].shape == (3, 2)


def test_what_coupling_again_would_freeze_is_frozen(monkeypatch):
    """An algebra for which the second meeting is too much: the structure says so."""
    monkeypatch.setattr(axes, "_runs", lambda parts, size: [[part] for part in parts])
    params = random_params(**ROLLED)
    structure = jp.infer_structure(rolled, params, X)
    assert all(d.frozen for d in structure.dims.values())
    assert "layouts that do not nest in" in structure.details()
    assert is_settled(rolled, params, X)


def is_settled(fn, params, *args):
    """Whether coupling all again, from the axes that were found, finds nothing new."""
    (found,) = infer.infer([(fn, args)], params)
    param_axes, fresh = infer.copy_axes([value.axes for value in found.param_values])
    leaves = [axis for axis in fresh.values() if axis.kind is axes.LEAF]
    free = [leaf for leaf in leaves if leaf.size > 1 and not leaf.reasons]
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    infer.couple(closed, out_shape, params, args, param_axes)
    return all(axes.find(leaf) is leaf and not leaf.reasons for leaf in free)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES[::6], ids=str)
def test_a_structure_is_settled(entry):
    fn, params, args = entry.build()
    assert is_settled(fn, params, *args)


@pytest.mark.slow
def test_structures_of_random_programs_are_settled():
    with jax.enable_x64(True):
        for seed in range(12):
            program = random_program(seed)
            assert is_settled(program.fn, program.params, *program.args)
