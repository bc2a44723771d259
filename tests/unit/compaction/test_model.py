"""A compact model as an object: what it keeps alive, how it is copied, what can't change."""

import copy
import dataclasses
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jax.random.normal(jax.random.key(9), (3, 4))
KEEP = np.arange(8) % 2 == 0


def fn(params, x):
    h = x @ params["up"]
    return jax.nn.softmax(jnp.tanh(h) * params["scale"]) @ params["down"]


def draw():
    up, down = jax.random.split(jax.random.key(0))
    return {"up": jax.random.normal(up, (4, 8)), "down": jax.random.normal(down, (8, 2)),
            "scale": 2.0}  # fmt: skip


def compacted(params):
    return jp.compact(fn, params, {"up": KEEP[None], "down": KEEP[:, None], "scale": True}, X)


@pytest.fixture
def model():
    params = draw()
    return params, compacted(params)


@pytest.mark.slow
def test_full_params_are_freed_and_needed_again_only_to_check():
    params = draw()
    small = compacted(params)
    seen = [weakref.ref(leaf) for leaf in (params["up"], params["down"])]
    assert small.certificate.check() < 1e-12
    expected = small.fn(small.params, X)
    del params
    gc.collect()
    assert [leaf() for leaf in seen] == [None, None]
    np.testing.assert_array_equal(small.fn(small.params, X), expected)
    with pytest.raises(ValueError, match=r"down of shape \(8, 2\) is gone.*check\(params=params\)"):
        small.certificate.check()
    assert small.certificate.check(params=draw()) < 1e-12
    with pytest.raises(ValueError, match="up has shape"):
        small.certificate.check(params=draw() | {"up": jnp.ones((5, 8))})


def test_the_masks_of_the_check_are_those_of_compact(model):
    """Without them the full model of these params would be dense, and differ from the small one."""
    params, small = model
    moved = params | {"up": params["up"] + KEEP}
    assert small.certificate.check(params=moved) < 1e-12


def through_pickle(small):
    return pickle.loads(pickle.dumps(small))


@pytest.mark.slow
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, through_pickle])
def test_copies(again, model):
    params, small = model
    small.fn(small.params, X)  # has traced
    other = again(small)
    np.testing.assert_array_equal(other.fn(other.params, X[:2]), small.fn(small.params, X[:2]))
    assert str(other.certificate) == str(small.certificate)
    assert other.certificate.check(params=params) < 1e-12
    up, was = (m.expand(m.params)["up"] for m in (other, small))
    np.testing.assert_array_equal(up, was)
    assert other.certificate.overhead == small.certificate.overhead > 1


def test_a_pickled_certificate_holds_no_full_params():
    params = draw() | {"up": jnp.ones((20_000, 8))}
    small = jp.compact(fn, params, {"up": KEEP[None], "down": KEEP[:, None], "scale": True},
                       jax.ShapeDtypeStruct((1, 20_000), jnp.float32))  # fmt: skip
    assert len(pickle.dumps(small.certificate)) < 60_000 < params["up"].nbytes


def test_plans_do_not_change(model):
    _, small = model
    (decision,) = small._plan.decisions.values()
    with pytest.raises(dataclasses.FrozenInstanceError):
        small._plan.semantics = "kept"
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.kept = ~decision.kept
    with pytest.raises(ValueError, match="read-only"):
        decision.kept[0] = False


def test_a_function_is_traced_once_for_each_shape():
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return fn(params, x)

    small = jp.compact(counted, draw(), {"up": KEEP[None], "down": True, "scale": True}, X)
    for rows in (3, 2, 3, 2):
        small.fn(small.params, X[:rows])
        jax.jit(small.fn)(small.params, X[:rows])
    assert traced == [(3, 4), (2, 4)]


def test_the_structure_that_is_printed_is_the_one_that_is_cut(model):
    params, small = model
    assert str(jp.infer_structure(fn, params, X)) == str(small._structure)
