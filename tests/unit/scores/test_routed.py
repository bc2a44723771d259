"""Scores of experts by what they do with tokens: the slow way beside them, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

E, K, W = 5, 2, 3


def route(p, x):
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)
    return {"moe": (chosen, gates, jnp.einsum("td,tkdf->tkf", x, p["experts"][chosen]))}


def drawn():
    keys = jax.random.split(jax.random.key(0), 4)
    router = jax.random.normal(keys[0], (W, E)) - 100 * (jnp.arange(E) == 4)
    params = {"router": router, "experts": jax.random.normal(keys[1], (E, W, W))}
    return params, [(jnp.abs(jax.random.normal(k, (n, W))),) for k, n in zip(keys[2:], (7, 4))]


def test_scores_are_sums_over_tokens():
    params, batches = drawn()
    found = jp.scores.experts(route, params, batches, count=E)["moe"]
    times, gates, norms, added = (np.zeros(E) for _ in range(4))
    for (x,) in batches:
        shares = np.asarray(jax.nn.softmax(x @ params["router"]), float)
        for t, row in enumerate(shares):
            for e in np.argsort(-row)[:K]:
                norm = np.linalg.norm(np.asarray(x[t] @ params["experts"][e], float))
                times[e] += 1
                gates[e] += row[e]
                norms[e] += norm
                added[e] += row[e] * norm
    assert times[4] == 0 == found.reap[4]
    np.testing.assert_allclose(found.frequency, times / 11, rtol=1e-5)
    np.testing.assert_allclose(found.gate, gates / 11, rtol=1e-5)
    np.testing.assert_allclose(found.norm, norms, rtol=1e-5)
    np.testing.assert_allclose(found.reap, added / np.maximum(times, 1), rtol=1e-5)
    assert found.frequency.sum() == pytest.approx(K)


PARAMS, BATCHES = drawn()
BAD = {
    "tree": (lambda: scored(lambda p, x: route(p, x)["moe"]), TypeError, "returned a tuple; want"),
    "shapes": (
        lambda: scored(lambda p, x: {"moe": (jnp.zeros((2, 1), int), jnp.ones((2, 1)), x[:2])}),
        ValueError,
        r"route gives 'moe' chosen experts of shape \(2, 1\), gates \(2, 1\) and outputs \(2, 3\)",
    ),
    "count": (
        lambda: jp.scores.experts(route, PARAMS, BATCHES, count=2),
        ValueError,
        r"route gives 'moe' expert \d of 2; give the number of experts: count=",
    ),
}


def scored(fn):
    return jp.scores.experts(fn, PARAMS, BATCHES, count=E)


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
