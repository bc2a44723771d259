"""The speed benchmarks: their networks, and what they conclude from numbers."""

import dataclasses
import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.common import data, results
from benchmarks.models import speed as speed_models
from benchmarks.studies.speed import accuracy as speed_accuracy
from benchmarks.studies.speed import solver as solver_speed
from benchmarks.studies.speed import speed

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


def test_the_solver_is_timed_on_a_deep_network():
    found = solver_speed.study(2, (1.5,))
    assert found["dimensions"] > 8 and found["candidates"] > found["dimensions"]
    assert found["seconds"]["1.5 x"] > 0


# -- accuracy at equal speed


SETTINGS = dataclasses.replace(
    speed_accuracy.QUICK, dense_steps=4, tune_steps=2, scale=4, speedups=(1.5,), test_images=100
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    made = speed_accuracy.Trainer("residual", data.load("digits"), SETTINGS, 0)
    return made.trained(path)


@pytest.fixture
def search(trainer):
    """Time is FLOPs, and a constant that no pruning takes away: half of the time for 30 %."""
    found = jp.Search(trainer.fn, trainer.dense, trainer.structure, trainer.scores(), trainer.x,
                      round_to=1)  # fmt: skip
    found.model.tables["latency"] = found.model.tables["flops"]
    return found


def on_a_device(trainer):
    dense = jp.cost(trainer.fn, trainer.dense, trainer.x).flops

    def speedup(keep):
        small = trainer.compacted(keep)
        return 1 / (0.3 + 0.7 * jp.cost(small.fn, small.params, trainer.x).flops / dense)

    return speedup


def test_weights_are_kept(trainer, tmp_path):
    speed_accuracy.save(trainer.dense, tmp_path / "w.npz")
    again = speed_accuracy.Trainer("residual", trainer.data, SETTINGS, 0)
    chex.assert_trees_all_equal(trainer.dense, again.trained(tmp_path / "w.npz").dense)


@pytest.mark.parametrize("way", speed_accuracy.WAYS)
@pytest.mark.parametrize("asked", [1.5, 2.2])
def test_a_budget_is_bisected_until_the_speed_is_there(trainer, search, monkeypatch, way, asked):
    monkeypatch.setattr(trainer, "speedup", on_a_device(trainer))
    keep, found = speed_accuracy.at_speed(trainer, search, way, asked)
    assert found == trainer.speedup(keep)
    settings = dataclasses.replace(SETTINGS, attempts=8)
    monkeypatch.setattr(trainer, "settings", settings)
    keep, closer = speed_accuracy.at_speed(trainer, search, way, asked)
    assert abs(np.log(closer / asked)) <= min(0.08, abs(np.log(found / asked)))
    assert set(keep) == set(search.model.names)


def test_a_speed_that_no_budget_gives(trainer, search, monkeypatch):
    monkeypatch.setattr(speed_accuracy, "kept_at", lambda *args: None)
    with pytest.raises(ValueError, match="time: no budget of 2 tried can be met"):
        speed_accuracy.at_speed(trainer, search, speed_accuracy.TIME, 2.0)


def test_stages_go_on_where_they_stopped(tmp_path, monkeypatch):
    """Each stage once; a clock is asked, and decides nothing."""
    monkeypatch.setattr(speed_accuracy, "QUICK", SETTINGS)
    monkeypatch.setattr(speed_accuracy.data, "load", lambda load=data.load: load("digits"))
    monkeypatch.setattr(speed_accuracy.Trainer, "speedup", lambda self, keep: 1.5)
    half = lambda model: np.array([len(c) // 2 for c in model.counts])  # noqa: E731
    monkeypatch.setattr(
        speed_accuracy, "kept_at", lambda search, *args: search.choices.keep(half(search.model))
    )
    monkeypatch.setattr(jp.Search, "_time", lambda self: None)
    where = ["--results", str(tmp_path), "--weights", str(tmp_path / "w")]
    ran, run = [], speed_accuracy.run
    monkeypatch.setattr(
        speed_accuracy, "run", lambda stage, *a: ran.append(stage) or run(stage, *a)
    )
    for stages in (["train"], ["plan", "tune"], [*speed_accuracy.STAGES]):
        args = ["speed_accuracy", "--quick", "--networks", "residual", "--objective", "balanced"]
        monkeypatch.setattr(sys, "argv", [*args, *where, "--stages", *stages])
        speed_accuracy.main()
    assert ran == ["train", "plan", "tune", "time"]
    found = json.loads((results.folder(tmp_path) / "speed_accuracy-quick.json").read_text())
    (network,) = found["networks"]["residual, balanced"].values()
    assert [row["way"] for row in network["rows"]] == list(speed_accuracy.WAYS)
    assert all(0 <= r["accuracy"] <= 1 and r["speedup"]["median"] > 0 for r in network["rows"])
    widths = {tuple(map(tuple, row["kept"].values())) for row in network["rows"]}
    assert len(widths) == 1  # all keep half here
    assert len({row["accuracy"] for row in network["rows"]}) == 1  # and are tuned alike


def test_seeds_are_averaged_and_ways_paired():
    one = {"asked": 2.0, "flops": 4, "speedup": {"median": 2.0}}
    seeds = {
        s: {
            "dense": 0.9,
            "rows": [one | {"way": w, "accuracy": a} for w, a in (("time", t), ("FLOPs", f))],
        }
        for s, (t, f) in {"1": (0.8, 0.7), "2": (0.9, 0.86)}.items()
    }
    found = speed_accuracy.summary(seeds)
    assert found["rows"][0]["accuracy"] == pytest.approx(0.85)
    (difference,) = found["differences"]
    assert difference["pair"] == ["time", "FLOPs"]
    assert difference["mean"] == pytest.approx(0.07) and difference["error"] == pytest.approx(0.03)
    assert "error" not in speed_accuracy.paired([0.5], [0.25])
