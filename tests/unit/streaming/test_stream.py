"""From disk to disk equals in memory, bit for bit, by every method and in every format."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import jaxprune as jp
from tests.unit.streaming import tiny
from tests.unit.streaming.tiny import NAMES, TOKENS, stream

PER_OUTPUT = jp.unstructured(per_output=True)


def magnitude(p, stats):
    masks = jp.unstructured()(jp.magnitude(p), 0.5)
    return jp.apply_masks(p, masks), masks


def wanda(p, stats):
    masks = PER_OUTPUT(jp.wanda(p, input_norms=stats.norms), 0.5)
    return jp.oneshot.refit(p, masks, stats), masks


def dsnot(p, stats):
    masks = PER_OUTPUT(jp.wanda(p, input_norms=stats.norms), 0.5)
    masks = jp.oneshot.dsnot(p, masks, stats)
    return jp.apply_masks(p, masks), masks


def solved(method, **options):
    return lambda p, stats: getattr(jp.oneshot, method)(p, stats, 0.5, **options)


METHODS = {
    "magnitude": (magnitude, {}),
    "wanda + refit": (wanda, {}),
    "sparsegpt": (solved("sparsegpt"), {}),
    "sparsegpt 2:4": (solved("sparsegpt", pattern=jp.n_m(2, 4)), {}),
    "alps": (solved("alps"), {}),
    "obc": (solved("obc"), {}),
    "dsnot": (dsnot, {}),
    "in order of use": (solved("sparsegpt"), {"order": "use"}),
    "with drift": (solved("sparsegpt"), {"error_propagation": 0.5}),
    "some leaves": (wanda, {"where": lambda path, leaf: path != "q"}),
}


@pytest.fixture
def source(tmp_path):
    return tiny.save_sharded(tmp_path / "source")


def assert_equal(folder, blocks):
    found = jp.oneshot.Checkpoint(folder)
    for names, want in zip(NAMES, blocks, strict=True):
        got = found.load(names)
        assert all(got[k].dtype == want[k].dtype for k in want)
        jax.tree.map(np.testing.assert_array_equal, got, dict(want))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_equals_sequential_bit_for_bit(source, tmp_path, name):
    prune, options = METHODS[name]
    if name == "some leaves":
        prune = lambda p, stats: magnitude(p, stats)  # noqa: E731
    want, masks = tiny.in_memory(prune, **options)
    done = stream(source, tmp_path / "target", prune, **options)
    assert_equal(done.folder, want)
    assert done.densities == [float(jp.density(p, m)) for p, m in zip(want, masks)]


@pytest.mark.slow
def test_bfloat16_comes_back_as_such(tmp_path):
    found = tiny.tensors(ml_dtypes.bfloat16)
    source = tiny.save_sharded(tmp_path / "source", 2, found)
    embed = (lambda p, x: p["table"][x].astype(jnp.bfloat16), tiny.EMBED[1])
    want, _ = tiny.in_memory(wanda, ml_dtypes.bfloat16)
    assert_equal(stream(source, tmp_path / "target", wanda, embed=embed).folder, want)


def test_everything_else_is_copied_and_the_result_is_a_checkpoint(source, tmp_path):
    before = tiny.content(source)
    target = stream(source, tmp_path / "target", magnitude).folder
    assert tiny.content(source) == before
    placed = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    want = tiny.tensors()
    assert placed.keys() == want.keys()
    for name in ("embed.weight", "norm.weight"):
        with safe_open(target / placed[name], "np") as file:
            assert file.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(file.get_tensor(name), want[name])
    assert {p.name for p in target.iterdir()} == {
        *placed.values(), "model.safetensors.index.json", "stream.json",
    }  # fmt: skip
    for file in set(placed.values()):
        with safe_open(target / file, "np") as opened:
            assert all(placed[name] == file for name in opened.keys())  # noqa: SIM118


@pytest.mark.slow
def test_one_file_gives_the_same_tensors_as_shards(source, tmp_path):
    single = tiny.save(tmp_path / "single")
    folders = [stream(s, tmp_path / f"to {s.name}", magnitude).folder for s in (source, single)]
    file = stream(single / "model.safetensors", tmp_path / "of file", magnitude).folder
    blocks = [jp.oneshot.Checkpoint(file).load(names) for names in NAMES]
    for folder in folders:
        assert_equal(folder, blocks)


@pytest.mark.slow
def test_hidden_states_need_no_embedding(source, tmp_path):
    table = tiny.tensors()["embed.weight"]
    states = [jnp.asarray(table)[x] for x in TOKENS]
    done = stream(source, tmp_path / "a", magnitude, embed=None, batches=iter(states))
    other = stream(source, tmp_path / "b", magnitude)
    assert_equal(done.folder, [jp.oneshot.Checkpoint(other.folder).load(n) for n in NAMES])


@pytest.mark.slow
def test_shapes_alone_where_no_statistics_are_needed(source, tmp_path):
    shapes = [jax.ShapeDtypeStruct(TOKENS[0].shape, jnp.int32)]
    seen = []

    def prune(p, stats):
        seen.append(stats)
        return magnitude(p, stats)

    done = stream(source, tmp_path / "target", prune, batches=shapes, settings="magnitude")
    assert seen == [None] * len(NAMES)
    assert_equal(done.folder, tiny.in_memory(magnitude)[0])


# ---- whole units --------------------------------------------------------------------------------


def structure(source):
    return jp.infer_structure(tiny.block, jp.oneshot.Checkpoint(source).shapes(NAMES[0]), tiny.X)


def plan(source):
    """Masks of all blocks: a quarter of all hidden units, by FLAP's scores of the dense network."""
    found = structure(source)

    def look(p, stats):
        return found.unit_scores(jp.scores.flap(p, stats=stats), jp.reduce.sum)[tiny.UNITS]

    scores = jp.oneshot.survey(
        source, tiny.block, NAMES, TOKENS, look, embed=tiny.EMBED, progress=False
    )
    cut = np.quantile(np.concatenate(scores), 0.25)
    return [found.masks({tiny.UNITS: np.asarray(units) > cut}) for units in scores]


@pytest.mark.slow
def test_units_are_cut_by_one_plan_and_repaired(source, tmp_path):
    masks = plan(source)
    left = iter(masks)

    def prune(p, stats):
        kept = next(left)
        return jp.oneshot.refit(p, kept, stats), kept

    want, _ = tiny.in_memory(prune)
    done = stream(source, tmp_path / "cut", masks=masks, repair=jp.oneshot.refit, cut=True)
    small = [jp.compact(tiny.block, p, m, tiny.X).params for p, m in zip(want, masks, strict=True)]
    assert_equal(done.folder, small)
    widths = [p["gate"].shape[1] for p in small]
    assert len(set(widths)) > 1 and sum(widths) == 36
    whole = stream(source, tmp_path / "whole", masks=masks, repair=jp.oneshot.refit)
    assert_equal(whole.folder, want)


@pytest.mark.slow
def test_masks_alone_set_to_zero_and_pruning_may_cut_too(source, tmp_path):
    masks = [structure(source).masks({tiny.UNITS: np.arange(16) > 3})] * 3
    dense = [jp.oneshot.Checkpoint(source).load(names) for names in NAMES]
    want = [jp.compact(tiny.block, p, m, tiny.X).params for p, m in zip(dense, masks)]
    assert_equal(stream(source, tmp_path / "a", masks=masks, cut=True).folder, want)
    prune = lambda p, stats: (p, masks[0])  # noqa: E731  (what it left is set to zero)
    assert_equal(stream(source, tmp_path / "b", prune, cut=True).folder, want)


@pytest.mark.slow
def test_masks_are_split_among_groups_in_order(source, tmp_path):
    masks = [structure(source).masks({tiny.UNITS: np.arange(16) > 3})] * 3
    left = iter([m for m in masks for _ in range(4)])

    def prune(p, stats):
        kept = next(left)
        own = {k: None if p[k] is None else kept[k] for k in p}
        return jp.oneshot.refit(p, own, stats), own

    want, _ = tiny.in_memory(prune, order="use")
    done = stream(source, tmp_path / "a", masks=masks, repair=jp.oneshot.refit, order="use")
    assert_equal(done.folder, want)


@pytest.mark.slow
def test_a_unit_that_has_to_stay_is_told(source, tmp_path):
    """Its gate is masked, and what the block adds to it is not zero."""
    masks = [dict.fromkeys(tiny.SHAPES, True) | {"gate": jnp.arange(16) > 3}] * 3
    block = lambda p, x: tiny.block(p | {"gate": p["gate"] + 1.0}, x)  # noqa: E731
    with pytest.warns(UserWarning) as told:
        jp.oneshot.stream(
            source, tmp_path / "a", block, NAMES, TOKENS, masks=masks, cut=True, embed=tiny.EMBED
        )
    assert len(told) == 3
    assert "blocks[0] keeps 4 masked units of gate:1, as zeros: " in str(told[0].message)


@pytest.mark.slow
def test_a_survey_is_of_the_dense_network(source):
    found = jp.oneshot.survey(
        source, tiny.block, NAMES, TOKENS, lambda p, stats: stats.norms["down"],
        embed=tiny.EMBED, progress=False,
    )  # fmt: skip
    want = []

    def look(p, stats):
        want.append(stats.norms["down"])
        return p, jax.tree.map(lambda _: True, p)

    tiny.in_memory(look, grams=False)
    np.testing.assert_array_equal(found, want)
    shapes = [jax.ShapeDtypeStruct(TOKENS[0].shape, jnp.int32)]
    look = lambda p, stats: stats  # noqa: E731
    assert jp.oneshot.survey(
        source, tiny.block, NAMES, shapes, look, embed=tiny.EMBED
    ) == [None] * 3  # fmt: skip


@pytest.mark.slow
def test_leaves_that_pruning_adds_get_names(source, tmp_path):
    def biased(p, stats):
        new, masks = magnitude(p, stats)
        return new | {"bias": jnp.ones(8)}, masks | {"bias": jnp.asarray(True)}

    added = lambda number, path: f"layers.{number}.mlp.{path}"  # noqa: E731
    done = stream(source, tmp_path / "a", biased, added=added)
    names = [each | {"bias": f"layers.{k}.mlp.bias"} for k, each in enumerate(NAMES)]
    want, _ = tiny.in_memory(biased)
    for each, p in zip(names, want, strict=True):
        found = jp.oneshot.Checkpoint(done.folder).load(each)
        jax.tree.map(np.testing.assert_array_equal, found, p)
    with pytest.raises(ValueError, match=r"prune gave blocks\[0\] the leaf bias, which no tensor"):
        stream(source, tmp_path / "b", biased)
    with pytest.raises(
        ValueError, match="the leaf bias of .* the name norm.weight, which a tensor"
    ):
        stream(source, tmp_path / "c", biased, added=lambda number, path: "norm.weight")


@pytest.mark.slow
def test_progress_wraps_the_blocks(source, tmp_path):
    seen = []

    def wrap(items):
        for item in items:
            seen.append(item)
            yield item

    stream(source, tmp_path / "a", magnitude, progress=wrap)
    assert seen == [0, 1, 2]
    first = lambda items: list(items)[:1]  # noqa: E731
    with pytest.raises(RuntimeError, match="progress passed on 1 of 3 blocks; make the same call"):
        stream(source, tmp_path / "b", magnitude, progress=first)
    done = stream(source, tmp_path / "b", magnitude).folder
    assert tiny.content(done) == tiny.content(tmp_path / "a")
