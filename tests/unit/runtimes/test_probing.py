"""Which operations a converter refuses: one that is told what it refuses stands for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.runtimes import _probing


def refusing(*names, together=False):
    """A converter that can't write some operations, alone or only beside others."""

    def convert(frozen):
        found = [eqn.primitive.name for eqn in frozen.closed.jaxpr.eqns]
        if set(names) & set(found) and not (together and len(found) == 1):
            raise RuntimeError("\n  sorry\nand a long story")
        return found

    return convert


def fn(w, x):
    y = jnp.sin(x @ w)
    return jnp.cos(y) + jnp.sin(y) + jnp.cumsum(y, 0)


ARGS = jnp.ones((3, 3)), jnp.ones((2, 3))


def test_what_is_converted_comes_back():
    wanted = ["dot_general", "sin", "cos", "sin", "add", "cumsum", "add"]
    assert _probing.converted("toy", jp.freeze(fn, *ARGS), refusing()) == wanted


def test_each_operation_that_fails_alone_is_named_once():
    match = (
        r"^the runtime toy can't do sin at test_probing.py:\d+ \(fn\), cumsum at "
        r"test_probing.py:\d+ \(fn\): RuntimeError: sorry$"
    )
    with pytest.raises(NotImplementedError, match=match):
        _probing.converted("toy", jp.freeze(fn, *ARGS), refusing("sin", "cumsum"))


def test_a_program_whose_operations_convert_alone():
    with pytest.raises(NotImplementedError, match="^the runtime toy can't do this function: Runt"):
        _probing.converted("toy", jp.freeze(fn, *ARGS), refusing("sin", together=True))


def test_a_missing_package_stays_what_it_is():
    def convert(frozen):
        raise ImportError("pip install it")

    with pytest.raises(ImportError, match="pip install it"):
        _probing.converted("toy", jp.freeze(fn, *ARGS), convert)


def test_arguments_to_try_a_program_on():
    frozen = jp.freeze(fn, *ARGS, shapes=("3, 3", "b, 3"))
    assert [x.shape for x in _probing.zeros(frozen)] == [(3, 3), (2, 3)]
    twice = jp.freeze(lambda x: x, jax.ShapeDtypeStruct((4,), jnp.int32), shapes="2*b")
    (found,) = _probing.zeros(twice)
    assert found.shape == (4,) and found.dtype == np.int32
