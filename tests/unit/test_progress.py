"""Progress: silent when quick, a bar or lines when slow, the wish of the caller in every case."""

import functools
import io
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp
from jaxprune import _progress
from jaxprune._progress import Row, track, working


@pytest.fixture
def at_once(monkeypatch):
    """Draws from the beginning, and often."""
    monkeypatch.setattr(_progress, "DELAY", 0.0)
    monkeypatch.setattr(_progress, "PERIOD", 0.01)
    monkeypatch.setattr(_progress, "REFRESH", 0.01)


class Terminal(io.StringIO):
    """What a program prints to a terminal."""

    def isatty(self):
        return True


def wait_for(found):
    """Waits until the drawing thread has done something, but not for ever."""
    for _ in range(500):
        if found():
            return
        _progress.threading.Event().wait(0.01)
    raise AssertionError("nothing was drawn")


def test_quick_work_prints_nothing(capsys):
    assert list(track(range(3), "counting")) == [0, 1, 2]
    with working("thinking"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_lines_that_name_the_work_the_item_and_what_is_left(at_once, monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with working("search for 2 x"):
        for k in track("abc", "timing", label=lambda item: f"item {item}"):
            if k == "b":
                wait_for(lambda: "item b" in log.getvalue())
    line = next(line for line in log.getvalue().splitlines() if "item b" in line)
    assert line.startswith("jaxprune: search for 2 x 0:00 | timing 1 of 3 0:00, 0:00 left item b")


def test_a_log_is_not_flooded(at_once, monkeypatch):
    monkeypatch.setattr(_progress, "PERIOD", 60.0)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    for _ in track(range(2000), "timing"):
        if not log.getvalue():
            wait_for(log.getvalue)
    assert len(log.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_bar_which_goes_when_it_ends(at_once, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    for k in track("ab", "timing", label=str):
        if k == "b":
            wait_for(lambda: "1 of 2" in terminal.getvalue())
    assert "timing" in terminal.getvalue() and "━" in terminal.getvalue()
    assert "\x1b[2K" in terminal.getvalue().splitlines()[-1]  # The line is erased.


def test_a_notebook_gets_a_text_that_is_updated_and_emptied(at_once, monkeypatch):
    shown = []
    handle = types.SimpleNamespace(update=lambda text: shown.append(repr(text)))
    fake = types.SimpleNamespace(display=lambda text, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(_progress, "_way", lambda: _progress._notebook)
    with working("search"):
        for _ in track("ab", "timing"):
            wait_for(lambda: any("timing" in text for text in shown))
    assert shown[-1] == "" and any("search" in text and "\ntiming" in text for text in shown)


def test_silence_and_a_function_of_the_callers(at_once, monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    assert list(track([1, 2], "counting", False)) == [1, 2]
    assert list(track([1, 2], "counting", lambda items: (2 * k for k in items))) == [2, 4]
    for progress in (False, list):
        with working("thinking", progress):
            pass
    assert not log.getvalue() and _progress._display is None


def test_other_processes_than_the_first_are_silent(at_once, monkeypatch):
    monkeypatch.setattr(_progress.jax, "process_index", lambda: 1)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with working("thinking"):
        _progress._display.thread.join()
    assert not log.getvalue()


@pytest.mark.parametrize("use", [lambda p: track([], "", p), lambda p: working("", p).__enter__()])
def test_another_kind_of_progress_is_an_error(use):
    with pytest.raises(TypeError, match="progress is 3; wanted None or True for a bar, False for"):
        use(3)


def test_the_display_ends_with_an_error_or_a_break():
    with pytest.raises(ZeroDivisionError), working("dividing"):
        1 / 0  # noqa: B018
    for _ in track(range(3), "counting"):
        break
    assert _progress._display is None


@pytest.mark.parametrize(
    "done, total, took, times",
    [
        (0, None, 61.2, "1:01"),
        (0, 4, 3.0, "0:03"),
        (1, 4, 30.0, "0:30, 1:30 left"),
        (1, 300, 30.0, "0:30, 2:29:30 left"),
    ],
)
def test_the_time_left_is_as_long_as_items_took(monkeypatch, done, total, took, times):
    monkeypatch.setattr(_progress.time, "monotonic", lambda: 100.0 + took)
    assert Row("timing", total, done, began=100.0).times() == times


# -------------------------------------------------------------------------------- public calls

PARAMS = {"up": jnp.arange(24.0).reshape(3, 8) / 24, "down": jnp.ones((8, 2))}
X = jnp.arange(12.0).reshape(4, 3)
HALF = jp.Target(params=0.5)


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def loss(p, x):
    return fn(p, x).sum()


@functools.cache
def known():
    """(structure, scores, statistics, masks) of the network."""
    structure, scores = jp.infer_structure(fn, PARAMS, X), jp.magnitude(PARAMS)
    stats = jp.calibrate(fn, PARAMS, [X], progress=False)
    return structure, scores, stats, jp.unstructured()(scores, 0.5)


def rounds(progress):
    tx = jp.training.static(optax.sgd(0.1), 0.0)
    train = lambda params, state, start, stop: (params, state)  # noqa: E731
    return list(jp.training.iterative(train, tx, PARAMS, 0.5, rounds=1, steps=1, progress=progress))


def checked(progress):
    structure, *_ = known()
    masks = structure.masks({"up:1": jnp.arange(8) < 2})
    return jp.compact(fn, PARAMS, masks, X).certificate.check(progress=progress)


def of_batches(call, **options):
    return lambda progress: call(loss, PARAMS, [(X,)], progress=progress, **options)


def of_stats(call, *args):
    return lambda progress: call(PARAMS, known()[2], 0.5, *args, progress=progress)


def of_masks(call):
    return lambda progress: call(PARAMS, known()[3], known()[2], progress=progress)


def searched(call, **options):
    def run(progress):
        structure, scores, *_ = known()
        return call(fn, PARAMS, structure, scores, X, round_to=1, progress=progress, **options)

    return run


def measured(p):
    return float(fn(p, X).sum())


CALLS = {
    "benchmark": lambda progress: jp.benchmark(fn, PARAMS, X, repeats=2, progress=progress),
    "compare": lambda progress: jp.compare({"a": (fn, (PARAMS, X))}, repeats=2, progress=progress),
    "calibrate": lambda progress: jp.calibrate(fn, PARAMS, [X], progress=progress),
    "activity": lambda progress: jp.scores.activity(fn, PARAMS, [(X,)], progress=progress),
    "mean_gradient": of_batches(jp.scores.evidence.mean_gradient),
    "gradient_flow": of_batches(jp.scores.evidence.gradient_flow),
    "fisher_diagonal": of_batches(jp.scores.evidence.fisher_diagonal),
    "hessian": of_batches(jp.scores.evidence.hessian_diagonal, key=jax.random.key(0)),
    "sparsegpt": of_stats(jp.oneshot.sparsegpt),
    "alps": of_stats(jp.oneshot.alps),
    "obc": of_stats(jp.oneshot.obc),
    "dsnot": of_masks(jp.oneshot.dsnot),
    "refit": of_masks(jp.oneshot.refit),
    "least_squares": of_masks(jp.oneshot.least_squares),
    "sequential": lambda progress: jp.oneshot.sequential(
        lambda p, x: jnp.tanh(x @ p["w"]), [{"w": jnp.eye(3)}], [X],
        lambda p, stats: (p, {"w": jnp.asarray(True)}), progress=progress,
    ),
    "permute": lambda progress: jp.oneshot.permute(
        fn, PARAMS, known()[0], known()[1], X, sweeps=1, progress=progress
    ),
    "iterative": rounds,
    "check": checked,
    "sensitivity": lambda progress: jp.sensitivity(
        PARAMS, known()[0], known()[1], metric=measured, fractions=(0.5,), progress=progress
    ),
    "pareto": searched(jp.pareto, targets=[HALF], verify=False),
    "prune_to_metric": searched(jp.prune_to_metric, metric=measured, floor=-1e9, bisections=1),
}  # fmt: skip


class Recorder:
    """In place of a display: what was shown."""

    every: list = []

    def __init__(self, rows):
        self.rows = self

    def append(self, row):
        self.every.append(row.what)

    def remove(self, row):
        pass

    def end(self):
        pass


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(_progress, "_Display", Recorder)
    monkeypatch.setattr(Recorder, "every", found := [])
    known()
    found.clear()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_long_call_shows_what_it_does_unless_told_otherwise(shown, name):
    CALLS[name](None)
    assert shown
    shown.clear()
    CALLS[name](False)
    assert not shown
    wrapped = []
    CALLS[name](lambda items: wrapped.append(items) or items)
    assert wrapped and not shown


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_long_call_refuses_a_progress_of_another_kind(name):
    with pytest.raises(TypeError, match="progress is 'tqdm'; wanted None or True for a bar"):
        CALLS[name]("tqdm")


def test_a_search_shows_what_it_does_unless_told_otherwise(shown):
    structure, scores, *_ = known()
    for progress, wanted in [(None, True), (False, False), (list, False)]:
        jp.search(fn, PARAMS, structure, scores, X, target=HALF, round_to=1, progress=progress)
        assert ("search for Target(params=0.5)" in shown) is wanted
        shown.clear()
    with pytest.raises(TypeError, match="progress is 3; wanted None or True"):
        jp.search(fn, PARAMS, structure, scores, X, target=HALF, progress=3)
