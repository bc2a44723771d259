"""A stream that is cut short anywhere goes on and ends with the same files, or says why not."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxprune as jp
from jaxprune.artefacts import files
from jaxprune.streaming import job
from tests.unit.streaming import tiny
from tests.unit.streaming.tiny import content, stream


def halved(p, stats):
    """Half of all weights, by the first statistics at hand: cheap, and of the hidden states."""
    kept = {name: np.arange(w.size).reshape(w.shape) % 2 > 0 for name, w in p.items()}
    scale = float(stats.norms["down"][0]) if stats.norms["down"] is not None else 1.0
    return {name: w * kept[name] * scale for name, w in p.items()}, kept


def thirds(p, stats):
    kept = {name: np.arange(w.size).reshape(w.shape) % 3 > 0 for name, w in p.items()}
    return {name: w * kept[name] for name, w in p.items()}, kept


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save_sharded(tmp_path_factory.mktemp("x") / "source", 2)


class Killed(BaseException):
    """Nobody catches it."""


class Writes:
    """Raises at the nth call that changes the disk; before it, or right after it."""

    def __init__(self, monkeypatch, n, after):
        self.left, self.after = n, after
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, call):
        def counted(*args, **options):
            self.left -= 1
            if self.left == 0 and not self.after:
                raise Killed
            found = call(*args, **options)
            if self.left == 0:
                self.left -= 1
                raise Killed
            return found

        return counted


def light(source, target):
    """A stream with hidden states in which little is computed."""
    names = [{"q": f"layers.{k}.q.weight"} for k in range(3)]
    return jp.oneshot.stream(
        source, target, lambda p, x: x + p["q"][0], names, tiny.TOKENS,
        lambda p, stats: (p | {"q": p["q"] * 0.5}, {"q": True}),
        embed=tiny.EMBED, where=lambda path, leaf: False, progress=False,
    ).folder  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_write(source, tmp_path, monkeypatch, after):
    """In turn at each call that changes the disk, before or after it; then it goes on."""
    want, n = content(light(source, tmp_path / "whole")), 0
    while True:
        target, n = tmp_path / f"killed at {n}", n + 1
        with monkeypatch.context() as patch:
            Writes(patch, n, after)
            try:
                light(source, target)
                break
            except Killed:
                pass
        assert content(light(source, target)) == want
    assert n > 30


@pytest.mark.slow
def test_drift_goes_on_with_both_kinds_of_hidden_states(source, tmp_path):
    options = {"error_propagation": 0.5}
    target = begun(source, tmp_path / "target", tiny_refit, **options)
    assert {p.name for p in target.glob("stream.*.safetensors")} == {
        "stream.hidden.1.safetensors", "stream.dense.1.safetensors",
    }  # fmt: skip
    want = content(stream(source, tmp_path / "whole", tiny_refit, **options).folder)
    assert content(stream(source, target, tiny_refit, **options).folder) == want


def tiny_refit(p, stats):
    masks = {n: None if w is None else np.arange(w.size).reshape(w.shape) % 2 > 0
             for n, w in p.items()}  # fmt: skip
    return jp.oneshot.refit(p, masks, stats), masks


SCRIPT = """
import sys
from pathlib import Path
from tests.unit.streaming import test_resume, tiny

print("ready", flush=True)
tiny.stream(Path(sys.argv[1]), Path(sys.argv[2]), test_resume.halved)
"""


@pytest.mark.slow
def test_a_process_that_is_killed(source, tmp_path):
    want = content(stream(source, tmp_path / "whole", halved).folder)
    target = tmp_path / "target"
    line = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(source), str(target)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    while process.poll() is None:
        state = target / "stream.json"
        if state.exists() and json.loads(state.read_text())["parts"]:
            process.send_signal(signal.SIGKILL)
    process.communicate()
    assert stream(source, target, halved).folder == target
    assert content(target) == want


def begun(source, target, prune=halved, **options):
    """A stream of which a block is done."""
    with pytest.raises(RuntimeError, match="progress passed on 1 of 3"):
        stream(source, target, prune, progress=lambda items: list(items)[:1], **options)
    return target


@pytest.mark.slow
def test_a_full_disk_is_told_and_what_is_done_stays(source, tmp_path, monkeypatch):
    want = content(stream(source, tmp_path / "whole", halved).folder)
    target = begun(source, tmp_path / "target")
    before = content(target)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        text = r"No space left on device: no room for more of .*target\. What stream.json tells of "
        with pytest.raises(OSError, match=text + "is complete; make room, and make the same") as e:
            stream(source, target, halved)
    assert e.value.errno == errno.ENOSPC
    assert content(target) == before
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "io")))
        with pytest.raises(OSError, match="io$"):
            stream(source, target, halved)
    assert content(stream(source, target, halved).folder) == want


@pytest.mark.slow
def test_other_settings_are_refused(source, tmp_path):
    target = begun(source, tmp_path / "target")
    before = content(target)
    others = {
        "prune": {"prune": thirds},
        "error_propagation": {"error_propagation": 0.25},
        "where": {"where": lambda path, leaf: path == "up"},
        "grams": {"grams": False},
        "cut": {"cut": True},
        "batches": {"batches": tiny.TOKENS[:2]},
        "embed": {"embed": (lambda p, x: 2 * p["table"][x], tiny.EMBED[1])},
        "prune, repair, order, where, grams, added": {"settings": "halved"},
    }
    for name, options in others.items():
        with pytest.raises(
            ValueError, match=rf"was begun with another .*{name}.*; pass what it was"
        ):
            stream(source, target, **{"prune": halved} | options)
    with pytest.raises(ValueError, match="was begun with another block; pass what it was begun"):
        jp.oneshot.stream(
            source, target, lambda p, x: 2 * tiny.block(p, x), tiny.NAMES, tiny.TOKENS, halved,
            embed=tiny.EMBED,
        )  # fmt: skip
    assert content(target) == before


@pytest.mark.slow
def test_settings_stand_for_functions(source, tmp_path):
    target = begun(source, tmp_path / "target", settings={"method": "halved", "share": 0.5})
    same = lambda p, stats: halved(p, stats)  # noqa: E731
    with pytest.raises(ValueError, match="was begun with another settings; pass what"):
        stream(source, target, same, settings={"method": "halved", "share": 0.6})
    stream(source, target, same, settings={"method": "halved", "share": 0.5})


@pytest.fixture
def own(tmp_path):
    """A source that a test may change."""
    return tiny.save_sharded(tmp_path / "own", 2)


def changed(folder):
    """One byte is another; how to take it back."""
    path = sorted(folder.glob("*.safetensors"))[1]
    old = path.read_bytes()
    path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    return lambda: path.write_bytes(old)


@pytest.mark.slow
def test_a_source_that_changed_since_is_refused_until_it_is_put_back(own, tmp_path):
    want = content(stream(own, tmp_path / "whole", halved).folder)
    target = begun(own, tmp_path / "target")
    back = changed(own)
    with pytest.raises(
        ValueError, match="00002.safetensors has changed since the stream to .* was"
    ):
        stream(own, target, halved)
    back()  # the stamp is new, the content is not
    assert content(stream(own, target, halved).folder) == want


@pytest.mark.slow
def test_a_source_that_changes_meanwhile_is_told(own, tmp_path):
    backs = []

    def prune(p, stats):
        if len(backs) == 0:
            backs.append(changed(own))
        return halved(p, stats)

    with pytest.raises(ValueError, match="has changed since the stream to .*put back what it was"):
        stream(own, tmp_path / "target", prune, settings="halved")
    assert not json.loads((tmp_path / "target/stream.json").read_text())["parts"]
    backs[0]()
    stream(own, tmp_path / "target", prune, settings="halved")


@pytest.mark.slow
def test_parts_and_hidden_states_that_changed_are_told(source, tmp_path):
    target = begun(source, tmp_path / "a")
    part = next(target.glob("model-00001*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match="model-00001-of-00004.safetensors is missing or has chang"
    ):
        stream(source, target, halved)
    target = begun(source, tmp_path / "b")
    next(target.glob("stream.hidden.*")).unlink()
    with pytest.raises(ValueError, match="the hidden states in .* are missing or have changed"):
        stream(source, target, halved)
    target = begun(source, tmp_path / "c")
    (target / "stream.json").write_text("{")
    with pytest.raises(ValueError, match="stream.json holds no JSON .*; remove .*c to begin anew"):
        stream(source, target, halved)
    (target / "stream.json").write_text("{}")
    with pytest.raises(ValueError, match="stream.json is no state of version 1; remove"):
        stream(source, target, halved)


@pytest.mark.slow
def test_a_finished_stream_is_left_as_it_is(source, tmp_path):
    target = stream(source, tmp_path / "target", halved).folder
    before = content(target)
    stamps = {p.name: p.stat().st_mtime_ns for p in target.glob("model-*")}
    assert len(stream(source, target, halved).densities) == 3
    assert content(target) == before
    assert {p.name: p.stat().st_mtime_ns for p in target.glob("model-*")} == stamps


def test_two_calls_do_not_share_a_target(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with (
        job.alone(target),
        pytest.raises(RuntimeError, match="another call streams to .*target; wait for it"),
    ):
        stream(source, target, halved)
