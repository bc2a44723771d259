"""Old names: each is an error that says the new one."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
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


MODULES = {"jp": jp, "jp.oneshot": jp.oneshot, "jp.training": jp.training}
OLD = [(module, old, new) for module, table in RENAMED.items() for old, new in table.items()]


@pytest.mark.parametrize(("module", "old", "new"), OLD)
def test_old_names_say_the_new_ones(module, old, new):
    with pytest.raises(AttributeError, match=f"^{re.escape(f'{module}.{old} is now {new}')}"):
        getattr(MODULES[module], old)
    found = jp
    for name in new.removeprefix("jp.").partition("(")[0].split("."):
        found = getattr(found, name)
    assert callable(found)


@pytest.mark.parametrize("module", MODULES)
def test_names_that_never_were(module):
    with pytest.raises(AttributeError, match=f"{module} has no attribute 'serch'"):
        _ = MODULES[module].serch


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
    "permute": (lambda: jp.oneshot.permute(fn, PARAMS, None, None, X, rounds=3), "sweeps"),
    "seed": (lambda: jp.oneshot.permute(fn, PARAMS, None, None, X, seed=3), "key"),
    "refit": (lambda: jp.oneshot.refit(PARAMS, None, None, steps=3), "cg_steps"),
    "sequential": (lambda: jp.oneshot.sequential(fn, [], [], drift=0.5), "error_propagation"),
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
