"""Times of groups: kept in a table, and measured by a clock that stalls."""

import functools
import itertools

import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune.budget import latency, model


def clock(*seconds):
    """Compiles to a timer that gives these seconds in turn."""
    return lambda: functools.partial(next, itertools.cycle(seconds))


def test_a_table_is_read_and_not_measured_again(tmp_path):
    compiled = []
    wanted = {name: lambda name=name: compiled.append(name) or (lambda: 1.5) for name in "ab"}
    jp.budget.LatencyTable(tmp_path / "t.json").measure(wanted)
    again = jp.budget.LatencyTable(tmp_path / "t.json")
    again.measure(wanted)
    assert compiled == ["a", "b"] and again.seconds == {"a": 1.5, "b": 1.5}


def test_the_least_of_passes_over_everything_counts():
    """A machine that is slow during the first pass: nothing of it is left."""
    passes = []
    wanted = {n: lambda n=n: lambda: passes.append(n) or (9.0, 1.0)[len(passes) > 2] for n in "ab"}
    table = jp.budget.LatencyTable(False)
    table.measure(wanted)
    assert table.seconds == {"a": 1.0, "b": 1.0} and passes[:4] == ["a", "b", "a", "b"]


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "BATCH", 1)

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jp.budget.LatencyTable(tmp_path / "t.json").measure({"a": clock(1.0), "b": fails})
    assert jp.budget.LatencyTable(tmp_path / "t.json").seconds == {"a": 1.0}


def test_a_table_from_elsewhere(tmp_path):
    table = jp.budget.LatencyTable(tmp_path / "t.json")
    table.identity["jax"] = "0.1"
    table.measure({"a": clock(1.0)})
    with pytest.raises(
        ValueError, match=r"measured elsewhere \(jax: '0.1' there.*jp.budget.LatencyTable"
    ):
        jp.budget.LatencyTable(tmp_path / "t.json")


def fake_clock(monkeypatch, turn, hiccups=()):
    """A program of which each turn takes so many seconds; its first runs last longer."""
    now, hiccups = [0.0], iter(hiccups)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def run(count):
        now[0] += turn * int(count) + next(hiccups, 0.0)
        return jnp.zeros(())

    return run


@pytest.mark.parametrize("turn", [1e-6, 1e-3, 0.1])
def test_seconds_of_one_turn(monkeypatch, turn):
    assert latency.timer(fake_clock(monkeypatch, turn), list)() == pytest.approx(turn)


def test_a_first_run_that_was_interrupted_is_made_up_for(monkeypatch):
    timer = latency.timer(fake_clock(monkeypatch, 1e-6, hiccups=(0.0, 0.01)), list)
    assert timer() > 1e-3 and timer() == pytest.approx(1e-6)


def test_a_group_is_compiled_at_a_width_and_timed():
    fn = lambda p, x: (x @ p["w"]).sum()  # noqa: E731
    params, x = {"w": jnp.ones((8, 16))}, jnp.ones((4, 8))
    structure = jp.infer_structure(fn, params, x)
    made = model.build(fn, params, (x,), structure, ["w:1"], 8, {})
    dot = next(g for g in made.groups if g.steps[0].name == "dot_general")
    assert latency.time_group(dot, {made.axes[0]: 8})() > 0


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": {}}', '{"identity": 1}', "\x00"])
def test_a_corrupt_table_is_named(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"table .*t.json can't be read .*; delete it to measure"):
        jp.budget.LatencyTable(tmp_path / "t.json")
