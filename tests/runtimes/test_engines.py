"""Networks that are served, compacted, in each engine: equal to the small function in XLA."""

import contextlib
import functools
import importlib.util
import io
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.models.served import NETWORKS, floats
from tests.unit.runtimes.test_state import check_cache, halved
from tests.unit.test_docs import blocks

pytest.importorskip("jax2onnx")
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
EQUAL = 1e-5
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def needs(package):
    """Skips without a package, which is not imported: OpenVINO's telemetry may fork then."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not here")


def runtime(engine, **options):
    needs(ENGINES[engine])
    return getattr(jp.runtimes, engine)(**options)


@functools.cache
def network(name):
    """(fn, params, x, the compact model)"""
    fn, params, x = NETWORKS[name]()
    structure = jp.infer_structure(fn, params, x)
    masks = jp.structured(structure)(jp.magnitude(params), 0.5)
    return fn, params, x, jp.compact(fn, params, masks, x)


def apart(got, wanted):
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_batch_gives_the_same(name, engine):
    *_, x, small = network(name)
    run = runtime(engine)(small, x, shapes="b, ...")
    for batch in (1, 5):
        given = jnp.tile(x, (3, *(1,) * (x.ndim - 1)))[:batch]
        found = apart(run(given), np.asarray(jax.jit(small.fn)(small.params, given)))
        print(f"{name} in {engine}, batch {batch}: {found:.1e}")
        assert found < EQUAL


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_functions_go_too(name):
    fn, params, x, _ = network(name)
    run = runtime("onnx")(fn, params, x)
    assert apart(run(params, x), np.asarray(jax.jit(fn)(params, x))) < EQUAL


def test_several_results_and_arguments():
    def fn(p, x, scale):
        y = jnp.tanh(x @ p["w"])
        most = y.argmax(-1)
        return {"y": y * scale, "rest": (most, x, most, jnp.arange(3), p["w"])}

    p, x = {"w": floats(4, 6)}, floats(3, 4)
    run = runtime("onnx")(fn, p, x, jnp.float32(2), shapes=("b, ...", ""))
    for a, b in zip(jax.tree.leaves(run(p, x, np.float32(3))), jax.tree.leaves(fn(p, x, 3.0))):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5)


# ------------------------------------------------------------------------------------- int8

# name -> largest relative error of each quantisation over the float results, None: it refuses
INT8 = {"encoder": (0.1, 0.1), "causal": (0.1, 0.3), "cnn": (0.2, 0.1)}


@pytest.mark.parametrize("quantize", ["dynamic", "static"])
@pytest.mark.parametrize("name", INT8)
def test_int8(tmp_path, name, quantize):
    """The file shrinks, results are near; what stays in float is told."""
    *_, x, small = network(name)
    several = [(floats(*x.shape, seed=i) if x.dtype == jnp.float32 else x,) for i in range(8)]
    options = {"quantize": quantize, "calibration": several if quantize == "static" else None}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        artefact = jp.export(
            small, tmp_path, x, shapes="b, ...", runtime=runtime("onnx", **options)
        )
    found = artefact.certificate["residual"]["relative"]
    print(f"{name} int8 {quantize}: {found:.1e}, {artefact.size} bytes")
    assert 1e-5 < found < INT8[name][quantize == "static"]


def test_weights_within_loops_are_quantised(tmp_path):
    *_, x, small = network("lstm")
    plain = jp.export(small, tmp_path, x, runtime=runtime("onnx"))
    int8 = jp.export(small, tmp_path, x, runtime=runtime("onnx", quantize="dynamic"))
    assert int8.certificate["residual"]["relative"] < 0.1 and int8.size < 1.3 * plain.size


def test_a_quantiser_that_leaves_weights_in_float_says_so():
    *_, x, small = network("cnn")
    with pytest.warns(
        UserWarning, match=r"dynamic quantisation left (9\d|100)% .*Conv of \(.*\).*static"
    ):
        runtime("onnx", quantize="dynamic")(small, x)
    with pytest.raises(ValueError, match="quantised no weights .there are none of products"):
        runtime("onnx", quantize="dynamic")(lambda x: x * floats(4, 4) + 1, floats(4, 4))


KEPT = [("onnx", "dynamic"), ("onnx", "static"), ("openvino", "static")]


def in_float(folder):
    """The float weights of products and convolutions of an ONNX file, those in loops too."""
    import onnx

    from jaxprune.runtimes import _onnx_graph

    model = onnx.load(folder / "model.onnx")
    nodes = [node for graph in _onnx_graph.graphs(model.graph) for node in graph.node]
    read = {n for node in nodes if node.op_type in ("MatMul", "Conv") for n in node.input[:2]}
    found = _onnx_graph.weights(model)
    return [w for name, w in found.items() if name in read and w.dtype == np.float32]


def quantized(folder, engine, quantize, fn, args, x, **options):
    """The artefact, and the float matrices in it."""
    calibration = [(x,)] if quantize == "static" else None
    where = runtime(engine, quantize=quantize, calibration=calibration, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ONNX Runtime's .* quantisation left")
        return jp.export(fn, folder, *args, runtime=where), in_float(folder)


@pytest.mark.parametrize("engine, quantize", KEPT)
def test_weights_that_are_named_stay_in_float(tmp_path, engine, quantize):
    """Each column of ``rough`` has an entry that leaves nothing for the others in 8 bits."""
    rough = floats(32, 8).at[jnp.arange(8), jnp.arange(8)].set(1e4)
    p, x = {"fine": floats(16, 32), "rough": rough}, floats(64, 16)
    fn = lambda p, x: (jnp.tanh(x @ p["fine"]) * (jnp.arange(32) > 7)) @ p["rough"]  # noqa: E731
    wanted = fn(p, x)
    plain, left = quantized(tmp_path / "all", engine, quantize, fn, (p, x), x)
    assert not left
    kept, left = quantized(
        tmp_path / "kept", engine, quantize, fn, (p, x), x, keep_float=("rough",)
    )
    np.testing.assert_array_equal(*left, rough)
    print(apart(plain.fn(x), wanted), apart(kept.fn(x), wanted))
    assert apart(kept.fn(x), wanted) < 0.05 < apart(plain.fn(x), wanted)
    assert kept.certificate["keep_float"] == ["rough"] and plain.certificate["keep_float"] == []
    assert "but rough" in jp.load_exported(tmp_path / "kept").fn.runtime.name


@pytest.mark.parametrize("engine, quantize", [row for row in KEPT if row[1] == "static"])
def test_a_convolution_and_the_norm_within_it_stay_in_float(tmp_path, engine, quantize):
    *_, x, small = network("cnn")
    kernel = small.params["params"]["Conv_1"]["kernel"]
    _, left = quantized(
        tmp_path, engine, quantize, small, (x,), x, keep_float="params/Conv_1/kernel"
    )
    assert [w.size for w in left] == [kernel.size]


def test_weights_within_loops_stay_in_float(tmp_path):
    """Gates lie side by side in one matrix: all of that stays."""
    *_, x, small = network("lstm")
    gate = "params/OptimizedLSTMCell_0/hi/kernel"
    assert gate in jp.runtimes.sensitivity(small.params, lambda p: 0.0).leaves
    _, left = quantized(tmp_path, "onnx", "dynamic", small, (x,), x, keep_float=gate)
    width = small.params["params"]["OptimizedLSTMCell_0"]["hi"]["kernel"].shape
    assert [w.shape for w in left] == [(width[0], 4 * width[1])]


def test_nothing_is_left_to_quantise():
    *_, x, small = network("encoder")
    where = runtime("onnx", quantize="dynamic", keep_float="params")
    with pytest.raises(ValueError, match="quantised no weights"):
        where(small, x)


def test_calibration_data_that_doesnt_fit():
    *_, x, small = network("encoder")
    wrong = runtime("onnx", quantize="static", calibration=[(x[:, :3],)])
    with pytest.raises(
        ValueError, match=r"argument 0 is int32\[2,3\], and the program takes int32"
    ):
        wrong(small, x)


def test_openvino_starts_no_process_to_report_its_import():
    import subprocess
    import sys

    needs("openvino")
    code = (
        "import os, sys, jaxprune as jp, jax.numpy as jnp;"
        "os.register_at_fork(before=lambda: print('forked'));"
        "jp.runtimes.openvino()(lambda x: x + 1, jnp.ones(2));"
        "print('openvino' in sys.modules, 'openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


# ------------------------------------------------------------------------------------ errors


def test_an_operation_that_cant_be_written_is_named_with_its_line():
    def fn(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    match = r"the runtime onnx can't do pure_callback at test_engines.py:\d+ \(.*fn\): jax2onnx"
    with pytest.raises(NotImplementedError, match=match):
        runtime("onnx")(fn, floats(3))


def test_random_keys_are_named():
    def fn(x, key):
        return x + jax.random.normal(key, x.shape)

    match = r"can't do random_\w+ at test_engines.py:\d+ .*: it has no random keys"
    with pytest.raises(NotImplementedError, match=match):
        runtime("onnx")(fn, floats(3), jax.random.key(0))


def test_jax_is_what_it_was_after_a_conversion():
    before = {m: dict(vars(m)) for m in (jnp, jax.lax, jax.nn)}
    runtime("onnx")(lambda x: jnp.cumsum(x, 0), floats(3, 2))
    for module, names in before.items():
        assert all(vars(module)[name] is value for name, value in names.items())
    code = (
        "import jax.numpy as jnp, jaxprune as jp; before = jnp.cumsum;"
        "jp.runtimes.onnx()(jnp.sin, jnp.ones(3)); print(jnp.cumsum is before)"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_file_that_the_engine_cant_run(tmp_path):
    pytest.importorskip("onnxruntime")
    from jaxprune.runtimes import _onnx

    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="ONNX Runtime can't run model.onnx: "):
        _onnx.read(tmp_path / "model.onnx", jp.runtimes.Options())


def test_sensitivity_in_an_engine_finds_activations_that_8_bits_cannot_hold():
    """One channel is so large that the others are rounded away where the second product reads."""
    params = {
        "wide": jnp.asarray(floats(8, 16)).at[:, 0].multiply(1e4),
        "out": jnp.asarray(floats(16, 4)).at[0].set(0),
        "last": jnp.asarray(floats(4, 4)),
    }
    x = jnp.asarray(floats(32, 8))

    def fn(p, x):
        return jnp.tanh(jax.nn.relu(x @ p["wide"]) @ p["out"]) @ p["last"]

    def metric(r):
        return -apart(r(fn, params, x)(params, x), np.asarray(fn(params, x)))

    static = runtime("onnx", quantize="static", calibration=[(x,)])
    found = jp.runtimes.sensitivity(params, metric, runtime=static)
    others = static.replace(static.options._replace(keep_float=("last", "wide")))
    assert next(iter(found.leaves)) == "out" and found.leaves["out"] == metric(others)
    assert found.every == metric(static) and found.exact > -EQUAL
    kept = found.keep_float(-0.1)
    assert metric(static.replace(static.options._replace(keep_float=kept))) >= -0.1 > found.every
    assert set(kept) < {*params}


def test_threads_of_onnx_runtime_do_not_spin_into_the_next_call(monkeypatch):
    """Those that do take the cores from the other models of a comparison."""
    import onnxruntime

    configs, made = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **kw: configs.append(a[1]) or made(*a, **kw)
    )
    runtime("onnx")(jnp.sin, jnp.ones(3))(jnp.ones(3))
    assert [c.get_session_config_entry("session.force_spinning_stop") for c in configs] == ["1"]


@pytest.mark.parametrize("name, shapes", [("encoder", "b, t"), ("causal", "b, t, ...")])
def test_any_length(name, shapes):
    *_, x, small = network(name)
    run = runtime("onnx")(small, x, shapes=shapes)
    for length in (3, 11):
        given = jnp.concatenate([x, x, x], 1)[:, :length]
        assert apart(run(given), np.asarray(small.fn(small.params, given))) < EQUAL


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_64_bits_switched_on(dtype):
    with jax.enable_x64(True):
        p = {"w": jnp.asarray(floats(4, 6), dtype)}
        x = jnp.asarray(floats(3, 4), dtype)
        fn = lambda p, x: jnp.tanh(x @ p["w"])[:, jnp.arange(2)]  # noqa: E731
        got = runtime("onnx")(fn, p, x)(p, x)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, fn(p, x), rtol=1e-5 if dtype == "float32" else 1e-12)
    assert not jax.config.jax_enable_x64


def test_an_artefact_runs_in_a_process_of_its_own(tmp_path):
    import subprocess
    import sys

    *_, x, small = network("nnx")
    artefact = jp.export(small, tmp_path, x, shapes="b, ...", runtime=runtime("onnx"))
    assert artefact.check(2) < EQUAL and artefact.certificate["residual"]["relative"] < EQUAL
    code = (
        "import sys, numpy as np, jaxprune as jp; m = jp.load_exported(sys.argv[1]);"
        "assert not {'flax', 'jax2onnx', 'onnx'} & set(sys.modules);"
        "print(m.fn(m.params, np.ones((3, 12, 12, 3), np.float32)).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    wanted = small.fn(small.params, jnp.ones((3, 12, 12, 3))).sum()
    assert float(done.stdout) == pytest.approx(float(wanted), rel=1e-4)


def test_engines_take_turns_in_one_comparison():
    fn, params, x, small = network("encoder")
    found = jp.compare(
        {"xla": (small.fn, (small.params, x)), "onnx": (small.fn, (small.params, x))},
        runtime={"onnx": runtime("onnx", threads=1)},
        repeats=2,
    )
    assert found.timings["xla"].runtime == "xla"
    assert found.timings["onnx"].runtime.startswith("onnx threads=1 (jax2onnx ")


def test_a_search_times_in_the_engine(tmp_path):
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    params, x = {"up": floats(256, 1024), "down": floats(1024, 256)}, floats(64, 256)
    structure = jp.infer_structure(fn, params, x)
    where = runtime("onnx", threads=1)
    table = jp.budget.LatencyTable(tmp_path / "t.json", runtime=where)
    plan = jp.search(
        fn, params, structure, jp.magnitude(params), x, round_to=64,
        target=jp.Target(speedup=1.2), runtime=where, table=table, repeats=3,
    )  # fmt: skip
    assert plan.measured.speedup > 0 and len(table) > 2
    with pytest.raises(ValueError, match="measured elsewhere .runtime: 'onnx threads=1"):
        jp.budget.LatencyTable(tmp_path / "t.json", runtime=runtime("onnx", threads=2))
    assert os.path.getsize(tmp_path / "t.json")


def test_the_page_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for line, code, shown in blocks("runtimes.md"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, "runtimes.md", "exec"), names)
        assert shown is None or printed.getvalue() == shown


@pytest.mark.parametrize("engine", ENGINES)
def test_a_decode_step_takes_its_cache_and_gives_it_back(tmp_path, engine):
    check_cache(tmp_path, runtime(engine), halved())
