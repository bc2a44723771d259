"""The page of ``python -m benchmarks browser``: what it finds in Chromium is what Python finds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.studies.browser import browser, chromium, folder
from tests.models.served import floats

pytest.importorskip("jax2onnx")
pytest.importorskip("onnxruntime")
if not (folder.DIST / folder.ENGINE[0]).exists():
    pytest.skip("no onnxruntime-web: npm ci in benchmarks/studies/browser", allow_module_level=True)
if chromium.path() is None:
    pytest.skip("no Chromium is here", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
NAMES = "dense", "pruned", "pruned + int8"


def net(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, p["conv"], (2, 2), "SAME", dimension_numbers=numbers)
    return jnp.einsum("bhwc,hwcd->bd", jax.nn.relu(y), p["out"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, what is in it, samples): a network of random weights, images of noise."""
    params = {"conv": floats(3, 3, 1, 16), "out": floats(8, 8, 16, 10)}
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16)).astype(np.uint8)
    samples = folder.Samples("noise", tuple("abcdefghij"), images, [*range(6)], -1.3, 0.01)
    one = floats(1, 16, 16, 1)
    structure = jp.infer_structure(net, params, one)
    masks = jp.structured(structure)(jp.magnitude(params), 0.5)
    small = jp.compact(net, params, masks, one)
    calibration = [(samples.inputs,)]
    networks = {
        "dense": folder.Network("at random", net, (params, one)),
        "pruned": folder.Network("half", small, (one,)),
        "pruned + int8": folder.Network("half", small, (one,), "static", calibration),
    }
    out = tmp_path_factory.mktemp("page")
    folder.write(out, networks, samples, lambda fn: 0.5)
    return out, folder.Folder.read(out), samples


@pytest.fixture(scope="module")
def report(built):
    return browser.measured(built[0])


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_onnx_runtime_in_python(built, report, name):
    """The oracle runs each file in ONNX Runtime, one image at a time."""
    _, made, samples = built
    here = np.concatenate([made.functions[name](x[None]) for x in samples.inputs])
    there = np.array(report["networks"][name]["logits"], np.float32)
    print(f"{name}: {np.abs(here - there).max() / np.abs(here).max():.1e}")
    np.testing.assert_array_equal(there.argmax(-1), here.argmax(-1))
    assert len(set(here.argmax(-1))) > 1
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-4 * np.abs(here).max())


def test_times_are_of_all_networks(report):
    for row in report["networks"].values():
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high
    assert [row["calls"] >= 1 for row in report["networks"].values()] == [True] * 3


def test_what_was_measured_is_saved_with_how_it_agrees(built, tmp_path):
    rows = browser.save(built[0], tmp_path / "browser.json")
    assert [row["agreement"]["same class"] for row in rows.values()] == [6, 6, 6]
    saved = json.loads((tmp_path / "browser.json").read_text())
    assert saved["rows"] == json.loads(json.dumps(rows)) and saved["chromium"].startswith("Chrome")
    assert (tmp_path / "browser.png").read_bytes().startswith(b"\x89PNG")
    off = {"networks": {name: {"logits": [[0] * 9 + [9]] * 6} for name in NAMES}}
    assert browser.agreement(off, built[1])["dense"]["same class"] < 6


def test_a_person_picks_and_draws(built):
    out, made, samples = built
    answers = "[...document.querySelectorAll('.answer')].map((x) => x.firstChild.textContent)"
    with folder.served(out) as address, chromium.page() as page:
        page.look(400, dark=True)
        page.open(address)
        page.evaluate("report")
        page.evaluate("document.querySelectorAll('#samples button')[3].click()")
        page.evaluate("new Promise((done) => setTimeout(done, 500))")
        functions = made.functions.values()
        found = [samples.classes[int(fn(samples.inputs[3:4]).argmax())] for fn in functions]
        assert page.evaluate(answers) == found
        assert "labelled “d”" in page.evaluate("document.getElementById('label').textContent")
        page.evaluate("document.getElementById('clear').click()")
        page.evaluate("new Promise((done) => setTimeout(done, 500))")
        black = np.full((1, 16, 16, 1), samples.low, np.float32)
        assert page.evaluate(answers) == [
            samples.classes[int(f(black).argmax())] for f in functions
        ]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(
            "performance.getEntriesByType('resource').every((x) => x.name.startsWith(origin))"
        )


def test_a_page_that_fails_says_so(built, tmp_path):
    out = built[0]
    for name in ("index.html", "page.mjs", "measure.mjs", "style.css"):
        (tmp_path / name).write_text((out / name).read_text())
    (tmp_path / "engine").symlink_to(out / "engine")
    with folder.served(tmp_path) as address, chromium.page() as page:
        page.open(address)
        with pytest.raises(RuntimeError, match=r"the page failed: .*about.json: 404"):
            page.evaluate("report")
        said = page.evaluate("document.querySelector('#status.failed').textContent")
        assert said.startswith("This page failed: about.json: 404")


def test_without_onnxruntime_web_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "DIST", tmp_path)
    with pytest.raises(FileNotFoundError, match="onnxruntime-web is not here: npm ci --prefix"):
        folder.write(tmp_path, {}, None, None)


def test_without_chromium_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(chromium, "NAMES", ("no-such-program",))
    with pytest.raises(FileNotFoundError, match="no Chromium is here, by the names no-such"):
        chromium.page().__enter__()
    with pytest.raises(SystemExit):
        browser.main([])
    assert "--out FOLDER keeps the page to serve" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        browser.main(["--again"])
    assert "--again measures a folder that is there" in capsys.readouterr().err


def test_what_chromium_cant_do_is_told():
    with chromium.page(20) as page:
        with pytest.raises(RuntimeError, match="can't open http://127.0.0.1:9/: net::ERR"):
            page.open("http://127.0.0.1:9/")
        with pytest.raises(RuntimeError, match="Chromium can't do No.thing: 'No.thing' wasn't"):
            page._call("No.thing")
        page._seconds = 0.5
        with pytest.raises(TimeoutError, match="no answer within 0.5 s"):
            page.evaluate("new Promise(() => {})")


def test_no_host_is_named():
    """Neither the page nor what installs its engine names where it comes from."""
    files = [folder.HERE / "package.json", folder.HERE / "package-lock.json"]
    for file in [*files, *(folder.HERE / "page").iterdir()]:
        assert "://" not in file.read_text(), file
    pinned = json.loads(files[0].read_text())["dependencies"]["onnxruntime-web"]
    locked = json.loads(files[1].read_text())["packages"]["node_modules/onnxruntime-web"]
    assert pinned == locked["version"]


def test_samples_become_what_the_network_was_trained_on():
    from benchmarks.common.data import Data

    pixels = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2, 1) * 17
    x = ((pixels.astype(float) - 72) / 90).astype(np.float32)
    y = np.array([1, 0, 1, 0], np.int32)
    samples = folder.Samples.of(Data("digits", "here", x, y, x, y), 1)
    assert samples.labels == [0, 1] and samples.classes == ("0", "1")
    np.testing.assert_allclose(samples.inputs, x[[1, 0]], rtol=1e-5, atol=1e-6)
