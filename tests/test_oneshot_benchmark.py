"""Structured one-shot pruning of the benchmark, on a model of the same form with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from benchmarks import oneshot_structured as job
from benchmarks.models import smollm2

WIDTH, HIDDEN, WORDS = 16, 24, 30


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(0), 99))

    def kernel(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

    def block():
        q, kv = 6 * smollm2.HEAD, 2 * smollm2.HEAD
        shapes = {
            "q": (WIDTH, q), "k": (WIDTH, kv), "v": (WIDTH, kv), "o": (q, WIDTH),
            "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
        }  # fmt: skip
        norms = {f"{name}_norm": jnp.ones(WIDTH) for name in ("attention", "mlp")}
        return {name: kernel(*shape) for name, shape in shapes.items()} | norms

    blocks = [block() for _ in range(2)]
    return {"embedding": kernel(WORDS, WIDTH) * 4, "blocks": blocks, "norm": jnp.ones(WIDTH)}


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (8, 32), 0, WORDS))


@pytest.fixture(scope="module")
def found(params, tokens):
    return job.scored(params, tokens)


@pytest.mark.parametrize(
    "name", ["magnitude -50 %", "activations + refit -50 %", "FLAP + refit + bias -25 %"]
)
def test_compact_equals_the_cut_model(params, tokens, found, name):
    keep, refit, bias = job.recipe(name, found)
    pruned, masks = job.pruned_model(params, tokens, keep, refit, bias)
    gone = 1 - int(name[-4:-2]) / 100
    assert sum(u[job.HIDDEN].sum() for u in keep) == round(2 * gone * HIDDEN)
    every = {"embedding": True, "norm": True, "blocks": masks}
    small = jp.compact(smollm2.apply, pruned, every, tokens[:1])
    assert small.certificate.exact
    for k, units in enumerate(keep):
        assert small.params["blocks"][k]["down"].shape == (units[job.HIDDEN].sum(), WIDTH)
        assert ("down_bias" in small.params["blocks"][k]) == bias
    want, got = smollm2.apply(pruned, tokens[:1]), small.fn(small.params, tokens[:1])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_refit_and_bias_lower_the_error_of_a_block(params, tokens, found):
    """Each repair solves a least squares problem: on the tokens it saw it can't be worse."""
    (p, _), units = params["blocks"], found["FLAP"][0]
    x = params["embedding"][tokens]
    structure, stats = job._structure(params), jp.calibrate(smollm2.block, p, [x])
    keep = {job.HIDDEN: job._best(units[job.HIDDEN], 8)}

    def error(refit, bias):
        return float(jnp.sum((smollm2.block(job.cut(structure, p, stats, keep, refit, bias)[0], x)
                              - smollm2.block(p, x)) ** 2))  # fmt: skip

    plain, refit, bias, both = (
        error(False, False),
        error(True, False),
        error(False, True),
        error(True, True),
    )
    assert refit < plain and bias < plain and both <= refit * 1.001


def test_z_scores_are_cut_over_all_blocks():
    found = [{job.HIDDEN: np.arange(8.0)}, {job.HIDDEN: 1000 * np.array([1.0] * 7 + [9.0])}]
    keep = job.by_z_score(found, 0.25)
    assert [u[job.HIDDEN].sum() for u in keep] == [3, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=4, max_size=4), st.integers(8, 40), st.integers(0, 99))
def test_marginals_add_up_to_the_convex_curve(steps, size, seed):
    scores = np.random.default_rng(seed).permutation(size).astype(float)
    curve, parts = list(np.cumsum([1.0, *steps])), (0.75, 0.5, 0.25, 0.0)
    units = job.marginal(scores, curve, parts)
    np.testing.assert_allclose(units.sum(), curve[-1] - curve[0], atol=1e-6)
    by_importance = units[np.argsort(-scores)]
    assert (np.diff(by_importance) <= 1e-9).all()  # the best is worth most
    kept = np.cumsum(np.concatenate([[0.0], by_importance]))
    loss = curve[-1] - kept  # of the best k units
    known = np.interp(np.arange(size + 1), np.array([1, *parts])[::-1] * size, curve[::-1])
    assert (loss <= known + 1e-6).all()


def test_hull_by_trying_every_line():
    y = np.random.default_rng(0).normal(size=12)
    n = len(y)
    lines = [
        [y[a] + (y[b] - y[a]) * (i - a) / max(b - a, 1) for a in range(i + 1) for b in range(i, n)]
        for i in range(n)
    ]
    np.testing.assert_allclose(job._hull(y), [min(line) for line in lines], atol=1e-12)


def test_single_cuts_and_the_search(params, tokens, found, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(job, "TOKENS", 8)
    monkeypatch.setitem(job.CUTS, job.HEADS, (0.5, 0.0))
    curves = job.losses(params, tokens[:4], tokens[4:6], found["FLAP"])
    dense = smollm2.perplexity(params, tokens[4:6])
    for rows in curves:
        assert len(rows[job.HIDDEN]) == 5 and len(rows[job.HEADS]) == 3
        assert np.exp(rows[job.HIDDEN][0]) == pytest.approx(dense, rel=1e-4)
    search = job.search(params, found["FLAP"], curves)
    plan = search.plan(jp.Target(params=0.6))
    keep = job.of_plan(plan, 2)
    assert job.counts(keep)[job.HIDDEN] == [int(u[job.HIDDEN].sum()) for u in keep]
    assert plan.measured.params <= 0.6
    first = job._first(params, job.counts(keep))
    again = jp.compact(smollm2.apply, params, first, tokens[:1])
    same = jp.compact(smollm2.apply, params, plan.masks, tokens[:1])
    assert jax.tree.map(np.shape, again.params) == jax.tree.map(np.shape, same.params)
