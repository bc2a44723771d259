"""A frozen program computes what its function does, from plain operations alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import jaxprune as jp
from jaxprune.ir import compat
from jaxprune.runtimes import rewriting

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)
W = {"up": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32), "down": jnp.ones((8, 3))}


def net(p, x):
    hidden = jax.jit(jax.nn.silu)(jax.checkpoint(lambda h: h @ p["up"])(x))
    return {"logits": hidden @ p["down"], "most": hidden.max()}


def names(frozen):
    return [eqn.primitive.name for eqn in compat.open_jaxpr(frozen.closed)[0].eqns]


def halved():
    masks = jp.infer_structure(net, W, X).masks({"up:1": np.arange(8) % 2 == 0})
    return jp.compact(net, W, masks, X)


def test_calls_and_custom_derivatives_are_gone():
    frozen = jp.freeze(net, W, X)
    assert names(frozen) == ["dot_general", "logistic", "mul", "dot_general", "reduce_max"]
    for a, b in zip(jax.tree.leaves(frozen(W, X)), jax.tree.leaves(net(W, X)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_params_of_a_compact_model_are_constants():
    small = halved()
    frozen = jp.freeze(small, X, shapes="b, ...")
    assert [x.shape for x in compat.open_jaxpr(frozen.closed)[1]] == [(6, 4), (4, 3)]
    assert str(frozen.args) == "(ShapeDtypeStruct(shape=(b, 6), dtype=float32),)"
    wide = jnp.tile(X, (3, 1))
    np.testing.assert_allclose(frozen(wide)["logits"], net(W, wide)["logits"] / 2, rtol=10)
    np.testing.assert_allclose(
        frozen(wide)["logits"], small.fn(small.params, wide)["logits"], rtol=1e-6
    )


def test_dead_keys_are_dropped_and_small_constants_computed():
    def fn(x):
        key, _ = jax.random.split(jax.random.key(0))
        noise = jax.random.normal(key, (6,))
        return x + jnp.arange(6) * 2 + noise * 0

    assert not {"random_split", "random_bits", "iota"} & set(names(jp.freeze(fn, X)))
    assert names(jp.freeze(lambda x: (jax.random.key(1), x)[1] + 1, X)) == ["add"]


def test_large_constants_are_not_spelled_out():
    frozen = jp.freeze(lambda x: x + jnp.zeros((500, 2, 6)), X)
    assert names(frozen)[0] == "broadcast_in_dim" and not compat.open_jaxpr(frozen.closed)[1]


def test_equations_keep_the_line_of_the_user():
    frozen = jp.freeze(lambda x: jax.jit(jnp.sin)(x), X)
    (eqn,) = frozen.closed.jaxpr.eqns
    assert compat.source_line(eqn).startswith("test_freezing.py:")
    eqns = jp.freeze(halved(), X).closed.jaxpr.eqns
    assert compat.source_line(eqns[0]).startswith("test_freezing.py:")
    assert "net.<locals>" in compat.source_line(eqns[0])


def test_loops_and_branches_are_rewritten_inside():
    def fn(x):
        def step(c, row):
            return jax.jit(jnp.tanh)(c + row), c

        last, rows = jax.lax.scan(step, jnp.zeros(6), x)
        return jax.lax.cond(last.sum() > 0, jax.nn.relu, lambda y: y * 2, rows)

    frozen = jp.freeze(fn, X)
    inner = [s for eqn in frozen.closed.jaxpr.eqns for s in compat.sub_jaxprs(eqn)]
    every = [e.primitive.name for s in inner for e in compat.open_jaxpr(s)[0].eqns]
    assert "jit" not in every and "custom_jvp_call" not in every
    np.testing.assert_allclose(frozen(X), fn(X), rtol=1e-6)


def test_an_argument_that_is_no_array():
    with pytest.raises(TypeError, match="argument 1 after params is the str 'relu'"):
        jp.freeze(net, W, "relu")


def test_rules_replace_operations():
    rule = {"sin": lambda eqn, ins, rules: [jnp.cos(*ins)]}
    closed = rewriting.rewritten(jax.make_jaxpr(jnp.sin)(X), rule)
    np.testing.assert_allclose(core.jaxpr_as_fun(closed)(X)[0], jnp.cos(X), rtol=1e-6)


def _rules(fn, *args):
    from jaxprune.runtimes._onnx_rules import RULES

    closed = jp.freeze(functools.partial(fn), *args).closed
    return rewriting.rewritten(closed, RULES)


def test_rule_of_boolean_where():
    fn = lambda x: jnp.where(x > 0, x < 1, x > -1)  # noqa: E731
    closed = _rules(fn, X)
    assert "select_n" not in {eqn.primitive.name for eqn in closed.jaxpr.eqns}
    assert (core.jaxpr_as_fun(closed)(X)[0] == fn(X)).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_rule_of_loops(reverse):
    """Weights become constants of the body, what is made of them alone is made once."""

    def fn(x):
        def step(c, row):
            wide = jnp.concatenate([W["up"], W["up"]], 1)
            return jnp.tanh(c + row @ wide + shift), c

        return jax.lax.scan(step, jnp.zeros(16), x, reverse=reverse)

    shift = jnp.ones(16)
    closed = _rules(fn, X)
    (loop,) = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert not loop.params["reverse"]
    inner = compat.open_jaxpr(loop.params["jaxpr"])[0].eqns
    assert "concatenate" not in [eqn.primitive.name for eqn in inner]
    assert loop.params.get("num_consts", 0) == 0  # JAX 0.12 has no such number
    for a, b in zip(core.jaxpr_as_fun(closed)(X), fn(X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


DOTS = {
    "outer": ((2, 3), (2, 4), (((), ()), ((0,), (0,)))),
    "outer, batch last": ((3, 2), (4, 5, 2), (((), ()), ((1,), (2,)))),
    "left is turned": ((4, 4), (4, 4), (((0,), (0,)), ((), ()))),
    "plain": ((2, 3), (3, 4), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("name", DOTS)
def test_rule_of_products(name, dtype):
    *shapes, numbers = DOTS[name]
    x, y = (jnp.asarray(5 * RNG.normal(size=s), dtype) for s in shapes)
    wide = jnp.float32 if dtype == jnp.float32 else jnp.int32
    fn = lambda x, y: jax.lax.dot_general(x, y, numbers, preferred_element_type=wide)  # noqa: E731
    closed = _rules(fn, x, y)
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            assert eqn.params["dimension_numbers"][0][0] == (1,)
            assert {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)} == {jnp.dtype(wide)}
    np.testing.assert_allclose(core.jaxpr_as_fun(closed)(x, y)[0], fn(x, y), rtol=1e-5)


@pytest.mark.parametrize("window", [(2, 2), (3, 1)])
def test_rule_of_sums_over_windows(window):
    import flax.linen as nn

    x = jnp.asarray(RNG.normal(size=(2, 7, 8, 3)), jnp.float32)
    fn = lambda x: nn.avg_pool(x, window, strides=(2, 1), padding="SAME")  # noqa: E731
    closed = _rules(fn, x)
    found = {eqn.primitive.name for eqn in closed.jaxpr.eqns}
    assert "reduce_window_sum" not in found and "conv_general_dilated" in found
    np.testing.assert_allclose(core.jaxpr_as_fun(closed)(x)[0], fn(x), rtol=1e-5, atol=1e-6)
