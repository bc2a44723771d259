"""LiteRT's files and SavedModels of compacted networks: equal to the small function in XLA."""

import functools
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.models.served import NETWORKS, floats
from tests.unit.runtimes.test_state import check_cache, halved

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("ai_edge_quantizer")
EQUAL = 1e-5
LOOPS = "lstm", "gru"


def mlp():
    params, static = eqx.partition(eqx.nn.MLP(8, 3, 64, 2, key=jax.random.key(0)), eqx.is_array)
    return (lambda p, x: jax.vmap(eqx.combine(p, static))(x)), params, floats(4, 8)


EVERY = NETWORKS | {"mlp": mlp}


@functools.cache
def network(name):
    """(the compact model, x, its results)"""
    fn, params, x = EVERY[name]()
    structure = jp.infer_structure(fn, params, x)
    masks = jp.structured(structure)(jp.magnitude(params), 0.5)
    small = jp.compact(fn, params, masks, x)
    return small, x, np.asarray(jax.jit(small.fn)(small.params, x))


def many(x):
    """Calibration data like what an export compares on: enough that ranges hold for others."""
    rng = np.random.default_rng(5)
    draw = rng.normal if x.dtype == jnp.float32 else (lambda size: rng.permutation(x))
    return [(np.asarray(draw(size=x.shape), x.dtype),) for _ in range(32)]


def apart(got, wanted):
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", EVERY)
def test_litert_gives_the_same(name):
    small, x, wanted = network(name)
    found = apart(jp.runtimes.litert(threads=1)(small, x)(x), wanted)
    print(f"{name} in litert: {found:.1e}")
    assert found < EQUAL


@pytest.mark.parametrize("name", EVERY)
def test_saved_models_give_the_same_at_any_batch(name):
    small, x, _ = network(name)
    run = jp.runtimes.savedmodel()(small, x, shapes="b, ...")
    for batch in (1, 5):
        given = jnp.tile(x, (3, *(1,) * (x.ndim - 1)))[:batch]
        found = apart(run(given), np.asarray(jax.jit(small.fn)(small.params, given)))
        print(f"{name} as a SavedModel, batch {batch}: {found:.1e}")
        assert found < EQUAL


@pytest.mark.parametrize("engine", ["litert", "savedmodel"])
def test_several_results_and_arguments(engine):
    """Among them arguments, constants, truth values, and an argument that has no effect."""

    def fn(p, x, scale, unused):
        y = jnp.tanh(x @ p["w"])
        return {"y": y * scale, "rest": (y.argmax(-1), x, jnp.arange(3), y > 0, y.sum(), x)}

    p, x = {"w": floats(4, 6)}, floats(3, 4)
    run = getattr(jp.runtimes, engine)()(fn, p, x, jnp.float32(2), x)
    got, wanted = run(p, x, np.float32(3), x), fn(p, x, 3.0, x)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=1e-5)


# (network, quantisation) -> the largest relative error of int8 over float results
INT8 = {(name, how): 0.05 for name in EVERY for how in ("dynamic", "static") if name not in LOOPS}
INT8 |= {(name, "dynamic"): 0.05 for name in LOOPS}


@pytest.mark.parametrize("name, how", INT8)
def test_int8(tmp_path, name, how):
    small, x, _ = network(name)
    plain = jp.export(small, tmp_path / "plain", x, runtime=jp.runtimes.litert())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"LiteRT's {how} quantisation left")
        where = jp.runtimes.litert(quantize=how, calibration=many(x) if how == "static" else None)
        int8 = jp.export(small, tmp_path / how, x, runtime=where)
    found = int8.certificate["residual"]["relative"]
    print(f"{name} int8 {how}: {found:.1e}, {plain.size} -> {int8.size} bytes")
    assert 1e-5 < found < INT8[name, how]
    assert int8.size < plain.size or name == "depthwise"  # 2,000 weights in many operations


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_tables_of_embeddings_are_quantised(how):
    table, ids = floats(500, 16), jnp.arange(6)
    where = jp.runtimes.litert(quantize=how, calibration=[(ids,)])
    run = where(lambda p, ids: jnp.take(p["w"], ids, axis=0), {"w": table}, ids)
    found = np.abs(run({"w": table}, ids) - table[:6]).max()
    step = np.abs(table).max() / 127
    assert 0 < found <= 1.01 * step


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_not_calibrated(name):
    small, x, _ = network(name)
    where = jp.runtimes.litert(quantize="static", calibration=[(x,)])
    with pytest.raises(NotImplementedError, match=r"can't calibrate what runs within scan at"):
        where(small, x)


def in_float(folder):
    from jaxprune.runtimes import _litert_quantize

    found = _litert_quantize._matrices((folder / "model.tflite").read_bytes())
    return [read for read in found if read.values is not None]


def quantized(folder, how, fn, args, x, **options):
    """The artefact, and the float matrices in it."""
    calibration = [(x,)] if how == "static" else None
    where = jp.runtimes.litert(quantize=how, calibration=calibration, **options)
    return jp.export(fn, folder, *args, runtime=where), in_float(folder)


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_weights_that_are_named_stay_in_float(tmp_path, how):
    """Each column of ``rough`` has an entry that leaves nothing for the others in 8 bits."""
    rough = floats(32, 8).at[jnp.arange(8), jnp.arange(8)].set(1e4)
    p, x = {"fine": floats(16, 32), "rough": rough}, floats(64, 16)
    fn = lambda p, x: (jnp.tanh(x @ p["fine"]) * (jnp.arange(32) > 7)) @ p["rough"]  # noqa: E731
    wanted = np.asarray(fn(p, x))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the int8 model differs")
        plain, left = quantized(tmp_path / "all", how, fn, (p, x), x)
    assert not left
    kept, left = quantized(tmp_path / "kept", how, fn, (p, x), x, keep_float=("rough",))
    np.testing.assert_array_equal(left[0].values.reshape(left[0].shape), rough.T)
    assert len(left) == 1
    print(apart(plain.fn(x), wanted), apart(kept.fn(x), wanted))
    assert apart(kept.fn(x), wanted) < 0.05 < apart(plain.fn(x), wanted)


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_a_convolution_and_the_norm_within_it_stay_in_float(tmp_path, how):
    small, x, _ = network("cnn")
    kernel = small.params["params"]["Conv_1"]["kernel"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, left = quantized(tmp_path, how, small, (x,), x, keep_float="params/Conv_1/kernel")
    assert [read.size for read in left] == [kernel.size]


def test_tables_and_weights_within_loops_stay_in_float(tmp_path):
    table, ids = floats(500, 16), jnp.arange(6)
    fn = lambda p, ids: jnp.take(p["t"], ids, axis=0) @ p["w"]  # noqa: E731
    p = {"t": table, "w": floats(16, 64)}
    _, left = quantized(tmp_path / "table", "dynamic", fn, (p, ids), ids, keep_float="t")
    assert [read.shape for read in left] == [(500, 16)]
    small, x, _ = network("lstm")
    gate = "params/OptimizedLSTMCell_0/hi/kernel"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LiteRT's dynamic quantisation left")
        _, every = quantized(tmp_path / "all", "dynamic", small, (x,), x)
        _, left = quantized(tmp_path / "kept", "dynamic", small, (x,), x, keep_float=gate)
    n, width = small.params["params"]["OptimizedLSTMCell_0"]["hi"]["kernel"].shape
    assert len(left) == len(every) + 1 and (4 * width, n) in [read.shape for read in left]


# ----------------------------------------------------------------------------- what is told


def test_weights_of_large_files_are_seen(tmp_path):
    """Beyond 256 kB the quantiser puts them behind the tables of the file."""

    def fn(p, x):
        return x @ p["a"] + p["b"]

    p, x = {"a": floats(640, 640), "b": floats(8, 640)}, floats(8, 640)
    with pytest.warns(UserWarning, match=r"left 5% .* in float: 1 ADD of \(8, 640\)"):
        artefact = jp.export(fn, tmp_path, p, x, runtime=jp.runtimes.litert(quantize="dynamic"))
    assert artefact.size < 0.3 * 4 * 640 * 640
    assert [read.shape for read in in_float(tmp_path)] == [(8, 640)]


def test_weights_that_stay_in_float_are_told():
    def fn(p, x):
        return x @ p["a"] + p["b"]

    p, x = {"a": floats(32, 16), "b": floats(8, 16)}, floats(8, 32)
    with pytest.warns(UserWarning, match=r"left 50% .* in float: 1 ADD of \(8, 16\)"):
        jp.runtimes.litert(quantize="dynamic")(fn, p, x)
    with pytest.raises(ValueError, match="quantised nothing, all weights stay in float: 1 MUL of"):
        jp.runtimes.litert(quantize="dynamic")(
            lambda p, x: x * p["w"], {"w": floats(4, 4)}, x[:4, :4]
        )


def test_results_that_are_far_off_are_told():
    """One column is a thousand times larger: 8 bits of its activations hide the others."""
    p = {"w": floats(16, 16), "v": floats(16, 1).at[0].set(0.0)}
    scale = jnp.ones(16).at[0].set(1e4)

    def fn(p, x):
        return ((x @ p["w"]) * scale) @ p["v"]

    x = floats(4, 16)
    with pytest.warns(UserWarning, match=r"the int8 model differs by .* see jp.runtimes.sens"):
        jp.runtimes.litert(quantize="static", calibration=[(x,)])(fn, p, x)


def test_names_for_sizes_are_refused_with_the_reason():
    small, x, _ = network("mlp")
    with pytest.raises(ValueError, match="wants numbers for sizes: .* 2.5 to 7 times slower"):
        jp.runtimes.litert()(small, x, shapes="b, ...")


def test_other_shapes_are_refused():
    small, x, _ = network("mlp")
    run = jp.runtimes.litert()(small, x)
    with pytest.raises(ValueError, match=r"argument 0 is float32\[2,8\], and the program takes"):
        run(x[:2])


def test_calibration_data_is_asked_for_and_checked():
    small, x, _ = network("mlp")
    with pytest.raises(ValueError, match=r'litert\(quantize="static"\) measures the ranges'):
        jp.runtimes.litert(quantize="static")
    with pytest.raises(ValueError, match=r"argument 0 is float32\[4,7\], and the program takes"):
        jp.runtimes.litert(quantize="static", calibration=[(x[:, :7],)])(small, x)
    with pytest.raises(ValueError, match="jp.runtimes.litert knows quantize='dynamic', 'static'"):
        jp.runtimes.litert(quantize="int4")


UNSUPPORTED = [
    ("litert", "sort", jnp.sort),  # the converter refuses it
    ("litert", "scatter", lambda x: x.at[jnp.array([0, 1]), 1].add(2.0)),  # so does LiteRT itself
    ("savedmodel", "cholesky", lambda x: jnp.linalg.cholesky(x @ x.T)),  # at its first call
    ("savedmodel", "pure_callback", lambda x: jax.pure_callback(np.sin, x, x)),
]


@pytest.mark.parametrize(
    "engine, name, fn", UNSUPPORTED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_operations_are_named_with_their_lines(engine, name, fn):
    match = rf"the runtime {engine} can't do {name}\S* at test_tensorflow.py:\d+"
    with pytest.raises(NotImplementedError, match=match):
        getattr(jp.runtimes, engine)()(lambda x: jnp.tanh(fn(x)), floats(4, 4))


# ------------------------------------------------------------------------------- artefacts


@pytest.mark.parametrize(
    "engine, name", [("litert", "model.tflite"), ("savedmodel", "saved_model")]
)
def test_artefacts_load_and_edited_ones_do_not(tmp_path, engine, name):
    small, x, wanted = network("nnx")
    artefact = jp.export(small, tmp_path, x, runtime=getattr(jp.runtimes, engine)())
    assert artefact.certificate["residual"]["relative"] < EQUAL and artefact.check(2) < EQUAL
    model = jp.load_exported(tmp_path)
    assert apart(model.fn(model.params, x), wanted) < EQUAL
    file = tmp_path / name if engine == "litert" else tmp_path / name / "saved_model.pb"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} has .* it was damaged or changed"):
        jp.load_exported(tmp_path)


def test_nothing_of_tensorflow_is_imported_before_it_is_used():
    code = (
        "import sys, jax.numpy as jnp, jaxprune as jp;"
        "where = [jp.runtimes.litert(quantize='dynamic'), jp.runtimes.savedmodel()];"
        "assert 'tensorflow' in where[0].key and where[1].key.startswith('savedmodel (jax ');"
        "found = {m.split('.')[0] for m in sys.modules};"
        "assert not found & {'tensorflow', 'ai_edge_litert', 'ai_edge_quantizer'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("engine", ["litert", "savedmodel"])
def test_a_decode_step_takes_its_cache_and_gives_it_back(tmp_path, engine):
    check_cache(tmp_path, getattr(jp.runtimes, engine)(), halved())
