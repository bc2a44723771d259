"""Operations timed in another runtime: as programs of their own, weights held."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import calls, latency
from tests.helpers import engines

W = {"up": jnp.ones((3, 16)), "down": jnp.ones((16, 2))}
X = jnp.ones((2, 3))


def net(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


@pytest.fixture
def plain(monkeypatch):
    calls._call.cache_clear()
    monkeypatch.setattr(calls, "ROUND", 1e-5)
    return engines.runtime()


def searched(runtime, **options):
    structure = jp.infer_structure(net, W, X)
    table = options.pop("table", jp.budget.LatencyTable(False, runtime=runtime))
    return jp.Search(
        net, W, structure, jp.magnitude(W), X, runtime=runtime, table=table, repeats=2, round_to=8,
        **options,
    )  # fmt: skip


def test_a_search_runs_there_whole(plain, monkeypatch):
    compiled, make = [], type(plain).__call__

    def spy(self, fn, *args, **options):
        compiled.append([np.shape(x) for x in args if not isinstance(x, dict)])
        return make(self, fn, *args, **options)

    monkeypatch.setattr(type(plain), "__call__", spy)
    search = searched(plain)
    plan = search.plan(jp.Target(latency=1e9))
    assert plan.measured.latency > 0
    # Products read activations, and hold their weights: no argument has a weight's shape.
    assert compiled and not {(3, 16), (16, 2), (3, 8), (8, 2)} & {s for c in compiled for s in c}


def test_what_is_made_of_params_alone_costs_nothing(plain):
    groups = [g for g in searched(plain).model.groups if g.weights and g.runs]
    assert groups and all(len(g.weights) == 1 for g in groups)
    import dataclasses

    alone = dataclasses.replace(groups[0], weights=frozenset(groups[0].ins))
    assert calls.time_group(plain, alone, {})() == calls.NOTHING


def test_an_operation_that_has_nothing_to_quantise_is_timed_in_float(monkeypatch):
    def write(frozen, path, options):
        if options.quantize:
            raise jp.runtimes.NothingQuantized("nothing")
        engines.write(frozen, path, options)

    runtime = jp.runtimes.Runtime(
        engines.ENGINE._replace(write=write), jp.runtimes.Options("dynamic")
    )
    run = calls._compiled(runtime, lambda x: x + 1, [np.ones(2, np.float32)])
    np.testing.assert_array_equal(run(np.ones(2, np.float32)), [2, 2])


def test_a_call_of_nothing_is_taken_off():
    timer = calls.Calls(lambda: lambda: None, lambda: 10.0)
    assert 0 < timer() < 1e-3  # at least a part of it is left


def test_the_table_is_of_the_engine_its_versions_and_bits(tmp_path, plain, monkeypatch):
    path = tmp_path / "t.json"
    table = jp.budget.LatencyTable(path, runtime=plain)
    assert table.identity["runtime"] == "plain (plain 1.0)"
    table.save()
    monkeypatch.setitem(engines.VERSIONS, "plain", "2.0")
    with pytest.raises(ValueError, match=r"'plain \(plain 1.0\)' there, 'plain \(plain 2.0\)' her"):
        jp.budget.LatencyTable(path, runtime=plain)
    with pytest.raises(ValueError, match="measured elsewhere"):
        jp.budget.LatencyTable(path, runtime=engines.runtime(quantize="dynamic"))
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path))
    names = {latency.default_path(latency.identity_of(r)) for r in (None, plain)}
    assert len(names) == 2
    assert "runtime" not in jp.budget.LatencyTable(False).identity
    assert "runtime" not in jp.budget.LatencyTable(False, runtime=jp.runtimes.xla()).identity


BAD = [
    ({"runtime": "onnx"}, TypeError, r"runtime is 'onnx'; write runtime=jp.runtimes.onnx\(\)"),
    ({"device": "h100"}, ValueError, "device='h100' estimates the times of XLA, and runtime is"),
    (
        {"table": jp.budget.LatencyTable(False)}, ValueError,
        r"times were taken in XLA, and the search is for plain .*LatencyTable\(path, runtime=",
    ),
]  # fmt: skip


@pytest.mark.parametrize("change, error, match", BAD)
def test_options_that_contradict(plain, change, error, match):
    options = {"runtime": plain, "table": None} | change
    structure = jp.infer_structure(net, W, X)
    with pytest.raises(error, match=match):
        jp.Search(net, W, structure, jp.magnitude(W), X, **options)
