"""What holds for every engine: arguments, errors, names. The engine here is ``jax.export``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.runtimes import _runtime
from tests.helpers import engines

W = {"up": jnp.arange(12.0).reshape(3, 4), "down": jnp.ones((4, 2))}
X = jnp.ones((2, 3))


def net(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def test_params_become_part_of_the_program():
    run = engines.runtime()(net, W, X, shapes="b, ...")
    for batch in (1, 5):
        x = np.ones((batch, 3), np.float32)
        got = run(W, x)
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, net(W, x), rtol=1e-6)
    equal = jax.tree.map(lambda w: w + 0, W)
    np.testing.assert_array_equal(run(equal, x), got)


def test_other_params_are_refused():
    run = engines.runtime()(net, W, X)
    with pytest.raises(ValueError, match="compiled for plain with other values of its first"):
        run(jax.tree.map(lambda w: w + 1, W), X)
    with pytest.raises(ValueError, match="other values of its first argument"):
        run()


def test_a_compact_model_is_called_without_its_params():
    masks = jp.infer_structure(net, W, X).masks({"up:1": np.arange(4) < 2})
    small = jp.compact(net, W, masks, X)
    run = engines.runtime()(small, X)
    np.testing.assert_allclose(run(X), small.fn(small.params, X), rtol=1e-6)


def test_lone_arrays_and_a_single_tree_stay_arguments():
    run = engines.runtime()(lambda a, b: {"sum": a + b}, X, X)
    np.testing.assert_array_equal(run(X, 2 * X)["sum"], 3 * X)
    run = engines.runtime()(lambda tree: tree["a"] * 2, {"a": X})
    np.testing.assert_array_equal(run({"a": 3 * X}), 6 * X)


SHAPES = [
    (np.ones((2, 4), np.float32), r"argument 0 is float32\[2,4\], and the program takes float32"),
    (
        np.ones((2, 3), np.int32),
        r"argument 0 is int32\[2,3\], and the program takes float32\[b,3\]",
    ),
    (np.ones(3, np.float32), r"argument 0 is float32\[3\]"),
]


@pytest.mark.parametrize("x, match", SHAPES)
def test_other_shapes_and_types(x, match):
    run = engines.runtime()(net, W, X, shapes="b, ...")
    with pytest.raises(ValueError, match=match + r".*; pass such an array, or make a size a name"):
        run(W, x)


def test_a_name_is_one_size():
    run = engines.runtime()(lambda a, b: a + b, X, X, shapes="b, ...")
    with pytest.raises(ValueError, match=r"argument 1 is float32\[1,3\].*\[b,3\] with b = 2"):
        run(X, X[:1])
    double = lambda a, b: jnp.concatenate([a, a]) + b  # noqa: E731
    run = engines.runtime()(double, X, jnp.ones((4, 3)), shapes=("b, ...", "2*b, ..."))
    assert run(X[:1], np.ones((2, 3), np.float32)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"takes float32\[2\*b,3\] with b = 2"):
        run(X, np.ones((3, 3), np.float32))


def test_another_tree():
    run = engines.runtime()(net, W, X)
    with pytest.raises(ValueError, match="compiled for other arguments: the tree of these has"):
        run(W, {"x": X})


def test_it_cant_be_traced():
    run = engines.runtime()(net, W, X)
    with pytest.raises(TypeError, match="runs in plain, outside JAX, and can't be traced: call it"):
        jax.jit(lambda x: run(W, x))(X)


def test_xla_is_jit():
    masks = jp.infer_structure(net, W, X).masks({"up:1": np.arange(4) < 2})
    small = jp.compact(net, W, masks, X)
    np.testing.assert_allclose(jp.runtimes.xla()(net, W, X)(W, X), net(W, X), rtol=1e-6)
    np.testing.assert_allclose(jp.runtimes.xla()(small, X)(X), small.fn(small.params, X), rtol=1e-6)
    assert jp.runtimes.xla().name == "xla" and "jax" in jp.runtimes.xla().key


def off_by(relative):
    """An engine whose results are so far off."""

    def read(path, options):
        run = engines.read(path, options)
        return lambda *flat: [y * np.asarray(1 + relative, y.dtype) for y in run(*flat)]

    return _runtime.Runtime(engines.ENGINE._replace(read=read))


def test_other_results_than_in_jax_are_told():
    with pytest.warns(UserWarning, match="plain gives other results than JAX .* differ by 0.01 of"):
        off_by(0.01)(net, W, X)
    masks = jp.infer_structure(net, W, X).masks({"up:1": np.arange(4) < 2})
    small = jp.compact(net, W, masks, X)
    with pytest.warns(UserWarning, match="differ by 0.01 of the largest one; jp.export would not"):
        off_by(0.01)(small, X, shapes="b, ...")


@pytest.mark.filterwarnings("error")
def test_when_results_are_not_compared():
    off_by(1e-6)(net, W, X)
    off_by(0.01)(net, W, X, check=False)
    off_by(0.01)(net, W, jax.ShapeDtypeStruct(X.shape, X.dtype))
    off_by(0.01)(lambda x: x * jnp.nan, X)
    int8 = off_by(0.01).replace(_runtime.Options("dynamic"))
    int8(net, W, X)


def test_names_and_keys():
    run = engines.runtime(quantize="dynamic", threads=2)
    assert repr(run) == "<runtime plain int8 dynamic threads=2>"
    assert run.key == "plain int8 dynamic threads=2 (plain 1.0)"
    assert hash(run) and run != engines.runtime(quantize="dynamic", threads=2)


def test_options_that_no_engine_takes():
    with pytest.raises(ValueError, match=r"jp.runtimes.plain knows quantize='dynamic', 'static'"):
        engines.runtime(quantize="int4")
    with pytest.raises(
        ValueError, match=r'"static"\) measures .* pass calibration=\[\(x,\), ...\]'
    ):
        engines.runtime(quantize="static")
    with pytest.raises(ValueError, match="wants threads >= 1, got 0"):
        engines.runtime(threads=0)
    with pytest.raises(ValueError, match="is for the engine 'abacus'; this version knows onnx"):
        jp.runtimes.engine("abacus")


def test_a_missing_package_says_what_to_install():
    with pytest.raises(
        ImportError, match=r"runtime onnx needs absent: pip install 'jaxprune\[onnx"
    ):
        _runtime.package("absent.part", "onnx")
    assert _runtime.versions("absent", "numpy") == {"numpy": np.__version__}


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_making_a_runtime_imports_no_engine(name):
    """Nor does the library: each engine's package is imported when it runs."""
    import subprocess
    import sys

    code = (
        f"import sys, jaxprune as jp; jp.runtimes.{name}(); "
        "print({'onnx', 'onnxruntime', 'openvino', 'tensorflow', 'jax2onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
