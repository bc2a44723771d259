"""Rounds of searching and recovering: what is gone stays gone, the rest is at one cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def fn(params, x):
    return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]


def loss(params, x, y):
    return jnp.mean((fn(params, x) - y) ** 2)


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (3, 16)),
        "bias": jax.random.normal(keys[1], (16,)),
        "down": jnp.ones((16, 2)) / 4,
    }
    xs = jax.random.normal(keys[2], (12, 16, 3))
    batches = [(x, jnp.sin(x[:, :2])) for x in xs]
    structure = jp.infer_structure(fn, params, xs[0])
    scores = jp.scores.taylor_units(structure, params, loss, batches)
    search = jp.Search(fn, params, structure, scores, xs[0], round_to=1, device="h100")
    return search, batches


@pytest.mark.slow
def test_each_round_scores_anew_and_cuts_further(case):
    search, batches = case
    seen = []

    def score(structure, params, loss, batches):
        seen.append(params)
        return jp.scores.taylor_units(structure, params, loss, batches)

    targets = [jp.Target(params=0.75), jp.Target(params=0.5)]
    small = jp.recovery.in_rounds(
        search, loss, batches, targets, score=score, steps=20, progress=False
    )
    assert small.sizes["hidden"] == 8
    assert len(seen) == 2
    first = np.asarray(jnp.any(seen[1]["up"] != 0, 0))
    assert first.sum() == 12
    (kept,) = (k for k in small.keep.values() if len(k) == 16)
    assert not (kept & ~first).any()
    assert small.certificate.exact
    assert small.recovery.stages[-1].loss < small.recovery.stages[0].loss
    held = [loss(small.expand(small.params), *b) for b in batches[:1]]
    np.testing.assert_allclose(small.recovery.stages[-1].loss, np.mean(held), rtol=1e-4)


def test_no_targets(case):
    search, batches = case
    with pytest.raises(ValueError, match=r"targets is empty; .*\[1.7, 3.0\]"):
        jp.recovery.in_rounds(search, loss, batches, [])
