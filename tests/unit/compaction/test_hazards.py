"""Where masked zeros make infinities; the reference is the masked model's value and gradient."""

import functools

import jax
import jax.numpy as jnp
import jax.scipy.special as special
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxprune as jp
from jaxprune.ir import primitives

GONE = np.arange(8) < 2
ROWS = jax.random.uniform(jax.random.key(2), (5, 4)) + 0.1


@jax.custom_jvp
def safe_root(x):
    return jnp.sqrt(x)


@safe_root.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return jnp.sqrt(x), jnp.where(x > 0, t / jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


@jax.custom_vjp
def steep(x):
    return 2 * x


steep.defvjp(lambda x: (2 * x, x), lambda x, g: (g / x,))


def of_scaled_unit(function):
    """A function of one 2 x 2 matrix per unit, which is zero where the unit is."""
    return lambda h, p: h + jax.vmap(lambda unit: function(unit * jnp.eye(2)))(h.sum(0))


def unit_norm(h, order=2):
    return h / (1 + jnp.linalg.norm(h, order, axis=0))


VALUE = {
    "1 / h": lambda h, p: 1 / h,
    "h / h": lambda h, p: h / h,
    "remainder": lambda h, p: 1.5 % h,
    "h ** -1": lambda h, p: h**-1,
    "h ** -2": lambda h, p: h**-2,
    "h ** -0.5": lambda h, p: h**-0.5,
    "negative powers": lambda h, p: h ** jnp.full(8, -2.0),
    "power of a parameter": lambda h, p: h ** -p["power"],
    "reciprocal": lambda h, p: jnp.reciprocal(h),
    "rsqrt": lambda h, p: lax.rsqrt(h),
    "log": lambda h, p: jnp.log(h),
    "log2": lambda h, p: jnp.log2(h),
    "lgamma": lambda h, p: special.gammaln(h),
    "digamma": lambda h, p: special.digamma(h),
    "zeta": lambda h, p: special.zeta(2.0, h),
    "complex": lambda h, p: (1 / (h + 0j)).real,
    "half precision": lambda h, p: (1 / h.astype(jnp.bfloat16)).astype(jnp.float32),
    "over its sum": lambda h, p: h / jnp.abs(h).sum(0),
    "in a loop": lambda h, p: lax.scan(lambda c, row: (c, jnp.log(row)), 0.0, h)[1],
    "weight norm": lambda h, p: ROWS @ (p["up"] / jnp.linalg.norm(p["up"], axis=0)),
    "cholesky": of_scaled_unit(lambda a: jnp.linalg.cholesky(a)[0, 0]),
    "triangular_solve": of_scaled_unit(
        lambda a: lax.linalg.triangular_solve(a, jnp.ones((2, 1)), left_side=True)[0, 0]
    ),
}

GRADIENT = {
    "sqrt": lambda h, p: jnp.sqrt(h),
    "cbrt": lambda h, p: jnp.cbrt(h),
    "h ** 0.5": lambda h, p: h**0.5,
    "h ** 0.0": lambda h, p: h**0.0,
    "norm": lambda h, p: unit_norm(h),
    "norm of order 3": lambda h, p: unit_norm(h, 3),
    "norm, at least": lambda h, p: h / jnp.maximum(jnp.linalg.norm(h, axis=0), 1e-6),
    "deviation": lambda h, p: h / (1 + h.std(0)),
    "angle": lambda h, p: jnp.arctan2(h, h),
    "rule that divides": lambda h, p: steep(h),
    "rematerialised": lambda h, p: jax.checkpoint(jnp.sqrt)(h),
    "in a loop": lambda h, p: lax.scan(lambda c, row: (c, jnp.sqrt(row)), 0.0, h)[1],
    "qr": of_scaled_unit(lambda a: jnp.linalg.qr(a)[1][0, 0]),
    "lu": of_scaled_unit(lambda a: lax.linalg.lu(a)[0][0, 0]),
}

HARMLESS = {
    **{name: lambda h, p, name=name: getattr(jax.nn, name)(h) for name in (
        "relu", "gelu", "silu", "mish", "elu", "celu", "selu", "relu6", "leaky_relu", "hard_tanh",
        "soft_sign", "squareplus", "log_sigmoid", "softmax", "standardize")},
    "softmax over rows": lambda h, p: h * jax.nn.softmax(h, 0),
    "logsumexp": lambda h, p: h + jax.nn.logsumexp(h, axis=0),
    "layer norm": lambda h, p: (h - h.mean(1, keepdims=True)) / jnp.sqrt(
        h.var(1, keepdims=True) + 1e-5),
    "batch norm": lambda h, p: (h - h.mean(0)) * lax.rsqrt(h.var(0) + 1e-5),
    "rms norm": lambda h, p: h * lax.rsqrt((h**2).mean(1, keepdims=True)),
    "abs": lambda h, p: h / (jnp.abs(h) + 1e-6),
    "norm of order 1": lambda h, p: unit_norm(h, 1),
    "largest norm": lambda h, p: unit_norm(h, jnp.inf),
    "h ** 2": lambda h, p: h**2,
    "h ** 0": lambda h, p: h**0,
    "h ** 1.5": lambda h, p: h**1.5,
    "powers": lambda h, p: h ** jnp.full(8, 2.0),
    "2 ** h": lambda h, p: 2.0**h,
    "h % 1": lambda h, p: h % 1.5,
    "log1p": lambda h, p: jnp.log1p(h),
    "rule of its own": lambda h, p: safe_root(h),
    "only compared": lambda h, p: jnp.where(jnp.sqrt(h) > 0.5, h, 2 * h),
    "no gradient": lambda h, p: h + lax.stop_gradient(jnp.sqrt(h)),
    "guarded": lambda h, p: jnp.where(h == 0, 0.0, 1 / jnp.where(h == 0, 1.0, h)),
    "whole numbers": lambda h, p: h * (5 // h.astype(int)),
    "zeros of its own": lambda h, p: h + jnp.sqrt(jnp.zeros(8)),
}  # fmt: skip


@functools.cache
def all_params():
    return {"up": jax.random.uniform(jax.random.key(0), (4, 8)) + 0.1,
            "down": jnp.ones((8, 3)), "power": jnp.full(8, 0.5)}  # fmt: skip


def read(use):
    """The certificate, and whether the masked model's value and gradients are numbers."""
    params = all_params()
    masks = {"up": ~GONE[None], "down": ~GONE[:, None], "power": jnp.asarray(True)}
    fn = lambda p, x: use(x @ p["up"], p) @ p["down"]  # noqa: E731
    small = jp.compact(fn, params, masks, ROWS)
    masked = jp.apply_masks(params, masks)
    assert jnp.isfinite(fn(params, ROWS)).all()
    grads = jax.grad(lambda p, x: fn(p, x).sum(), (0, 1))(masked, ROWS)
    finite = [all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(tree))
              for tree in (fn(masked, ROWS), grads)]  # fmt: skip
    return small.certificate, *finite


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUE)
def test_a_value_that_is_not_finite_is_named(name):
    certificate, value, _ = read(VALUE[name])
    assert not value and any("gradient" not in place for place in certificate.hazards)
    assert "the masked model may not be finite: " in str(certificate)
    assert np.isnan(certificate.check()) and not certificate.check() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT)
def test_a_gradient_that_is_not_finite_is_named(name):
    certificate, value, gradient = read(GRADIENT[name])
    assert value and not gradient
    assert certificate.hazards
    assert all(place.endswith(" (in the gradient)") for place in certificate.hazards)
    assert "the masked model's gradient may not be finite: " in str(certificate)


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_finite_is_not_named(name):
    certificate, value, gradient = read(HARMLESS[name])
    assert value and gradient and not certificate.hazards


def test_the_line_says_what_to_do_instead():
    certificate, *_ = read(lambda h, p: jnp.log(h))
    assert (
        'meets masked zeros; compact with semantics="kept", or fold the norm into the weights first'
        in str(certificate)
    )


def test_a_power_that_is_not_known_may_be_negative():
    certificate, *_ = read(lambda h, p: h ** p["power"])
    assert [place.split(" at ")[0] for place in certificate.hazards] == ["pow"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n, r in primitives.ROWS.items() if r.finite))
def test_primitives_that_are_not_evaluated_are_harmless(name):
    """The table spares time only: evaluated, each is finite at zero, value and derivative."""
    unary = {
        "abs": lax.abs, "add": lambda x: lax.add(x, 0.5), "max": lambda x: lax.max(x, 0.5),
        "min": lambda x: lax.min(x, 0.5), "mul": lambda x: lax.mul(x, 0.5),
        "sub": lambda x: lax.sub(x, 0.5), "clamp": lambda x: lax.clamp(-1.0, x, 1.0),
        "select_n": lambda x: lax.select_n(True, x, x), "complex": lambda x: lax.complex(x, x),
        "round": lax.round, "real": lambda x: lax.real(lax.complex(x, x)),
        "imag": lambda x: lax.imag(lax.complex(x, x)), "conj": lambda x: lax.conj(x),
        "convert_element_type": lambda x: lax.convert_element_type(x, jnp.bfloat16),
        "reduce_precision": lambda x: lax.reduce_precision(x, 5, 10),
        "add_any": lambda x: lax.add(x, x), "copy": jnp.copy,
        "name": lambda x: checkpoint_name(x, "x"),
    }  # fmt: skip
    function = unary.get(name) or getattr(lax, name)
    value, slope = jax.jvp(function, (jnp.zeros(()),), (jnp.ones(()),))
    assert jnp.isfinite(value) and jnp.isfinite(slope)
