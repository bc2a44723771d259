"""The speed benchmarks: their networks, and what they conclude from numbers."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks import data, results, speed, speed_accuracy, speed_models
from jaxprune.budget.search import Search

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


# -- networks


@pytest.mark.parametrize("name", ["small ResNet", "small GPT, decode after 16", "small LSTM"])
def test_half_of_every_width_is_the_network_written_at_half(name):
    network = speed.Network(speed_models.QUICK[name](), "float32")
    half = network.compact(network.half())
    x = network.x
    native = jax.eval_shape(network.case.half.init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, native) == jax.tree.map(np.shape, half.params)
    masked = jax.jit(network.fn)(jp.apply_masks(network.params, network.half()), x)
    np.testing.assert_allclose(jax.jit(half.fn)(half.params, x), masked, atol=1e-4)
    # Not the function written by hand where a mean goes over the kept units only: time is equal.
    assert jax.eval_shape(network.case.half.apply, half.params, x).shape == masked.shape


def test_a_cache_of_past_tokens_loses_its_heads_but_no_tokens():
    network = speed.Network(speed_models.QUICK["small GPT, decode after 16"](), "float32")
    small = network.compact(network.half())
    assert small.params["params"]["TransformerBlock_0"]["Attention_0"]["keys"].shape == (
        1,
        16,
        2,
        8,
    )


def test_decoding_after_cached_tokens_equals_the_last_token_of_all():
    """The cache holds what the same network computes for the tokens before."""
    widths = speed_models.SMALL
    whole = speed_models.GPT(50, widths, 2, 16)
    tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 50)
    params = whole.init(jax.random.key(1), tokens)
    is_projection = lambda m, _: m.name in ("key", "value")  # noqa: E731
    want, state = whole.apply(params, tokens, capture_intermediates=is_projection)
    step = speed_models.GPT(50, widths, 2, 16, cached=8)
    cached = jax.tree.map(lambda leaf: leaf, params)
    for block, found in state["intermediates"].items():
        past = {f"{n}s": found["Attention_0"][n]["__call__"][0][:, :8] for n in ("key", "value")}
        cached["params"][block]["Attention_0"] |= past
    got = step.apply(cached, tokens[:, 8:])
    np.testing.assert_allclose(got[:, 0], want[:, -1], atol=1e-5)


@pytest.mark.parametrize("which", speed.FORMATS)
def test_sparse_formats_compute_the_masked_network(which):
    network = speed.Network(speed_models.QUICK["small MLP"](), "float32")
    entries = dict(speed.sparse_entries(network))
    fn, (params, x) = entries[f"{which} in dense layers, 90% removed"]
    masks = jp.unstructured()(network.scores, speed.SPARSITY)
    want = network.fn(jp.apply_masks(network.params, masks), network.x)
    np.testing.assert_allclose(jax.jit(fn)(params, x), want, atol=1e-5)


def test_a_network_without_dense_layers_has_no_sparse_row():
    network = speed.Network(speed_models.QUICK["small GPT, decode after 16"](), "float32")
    assert speed._converted(network.params, jnp.asarray)[1] == 4  # of two blocks
    assert speed._converted({"Conv_0": {"kernel": jnp.ones((2, 2))}}, jnp.asarray)[1] == 0


# -- what is concluded


def row(speedup, score):
    return {"speedup": {"median": speedup}, "score": score}


def test_scores_are_compared_at_equal_time():
    rows = {
        "dense": {"speedup": {"median": 1.0}},
        "uniform 2 x": row(2.0, 0.5), "uniform 4 x": row(4.0, 0.1),
        "search 3 x": row(8 / 3, 0.45), "search 5 x": row(5.0, 0.3),
        "search 1.5 x": row(4 / 3, 0.9),
    }  # fmt: skip
    found = speed.equal_time(rows)
    assert [(r["search"], round(r["uniform"], 6)) for r in found] == [(0.45, 0.3), (0.9, 0.75)]


def test_the_quick_command_writes_every_row(tmp_path, monkeypatch):
    met, plan = jp.Target(latency=1e3), speed._plan  # whatever the clock says; 1e9 x never
    for asked in ("SPEEDUPS", "UNIFORM"):
        monkeypatch.setattr(speed, asked, {"float32": (1.0, 1e9)})
    monkeypatch.setattr(
        speed,
        "_plan",
        lambda search, s, uniform: search.plan(met) if s == 1 else plan(search, s, uniform),
    )
    only = ["--only", "small MLP", "--rounds", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["speed", "--quick", *only])
    speed.main()
    found = json.loads((results.folder(tmp_path) / "speed-quick.json").read_text())
    (network,) = found["networks"].values()
    names = [speed.DENSE, speed.MASKED, speed.NAIVE, speed.HALVED, speed.NATIVE]
    sparse = [f"{name} in dense layers, 90% removed" for name in speed.FORMATS]
    assert list(network["rows"]) == [*names, "search 1 x", "uniform 1 x", *sparse]
    rows = network["rows"]
    assert rows[speed.DENSE]["speedup"]["median"] == 1 == rows[speed.DENSE]["flops_ratio"]
    assert rows[speed.HALVED]["flops"] == rows[speed.NATIVE]["flops"]
    assert rows["search 1 x"]["score"] == 1
    monkeypatch.setattr(speed, "measure", None)  # what is there isn't measured again
    speed.main()


# -- accuracy at equal speed


@pytest.fixture(scope="module")
def trainer():
    settings = dataclasses.replace(
        speed_accuracy.QUICK, dense_steps=4, tune_steps=2, widths=(8, 16), speedups=(1.0,)
    )
    return speed_accuracy.Trainer(data.load("digits"), settings, 0)


def test_every_way_is_tuned_and_timed(trainer, monkeypatch):
    ways = {
        name: speed_accuracy.WAYS[name] for name in ("time, Taylor, sum", "uniform, Taylor, sum")
    }
    monkeypatch.setattr(speed_accuracy, "WAYS", ways)
    scores = trainer.scores["Taylor"]
    search = Search(trainer.fn, trainer.dense, trainer.structure, scores, trainer.x, round_to=1)
    plan = search.plan(jp.Target(flops=0.5))
    monkeypatch.setattr(trainer, "plan", lambda way, speedup: plan)  # no clock decides
    rows = speed_accuracy.rows(trainer)
    assert [row["way"] for row in rows] == list(ways)
    assert all(0 <= row["accuracy"] <= 1 and row["speedup"]["median"] > 0 for row in rows)
    small = trainer.compacted(plan.masks)
    assert rows[0]["flops"] == jp.cost(small.fn, small.params, trainer.x).flops


def test_flops_are_tightened_until_the_speed_is_there(trainer, monkeypatch):
    """A device on which half of the FLOPs give a speed-up of 1.6 and a third gives 2."""
    dense = jp.cost(trainer.fn, trainer.dense, trainer.x).flops

    def speedup(masks):
        small = trainer.compacted(masks)
        return (dense / jp.cost(small.fn, small.params, trainer.x).flops) ** 0.63

    monkeypatch.setattr(jp.LatencyTable, "alignment", lambda self, dtype: 1)
    monkeypatch.setattr(trainer, "speedup", speedup)
    monkeypatch.setattr(trainer, "settings", dataclasses.replace(trainer.settings, attempts=5))
    plan = trainer.plan(("magnitude", "sum", speed_accuracy.FLOPS), 2.0)
    assert 1.98 <= speedup(plan.masks) < 2.4
    monkeypatch.setattr(trainer, "speedup", lambda masks: 1.0)
    monkeypatch.setattr(trainer, "settings", dataclasses.replace(trainer.settings, attempts=2))
    with pytest.raises(ValueError, match="no FLOPs of 2 tried give 2.0 x"):
        trainer.plan(("magnitude", "sum", speed_accuracy.FLOPS), 2.0)


def test_seeds_are_averaged():
    one = {"way": "time", "asked": 2.0, "flops": 4, "speedup": {"median": 2.0}}
    seeds = {
        s: {"dense": 0.9, "rows": [one | {"accuracy": a}]} for s, a in {"1": 0.8, "2": 0.9}.items()
    }
    (found,) = speed_accuracy.summary(seeds)
    assert found["accuracy"] == pytest.approx(0.85) and found["accuracies"] == [0.8, 0.9]
