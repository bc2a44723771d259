"""Timing: right on a known sleep, interleaved, never folded away; no tight bound on any time."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import measuring as measure
from tests.helpers import engines

SECONDS = 0.02


def sleeper(seconds=SECONDS, log=None, name=None):
    """A function of one array that takes a known time on the host."""

    def sleep(x):
        time.sleep(seconds)
        if log is not None:
            log.append(name)
        return np.asarray(x)

    return lambda x: jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


X = np.ones(2, np.float32)


def test_a_known_sleep_is_timed():
    timing = jp.benchmark(sleeper(), X, repeats=5)
    assert SECONDS <= timing.median < 5 * SECONDS
    assert timing.calls == 1  # one call is long enough for the clock
    low, high = timing.quartiles
    assert low <= timing.median <= high and len(timing.samples) == 5


def test_queued_calls_do_not_overlap():
    """Were calls of one round in flight at once, each would seem to take a part of its sleep."""
    timing = jp.benchmark(sleeper(), X, repeats=2, min_round=4 * SECONDS)
    assert timing.calls >= 2
    assert SECONDS <= timing.median < 5 * SECONDS


def test_short_functions_are_called_often_enough_for_the_clock():
    timing = jp.benchmark(jnp.sin, X, repeats=5, min_round=0.005)
    assert timing.calls > 10
    assert timing.median * timing.calls > 0.0005


def test_the_timed_work_is_not_folded_away():
    """A matrix product of arguments takes longer than one entry of it."""
    a = jnp.ones((512, 512))
    entries = {"product": (lambda a: a @ a, (a,)), "entry": (lambda a: a[0, 0], (a,))}
    assert jp.compare(entries, repeats=5).ratios["entry"].median > 2


def test_compilation_is_not_timed():
    traced = []

    def slow_to_trace(x):
        traced.append(time.sleep(0.5))
        return x + 1

    assert jp.benchmark(slow_to_trace, X, repeats=3).median < 0.1
    assert len(traced) == 1


@pytest.mark.parametrize("form", ["plain", "jitted", "compiled"])
def test_takes_functions_in_every_form(form):
    def fn(p, x):
        return p["w"] * x

    params = {"w": jnp.ones(2), "key": jax.random.key(0)}
    jitted = jax.jit(fn)
    forms = {"plain": fn, "jitted": jitted, "compiled": jitted.lower(params, X).compile()}
    timing = jp.benchmark(forms[form], params, X, repeats=2)
    assert timing.median > 0
    assert timing.arguments == ("2 leaves, 3 entries, float32 key<fry>", "float32[2]")


def test_rounds_interleave_in_changing_order():
    log = []
    entries = {name: (sleeper(0.001, log, name), (X,)) for name in "abc"}
    jp.compare(entries, repeats=8, min_round=0.0)
    rounds = [tuple(log[i : i + 3]) for i in range(len(log) - 24, len(log), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2


@pytest.mark.slow
def test_ratios_are_paired_speedups():
    entries = {"slow": (sleeper(0.03), (X,)), "fast": (sleeper(0.01), (X,))}
    c = jp.compare(entries, repeats=5)
    slow, fast = (np.array(c.timings[name].samples) for name in ("slow", "fast"))
    assert c.baseline == "slow"
    assert c.ratios["slow"] == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(c.ratios["fast"], np.quantile(slow / fast, [0.25, 0.5, 0.75]))
    assert 1.5 < c.ratios["fast"].median < 4
    swapped = jp.compare(entries, repeats=3, baseline="fast")
    assert swapped.ratios["slow"].median < 0.7


def test_a_function_is_as_fast_as_itself():
    a = jnp.ones((128, 128))
    entries = {name: (lambda a: jnp.tanh(a @ a), (a,)) for name in ("one", "again")}
    assert 0.3 < jp.compare(entries, repeats=11).ratios["again"].median < 3


def test_tables_say_what_was_measured():
    c = jp.compare({"dense": (jnp.sin, (X,)), "compact": (jnp.cos, (X,))}, repeats=3)
    head, *rows, foot = [line for line in str(c).splitlines() if not line.startswith("note:")]
    assert "median [ms]" in head and "speed-up over dense [quartiles]" in head
    assert [row.split()[0] for row in rows] == ["dense", "compact"]
    assert "1.00 x [1.00, 1.00]" in rows[0]
    assert foot == f"{jax.devices()[0].device_kind}, 3 interleaved rounds"
    assert f"on {jax.devices()[0].device_kind}, 3 rounds of" in str(c.timings["dense"])


@pytest.mark.parametrize(
    ("samples", "load", "said"),
    [
        ((1.0, 1.01, 1.02), 3.0, None),
        ((1.0, 2.0, 3.0), 3.25, "quartiles are 50% apart (load: 3.2 processes per core); time"),
        ((1.0, 2.0, 3.0), math.nan, "quartiles are 50% apart (load: unknown); time again on"),
    ],
)
def test_wide_quartiles_are_said_with_the_load(samples, load, said):
    timing = jp.measuring.Timing(samples, 1, "cpu", (), load)
    ratios = {"dense": jp.measuring.Ratio(1.0, 1.0, 1.0)}
    table = jp.measuring.Comparison({"dense": timing}, ratios, "dense")
    for text, start in [(str(timing), "note: "), (str(table), "note: dense: ")]:
        assert ("note" not in text) if said is None else (start + said in text)
    assert timing.to_json()["load"] == (None if math.isnan(load) else load)


def test_everything_goes_into_json():
    c = jp.compare({"dense": (jnp.sin, (X,))}, repeats=3)
    found = json.loads(json.dumps(c.to_json(), allow_nan=False))
    assert found["environment"]["jax"] == jax.__version__
    assert found["environment"]["cpu_count"] >= 1
    assert {"device", "platform", "python", "jaxlib", "numpy"} <= found["environment"].keys()
    dense = found["timings"]["dense"]
    assert dense["samples_seconds"] == list(c.timings["dense"].samples)
    assert dense["median_seconds"] == c.timings["dense"].median
    assert dense["speedup"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert dense["arguments"] == ["float32[2]"]


def test_environment_names_the_device():
    assert measure.environment()["device"] == jax.devices()[0].device_kind


ERRORS = {
    "no function": (lambda: jp.benchmark(3, X), TypeError, "jp.benchmark wants a function.* int 3"),
    "no arguments": (lambda: jp.benchmark(jnp.sin), ValueError, "no arguments .* fold away"),
    "static argument": (
        lambda: jp.benchmark(jnp.sum, X, "train"),
        TypeError,
        r"argument 1 holds str 'train'; close over .* lambda params, x: fn\(params, x, 'train'\)",
    ),
    "shape only": (
        lambda: jp.benchmark(jnp.sin, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}),
        TypeError,
        r"argument 0/w is ShapeDtypeStruct.*make one, jnp.zeros\(x.shape, x.dtype\)",
    ),
    "donation": (
        lambda: jp.benchmark(jax.jit(lambda x: x + 1, donate_argnums=0), jnp.array(X)),
        ValueError,
        "donates its arguments.*jit it without donate_argnums",
    ),
    "repeats": (
        lambda: jp.benchmark(jnp.sin, X, repeats=0),
        ValueError,
        "wants repeats >= 1, got 0",
    ),
    "repeats of compare": (
        lambda: jp.compare({"a": (jnp.sin, (X,))}, repeats=-1),
        ValueError,
        "jp.compare wants repeats >= 1, got -1",
    ),
    "no entries": (lambda: jp.compare({}), ValueError, "got no entries; write jp.compare"),
    "no dict": (lambda: jp.compare([(jnp.sin, (X,))]), TypeError, "wants a dict.* got list"),
    "bare array": (
        lambda: jp.compare({"a": (jnp.sin, X)}),
        TypeError,
        r"entry 'a' of jp.compare wants \(fn, args\) .* got \['\w+', 'ndarray'\]",
    ),
    "bare function": (lambda: jp.compare({"a": jnp.sin}), TypeError, "entry 'a' .* wants"),
    "bad entry": (
        lambda: jp.compare({"a": (jnp.sin, (None, "b"))}),
        TypeError,
        "entry 'a' of jp.compare wants arrays, argument 1 holds str 'b'",
    ),
    "baseline": (
        lambda: jp.compare({"a": (jnp.sin, (X,))}, baseline="b"),
        ValueError,
        r"baseline 'b' of jp.compare is not among \['a'\]",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_clear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_engines_take_turns_with_xla():
    """A call in an engine goes from NumPy to NumPy, with params held."""
    seen = []
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))

    def read(path, options):
        run = engines.read(path, options)

        def spy(*flat):
            seen.append([type(a) for a in flat])
            return run(*flat)

        return spy

    runtime = jp.runtimes.Runtime(engines.ENGINE._replace(read=read))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    found = jp.compare(
        {"here": (fn, (params, x)), "there": (fn, (params, x))},
        runtime={"there": runtime}, repeats=2,
    )  # fmt: skip
    assert set(map(tuple, seen)) == {(np.ndarray,)}
    assert found.timings["there"].runtime == "plain (plain 1.0)"
    assert found.timings["here"].runtime == "xla"
    assert found.to_json()["timings"]["there"]["runtime"] == "plain (plain 1.0)"
    timing = jp.benchmark(fn, params, x, repeats=1, runtime=runtime)
    assert "in plain (plain 1.0)" in str(timing) and "in plain" in timing._repr_html_()
    compiled = runtime(fn, params, x)
    assert jp.benchmark(compiled, params, x, repeats=1).runtime == "plain (plain 1.0)"
    assert jp.benchmark(fn, params, x, repeats=1, runtime=jp.runtimes.xla()).runtime == "xla"


def test_a_runtime_for_what_is_no_entry():
    with pytest.raises(ValueError, match="a runtime for 'theer', which is not among"):
        jp.compare({"here": (jnp.sin, (jnp.ones(2),))}, runtime={"theer": jp.runtimes.xla()})
