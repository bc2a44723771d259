"""Artefacts: what the certificate says, and what happens to files that were changed."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.artefacts import folders, trees
from tests.helpers import engines

RNG = np.random.default_rng(0)
W = {
    "up": jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32),
    "down": jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32),
}
X = jnp.ones((2, 3))


def net(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def halved(semantics="masked", params=W):
    masks = jp.infer_structure(net, W, X).masks({"up:1": np.arange(8) < 4})
    return jp.compact(net, params, masks, X, semantics=semantics)


@pytest.fixture
def plain(monkeypatch):
    return engines.runtime(monkeypatch)


def test_what_is_written_runs_and_says_what_it_is(tmp_path, plain):
    small = halved()
    artefact = jp.export(small, tmp_path, X, shapes="b, ...", runtime=plain)
    assert {*os.listdir(tmp_path)} == {"model.plain", "certificate.json"}
    assert artefact.certificate == json.loads((tmp_path / "certificate.json").read_text())
    said = artefact.certificate
    assert (said["engine"], said["versions"]) == ("plain", {"plain": "1.0"})
    assert said["model"]["dimensions"][0]["removed"] == 4 and said["model"]["exact"]
    assert said["residual"]["against"] == "the masked model" == artefact.against
    assert said["residual"]["relative"] < 1e-6
    assert said["environment"]["device"]
    assert artefact.size == (tmp_path / "model.plain").stat().st_size
    assert artefact.check(2) < 1e-6
    assert artefact.benchmark(repeats=1).runtime == "plain (plain 1.0)"
    assert repr(artefact).startswith(f"<artefact {tmp_path} for plain, ")
    model = jp.load_exported(tmp_path)
    for batch in (1, 5):
        x = np.ones((batch, 3), np.float32)
        np.testing.assert_allclose(model.fn(model.params, x), small.fn(small.params, x), rtol=1e-5)


def test_a_program_of_xla_may_be_read_while_it_is_traced(tmp_path):
    small = halved()
    artefact = jp.export(small, tmp_path, X)
    traced = jax.jit(artefact.fn)(X)
    np.testing.assert_allclose(traced, small.fn(small.params, X), rtol=1e-6)
    assert artefact.check(2) < 1e-6 and artefact.benchmark(repeats=1).median > 0


def test_digests_tell_params_and_masks_apart(tmp_path, plain):
    def model(params):
        return jp.export(halved(params=params), tmp_path, X, runtime=plain).certificate["model"]

    other = {**W, "up": W["up"].at[0, 7].add(1)}  # in a removed unit
    a, b = model(W), model(other)
    assert a["params sha256"] == b["params sha256"] and a["masks sha256"] == b["masks sha256"]
    assert a["dense params sha256"] != b["dense params sha256"]


def test_what_it_is_compared_with(tmp_path, plain):
    """The masked model, or what is left of it."""

    def against(fn, *args):
        return jp.export(fn, tmp_path, *args, runtime=plain).against

    assert against(net, W, X) == "the function"
    small = halved()
    assert against(small.replace(jax.tree.map(lambda w: w + 1, small.params)), X) == (
        "the compact model"
    )
    assert against(halved("kept"), X) == "the compact model"
    gone = halved(params=jax.tree.map(lambda w: w + 1, W))
    assert against(gone, X) == "the compact model"


def test_a_dense_function(tmp_path, plain):
    """Of params first, and of arrays alone, in an engine and in XLA."""
    for runtime in (plain, None):
        jp.export(net, tmp_path, W, X, runtime=runtime, shapes="b, ...")
        model = jp.load_exported(tmp_path)
        np.testing.assert_allclose(model.fn(model.params, X), net(W, X), rtol=1e-5)
        jp.export(lambda x: {"y": x * 2}, tmp_path, X, runtime=runtime)
        model = jp.load_exported(tmp_path)
        assert model.params == {}
        np.testing.assert_array_equal(model.fn({}, X)["y"], 2 * X)


def test_the_latest_export_of_a_folder_counts(tmp_path, plain):
    small = halved()
    jp.export(small, tmp_path, X, runtime=plain)
    artefact = jp.export(small, tmp_path, X)
    assert {*os.listdir(tmp_path)} == {"model.plain", "exported.safetensors"}
    assert artefact.check() < 1e-6 and artefact.certificate["engine"] == "xla"
    assert artefact.size == (tmp_path / "exported.safetensors").stat().st_size
    assert artefact.benchmark(repeats=1).runtime == "xla"
    assert len(jp.load_exported(tmp_path).params) == 2
    jp.export(small, tmp_path, X, runtime=plain)
    assert {*os.listdir(tmp_path)} == {"model.plain", "certificate.json"}
    assert jp.load_exported(tmp_path).params == {}


def test_params_of_ones_own_are_refused(tmp_path, plain):
    small = halved()
    jp.export(small, tmp_path, X, runtime=plain)
    model = jp.load_exported(tmp_path)
    with pytest.raises(ValueError, match="other values of its first argument"):
        model.fn(small.params, X)


def test_a_file_that_was_edited(tmp_path, plain):
    jp.export(halved(), tmp_path, X, runtime=plain)
    path = tmp_path / "model.plain"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.plain has \d+ bytes, and is not the file of"):
        jp.load_exported(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"model.plain is missing; restore it from a copy, or"):
        jp.load_exported(tmp_path)


EDITS = [
    (lambda text: text.replace('"exact": true', '"exact": false'), "was damaged or changed"),
    (lambda text: text[:50], "holds no JSON that can be read"),
]


@pytest.mark.parametrize("edit, match", EDITS)
def test_a_certificate_that_was_edited(tmp_path, plain, edit, match):
    jp.export(halved(), tmp_path, X, runtime=plain)
    path = tmp_path / "certificate.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=f"certificate.json {match}"):
        jp.load_exported(tmp_path)


FORGED = [
    ({"engine": "abacus"}, "is for the engine 'abacus'; this version knows onnx"),
    ({"version": 99}, "is jaxprune artefact 99, wanted jaxprune artefact 1"),
    ({"threads": -1}, r"its certificate\['threads'\] is -1, wanted an integer from 0"),
    ({"arguments": {"set": []}}, "holds {'set': .*} where a tree of types is wanted"),
]


@pytest.mark.parametrize("change, match", FORGED)
def test_a_certificate_of_something_else(tmp_path, plain, change, match):
    jp.export(halved(), tmp_path, X, runtime=plain)
    path = tmp_path / "certificate.json"
    path.write_bytes(folders.sealed(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        jp.load_exported(tmp_path)


def test_an_engine_of_another_version_warns_of_both(tmp_path, plain, monkeypatch):
    jp.export(halved(), tmp_path, X, runtime=plain)
    monkeypatch.setitem(engines.VERSIONS, "plain", "2.0")
    with pytest.warns(UserWarning, match="checked with plain 1.0, and 2.0 is here: export it anew"):
        jp.load_exported(tmp_path)


def test_wrong_results_are_not_written(tmp_path, plain, monkeypatch):
    jp.export(halved(), tmp_path, X, runtime=plain)
    before = (tmp_path / "certificate.json").read_bytes()
    wrong = engines.ENGINE._replace(
        read=lambda path, options: lambda *xs: [1.1 * y for y in engines.read(path, options)(*xs)]
    )
    runtime = jp.runtimes.Runtime(wrong)
    with pytest.raises(ValueError, match="gives other results than the masked model: .* 0.1 of"):
        jp.export(halved(), tmp_path, X, runtime=runtime)
    assert (tmp_path / "certificate.json").read_bytes() == before
    assert {*os.listdir(tmp_path)} == {"model.plain", "certificate.json"}
    int8 = jp.runtimes.Runtime(wrong, jp.runtimes.Options("dynamic"))
    artefact = jp.export(halved(), tmp_path, X, runtime=int8)
    assert artefact.certificate["residual"]["relative"] == pytest.approx(0.1, rel=1e-3)


def test_a_function_that_gives_nan(tmp_path, plain):
    artefact = jp.export(lambda x: jnp.log(-jnp.abs(x)), tmp_path, X, runtime=plain)
    assert artefact.certificate["residual"]["relative"] is None
    assert np.isnan(artefact.check())


def test_bad_calls(tmp_path, plain):
    with pytest.raises(ValueError, match="platforms are for XLA, and runtime is <runtime plain>"):
        jp.export(halved(), tmp_path, X, runtime=plain, platforms=["cpu"])
    artefact = jp.export(halved(), tmp_path, X, runtime=plain)
    with pytest.raises(ValueError, match="check wants n >= 1 random inputs, got 0"):
        artefact.check(0)
    with pytest.raises(TypeError, match="the results hold a Odd, which can't be described"):
        jp.export(lambda x: Odd(x), tmp_path, X, runtime=plain)


@jax.tree_util.register_pytree_node_class
class Odd:
    def __init__(self, x):
        self.x = x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_writer_leaves_the_old_artefact(tmp_path, plain, monkeypatch, call):
    jp.export(halved(), tmp_path, X, runtime=plain)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        jp.export(lambda x: x + 1, tmp_path, X, runtime=plain)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_leftovers_of_killed_writers_go(tmp_path, plain):
    parts = tmp_path / f".certificate.json.{'0' * 16}.parts"
    parts.mkdir()
    (parts / "model.plain").write_text("half")
    parts.with_suffix(".tmp").write_text("")
    jp.export(halved(), tmp_path, X, runtime=plain)
    assert {*os.listdir(tmp_path)} == {"model.plain", "certificate.json"}


def test_a_folder_of_an_engine_is_replaced(tmp_path):
    def make(text):
        def fill(parts):
            (parts / "model" / "deep").mkdir(parents=True)
            (parts / "model" / "deep" / "x").write_text(text)
            return {"made": text}

        return fill

    for text in ("one", "two!"):
        folders.write(tmp_path, make(text))
        said = folders.read(tmp_path)
        assert said["files"]["model/deep/x"]["bytes"] == len(text) and said["made"] == text
    assert {*os.listdir(tmp_path)} == {"model", "certificate.json"}


def test_it_runs_in_a_process_without_the_code(tmp_path, plain):
    small = halved()
    jp.export(small, tmp_path, X, runtime=plain)
    code = (
        "import sys, numpy as np, jaxprune as jp; from tests.helpers import engines;"
        "jp.runtimes._FILES['plain'] = 'tests.helpers.engines';"
        "m = jp.load_exported(sys.argv[1]);"
        "print(m.fn(m.params, np.ones((2, 3), np.float32)).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(float(small.fn(small.params, X).sum()), rel=1e-5)


def test_trees_as_json():
    tree = ({"a": X, "b": (X, [None, jax.ShapeDtypeStruct((), jnp.int32)])}, X)
    back = trees.restore(json.loads(json.dumps(trees.describe(tree, "the arguments"))))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(back)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(tree)
    ]
