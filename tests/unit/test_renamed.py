"""Old names: each is an error that says the new one."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune._renamed import MOVED, RENAMED

FUNCTIONS = {name: getattr(jp.oneshot, name) for name in RENAMED}


@pytest.mark.parametrize("name, old", [(f, old) for f, table in RENAMED.items() for old in table])
def test_an_old_keyword_says_the_new_one(name, old):
    new = RENAMED[name][old]
    with pytest.raises(TypeError, match=f"{name}: {old}= is {new}= now"):
        FUNCTIONS[name](**{old: 1})
    assert new in inspect.signature(FUNCTIONS[name]).parameters


@pytest.mark.parametrize("module, old", [(m, old) for m, table in MOVED.items() for old in table])
def test_an_old_function_says_where_it_is(module, old):
    where = {"jp.oneshot": jp.oneshot, "jp.training": jp.training}[module]
    with pytest.raises(AttributeError, match=f"{module}.{old} has moved; write jp"):
        getattr(where, old)
    new = MOVED[module][old].removeprefix("jp.").partition("(")[0].split(".")
    assert callable(getattr(getattr(jp, new[0]), new[1]))
    assert not hasattr(where, "unknown")


@pytest.mark.parametrize("name", ["mean", "sum", "taylor"])
def test_a_reduction_by_name_says_the_function(name):
    params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
    for call in (
        lambda reduce: jp.structured(structure, reduce=reduce),
        lambda reduce: structure.unit_scores(params, reduce),
    ):
        with pytest.raises(ValueError, match=f"reduce is '{name}'.*pass reduce=jp.reduce.{name}"):
            call(name)
    sums = structure.unit_scores(params, lambda sums, counts: sums / np.sqrt(counts))
    np.testing.assert_allclose(sums["up:1"], 5 / np.sqrt(5), rtol=1e-6)


def test_density_takes_params_first():
    params, masks = {"w": jnp.ones((2, 2))}, {"w": jnp.eye(2, dtype=bool)}
    assert float(jp.density(params, masks)) == 0.5
    with pytest.raises(TypeError, match=r"params come first now: write jp.density\(params, masks"):
        jp.density(masks, params)
    ints = {"w": jnp.ones((2, 2), jnp.int8)}
    with pytest.raises(TypeError, match="params come first now"):
        jp.density(masks, ints)
