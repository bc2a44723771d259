"""Old names: each is an error that says the new one."""

import inspect

import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune._renamed import RENAMED, renamed

X = jnp.ones((1, 3))
PARAMS = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def search():
    structure = jp.infer_structure(fn, PARAMS, X)
    return jp.Search(fn, PARAMS, structure, PARAMS, X, round_to=1, device="h100")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_say_the_new_ones(old, new):
    with pytest.raises(AttributeError, match=f"^jp.{old} is now {new}"):
        getattr(jp, old)


def test_names_that_never_were():
    with pytest.raises(AttributeError, match="module 'jaxprune' has no attribute 'serch'"):
        _ = jp.serch  # type: ignore[attr-defined]


KEYWORDS = {
    "benchmark": (lambda: jp.benchmark(jnp.sin, X, rounds=3), "repeats"),
    "compare": (lambda: jp.compare({"a": (jnp.sin, (X,))}, rounds=3), "repeats"),
    "Search": (lambda: jp.Search(fn, PARAMS, None, None, X, rounds=3), "repeats"),
    "search": (lambda: jp.search(fn, PARAMS, None, None, X, rounds=3), "repeats"),
    "pareto": (lambda: jp.pareto(fn, PARAMS, None, None, X, targets=[2], rounds=3), "repeats"),
    "steps": (lambda: jp.prune_to_metric(fn, PARAMS, None, None, steps=3), "bisections"),
    "cost": (lambda: jp.prune_to_metric(fn, PARAMS, None, None, cost="flops"), "minimize"),
    "rounds": (lambda: jp.prune_to_metric(fn, PARAMS, None, None, rounds=3), "repeats"),
    "steps of a search": (lambda: search().to_metric(len, floor=1, steps=3), "bisections"),
    "cost of a search": (lambda: search().to_metric(len, floor=1, cost="flops"), "minimize"),
}


@pytest.mark.parametrize(("call", "new"), KEYWORDS.values(), ids=KEYWORDS)
def test_old_keywords_say_the_new_ones(call, new):
    with pytest.raises(TypeError, match=rf"= of .* is now {new}=; write {new}="):
        call()


def test_a_renamed_keyword_changes_no_signature():
    def plain(x, *, repeats=3):
        return x, repeats

    found = renamed("plain", rounds="repeats")(plain)
    assert inspect.signature(found) == inspect.signature(plain) and found(1) == (1, 3)
    assert found.__kwdefaults__ == {"repeats": 3} and found(1, repeats=4) == (1, 4)
