"""Damaged files: one clear error each, or the very same model. Forged ones carry a right digest."""

import copy
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.artefacts import export, save, tensors

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)


def fn(p, x):
    """Two scanned layers whose units differ, a folded bias, a softmax with carried units."""

    def layer(h, w):
        return h + jnp.tanh(h @ w["in"]) @ w["out"], None

    h = jax.lax.scan(layer, x @ p["up"], p["layers"])[0]
    h = h + jax.nn.relu(h @ p["wide"] + p["bias"]) @ p["narrow"]
    return jax.nn.softmax(h @ p["logits"]) @ p["last"]


SHAPES = {
    "up": (3, 4), "layers": {"in": (2, 4, 6), "out": (2, 6, 4)}, "wide": (4, 8), "bias": (8,),
    "narrow": (8, 4), "logits": (4, 6), "last": (6, 2),
}  # fmt: skip


def compacted(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    structure = jp.infer_structure(fn, params, X)
    rows = np.array([[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 0]], bool)
    masks = structure.masks({"layers/in:2": {"layers/in:0": rows}})
    masks["wide"] = jnp.asarray(np.arange(8) % 2 == 0)[None]
    masks["logits"] = jnp.asarray(np.arange(6) < 4)[None]
    return params, jp.compact(fn, params, masks, X)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    params, small = compacted()
    jp.save(small, folder)
    jp.export(small, folder, X)
    return folder, params, small.fn(small.params, X)


def loaders(folder, params):
    """(the file that each reads, what it computes)"""

    def load():
        again = jp.load(folder, fn, params, X)
        return again.fn(again.params, X)

    def exported():
        model = jp.load_exported(folder)
        return model.fn(model.params, X)

    return {save.FILE: load, export.FILE: exported}


def plan_of(path):
    content = path.read_bytes()
    return tensors.parse(content)


def forge(path, text, arrays):
    """What an editor writes who knows how the digest is made."""
    arrays = tensors.in_order(arrays)
    head = tensors.head(text if isinstance(text, str) else json.dumps(text), arrays)
    body = b"".join(a.tobytes() for a in arrays.values())
    path.write_bytes(signed(head + body))


def signed(content):
    start, end = tensors.DIGEST, tensors.DIGEST + 64
    digest = hashlib.sha256(content[:start] + content[end:]).hexdigest().encode()
    return content[:start] + digest + content[end:]


def refused(name, load):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load()
    assert type(caught.value) in (ValueError, FileNotFoundError), caught.value
    assert name in str(caught.value) or "the saved plan is of another model" in str(caught.value)
    return str(caught.value)


FILES = [save.FILE, export.FILE]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_undamaged_file_loads(saved, name):
    folder, params, expected = saved
    np.testing.assert_allclose(loaders(folder, params)[name](), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_any_bit_that_flips_is_found(saved, tmp_path, name):
    folder, params, _ = saved
    content = (folder / name).read_bytes()
    load = loaders(tmp_path, params)[name]
    for i in [*range(0, len(content), 1 + len(content) // 3000), len(content) - 1]:
        flipped = bytearray(content)
        flipped[i] ^= 1 << i % 8
        (tmp_path / name).write_bytes(flipped)
        refused(name, load)


BYTES = {
    "empty": lambda b: b"",
    "a byte": lambda b: b[:1],
    "cut in its header": lambda b: b[:100],
    "cut in the middle": lambda b: b[: len(b) // 2],
    "cut by a byte": lambda b: b[:-1],
    "longer by a byte": lambda b: b + b"\0",
    "twice": lambda b: b + b,
    "zeros": lambda b: bytes(len(b)),
    "noise": lambda b: np.random.default_rng(0).bytes(len(b)),
    "text": lambda b: b"{}",
    "no UTF-8": lambda b: b"\xff\xfe" * 300,
    "a huge header": lambda b: b"\xff" * 8 + b[8:],
    "an empty header": lambda b: bytes(8) + b[8:],
    "a header of another length": lambda b: (len(b)).to_bytes(8, "little") + b[8:],
    "two halves swapped": lambda b: b[len(b) // 2 :] + b[: len(b) // 2],
    "a zeroed page": lambda b: b[:-256] + bytes(256),
    "lines as Windows ends them": lambda b: b.replace(b" ", b"\r\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", BYTES)
def test_damaged_bytes(saved, tmp_path, name, damage):
    folder, params, _ = saved
    (tmp_path / name).write_bytes(BYTES[damage]((folder / name).read_bytes()))
    assert "jp.save" in refused(name, loaders(tmp_path, params)[name])


@pytest.mark.parametrize("name", FILES)
def test_places_that_hold_no_file(saved, tmp_path, name):
    _, params, _ = saved
    load, path = loaders(tmp_path, params)[name], tmp_path / name
    assert "is missing" in refused(name, load)
    path.symlink_to(tmp_path / "nowhere")
    assert "is missing" in refused(name, load)
    path.unlink()
    path.mkdir()
    assert "is no regular file" in refused(name, load)
    path.rmdir()
    os.mkfifo(path)
    assert "is no regular file" in refused(name, load)
    path.unlink()
    path.symlink_to(path)
    assert "symbolic" in refused(name, load)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 42)  # a sparse file that no memory holds
    assert "no file that jaxprune wrote" in refused(name, load)
    path.unlink()
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(name, loaders(tmp_path / "file", params)[name])


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_grows_without_end_is_not_read(saved, tmp_path, name):
    folder, params, _ = saved
    shutil.copy(folder / name, tmp_path / name)
    with open(tmp_path / name, "r+b") as file:
        file.truncate(1 << 42)
    assert "was cut off or changed" in refused(name, loaders(tmp_path, params)[name])


@pytest.mark.parametrize("old", ["plan.json", "export.json"])
def test_what_an_older_version_wrote_is_named(saved, tmp_path, old):
    _, params, _ = saved
    (tmp_path / old).write_text("{}")
    for name, load in loaders(tmp_path, params).items():
        with pytest.raises(ValueError, match=f"{old} was written by an older version"):
            load()
        assert name not in os.listdir(tmp_path)


def test_a_file_of_the_other_kind_is_refused(saved, tmp_path):
    folder, params, _ = saved
    shutil.copy(folder / save.FILE, tmp_path / export.FILE)
    shutil.copy(folder / export.FILE, tmp_path / save.FILE)
    for name, load in loaders(tmp_path, params).items():
        assert "is ('jaxprune" in refused(name, load)


def test_a_safetensors_file_of_others_is_refused(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder, params, _ = saved
    save_file({"params/up": np.ones(3)}, tmp_path / save.FILE)
    assert "no file that jaxprune wrote" in refused(save.FILE, loaders(tmp_path, params)[save.FILE])
    save_file(load_file(folder / save.FILE), tmp_path / save.FILE)
    assert "no file that jaxprune wrote" in refused(save.FILE, loaders(tmp_path, params)[save.FILE])


# ------------------------------------------------------------------- edits with a right digest

TEXTS = {
    "no JSON": "{",
    "deep nesting": "[" * 100_000 + "]" * 100_000,
    "a number of many digits": '{"format": ' + "9" * 10_000 + "}",
    "a lone surrogate": '{"\\ud800": 1}',
    "NaN": '{"format": NaN}',
    "infinity": '{"format": -Infinity}',
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "nothing": "",
    "an empty plan": "{}",
    "another version": '{"format": "jaxprune compact model", "version": 99}',
    "its version alone": '{"format": "jaxprune compact model", "version": 2}',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", TEXTS)
def test_forged_texts(saved, tmp_path, name, text):
    folder, params, _ = saved
    forge(tmp_path / name, TEXTS[text], plan_of(folder / name)[1])
    refused(name, loaders(tmp_path, params)[name])


def edits(value, at=()):
    """Every way to spoil one place of a plan: another type, another value, gone, one more."""
    wrong = {str: [3, None, "", "nowhere:0"], int: ["3", -1, 3.0, 10**9, True, None]}
    wrong |= {bool: [0, "x", None], list: [{}, None, "x", [[]], [None]], dict: [[], None, {"x": 1}]}
    for other in wrong[type(value)]:
        if other != value or type(other) is not type(value):
            yield at, other
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key), KeyError
            yield from edits(child, (*at, key))


def spoiled(text, at, other):
    text = copy.deepcopy(text)
    place = text
    for key in at[:-1]:
        place = place[key]
    if not at:
        return other
    if other is KeyError:
        del place[at[-1]]
    else:
        place[at[-1]] = other
    return text


# What nothing is computed by; of an exported model the full shapes, too.
TELLS_ONLY = {"made with", "reasons", "platforms", "arguments", "jax"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_forged_plans(saved, tmp_path, name):
    """Every place of the plan spoiled in several ways: an error, or the same model."""
    folder, params, expected = saved
    text, arrays = plan_of(folder / name)
    load, refusals = loaders(tmp_path, params)[name], 0
    for at, other in edits(text):
        if len(at) > 1 and isinstance(at[-1], int) and at[-1] > 1:
            continue  # later rows are like the first two
        forge(tmp_path / name, spoiled(text, at, other), arrays)
        try:
            got = load()
        except (ValueError, FileNotFoundError) as error:
            assert type(error) in (ValueError, FileNotFoundError), (at, other, error)
            refusals += 1
        else:
            full_shape = name == export.FILE and "shape" in at
            assert full_shape or TELLS_ONLY & set(at), (at, other)
            np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=str((at, other)))
    assert refusals > 200


def spoiled_arrays(key, array):
    """(what is done, the arrays in its place)"""
    yield "gone", {}
    yield "twice as long", {key: np.concatenate([np.atleast_1d(array)] * 2)}
    yield "with one axis more", {key: array[None]}
    yield "flat", {key: array.reshape(-1) if array.ndim > 1 else array[None]}
    yield "of another type", {key: array.astype(np.float16 if array.dtype != np.float16 else int)}
    yield "none of it", {key: array[:0]}
    yield "beside another", {key: array, f"{key}/x": array}
    if array.dtype == bool:
        yield "of numbers", {key: array.astype(np.uint8)}
    if key.startswith("kept/"):
        yield "rolled", {key: np.roll(array, 1)}
        yield "inverted", {key: ~array}
        yield "all", {key: np.ones_like(array)}
        yield "nothing", {key: np.zeros_like(array)}
    if key.startswith("candidates/"):
        yield "inverted", {key: ~array}
        yield "nothing", {key: np.zeros_like(array)}
    if key.startswith("order/"):
        yield "zeros", {key: np.zeros_like(array)}
        yield "out of bounds", {key: array + 1}
        yield "negative", {key: array - array.shape[1]}
        yield "huge", {key: np.full_like(array, 2**62)}
    if key == "program":
        yield "cut", {key: array[: len(array) // 2]}
        yield "zeros", {key: np.zeros_like(array)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_forged_arrays(saved, tmp_path, name):
    """An error, or the same: of a dimension that stays whole, or bytes after the program's end."""
    folder, params, expected = saved
    text, arrays = plan_of(folder / name)
    load, passed = loaders(tmp_path, params)[name], []
    for key, array in arrays.items():
        for what, instead in spoiled_arrays(key, array):
            forge(tmp_path / name, text, {k: v for k, v in arrays.items() if k != key} | instead)
            try:
                np.testing.assert_array_equal(load(), expected, err_msg=f"{key} {what}")
            except (ValueError, FileNotFoundError) as error:
                assert type(error) in (ValueError, FileNotFoundError), (key, what, error)
            else:
                passed.append(key)
    assert set(passed) <= {"program", "kept/logits:1", "candidates/logits:1"}, passed


def test_booleans_are_zeros_and_ones(saved, tmp_path):
    folder, params, _ = saved
    text, arrays = plan_of(folder / save.FILE)
    key = next(k for k in arrays if k.startswith("kept/"))
    forge(tmp_path / save.FILE, text, arrays | {key: (arrays[key] * np.uint8(7)).view(bool)})
    assert "holds bytes that are no booleans" in refused(
        save.FILE, loaders(tmp_path, params)[save.FILE]
    )


HEADERS = {
    "no metadata": lambda h: {k: v for k, v in h.items() if k != "__metadata__"},
    "a wrong code": lambda h: h | {"params/up": h["params/up"] | {"dtype": "F99"}},
    "a code that is no text": lambda h: h | {"params/up": h["params/up"] | {"dtype": []}},
    "a shape that is negative": lambda h: h | {"params/up": h["params/up"] | {"shape": [-3, -4]}},
    "a huge shape": lambda h: h | {"params/up": h["params/up"] | {"shape": [2**60, 2**60]}},
    "a huge empty shape": lambda h: h | {"x": {**EMPTY, "shape": [0, 2**61, 2**61]}},
    "a hundred axes": lambda h: h | {"x": {**EMPTY, "shape": [0] * 100}},
    "a place elsewhere": lambda h: h | {"params/up": h["params/up"] | {"data_offsets": [0, 4]}},
    "a place of one end": lambda h: h | {"params/up": h["params/up"] | {"data_offsets": [0]}},
    "an entry less": lambda h: dict(list(h.items())[:-1]),
    "an entry more": lambda h: h | {"x": EMPTY},
    "an entry that is a list": lambda h: h | {"x": []},
    "another order": lambda h: {k: h[k] for k in ["__metadata__", *reversed(list(h)[1:])]},
}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("edit", HEADERS)
def test_forged_headers(saved, tmp_path, name, edit):
    folder, params, _ = saved
    content = (folder / name).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = HEADERS[edit](json.loads(content[8:size]))
    if "__metadata__" in header:
        header["__metadata__"]["bytes"] = "0" * 16
    new = json.dumps(header, separators=(",", ":")).encode()
    whole = len(new).to_bytes(8, "little") + new + content[size:]
    at = tensors.LENGTH
    whole = whole[:at] + f"{len(whole):016d}".encode() + whole[at + 16 :]
    (tmp_path / name).write_bytes(signed(whole))
    refused(name, loaders(tmp_path, params)[name])
