"""Times of groups: kept in a table, and measured by a clock that stalls."""

import datetime
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import clock, latency, model


def ticking(*seconds):
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
        jp.budget.LatencyTable(tmp_path / "t.json").measure({"a": ticking(1.0), "b": fails})
    assert jp.budget.LatencyTable(tmp_path / "t.json").seconds == {"a": 1.0}


def test_a_table_from_elsewhere(tmp_path):
    table = jp.budget.LatencyTable(tmp_path / "t.json")
    table.identity["jax"] = "0.1"
    table.measure({"a": ticking(1.0)})
    with pytest.raises(
        ValueError, match=r"measured elsewhere \(jax: '0.1' there.*jp.budget.LatencyTable"
    ):
        jp.budget.LatencyTable(tmp_path / "t.json")


def fake_clock(monkeypatch, turn, hiccups=()):
    """A program of which each turn takes so many seconds; its first runs last longer."""
    now, hiccups = [0.0], iter(hiccups)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def run(count):
        now[0] += turn * int(count) + next(hiccups, 0.0)
        return jnp.zeros(())

    return types.SimpleNamespace(compile=lambda: run)


@pytest.mark.parametrize("turn", [1e-6, 1e-3, 0.1])
def test_seconds_of_one_turn(monkeypatch, turn):
    assert clock.Loop(fake_clock(monkeypatch, turn), list)() == pytest.approx(turn)


def test_a_first_run_that_was_interrupted_is_made_up_for(monkeypatch):
    timer = clock.Loop(fake_clock(monkeypatch, 1e-6, hiccups=(0.0, 0.01)), list)
    assert timer() > 1e-3 and timer() == pytest.approx(1e-6)


def test_a_group_is_compiled_at_a_width_and_timed():
    fn = lambda p, x: (x @ p["w"]).sum()  # noqa: E731
    params, x = {"w": jnp.ones((8, 16))}, jnp.ones((4, 8))
    structure = jp.infer_structure(fn, params, x)
    made = model.build(fn, params, (x,), structure, ["w:1"], 8, {})
    dot = next(g for g in made.groups if g.steps[0].name == "dot_general")
    assert clock.time_group(dot, {made.axes[0]: 8})() > 0


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": {}}', '{"identity": 1}', "\x00"])
def test_a_corrupt_table_is_named(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"table .*t.json can't be read .*; delete it to measure"):
        jp.budget.LatencyTable(tmp_path / "t.json")


# --------------------------------------------------------------------------- what can be trusted


@pytest.fixture
def machine(monkeypatch):
    """A machine whose load and date a test sets."""
    state = types.SimpleNamespace(load=0.5, now=datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC))
    monkeypatch.setattr(latency, "load", lambda: state.load)
    monkeypatch.setattr(latency, "now", lambda: state.now)
    return state


def test_a_time_is_kept_with_when_at_which_load_and_how_far_it_scatters(machine, tmp_path):
    machine.load = 2.0
    jp.budget.LatencyTable(tmp_path / "t.json").measure({"a": ticking(1.0, 2.0, 3.0)})
    entry = jp.budget.LatencyTable(tmp_path / "t.json").entries["a"]
    assert entry == latency.Entry(1.0, "2030-01-01T00:00:00+00:00", 2.0, pytest.approx(0.5))
    assert entry.noisy and not entry.stale


def test_an_unknown_load_is_written_and_read(machine, tmp_path):
    machine.load = math.nan
    jp.budget.LatencyTable(tmp_path / "t.json").measure({"a": ticking(1.0)})
    entry = jp.budget.LatencyTable(tmp_path / "t.json").entries["a"]
    assert math.isnan(entry.load) and not entry.noisy


def test_samples_are_taken_until_they_agree():
    taken = {"a": 0, "b": 0}

    def counting(name, *seconds):
        times = itertools.cycle(seconds)
        return lambda: lambda: taken.update({name: taken[name] + 1}) or next(times)

    table = jp.budget.LatencyTable(False)
    table.measure({"a": counting("a", 1.0), "b": counting("b", 1.0, 3.0)})
    assert taken == {"a": latency.PASSES[0], "b": latency.PASSES[1]}


@pytest.mark.parametrize("why", ["busy", "scattering", "old"])
def test_a_time_that_cannot_be_trusted_is_taken_again_once_it_is_quieter(machine, tmp_path, why):
    machine.load = 3.0 if why == "busy" else 0.5
    samples = (1.0, 2.0) if why == "scattering" else (2.0,)
    jp.budget.LatencyTable(tmp_path / "t.json").measure({"a": ticking(*samples)})
    machine.now += datetime.timedelta(days=365 if why == "old" else 1)
    again = jp.budget.LatencyTable(tmp_path / "t.json")
    if why != "old":
        machine.load = 3.0
        again.measure({"a": ticking(0.9)})
        assert again.seconds["a"] != 0.9 and again.doubtful(["a"]) == ["a"]
    machine.load = 0.5
    again.measure({"a": ticking(0.9)})
    assert again.seconds == {"a": 0.9} and not again.doubtful(["a"])


def test_a_time_is_taken_again_once_a_process():
    table, compiled = jp.budget.LatencyTable(False), []
    wanted = {"a": lambda: compiled.append("a") or functools.partial(next, iter([1.0, 9.0] * 9))}
    table.measure(wanted)
    table.measure(wanted)
    assert compiled == ["a"] and table.doubtful(["a", "unknown"]) == ["a"]


def test_a_file_of_the_older_format_is_measured_anew_with_a_message(tmp_path):
    table = jp.budget.LatencyTable(tmp_path / "t.json")
    text = json.dumps({"identity": table.identity, "seconds": {"a": 1.5}})
    (tmp_path / "t.json").write_text(text)
    with pytest.warns(UserWarning, match="doesn't say at which load its 1 times were taken: they"):
        table = jp.budget.LatencyTable(tmp_path / "t.json")
    table.measure({"a": ticking(2.0)})
    assert jp.budget.LatencyTable(tmp_path / "t.json").seconds == {"a": 2.0}


def test_progress_wraps_what_is_timed_and_sees_it_timed_one_after_another():
    seen, table = [], jp.budget.LatencyTable(False)

    def watch(names):
        for name in names:
            seen.append((name, len(table)))
            yield name

    table.measure({"a": ticking(1.0), "b": ticking(1.0)}, watch)
    assert seen == [("a", 0), ("b", 0)]


@pytest.mark.slow
def test_a_table_that_is_timed_under_load_says_so(monkeypatch):
    """Twice as many busy processes as cores; the load average of a minute is made to follow."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(2 * os.cpu_count())]
    try:
        monkeypatch.setattr(latency, "load", lambda: len(busy) / os.cpu_count())
        table, x = jp.budget.LatencyTable(False), jnp.ones((64, 64))
        loop = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: y @ x, x))
        table.measure({"dot": lambda: clock.Loop(loop.lower(np.int32(1), x), lambda: [x])})
    finally:
        for process in busy:
            process.kill()
            process.wait()
    entry = table.entries["dot"]
    assert entry.load == 2 and entry.spread >= 0 and table.doubtful(["dot"]) == ["dot"]
