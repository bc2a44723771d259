"""Units removed with repair and exchanged: every subset beside them, and bad input."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.oneshot import _osscar


def drawn(seed, inputs=8, outs=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, inputs)) @ rng.normal(size=(inputs, inputs))
    return rng.normal(size=(inputs, outs)), x.T @ x


def loss(w, h, rows):
    """Least squares on the damped Gram matrix, the slow way."""
    h = h + np.eye(len(h)) * 0.01 * np.mean(np.diagonal(h))
    root = np.linalg.cholesky(h).T
    fit = np.linalg.lstsq(root[:, rows], root @ w, rcond=None)[0]
    return float(np.sum((root @ w - root[:, rows] @ fit) ** 2))


def every(w, h, count, group):
    units = np.arange(len(w)).reshape(-1, group)
    return {
        kept: loss(w, h, units[list(kept)].reshape(-1))
        for kept in itertools.combinations(range(len(units)), count)
    }


@pytest.mark.parametrize(("count", "group"), [(2, 1), (5, 1), (2, 2), (3, 2), (1, 4)])
def test_no_single_exchange_is_better_and_few_subsets_are(count, group):
    ranks = []
    for seed in range(8):
        w, h = drawn(seed)
        found = jp.oneshot.osscar(w, h, count, group=group)
        subsets = every(w, h, count, group)
        kept = tuple(np.flatnonzero(found.kept).tolist())
        assert found.loss == pytest.approx(subsets[kept], rel=1e-6)
        near = [x for s, x in subsets.items() if len({*s} & {*kept}) == count - 1]
        assert found.loss <= min(near, default=np.inf) * (1 + 1e-6)
        assert found.loss <= jp.oneshot.osscar(w, h, count, group=group, swaps=0).loss * (1 + 1e-9)
        ranks.append(sorted(subsets.values()).index(subsets[kept]))
    assert sum(r == 0 for r in ranks) >= 6  # mostly the best of all


def test_some_exchange_helps():
    each = [jp.oneshot.osscar(*drawn(seed), 3).swaps for seed in range(20)]
    assert max(each) >= 1


def test_removal_keeps_the_inverse_of_what_is_left():
    """One step of the first stage, by brute force: the cheapest removal of all."""
    w, h = drawn(1)
    kept = _osscar._greedy(w, _osscar._damped(h, 0.01), 7, np.arange(8)[:, None])
    costs = every(w, h, 7, 1)
    assert tuple(np.flatnonzero(kept)) == min(costs, key=costs.get)


def test_all_units_lose_nothing():
    w, h = drawn(2)
    found = jp.oneshot.osscar(w, h, 8)
    assert found.kept.all() and found.loss == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.weights, w, atol=1e-9)


def test_it_beats_flap_on_a_network():
    rng = np.random.default_rng(0)
    params = {"up": jnp.asarray(rng.normal(size=(6, 16))), "down": jnp.asarray(
        rng.normal(size=(16, 4)))}  # fmt: skip
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    x = jnp.asarray(rng.normal(size=(64, 6)))
    structure = jp.infer_structure(fn, params, x)
    stats = jp.calibrate(fn, params, [x])
    found = jp.oneshot.osscar(params["down"], stats.grams["down"], 6)
    flap = structure.unit_scores(jp.scores.flap(params, stats=stats))["up:1"]
    keeps = {"osscar": found.kept, "flap": np.isin(np.arange(16), np.argsort(flap)[-6:])}
    errors = {}
    for name, keep in keeps.items():
        masks = structure.masks({"up:1": keep})
        repaired = jp.oneshot.refit(params, masks, stats)
        errors[name] = float(jnp.sum((fn(repaired, x) - fn(params, x)) ** 2))
    assert errors["osscar"] < errors["flap"]


W, H = drawn(0)
BAD = {
    "shapes": (lambda: jp.oneshot.osscar(W.T, H, 2), r"weights have shape \(3, 8\) and gram \(8,"),
    "group": (lambda: jp.oneshot.osscar(W, H, 2, group=3), "8 inputs are no whole units of gro"),
    "count": (lambda: jp.oneshot.osscar(W, H, 9), "count is 9; wanted 1 to 8 units"),
    "NaN": (lambda: jp.oneshot.osscar(W, H * np.nan, 2), "gram holds NaN or infinity; look"),
}


@pytest.mark.parametrize(("call", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()
