"""Files are switched in one step: whatever happens to a writer, a reader finds old or new."""

import os
import resource
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.artefacts import files, save

WHAT = {"format": "test", "version": 1}


def put(folder, number, size=1000):
    files.write(folder, "x", WHAT | {"number": number}, {"a": np.full(size, number)})


def get(folder):
    text, arrays = files.read(folder, "x", "test", 1)
    assert (arrays["a"] == text["number"]).all()
    return text["number"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from jaxprune.artefacts import files, tensors

folder = Path(sys.argv[1])

def write(number):
    text = '{"format": "test", "version": 1, "number": %d}' % number
    files._write(folder / "x", text, tensors.in_order({"a": np.full(1000, number)}))

def killed_at(n, number):
    # a process that is killed when it calls its nth C function
    if (child := os.fork()) == 0:
        calls = 0
        def hook(frame, event, argument):
            nonlocal calls
            calls += event == "c_call"
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(hook)
        write(number)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0

write(0)
before, seen, n = 0, [], 0
while killed_at(n := n + 1, n):
    found, arrays = files.read(folder, "x", "test", 1)
    assert (arrays["a"] == found["number"]).all() and found["number"] in (before, n), (n, found)
    seen.append(found["number"] == n)
    before = found["number"]
assert files.read(folder, "x", "test", 1)[0]["number"] == n
assert os.listdir(folder) == ["x"], os.listdir(folder)
print(n, seen.index(True), all(seen[seen.index(True):]))
"""


@pytest.mark.slow
def test_a_writer_killed_at_every_call(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, first, switched_once = done.stdout.split()
    assert int(count) > 60 and 30 < int(first) < int(count) and switched_once == "True"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    put(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            put(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert get(tmp_path) == 1
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_writer_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    put(tmp_path, 1)

    def fail(*args):
        raise error

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(type(error)):
        put(tmp_path, 2)
    monkeypatch.undo()
    assert get(tmp_path) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_written_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    """The file, then its name, then the folders that were made."""
    done, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", lambda *a: (done.append("replace"), replace(*a)))
    put(tmp_path / "new" / "deep", 1)
    temporary, *rest = done
    assert temporary.startswith(".x.") and temporary.endswith(".tmp")
    assert rest == ["replace", "deep", "new", tmp_path.name]


def test_leftovers_of_killed_writers_go_and_others_stay(tmp_path):
    names = {
        kind: f".x.{number}.tmp" for kind, number in zip(("dead", "alive"), ("0" * 16, "1" * 16))
    }
    others = {".y.0000000000000000.tmp", ".x.short.tmp", "plan.json", "x.tmp"}
    for name in {*names.values(), *others}:
        (tmp_path / name).write_text("")
    with open(tmp_path / names["alive"], "rb") as held:
        files._lock(held, wait=True)
        put(tmp_path, 1)
        assert {*os.listdir(tmp_path)} == {"x", names["alive"], *others}
    put(tmp_path, 2)
    assert {*os.listdir(tmp_path)} == {"x", *others}


def test_a_new_file_that_is_taken_for_a_leftover(tmp_path, monkeypatch):
    """Between its making and its lock another saver may remove it: it is made again."""
    lock, once = files._lock, [True]

    def late(file, wait):
        if wait and once.pop() if once else False:
            for found in tmp_path.glob(".x.*.tmp"):
                found.unlink()
        lock(file, wait)

    monkeypatch.setattr(files, "_lock", late)
    put(tmp_path, 1)
    assert get(tmp_path) == 1 and not once
    assert os.listdir(tmp_path) == ["x"]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    (tmp_path / ".x.0000000000000000.tmp").write_text("")
    put(tmp_path, 1)
    assert get(tmp_path) == 1
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        put(tmp_path, 1)
    assert os.listdir(tmp_path) == ["x"]


def test_the_file_has_the_usual_permissions(tmp_path):
    put(tmp_path, 1)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITER = """
import sys, numpy as np
from pathlib import Path
from jaxprune.artefacts import files, tensors
print("ready", flush=True)
number = int(sys.argv[2])
while True:
    number += 2
    text = '{"format": "test", "version": 1, "number": %d}' % number
    files._write(Path(sys.argv[1]) / "x", text, tensors.in_order({"a": np.full(1000, number)}))
"""


@pytest.mark.slow
def test_readers_beside_two_savers(tmp_path):
    """A reader finds one of the models, whole; the savers don't disturb one another."""
    put(tmp_path, 0)
    savers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(start)], stdout=subprocess.PIPE
        )
        for start in (0, 1)
    ]
    try:
        for saver in savers:
            assert saver.stdout.readline() == b"ready\n"
        seen = {get(tmp_path) for _ in range(2000)}
        assert [saver.poll() for saver in savers] == [None, None]
    finally:
        for saver in savers:
            saver.kill()
            saver.communicate()
    assert len(seen) > 10 and {number % 2 for number in seen} == {0, 1}
    put(tmp_path, 5)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.slow
def test_models_loaded_beside_a_saver(tmp_path):
    """jp.load gives the parameters and the plan of one model."""

    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    x = jnp.ones((1, 3))
    full = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    structure = jp.infer_structure(fn, full, x)
    smalls = []
    for n in (2, 5):
        params = {"up": full["up"] * n, "down": full["down"] * n}
        masks = structure.masks({"up:1": np.arange(8) < n})
        smalls.append(jp.compact(fn, params, masks, x))
    jp.save(smalls[0], tmp_path)
    stop = threading.Event()

    def saving():
        while not stop.is_set():
            for small in smalls:
                jp.save(small, tmp_path)

    saver = threading.Thread(target=saving)
    saver.start()
    try:
        sizes = set()
        for _ in range(60):
            again = jp.load(tmp_path, fn, full, x)
            n = again.params["up"].shape[1]
            sizes.add(n)
            assert (again.params["up"] == n).all() and again.keep["up:1"].sum() == n
    finally:
        stop.set()
        saver.join()
    assert sizes == {2, 5}
    assert os.listdir(tmp_path) == [save.FILE]
