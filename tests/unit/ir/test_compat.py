"""The canary: what jaxprune reads of JAX's equations, on whatever JAX is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.ir import compat, tape
from jaxprune.rules import registry

X = jnp.arange(6.0).reshape(2, 3)


def last(fn, *args):
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns[-1]


def test_scan_layout():
    w = jnp.ones(3)
    eqn = last(lambda w, x: jax.lax.scan(lambda c, y: (c + y * w, c), x[0], x), w, X)
    parts = compat.scan_parts(eqn)
    assert (parts.num_consts, parts.num_carry, parts.length) == (1, 1, 2)
    (again,) = compat.sub_jaxprs(eqn)
    assert len(compat.open_jaxpr(again)[0].invars) == 3


def test_a_whole_equation_binds():
    eqn = last(lambda x: jax.lax.scan(lambda c, y: (c + y, c), jnp.zeros(3), x), X)
    carry, rows = compat.bind(eqn, [jnp.zeros(3), X])
    np.testing.assert_array_equal(carry, X.sum(0))
    assert rows.shape == (2, 3)


def test_custom_derivatives_are_readable():
    jaxpr, _, zero = compat.custom_jvp_jaxpr(last(jax.nn.relu, X))
    assert len(jaxpr.outvars) == 2 and list(zero) == [False]

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, x), lambda r, g: (3 * g,))
    parts = compat.custom_vjp_parts(last(double, X))
    assert list(parts.forwarded) == [0]
    np.testing.assert_array_equal(parts.bwd(X, X)[0], 3 * X)


def test_the_users_own_line_is_named():
    assert compat.source_line(last(lambda x: jax.lax.sin(x), X)).startswith("test_compat.py:")


@pytest.mark.parametrize(
    "fn",
    [
        jnp.sin, jax.nn.softmax, lambda x: x @ x.T, lambda x: x.reshape(6), lambda x: x[:, 1:],
        lambda x: jnp.concatenate([x, x]), lambda x: jnp.pad(x, 1), lambda x: jnp.split(x, 3, 1),
        lambda x: jnp.where(x > 0, x, 0), lambda x: x.mean(0), lambda x: jnp.var(x, 1),
        lambda x: jnp.stack([x, x]), lambda x: jnp.tile(x, (2, 1)), lambda x: x[jnp.array([1, 0])],
    ],
)  # fmt: skip
def test_everyday_functions_have_rules_for_all_their_primitives(fn):
    program = tape.build(jax.make_jaxpr(fn)(X), [tape.Value(X.aval)], registry.couple)
    missing = [s.name for s in program.steps if registry.rule_of(s) is registry.OPAQUE]
    assert not missing
