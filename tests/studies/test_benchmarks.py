"""The main job's parts on small data, its whole on the smallest settings, and the command line."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib
import io
import json
import math
import socket
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxprune as jp
from benchmarks import __main__ as command
from benchmarks.common import data, measuring, plots, results, table, train
from benchmarks.models import transformers as native_models
from benchmarks.models.resnet import ResNet
from benchmarks.pages import facts
from benchmarks.studies import STUDIES
from benchmarks.studies.main import methods, run
from benchmarks.studies.oneshot import report as oneshot_report
from benchmarks.studies.speed import native

TINY = dataclasses.replace(
    run.QUICK, test_images=64, dense_steps=2, tune_steps=2, gradual_steps=3, renew_every=1,
    gradient_batches=1, rounds=2, points=(0.5,), gradual_scores=("Taylor",), sparsities=(0.9,),
    widths=(8, 16), batch=16, timing_batches=(1, 32),
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def network(digits):
    """A narrow network after initialisation: (model, its function, variables, structure)."""
    model = ResNet(digits.classes, widths=(8, 16), stem_strides=1)
    variables = jax.jit(model.init)(jax.random.key(0), digits.train_x[:1])
    fn = train.inference(model)
    return model, fn, variables, jp.infer_structure(fn, variables, digits.train_x[:1])


@pytest.fixture(scope="module")
def steps():
    """What was being done at each training step of the main job, as the progress bar hears it."""
    return []


@pytest.fixture(scope="module")
def rows(digits, steps):
    """The whole main job, as small as it gets."""
    return list(run.rows(digits, TINY, lambda what: lambda: steps.append(what)))


# -- data


def write_idx(folder, images, labels):
    for split in data.FILES.values():
        header = np.array([2051, *images.shape], ">i4").tobytes()
        (folder / split[0]).write_bytes(gzip.compress(header + images.tobytes()))
        (folder / split[1]).write_bytes(gzip.compress(bytes(8) + labels.tobytes()))


def test_idx_files_are_read_row_by_row(tmp_path):
    images = np.arange(3 * 4 * 2, dtype=np.uint8).reshape(3, 4, 2)
    write_idx(tmp_path, images, np.arange(3, dtype=np.uint8))
    got = data.from_debian(tmp_path)
    expected = (images[..., None] - images.mean()) / images.std()
    np.testing.assert_allclose(got.test_x, expected, rtol=1e-6)
    assert got.test_y.tolist() == [0, 1, 2]
    for image, label in zip(got.train_x, got.train_y, strict=True):  # shuffled as pairs
        np.testing.assert_allclose(image, expected[label], rtol=1e-6)


def test_a_source_that_is_not_there_names_the_package(tmp_path):
    with pytest.raises(data.Unavailable, match="apt-get install dataset-fashion-mnist"):
        data.from_debian(tmp_path / "nowhere")


def test_the_first_source_that_is_there_is_taken_and_the_others_are_named(monkeypatch, digits):
    def absent():
        raise data.Unavailable("not here")

    monkeypatch.setattr(data, "SOURCES", {"a": absent, "b": lambda: digits, "c": absent})
    assert data.load().passed_over == ("a: not here",)
    monkeypatch.setattr(data, "SOURCES", {"a": absent, "c": absent})
    with pytest.raises(data.Unavailable, match="a: not here; c: not here"):
        data.load()


def test_an_unreachable_host_is_given_up_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.gz"
        with pytest.raises(data.Unavailable, match=r"127\.0\.0\.1 cannot be reached"):
            data._require_connection(url)


def test_missing_tensorflow_datasets_is_said(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.Unavailable, match="pip install tensorflow-datasets"):
        data.from_tfds()


def test_nothing_prepared_is_said(monkeypatch, tmp_path):
    builder = types.SimpleNamespace(is_prepared=lambda: False, data_dir=tmp_path)
    monkeypatch.setattr(data, "_tfds_builder", lambda: builder)
    with pytest.raises(data.Unavailable, match="nothing is prepared under"):
        data.from_tfds()


def test_a_prepared_set_is_read_without_tensorflow(monkeypatch):
    one = {"image": np.ones((2, 2, 1), np.uint8), "label": 3}
    two = {"image": np.zeros((2, 2, 1), np.uint8), "label": 1}
    builder = types.SimpleNamespace(
        is_prepared=lambda: True,
        as_data_source=lambda: {"train": [one, two], "test": [two]},
    )
    monkeypatch.setattr(data, "_tfds_builder", lambda: builder)
    got = data.from_tfds()
    assert sorted(got.train_y.tolist()) == [1, 3]
    assert got.test_x.shape == (1, 2, 2, 1)


def test_a_format_that_only_tensorflow_reads_is_said(monkeypatch):
    def as_data_source():
        raise NotImplementedError("tfrecord")

    builder = types.SimpleNamespace(is_prepared=lambda: True, as_data_source=as_data_source)
    monkeypatch.setattr(data, "_tfds_builder", lambda: builder)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.Unavailable, match="only tensorflow reads: pip install tensorflow"):
        data.from_tfds()


def test_downloads_go_through_the_checked_cache_of_tensorflow_datasets(monkeypatch, tmp_path):
    from tensorflow_datasets.core.download import checksums

    served = tmp_path / "served"
    served.mkdir()
    write_idx(served, np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"

        def info(name, content):
            digest = hashlib.sha256(content).hexdigest()
            return checksums.UrlInfo(size=len(content), checksum=digest, filename=name)

        files = {path.name: path.read_bytes() for path in served.iterdir()}
        builder = types.SimpleNamespace(
            url_infos={address + name: info(name, content) for name, content in files.items()},
            data_dir=tmp_path / "tfds" / "fashion_mnist" / "1.0.0",
        )
        monkeypatch.setattr(data, "_tfds_builder", lambda: builder)
        data._require_connection(address)
        got = data.download()
        server.shutdown()
    for url, path in got.items():
        with open(path, "rb") as file:
            assert file.read() == files[url.rsplit("/", 1)[1]]


def test_a_failing_download_is_reported_with_its_last_line(monkeypatch):
    def failing(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: wrong checksum")

    builder = types.SimpleNamespace(url_infos={"http://localhost/x": None})
    monkeypatch.setattr(data, "_tfds_builder", lambda: builder)
    monkeypatch.setattr(data, "_require_connection", lambda url: None)
    monkeypatch.setattr(data.subprocess, "run", failing)
    with pytest.raises(data.Unavailable, match="the download failed: OSError: wrong checksum"):
        data.from_download()


def test_a_stalled_download_is_given_up(monkeypatch):
    def stalling(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    builder = types.SimpleNamespace(url_infos={"http://localhost/x": None})
    monkeypatch.setattr(data, "_tfds_builder", lambda: builder)
    monkeypatch.setattr(data, "_require_connection", lambda url: None)
    monkeypatch.setattr(data.subprocess, "run", stalling)
    with pytest.raises(data.Unavailable, match="the download took over 300 s"):
        data.from_download()


# -- training and methods


@pytest.mark.parametrize("batch", [7, 64, 360, 1000])
def test_accuracy_counts_each_image_once_whatever_the_batch(digits, batch):
    def guess(variables, x):  # right for every third image
        index = [np.flatnonzero((digits.test_x == one).all((1, 2, 3)))[0] for one in x]
        wrong = (digits.test_y[index] + (np.asarray(index) % 3 > 0)) % 10
        return jax.nn.one_hot(wrong, 10)

    assert train.accuracy(guess, None, digits, batch) == pytest.approx(120 / 360)


def test_batch_statistics_pass_the_optimizer_as_they_are(network, digits):
    model, _, variables, _ = network
    tx = train.sgd(10, 0.1)
    run_ = train.fit(
        model, tx, train.Run(variables, tx.init(variables)), digits, steps=1, batch=16, seed=0
    )
    order = np.random.default_rng(0).permutation(len(digits.train_x))[:16]
    x = digits.train_x[order]
    _, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        run_.variables["batch_stats"],
        new["batch_stats"],
    )


@pytest.fixture(scope="module")
def tuner(network):
    """One transformation for all masks, which live in its state."""
    return optax.chain(train.sgd(3, 0.1), jp.keep_params_sparse(methods.dense(network[2])))


@pytest.mark.parametrize("method", [m for m in run.plan(TINY) if m.schedule == "one-shot"], ids=str)
def test_masks_hold_through_tuning(network, digits, tuner, method):
    model, _, variables, structure = network
    gradient = methods.mean_gradient(model, variables, digits, 1, 16)
    masks = methods.one_shot(method, structure, variables, gradient)
    masked = jp.apply_masks(variables, masks)
    state = optax.tree_utils.tree_set(tuner.init(masked), masks=masks)
    tuned = train.fit(model, tuner, train.Run(masked, state), digits, steps=3, batch=16, seed=0)
    again = jp.apply_masks(tuned.variables, masks)
    jax.tree.map(np.testing.assert_array_equal, tuned.variables, again)
    kept = measuring.kept_params(masked) / measuring.kept_params(variables)
    assert kept == 1 if method.pattern == "dense" else kept < 0.75


@pytest.mark.parametrize("score", methods.STRUCTURED)
def test_gradual_pruning_ends_at_the_target_with_the_better_units(network, digits, score):
    model, _, variables, structure = network
    tx = methods.gradual(score, structure, train.sgd(6, 1e-6), steps=6, every=1)
    state = optax.tree_utils.tree_set(tx.init(variables), target=0.5)
    done = train.fit(model, tx, train.Run(variables, state), digits, steps=6, batch=16, seed=0)
    masks = optax.tree_utils.tree_get(done.opt_state, "masks")
    keep = structure.keep(masks)
    free = {name: kept for name, kept in keep.items() if not structure.dims[name].frozen}
    assert {(len(kept), kept.sum()) for kept in free.values()} == {(8, 8), (16, 8)}
    if score == "magnitude L2":  # hardly trained: what goes gradually is what goes at once
        method = methods.Method("structured", score, "one-shot", 0.5)
        at_once = structure.keep(methods.one_shot(method, structure, variables, None))
        agree = [(kept == at_once[name]).mean() for name, kept in free.items()]
        assert np.mean(agree) > 0.9


@pytest.mark.parametrize("score", methods.STRUCTURED)
def test_batch_statistics_do_not_vote(network, digits, score):
    model, _, variables, structure = network
    gradient = methods.mean_gradient(model, variables, digits, 1, 16)
    method = methods.Method("structured", score, "one-shot", 0.5)
    loud = variables | {
        "batch_stats": jax.tree.map(
            lambda s: s + 100 * jnp.arange(s.size, dtype=s.dtype), variables["batch_stats"]
        )
    }
    got, expected = (
        methods.one_shot(method, structure, given, gradient) for given in (loud, variables)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# -- the whole


def test_every_method_is_a_row_after_the_dense_network(rows):
    assert [r["pattern"] for r in rows] == ["dense"] + [m.pattern for m in run.plan(TINY)]


def test_compact_models_equal_their_masked_models_and_are_smaller(rows):
    dense, *others = rows
    compact = [row for row in others if row["pattern"] == "structured"]
    assert len(compact) == 4  # three scores at once, one gradually
    for row in compact:
        assert row["equality"]["exact"]
        assert row["equality"]["units_removed"] > 0
        assert row["equality"]["max_relative_error"] < 1e-5
        assert row["equality"]["error_float64"] < 1e-12
        assert row["bytes_on_disk"] < dense["bytes_on_disk"]
        assert row["flops_ratio"] > 1.3


def test_masked_networks_keep_the_dense_file_and_flops(rows):
    dense, *others = rows
    for row in others:
        if row["pattern"] in ("unstructured", "2:4"):
            assert row["params_kept"] < 0.6 * dense["params_kept"]
            assert row["bytes_on_disk"] == dense["bytes_on_disk"]
            assert row["flops_ratio"] == 1


def test_every_raw_timing_is_kept(rows):
    for row in rows:
        for timing, batch in zip(row["timing"], TINY.timing_batches, strict=True):
            assert len(timing["samples_seconds"]) == TINY.rounds
            assert timing["batch"] == batch
            assert math.isclose(
                timing["images_per_second"] * timing["median_seconds"], batch, rel_tol=1e-6
            )


def test_the_bar_counts_every_step(rows, steps):
    assert len(steps) == run.count_steps(TINY)


def test_full_mode_holds_every_score_both_ways_at_five_points_and_three_seeds():
    assert run.FULL.seeds == 3
    ways = {(m.score, m.schedule) for m in run.plan(run.FULL) if m.pattern == "structured"}
    assert ways == {(s, w) for s in methods.STRUCTURED for w in ("one-shot", "gradual")}
    for settings in (run.QUICK, run.FULL):
        assert len(settings.points) >= 5


def test_the_command_writes_json_and_pictures(rows, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--data", "digits", "--results", str(tmp_path)])
    monkeypatch.setattr(run, "QUICK", TINY)
    monkeypatch.setattr(run, "rows", lambda *args: iter(rows))
    command.main()
    folder = results.folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "main-quick.json",
        "main-quick_accuracy_speedup.png",
        "main-quick_measured_theoretical.png",
    ]
    found = results.load(folder / "main-quick.json")
    assert found["rows"] == json.loads(json.dumps(rows))
    assert found["versions"]["jax"] == jax.__version__
    assert found["data"]["source"] == "scikit-learn (embedded)"
    assert found["data"]["test_images"] == 64
    assert "digits from scikit-learn" in capsys.readouterr().out


def test_help_explains_itself():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--full" in done.stdout
    assert "main-quick.json" in done.stdout


# -- results, table, pictures


def test_rows_of_several_days_are_dated():
    found = {"date": "2026-01-02"}
    assert results.days(found, [{}, {}]) == "2026-01-02"
    rows = [{}, {"date": "2026-01-01"}, {"date": "2026-01-05"}]
    assert results.days(found, rows) == "2026-01-01 to 2026-01-05"


def test_results_survive_the_file_with_raw_timings_on_one_line(tmp_path):
    result = {"seconds": [1.5, 2e-07, 3], "rows": [{"a": None}], "names": ["x", "y"]}
    results.save(result, tmp_path / "a" / "b.json")
    assert results.load(tmp_path / "a" / "b.json") == result
    assert '"seconds": [1.5, 2e-07, 3]' in (tmp_path / "a" / "b.json").read_text()


def test_the_table_averages_over_seeds(rows):
    both = [*rows, *({**row, "seed": 1, "accuracy": row["accuracy"] + 0.02} for row in rows)]
    grouped = table.groups(both)
    assert [len(group) for group in grouped] == [2] * len(rows)
    assert table.mean(grouped[0], "accuracy") == pytest.approx(rows[0]["accuracy"] + 0.01)
    assert table.cells(grouped[0])[2].endswith("± 1.0%")
    assert all(len(table.cells(group)) == len(table.HEADINGS) for group in grouped)


def test_the_table_tells_how_many_masked_units_stay(rows):
    row = next(row for row in rows if row["equality"])
    equality = row["equality"] | {"exact": False, "units_masked": 12, "units_removed": 9}
    assert table.cells([row | {"equality": equality}])[-1].endswith(", 3 masked units stay")


def test_the_printed_table_says_what_its_columns_mean(rows):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table.rich_table(rows, "title"))
    text = console.export_text()
    assert "batch 32" in text
    assert "masked networks keep their zeros" in text


def test_pictures_are_drawn_for_one_point_and_for_many(rows, tmp_path):
    for path in plots.save(rows, "title", tmp_path, "main"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_readme_shows_perplexities_and_their_plot(tmp_path):
    point = {"docs": 2.0, "excerpt": 3.0, "at": "50%", "method": "wanda", "drift": 0.0}
    both = point | {"calibration": "docs + glosses", "sequences": 64}
    rows = [
        point | {"calibration": "docs", "sequences": 32, "glosses": 1234.4},
        point | {"calibration": "docs", "sequences": 32, "glosses": 9.0, "seed": 1},
        both | {"glosses": 5.0},
        both | {"glosses": 6.0, "at": "2:4"},
        both | {"glosses": 4.0, "drift": 0.25},
        both | {"glosses": 3.0, "drift": 0.5},  # another share than was chosen
        point | {"calibration": "docs + glosses", "sequences": 32, "glosses": 7.0},  # no default
    ]
    found = {"dense": {"docs": 1.0, "excerpt": 1.0, "glosses": 1.5}, "rows": rows}
    lines = oneshot_report.markdown(found).splitlines()
    assert lines[2:] == [
        "|  | dense | 1.0 | 1.0 | 1.5 |  |  |",
        "| 50 % | wanda | 3.0 | 2.0 | 5.0 | 3.0 | 1,234 |",
        "| 50 % | wanda, drift 0.25 | 3.0 | 2.0 | 4.0 |  |  |",
        "| 2:4 | wanda | 3.0 | 2.0 | 6.0 |  |  |",
    ]
    assert oneshot_report.plot(found, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


# -- beside a native module


@pytest.fixture(scope="module")
def beside_native():
    """Every network of the study ``native``, as small as it gets: (case, its functions)."""
    return [(case, native.build(case, batch=2)) for case in native_models.tiny_cases()]


@pytest.fixture(scope="module")
def nothing_carried(beside_native):
    return [(case, entries) for case, entries in beside_native if "two-pass" not in case.name]


def test_the_compact_program_costs_what_the_native_module_does(nothing_carried):
    for case, entries in nothing_carried:
        found = native.flops(entries)
        # jnp.tril adds 0 to an iota, once per layer and position: the compact program doesn't
        added = {"add": 2 * 6 * 6} if case.name.startswith("GPT") else {}
        assert {n: a - b for n, (a, b) in found["differing"].items()} == added, case.name
        assert found["native"] - found["compact"] == sum(added.values()), case.name
        assert found["dense"] > 2.5 * found["compact"], case.name


def test_a_variance_after_the_mean_costs_its_removed_part_and_no_more(beside_native):
    (entries,) = (entries for case, entries in beside_native if "two-pass" in case.name)
    found = native.flops(entries)
    # three norms; 4 channels of 5 tokens in two of them and of 1 in the last, in a batch of 2:
    # the mean is subtracted, squared and summed once more there, and the two sums are added
    rows = 2 * (5 + 5 + 1)
    parts = {"add": rows, "reduce_sum": 4 * rows, "square": 4 * rows, "sub": 4 * rows}
    assert {n: b - a for n, (a, b) in found["differing"].items()} == parts


def test_the_compiler_makes_the_same_program_of_both(nothing_carried):
    for case, entries in nothing_carried:
        compiled = {
            name: jax.jit(entries[name][0]).lower(*entries[name][1]).compile()
            for name in (native.NATIVE, native.COMPACT)
        }
        found = native.optimized(compiled)
        assert found["differing"] == {}, case.name
        assert found["native"] == found["compact"] > 100, case.name


def test_operations_are_read_with_their_shapes():
    text = """
    %p.1 = f32[2,3]{1,0} parameter(0), metadata={op_name="a(b"}
    ROOT fusion = f32[2,3]{1,0:T(8,128)} fusion(f32[2,3]{1,0} %p.1), kind=kLoop
    %t = (s32[], /*index=1*/f32[4]{0}) tuple(%c, %p.1)
    """
    assert native.operations(text) == {
        "parameter f32[2,3]": 1, "fusion f32[2,3]": 1, "tuple (2 arrays)": 1,
    }  # fmt: skip


def test_the_native_command_compares_and_writes(tmp_path, monkeypatch, capsys):
    options = ["native", "--rounds", "2", "--repetitions", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    monkeypatch.setattr(native, "BATCHES", (2,))
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests' work
    monkeypatch.setattr(native_models, "cases", lambda: native_models.tiny_cases()[:1])
    native.main()
    found = results.load(results.folder(tmp_path) / "native.json")
    row = found["networks"]["small ResNet"]
    assert {"trace", "lower", "compile", "lower + compile", "all three"} == set(row["stages"])
    times = row["batches"]["2"]["gradient"]["times"]
    assert times["native"]["ratio"] == 1
    assert len(times["compact"]["samples_seconds"]) == 2
    assert len(found["load_average"]["before"]) == 3
    assert "forward, batch 2" in capsys.readouterr().out


# ------------------------------------------------------------------------------- the command line


def test_all_studies_are_listed_and_have_a_main(capsys):
    command.main(["--list"])
    listed = capsys.readouterr().out
    for name, study in STUDIES.items():
        assert name in listed and study.question in listed
        assert callable(importlib.import_module(f"benchmarks.studies.{study.module}").main)


def test_a_study_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(SystemExit, match="no study 'sped'.*speed_accuracy"):
        command.main(["sped"])


def test_a_quick_run_has_options_of_its_own_and_leaves_the_results_alone():
    given = command.arguments("native", ["--quick"])
    assert given[:2] == ["--rounds", "3"] and "--results" in given
    assert str(results.FOLDER) not in given
    with pytest.raises(SystemExit, match="oneshot_layer has no quick way"):
        command.arguments("oneshot_layer", ["--quick"])


def test_whole_runs_say_how_long_they_took(tmp_path):
    command.note("native", 4.81, tmp_path)
    command.note("main", 4.0, tmp_path)
    listed = {fact.study: fact.minutes for fact in facts.facts(tmp_path)}
    assert listed["native"] == "4.8" and listed["main"] == "4"
    assert list(listed.values()).count("not recorded") == len(STUDIES) - 2
