"""Params that a call hands back anew are inputs of an engine's file."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.runtimes._runtime import frozen_for
from jaxprune.runtimes.state import stateful
from tests.helpers import engines
from tests.models.zoo import states

FN, PARAMS, ARGS = states.decode_with_cache()
IDS = ARGS[0]


@pytest.fixture
def plain(monkeypatch):
    return engines.runtime(monkeypatch)


def halved():
    """The decode step with one of two key-value heads."""
    structure = jp.infer_structure(FN, PARAMS, *ARGS)
    heads = next(n for n, d in structure.dims.items() if d.label.endswith("heads"))
    masks = structure.masks({heads: np.arange(states.KV) < 1})
    return jp.compact(FN, PARAMS, masks, *ARGS)


@pytest.fixture(scope="module")
def small():
    return halved()


def stepped(call, state, steps=3):
    """Logits of several steps, each with the cache of the one before."""
    logits = []
    for i in range(steps):
        found = call(state, (IDS + i) % 3, np.int32(i))
        state = {"cache": found["cache"]}
        logits.append(np.asarray(found["logits"]))
    return np.stack(logits)


def test_a_cache_goes_in_and_out(tmp_path, plain, small):
    check_cache(tmp_path, plain, small)


def check_cache(folder, runtime, small):
    """An engine's file gives what the small function does, step by step."""
    artefact = jp.export(small, folder, *ARGS, runtime=runtime, state="cache")
    assert artefact.against == "the masked model" and artefact.check(3) < 1e-5
    model, start = jp.load_exported(folder), {"cache": small.params["cache"]}
    assert start["cache"]["k"].shape[2] < PARAMS["cache"]["k"].shape[2]
    wanted = stepped(lambda s, *args: small.fn({**small.params, **s}, *args), start)
    found = stepped(lambda *args: model.fn(model.params, *args), start)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted[1] - wanted[0]).max() > 1e-3


def test_what_it_is_compared_with_is_the_masked_model(tmp_path, plain, small):
    """Another cache in the masked model is found, so the state reaches both."""
    artefact = jp.export(small, tmp_path, *ARGS, runtime=plain, state=["cache"])
    honest = artefact.fn
    artefact.fn = lambda state, *args: honest(jax.tree.map(lambda x: 2 * x, state), *args)
    assert artefact.check(1) > 1e-2


def test_tuned_and_dense_models_have_state(tmp_path, plain, small):
    tuned = small.replace(jax.tree.map(lambda x: x + 0.1, small.params))
    artefact = jp.export(tuned, tmp_path, *ARGS, runtime=plain, state="cache")
    assert artefact.against == "the compact model" and artefact.check(2) < 1e-6
    dense = jp.export(FN, tmp_path, PARAMS, *ARGS, runtime=plain, state="cache")
    assert dense.against == "the function" and dense.check(2) < 1e-6


def test_state_that_would_be_a_constant_is_refused(tmp_path, plain, small):
    said = 'hands back cache/k, cache/v anew, .* write jp.export(..., state="cache")'
    pattern = re.escape(said).replace(re.escape(".*"), ".*")
    with pytest.raises(ValueError, match=pattern):
        jp.export(small, tmp_path, *ARGS, runtime=plain)
    with pytest.raises(ValueError, match=pattern):
        jp.export(FN, tmp_path, PARAMS, *ARGS, runtime=plain)
    assert not list(tmp_path.iterdir())


def test_state_that_isnt_there(tmp_path, plain, small):
    for state in ("caches", []):
        with pytest.raises(
            ValueError, match=r"names no part of params, whose keys are \['cache', "
        ):
            jp.export(small, tmp_path, *ARGS, runtime=plain, state=state)
    with pytest.raises(ValueError, match=r"whose keys are \[\]"):
        jp.export(jnp.tanh, tmp_path, jnp.ones(2), runtime=plain, state="cache")


def test_programs_of_xla_take_all_params(tmp_path, small):
    with pytest.raises(ValueError, match="is for the file of an engine.*leave it out"):
        jp.export(small, tmp_path, *ARGS, state="cache")


def test_weights_of_a_model_with_state_stay_in_float(plain, small):
    """The twin of such a program has other constants, and takes the same state."""
    kept = plain.replace(plain.options._replace(keep_float=("weights/proj",)))
    taken, args = stateful(small, ARGS, "cache")
    frozen = frozen_for(kept, taken, args)
    mine, twin = frozen(*args), frozen.twin(*args)
    assert np.abs(mine["logits"] - twin["logits"]).max() > 1e-3
    np.testing.assert_array_equal(mine["cache"]["k"], twin["cache"]["k"])
