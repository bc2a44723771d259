"""Rewritten ONNX graphs compute what they did, by ONNX's own reference evaluator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from jaxprune.runtimes import _onnx_graph  # noqa: E402

SIZES = dict(zip("abcdefg", (2, 3, 4, 5, 2, 3, 4)))


def model(nodes, inputs, weights, rank=None):
    names = [n for node in nodes for n in node.output][-1:]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def array(labels, seed):
    return np.random.default_rng(seed).normal(size=[SIZES[a] for a in labels]).astype(np.float32)


@st.composite
def equations(draw):
    """Batch, own and summed axes of two operands, in any order."""
    kinds = draw(
        st.lists(st.sampled_from(["both", "left", "right", "sum"]), min_size=1, max_size=6)
    )
    axes = list(zip("abcdefg", kinds))
    left = draw(st.permutations([a for a, k in axes if k != "right"]))
    right = draw(st.permutations([a for a, k in axes if k != "left"]))
    out = draw(st.permutations([a for a, k in axes if k != "sum"]))
    return "".join(left), "".join(right), "".join(out)


@given(equations(), st.sampled_from(["none", "left", "right"]))
@settings(max_examples=150)
def test_einsum(equation, held):
    left, right, out = equation
    x, y = array(left, 0), array(right, 1)
    node = helper.make_node("Einsum", ["x", "y"], ["z"], equation=f"{left},{right}->{out}")
    every = {"x": x, "y": y}
    weights = {"none": {}, "left": {"x": x}, "right": {"y": y}}[held]
    free = {name: a for name, a in every.items() if name not in weights}
    graph = model([node], free, weights)
    _onnx_graph.rewrite(graph)
    assert "Einsum" not in {n.op_type for n in graph.graph.node}
    (got,) = ReferenceEvaluator(graph).run(None, free)
    wanted = np.einsum(f"{left},{right}->{out}", x, y)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_weights_become_one_matrix():
    node = helper.make_node("Einsum", ["x", "w"], ["z"], equation="abc,cde->abde")
    graph = model([node], ["x"], {"w": array("cde", 0)})
    _onnx_graph.rewrite(graph)
    (product, _) = graph.graph.node
    assert product.op_type == "MatMul"
    found = {w.name: tuple(w.dims) for w in graph.graph.initializer}
    assert found[product.input[1]] == (4, 10) and "w" not in found


@pytest.mark.parametrize("equation", ["aa,ab->b", "ab,bc->c"])
def test_what_is_no_product_stays(equation):
    node = helper.make_node("Einsum", ["x", "y"], ["z"], equation=equation)
    graph = model([node], ["x", "y"], {})
    _onnx_graph.rewrite(graph)
    assert [n.op_type for n in graph.graph.node] == ["Einsum"]


def test_gemm_without_a_bias_is_a_product():
    node = helper.make_node("Gemm", ["x", "w", "b"], ["z"], alpha=1.0, beta=0.0)
    graph = model([node], ["x"], {"w": array("ab", 0), "b": np.float32(0).reshape(())})
    _onnx_graph.rewrite(graph)
    assert [n.op_type for n in graph.graph.node] == ["MatMul"]
    assert [w.name for w in graph.graph.initializer] == ["w"]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["z"])
    graph = model([node], ["x"], {"w": array("ab", 0), "b": array("b", 1)})
    _onnx_graph.rewrite(graph)
    assert [n.op_type for n in graph.graph.node] == ["Gemm"]


@pytest.mark.parametrize("window", [(1, 2, 2, 1), (1, 3, 1, 1), (2, 2, 2, 1)])
def test_windows_along_few_axes(window):
    x = np.random.default_rng(0).normal(size=(1, 1, 2, 8, 7, 3)).astype(np.float32)
    node = helper.make_node("MaxPool", ["x"], ["z"], kernel_shape=window, strides=window)
    graph = model([node], ["x"], {})
    _onnx_graph.rewrite(graph)
    (got,) = ReferenceEvaluator(graph).run(None, {"x": x})
    views = np.lib.stride_tricks.sliding_window_view(x, window, axis=(2, 3, 4, 5))
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in window))
    np.testing.assert_array_equal(got, views[steps].max((-1, -2, -3, -4)))


def conv(chain, weights, extra=()):
    """A convolution, channels last afterwards, and a chain of operations on them."""
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["c"]), make("Transpose", ["c"], ["n0"], perm=[0, 2, 3, 1]), *extra
    ]  # fmt: skip
    for i, (kind, name) in enumerate(chain):
        nodes.append(make(kind, [f"n{i}", name], [f"n{i + 1}"]))
    return model(nodes, ["x"], {"w": array("dcab", 0), **weights})


def test_scales_and_shifts_go_into_the_convolution():
    weights = {k: 1 + array("d", i).reshape(1, -1) ** 2 for i, k in enumerate(("s", "m", "b"))}
    weights["two"] = np.float32(2).reshape(())
    graph = conv([("Sub", "m"), ("Mul", "s"), ("Add", "b"), ("Div", "two")], weights)
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 6)).astype(np.float32)
    (wanted,) = ReferenceEvaluator(graph).run(None, {"x": x})
    _onnx_graph.rewrite(graph)
    assert [n.op_type for n in graph.graph.node] == ["Conv", "Transpose"]
    (got,) = ReferenceEvaluator(graph).run(None, {"x": x})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


RELU = helper.make_node("Relu", ["n0"], ["r"])
STAY = {
    "another reader": ([("Mul", "s")], {"s": array("d", 1)}, [RELU]),
    "other axes": ([("Mul", "s")], {"s": np.ones((4, 1), np.float32)}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_is_no_scale_of_channels_stays(case):
    chain, weights, extra = STAY[case]
    graph = conv(chain, weights, extra)
    _onnx_graph.rewrite(graph)
    assert "Mul" in {n.op_type for n in graph.graph.node}


def test_a_maximum_with_zero():
    node = helper.make_node("Max", ["x", "zero"], ["z"])
    for number, kind in ((0, "Relu"), (1, "Max")):
        graph = model([node], ["x"], {"zero": np.float32(number).reshape(())})
        _onnx_graph.rewrite(graph)
        assert [n.op_type for n in graph.graph.node] == [kind]


def test_loops_are_rewritten_inside():
    inner = model(
        [helper.make_node("Einsum", ["s", "w"], ["t"], equation="ab,bc->ac")],
        ["s"],
        {"w": array("bb", 0)},
    ).graph
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    graph = model([node], ["c"], {})
    _onnx_graph.rewrite(graph)
    kinds = [[n.op_type for n in g.node] for g in _onnx_graph.graphs(graph.graph)]
    assert kinds == [["If"], ["MatMul"], ["MatMul"]]
