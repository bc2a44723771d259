"""Checkpoints are read as they are, or one clear error says what is wrong; also with calls."""

import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxprune as jp
from jaxprune.streaming import settings, shards
from tests.unit.streaming import tiny
from tests.unit.streaming.tiny import NAMES, TOKENS, stream

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    return tiny.save_sharded(tmp_path / "source", 2)


def keep(p, stats):
    return p, jax.tree.map(lambda _: True, p)


def refused(source, tmp_path, error, text, prune=keep, **options):
    """A call that raises before it has written anything."""
    target = tmp_path / "target"
    with pytest.raises(error, match=text):
        stream(source, target, prune, **options)
    assert not target.exists() or not list(target.glob("*.safetensors"))


def test_tensors_of_all_types(tmp_path):
    found = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((2,), ml_dtypes.bfloat16),
        "c": np.float32(3.0), "d": np.zeros((0, 4), np.int8), "e": np.array([True, False]),
    }  # fmt: skip
    save_file({k: np.asarray(x) for k, x in found.items()}, tmp_path / "x.safetensors")
    checkpoint = jp.oneshot.Checkpoint(tmp_path / "x.safetensors")
    assert set(checkpoint.names) == set(found)
    names = {k: k for k in found} | {"a": jp.oneshot.Transposed("a")}
    got = checkpoint.load(names)
    for k, x in (found | {"a": found["a"].T}).items():
        assert got[k].dtype == x.dtype
        np.testing.assert_array_equal(got[k], x)
    assert checkpoint.shapes(names) == jax.eval_shape(lambda: got)


def test_a_shard_that_is_missing_cut_off_or_damaged(source, tmp_path):
    path = source / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    cases = {
        "is cut off: it has .* bytes, and its header tells of": [
            whole[:-1], whole[: 8 + size], whole[:100], whole[:5], b"",
        ],
        "is no safetensors file, or damaged: its holds no JSON": [whole[:8] + b"x" * size],
        "is damaged: 1 of its .* bytes belong to no tensor": [whole + b"x"],
    }  # fmt: skip
    for text, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            refused(source, tmp_path, ValueError, f"model-00002-of-00002.safetensors {text}")
    path.unlink()
    refused(
        source, tmp_path, FileNotFoundError, "the shard model-00002-of-00002.safetensors is missing"
    )


def with_header(path, change):
    """A file whose header is changed."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    told = json.loads(whole[8 : 8 + size])
    change(told)
    head = json.dumps(told).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + whole[8 + size :])


def test_headers_that_lie(tmp_path):
    cases = [
        (lambda t: t["a"].update(dtype=3), r"header\['a'\]\['dtype'\] is 3, wanted str"),
        (lambda t: t["a"].update(data_offsets=[4, 0]), r"has the offsets \[4, 0\]"),
        (lambda t: t["a"].update(shape=[3]), r"header\['a'\] has 8 bytes for F32\[3\]"),
        (lambda t: t["b"].update(data_offsets=[4, 12]), "a tensor begins at byte .* ends at"),
    ]
    for change, text in cases:
        save_file({k: np.ones(2, np.float32) for k in "ab"}, tmp_path / "x.safetensors")
        with_header(tmp_path / "x.safetensors", change)
        with pytest.raises(ValueError, match=text):
            jp.oneshot.Checkpoint(tmp_path / "x.safetensors")


def test_a_tensor_in_two_shards_or_in_none(source, tmp_path):
    first, second = sorted(source.glob("*.safetensors"))
    index = (source / INDEX).read_text()
    told = json.loads(index)
    told["weight_map"]["more"] = second.name
    (source / INDEX).write_text(json.dumps(told))
    refused(source, tmp_path, ValueError, "says that more stands in model-00002.*holds no such")
    (source / INDEX).write_text("{")
    refused(source, tmp_path, ValueError, f"{INDEX} is damaged: its holds no JSON")
    (source / INDEX).write_text('{"weight_map": {"a": 3}}')
    refused(source, tmp_path, ValueError, f"{INDEX} is damaged: its index.*is 3, wanted str")
    (source / INDEX).write_text(index)
    name = next(iter(shards.header(first)[1]))
    found = {n: np.ones(2, np.float32) for n in [*shards.header(second)[1], name]}
    save_file(found, second)
    text = f"the tensor {name} stands in two shards, {first.name} and {second.name}"
    refused(source, tmp_path, ValueError, text)


def test_no_checkpoint_and_no_such_tensor(source, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no checkpoint at .*nowhere: it is no file, and no"
    ):
        jp.oneshot.Checkpoint(tmp_path / "nowhere")
    checkpoint = jp.oneshot.Checkpoint(source)
    with pytest.raises(ValueError, match="no tensor 'layers.0.q.weigh', wanted at q; near names: "):
        checkpoint.load({"q": "layers.0.q.weigh"})
    with pytest.raises(TypeError, match="names hold 3 at q; wanted the name of a tensor"):
        checkpoint.shapes({"q": 3})


def test_types_that_arrays_can_not_have(tmp_path):
    save_file({"a": np.ones(2, np.float64)}, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match="the tensor a is float64, and JAX has 64 bits switched off"
    ):
        jp.oneshot.Checkpoint(tmp_path / "x.safetensors").load({"a": "a"})
    with_header(tmp_path / "x.safetensors", lambda told: told["a"].update(dtype="F6"))
    checkpoint = jp.oneshot.Checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="the tensor a in x.safetensors is of the type F6, which"):
        checkpoint.load({"a": "a"})


def test_a_file_that_gets_shorter_while_it_is_read(source, tmp_path):
    store = jp.oneshot.Checkpoint(source).store
    name, tensor = max(store.tensors.items(), key=lambda item: item[1].begin)
    tensor.file.write_bytes(tensor.file.read_bytes()[:-4])
    for call in (lambda: store.read(name), lambda: list(shards._chunks(tensor))):
        with pytest.raises(ValueError, match="is cut off: it has"):
            call()


def test_targets_that_would_be_spoiled(source, tmp_path):
    with pytest.raises(ValueError, match="target is the source's folder, .*source; pass another"):
        stream(source, source, keep)
    other = tiny.save(tmp_path / "other")
    with pytest.raises(FileExistsError, match="other holds model.safetensors, and no stream.json"):
        stream(source, other, keep)


def test_calls_are_checked(source, tmp_path):
    text = (
        r"blocks\[0\] and blocks\[1\] both name the tensor layers.0.q.weight; each is pruned once"
    )
    twice = [NAMES[0], NAMES[1] | {"q": NAMES[0]["q"]}]
    with pytest.raises(ValueError, match=text):
        jp.oneshot.stream(source, tmp_path / "a", tiny.block, twice, TOKENS, keep, embed=tiny.EMBED)
    with pytest.raises(ValueError, match="stream: blocks is empty"):
        jp.oneshot.stream(source, tmp_path / "a", tiny.block, [], TOKENS, keep)
    refused(source, tmp_path, TypeError, "stream wants either prune, .*; got neither", None)
    refused(source, tmp_path, TypeError, "or masks=.*; got both", masks=[])
    refused(
        source, tmp_path, TypeError, "repair= is for masks=; with prune", repair=jp.oneshot.refit
    )
    refused(
        source, tmp_path, ValueError, "masks are of 1 blocks, and blocks names 3", None, masks=[1]
    )
    refused(source, tmp_path, ValueError, "stream: batches is empty", batches=[])
    refused(source, tmp_path, ValueError, "stream: error_propagation=2", error_propagation=2)
    refused(source, tmp_path, TypeError, "embed is 3; wanted a pair of a function", embed=3)
    mixed = [TOKENS[0], jax.ShapeDtypeStruct(TOKENS[0].shape, jnp.int32)]
    refused(source, tmp_path, ValueError, "batches hold arrays and shapes; pass", batches=mixed)
    refused(source, tmp_path, TypeError, "progress is 'bar'", progress="bar")


def test_a_block_of_other_outputs(source, tmp_path):
    blocks = {
        r"at blocks\[0\]: shape \(2, 12, 4\) for \(2, 12, 8\); the next": lambda p, x: x[..., :4],
        r"at blocks\[0\]: it has a tuple at its root": lambda p, x: (tiny.block(p, x), x),
    }
    for text, block in blocks.items():
        with pytest.raises(ValueError, match=f"block gives other hidden states.*{text}"):
            jp.oneshot.stream(source, tmp_path / "a", block, NAMES, TOKENS, keep, embed=tiny.EMBED)
        with pytest.raises(ValueError, match=f"block gives other hidden states.*{text}"):
            jp.oneshot.survey(source, block, NAMES, TOKENS, keep, embed=tiny.EMBED)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_what_prune_gives_is_checked(source, tmp_path):
    text = r"prune gave no leaf q for blocks\[0\], and the tensor layers.0.q.weight stands for it"
    less = lambda p, stats: ({k: p[k] for k in p if k != "q"}, {k: True for k in p if k != "q"})  # noqa: E731
    options = {"batches": [jax.ShapeDtypeStruct(TOKENS[0].shape, jnp.int32)]}
    refused(source, tmp_path, ValueError, text, less, **options)
    other = lambda p, stats: p  # noqa: E731
    with pytest.raises(TypeError, match=r"prune returned dict; wanted \(pruned, masks\)"):
        stream(source, tmp_path / "b", other, **options)


# ---- digests of functions -----------------------------------------------------------------------

SHARE = 0.5


def by_global(p):
    return SHARE * p


def test_functions_are_told_apart_by_what_decides(monkeypatch):
    def made(share, *more):
        return lambda p, scale=1.0: p * share + len(more) * scale

    class Scaled:
        def __init__(self, share):
            self.share = share

        def __call__(self, p):
            return p * self.share

    digest = settings.digest
    before = digest(by_global)
    assert digest(made(0.5)) == digest(made(0.5)) != digest(made(0.6))
    assert digest(jax.jit(made(0.5))) == digest(jax.jit(made(0.5))) != digest(jax.jit(made(0.6)))
    assert digest(Scaled(0.5)) == digest(Scaled(0.5)) != digest(Scaled(0.6))
    assert digest([np.ones(2)] * 2) == digest([np.ones(2), np.ones(2)]) != digest([np.ones(2)])
    patterns = [jp.n_m(2, 4), jp.n_m(2, 4), jp.n_m(4, 8), jp.unstructured(per_output=True)]
    assert digest(patterns[0]) == digest(patterns[1])
    assert len({digest(p) for p in patterns}) == 3
    loop = []
    loop.append(loop)
    assert digest(loop) == digest(loop)
    monkeypatch.setitem(globals(), "SHARE", 0.6)
    assert digest(by_global) != before


# ---- Orbax --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax_from_and_to(tmp_path, ocdbt):
    ocp = pytest.importorskip("orbax.checkpoint")
    found = {k: jnp.asarray(x) for k, x in tiny.tensors(ml_dtypes.bfloat16).items()}
    tree = {
        "layers": [
            {n: found[f"layers.{k}.{n}.weight"].T for n in tiny.SHAPES}
            for k in range(tiny.LAYERS)
        ],
        "embed": {"table": found["embed.weight"]}, "step": jnp.asarray(3),
    }  # fmt: skip
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(tmp_path / "source", tree)
    names = [{n: f"layers.{k}.{n}" for n in tiny.SHAPES} for k in range(tiny.LAYERS)]
    embed = (lambda p, x: p["table"][x].astype(jnp.bfloat16), {"table": "embed.table"})

    def prune(p, stats):
        masks = jp.unstructured()(jp.wanda(p, input_norms=stats.norms), 0.5)
        return jp.apply_masks(p, masks), masks

    states = [tree["embed"]["table"][x] for x in TOKENS]
    want, _ = jp.oneshot.sequential(tiny.block, tree["layers"], states, prune)
    first = lambda items: list(items)[:1]  # noqa: E731
    call = (tmp_path / "source", tmp_path / "target", tiny.block, names, TOKENS, prune)
    with pytest.raises(RuntimeError, match="progress passed on 1 of 3"):
        jp.oneshot.stream(*call, embed=embed, progress=first)
    done = jp.oneshot.stream(*call, embed=embed)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        got = checkpointer.restore(done.folder)
    assert got["step"] == 3
    np.testing.assert_array_equal(got["embed"]["table"], tree["embed"]["table"])
    for p, q in zip(got["layers"], want, strict=True):
        jax.tree.map(np.testing.assert_array_equal, p, dict(q))
    again = jp.oneshot.Checkpoint(done.folder)
    jax.tree.map(np.testing.assert_array_equal, again.load(names[0]), dict(want[0]))


def test_orbax_without_its_store_and_damaged(tmp_path, monkeypatch):
    row = {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": {}}
    (tmp_path / "_METADATA").write_text(json.dumps({"tree_metadata": {"('a',)": row}}))
    checkpoint = jp.oneshot.Checkpoint(tmp_path)
    assert checkpoint.names == ("a",)
    if "tensorstore" in sys.modules or pytest.importorskip("tensorstore"):
        with pytest.raises(
            ValueError, match="the leaf a of .* can't be read; write the checkpoint"
        ):
            checkpoint.load({"a": "a"})
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match=r"read by TensorStore: pip install 'jaxprune\[orbax\]'"):
        checkpoint.load({"a": "a"})
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(
        ValueError, match=r"_METADATA is damaged \('tree_metadata'\); write it anew"
    ):
        jp.oneshot.Checkpoint(tmp_path)
