"""One-shot pruning of the benchmarks, on a model of the same form with random weights."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from benchmarks.common import texts
from benchmarks.models import smollm2
from benchmarks.studies.oneshot import search as staged
from benchmarks.studies.oneshot import stream
from benchmarks.studies.oneshot import structured as job
from benchmarks.studies.oneshot import structured_time as clock
from benchmarks.studies.oneshot import time as oneshot_time
from benchmarks.studies.oneshot import weights as oneshot
from jaxprune.budget.solver import Term, Total
from jaxprune.oneshot import order

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
    "name",
    [
        "magnitude -20 %",
        "activations + refit -50 %",
        "FLAP + refit + bias -30 %",
        "FLAP + stream -50 %",
    ],
)
def test_compact_equals_the_cut_model(params, tokens, found, name):
    keep, repair = job.recipe(name, found)
    pruned, masks = job.REPAIRS[repair](params, tokens, keep)
    gone = 1 - int(name[-4:-2]) / 100
    assert abs(sum(u[job.HIDDEN].sum() for u in keep) - 2 * gone * HIDDEN) < 1
    every = {"embedding": True, "norm": True, "blocks": masks}
    small = jp.compact(smollm2.apply, pruned, every, tokens[:1])
    assert small.certificate.exact
    for k, units in enumerate(keep):
        assert small.params["blocks"][k]["down"].shape == (units[job.HIDDEN].sum(), WIDTH)
        assert ("down_bias" in small.params["blocks"][k]) == ("bias" in repair)
    want, got = smollm2.apply(pruned, tokens[:1]), small.fn(small.params, tokens[:1])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_order_of_use_of_a_block(params):
    x = jnp.zeros((1, 4, WIDTH))
    groups = order.of_use(smollm2.block, params["blocks"][0], x, None)
    found = [{name for name in params["blocks"][0] if group(name, None)} for group in groups]
    assert found == [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}]


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


def test_kept_rows_solve_the_normal_equations():
    rng = np.random.default_rng(0)
    w, kept = rng.normal(size=(6, 3)).astype(np.float32), np.array([1, 1, 0, 1, 0, 1], bool)
    x, target = (rng.normal(size=(2, 40, n)).astype(np.float32) for n in (6, 3))
    found = np.asarray(stream.solve(w, kept, [(x[0], target[0]), (x[1], target[1])], 0.01))
    flat, wanted = x.reshape(-1, 6)[:, kept].astype(float), target.reshape(-1, 3)
    ridge = np.sqrt(0.01 * np.mean(np.sum(flat**2, 0))) * np.eye(4)
    want = np.linalg.lstsq(np.vstack([flat, ridge]), np.vstack([wanted, ridge @ w[kept]]))[0]
    np.testing.assert_allclose(found[kept], want, rtol=1e-3, atol=1e-5)
    assert (found[~kept] == 0).all()
    assert (np.asarray(stream.solve(w, np.zeros(6, bool), [(x, target)], 0.01)) == 0).all()


def test_stream_repair_lessens_the_drift_and_leaves_a_whole_model_as_it_is(params, tokens, found):
    structure, x = job._structure(params), [params["embedding"][tokens]]
    whole = staged.everything(params)
    same, _ = stream.pruned_blocks(structure, params["blocks"], x, whole)
    chex.assert_trees_all_close(same, params["blocks"], atol=1e-3)
    keep, _ = job.recipe("FLAP + stream -50 %", found)

    def drift(share):
        blocks, _ = stream.pruned_blocks(structure, params["blocks"], x, keep, share)
        out, dense = x[0], x[0]
        for p, q in zip(blocks, params["blocks"]):
            out, dense = smollm2.block(p, out), smollm2.block(q, dense)
        return float(jnp.sum((out - dense) ** 2))

    assert drift(1.0) < drift(0.5) < drift(0.0)


def test_z_scores_are_cut_over_all_blocks():
    found = [{job.HIDDEN: np.arange(8.0)}, {job.HIDDEN: 1000 * np.array([1.0] * 7 + [9.0])}]
    keep = job.by_z_score(found, 0.25)
    assert [u[job.HIDDEN].sum() for u in keep] == [3, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=3, max_size=3), st.integers(8, 40), st.integers(0, 99))
def test_scores_add_up_to_the_convex_curve(steps, size, seed):
    order = np.random.default_rng(seed).permutation(size).astype(float)
    counts = [size - 1, size // 2, 2, 0]  # one unit has gone before
    row = dict(zip(counts, np.cumsum([1.0, *steps])))
    units = staged._scores(order, row)
    np.testing.assert_allclose(units.sum(), row[0] - row[size - 1], atol=1e-6)
    best_first = units[np.argsort(-order)]
    assert best_first[-1] == 0  # it has gone
    assert (np.diff(best_first) <= 1e-9).all()  # the best is worth most
    kept = np.cumsum(np.concatenate([[0.0], best_first[:-1]]))
    known = np.interp(np.arange(size), counts[::-1], [row[c] for c in counts[::-1]])
    assert (row[0] - kept <= known + 1e-6).all()


def test_units_below_what_was_tried_stay():
    scores, least = staged.worth([{job.HIDDEN: np.arange(8.0)}], [{job.HIDDEN: {8: 0.1, 6: 0.3}}])
    want = [0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    np.testing.assert_allclose(scores["blocks/0/gate:1"], want, atol=1e-9)
    assert least == {"blocks/0/gate:1": 6}


def test_hull_by_trying_every_line():
    y = np.random.default_rng(0).normal(size=12)
    n = len(y)
    lines = [
        [y[a] + (y[b] - y[a]) * (i - a) / max(b - a, 1) for a in range(i + 1) for b in range(i, n)]
        for i in range(n)
    ]
    np.testing.assert_allclose(staged.hull(y), [min(line) for line in lines], atol=1e-12)


def test_divergence_is_zero_for_the_same_model_and_the_mean_over_tokens_else(params, tokens):
    divergence = staged.divergence_from(params, tokens[:3])
    hidden = params["embedding"][tokens[:3]]
    assert divergence(params, 0, hidden) == pytest.approx(0, abs=1e-6)
    cut = params | {"blocks": [params["blocks"][0]] * 2}
    p, q = (jax.nn.softmax(smollm2.apply(m, tokens[:3])) for m in (params, cut))
    want = float(jnp.mean(jnp.sum(p * jnp.log(p / q), -1)))
    assert divergence(cut, 0, hidden) == pytest.approx(want, rel=1e-3)
    after = smollm2.block(params["blocks"][0], hidden)
    assert divergence(cut, 1, after) == pytest.approx(want, rel=1e-3)


def test_stages_take_more_and_more(params, tokens, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(job, "TOKENS", 8)
    monkeypatch.setattr(staged, "ALIGNED", 3)
    monkeypatch.setattr(staged, "TRIED", {job.HIDDEN: (1 / 8, 1 / 4), job.HEADS: (0.5,)})
    search, keep = staged.searching(params), staged.everything(params)
    for fraction in (0.9, 0.8):
        target = jp.Target(params=fraction)
        before, now = keep, job.pruned_model(params, tokens, keep, True, False)[0]
        order = staged.tried(params, now, keep, tokens[:4], tokens[4:6])[1]
        keep, plan = staged.stage(params, now, keep, tokens[:4], tokens[4:6], search, target)
        assert plan.predicted.params <= fraction
        for old, new in zip(before, keep):
            for dim in old:
                assert not (new[dim] & ~old[dim]).any()  # what has gone stays away
                taken = old[dim].sum() - new[dim].sum()
                assert taken <= max(staged.TRIED[dim]) * old[dim].size
        for units, new in zip(order, keep):
            for dim, kept in new.items():  # the best stay
                assert units[dim][kept].min(initial=9) >= units[dim][~kept].max(initial=-1)
    assert staged._unpacked(staged._packed(keep), keep)[1][job.HIDDEN].tolist() == (
        keep[1][job.HIDDEN].tolist()
    )
    first = job.first(params, job.counts(keep))
    small = jp.compact(smollm2.apply, params, first, tokens[:1])
    sizes = [p["down"].shape[0] for p in small.params["blocks"]]
    assert sizes == job.counts(keep)[job.HIDDEN]
    every, cut = (job.counts(units) for units in (staged.everything(params), keep))
    assert clock.predicted(search, every) == 1
    assert clock.predicted(search, job.counts(keep)) == pytest.approx(plan.predicted.speedup)
    rows = {"all": every, "cut": cut}
    monkeypatch.setattr(clock, "RUNS", {"prefill": 4})
    found = clock.timed(params, rows, 2)
    assert found["cut"]["prefill"]["speedup"]["median"] > 0 and list(found) == list(rows)


def test_a_line_for_each_recipe(tmp_path):
    assert clock.family("FLAP + stream -20 %") == "FLAP + stream"
    assert clock.family("heads, activations -1/3") == "heads, activations"
    assert clock.family("search 1.5 x + stream") == "search + stream"
    perplexities = {
        "search 1.5 x": 30.0,
        "search 2 x": 50.0,
        "magnitude -20 %": 1e6,
        "not timed": 20.0,
    }
    cut = {"dense": {"excerpt": 17.0}, "rows": {k: {"excerpt": x} for k, x in perplexities.items()}}
    times = {k: {"prefill": {"speedup": {"median": 1.5}}} for k in [*perplexities][:3]}
    figure = clock.plot(cut, times, tmp_path / "times.png")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["search", "dense"] and (tmp_path / "times.png").stat().st_size > 5000


def test_predictions_between_counts_are_linear():
    term = Term((0, 1), np.outer([1.0, 3.0], [1.0, 2.0, 4.0]))
    model = types.SimpleNamespace(
        names=["blocks/0/a", "blocks/1/a"],
        counts=[np.array([4, 8]), np.array([0, 2, 4])],
        tables={"latency": Total([term, Term((1,), np.array([0.0, 2.0, 4.0]))], 2, 1.0)},
    )
    found = clock.predicted(types.SimpleNamespace(model=model), {"a": [6, 1]})
    assert found == pytest.approx((12 + 4 + 1) / (2 * 1.5 + 1 + 1))


# -- single weights


@pytest.mark.parametrize("method", oneshot.METHODS)
def test_every_method_prunes_all_kernels_alike(params, tokens, method):
    drift = 0.0 if method in oneshot.UNCORRECTED else 0.5
    pruned, about = oneshot.prune_model(params, tokens, method, "2:4", 0.01, drift)
    for p, q in zip(params["blocks"], pruned["blocks"], strict=True):
        for name, w in q.items():
            gone = float(jnp.mean(w == 0))
            assert gone == (0.5 if w.ndim == 2 else 0.0), name
            assert ("refit" in method) <= (w.ndim < 2 or not np.isin(w[w != 0], p[name]).all())
    assert pruned["embedding"] is params["embedding"]
    grams = method.endswith("refit") or method in ("sparsegpt", "alps")
    assert ("layer_error" in about) == grams


def test_permutation_keeps_the_function_and_more_score(params, tokens, monkeypatch):
    p, x = params["blocks"][0], params["embedding"][tokens]
    stats = jp.calibrate(smollm2.block, p, [x], grams=False)
    permute, seen = jp.oneshot.permute, []

    def spy(*args, **options):
        seen.append(permute(*args, **options))
        return seen[-1]

    monkeypatch.setattr(jp.oneshot, "permute", spy)
    pruned, _ = oneshot.permuted_wanda(p, stats, "2:4", 0.01)
    ((moved, orders),) = seen
    np.testing.assert_allclose(smollm2.block(moved, x), smollm2.block(p, x), rtol=1e-4, atol=1e-4)
    order = orders[oneshot.HIDDEN]
    assert sorted(order.tolist()) == list(range(HIDDEN)) != order.tolist()
    plain, _ = oneshot.METHODS["wanda"](p, stats, "2:4", 0.01)
    norms = stats.norms["down"][:, None]

    def kept(w, by):
        return float(jnp.sum(jnp.abs(w) * by))

    assert kept(pruned["down"], norms[order]) > 1.01 * kept(plain["down"], norms)


class Letters:
    def encode(self, text):
        return types.SimpleNamespace(ids=[ord(c) for c in text])


def test_mixed_calibration_loses_no_page(monkeypatch, tmp_path):
    """The first half is what the pages alone give; the other half is of the other domain."""
    (tmp_path / "page.rst.txt").write_text("documentation " * 999)
    monkeypatch.setattr(texts, "DOCS", tmp_path)
    monkeypatch.setattr(texts, "verb_glosses", lambda: "verb " * 9999)
    monkeypatch.setattr(texts, "docs", lambda part: [tmp_path / "page.rst.txt"])
    alone = oneshot.calibration(Letters(), False, 4)
    mixed = oneshot.calibration(Letters(), True, 8)
    assert alone.shape == (4, oneshot.LENGTH) and (mixed[:4] == alone).all()
    assert "".join(map(chr, mixed[5])).startswith(("verb", "erb", "rb", "b", " "))


def test_sparsegpt_is_timed_beside_the_products_it_needs():
    found = oneshot_time.study(size=64, tokens=128, rounds=3)
    timings = found["timings"]
    assert set(timings) == {"gram and factor", "sparsegpt"}
    beside, ours = (timings[n]["samples_seconds"] for n in ("gram and factor", "sparsegpt"))
    speedup = np.median(np.divide(beside, ours))
    np.testing.assert_allclose(found["sparsegpt_over_gram_and_factor"], 1 / speedup)
    w = jax.random.normal(jax.random.key(0), (64, 64))
    pruned, mask = oneshot_time.solve(w, jnp.eye(64))
    assert float(mask.mean()) == 0.5 == float((pruned == 0).mean())
    assert oneshot_time.compile_seconds(16) > 0
    large = oneshot_time.large((64, 32))
    assert large["density"] == 0.5 and large["bytes"]["argument"] == 4 * (64 * 32 + 64 * 64)
