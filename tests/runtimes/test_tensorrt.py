"""What docs/tensorrt.md says of the ONNX file: operator set, operations, zero points of 0."""

import re

import jax
import numpy as np
import pytest

import jaxprune as jp
from tests.models.served import NETWORKS
from tests.unit.test_docs import DOCS, blocks

onnx = pytest.importorskip("onnx")
pytest.importorskip("jax2onnx")
pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PAGE = (DOCS / "tensorrt.md").read_text()
LISTED = set(re.findall(r"`(\w+)`", re.search(r"\| operations \|(.*?)\|", PAGE)[1]))


def graphs(model):
    from jaxprune.runtimes import _onnx_graph

    return list(_onnx_graph.graphs(model.graph))


def nodes(model):
    return [node for graph in graphs(model) for node in graph.node]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The file of each network, compacted, with any batch size."""
    found = {}
    for name, make in NETWORKS.items():
        fn, params, x = make()
        masks = jp.structured(jp.infer_structure(fn, params, x))(jp.magnitude(params), 0.5)
        small, folder = jp.compact(fn, params, masks, x), tmp_path_factory.mktemp(name)
        jp.export(small, folder, x, shapes="b, ...", runtime=jp.runtimes.onnx())
        found[name] = onnx.load(folder / "model.onnx")
    return found


def test_the_operations_are_those_that_the_page_lists(models):
    """All of them are in TensorRT's table; an operation that is new here must be looked up."""
    every = [node for model in models.values() for node in nodes(model)]
    assert {node.domain for node in every} <= {""}
    assert sorted({node.op_type for node in every}) == sorted(LISTED)
    assert not any(model.functions for model in models.values())


def test_operator_set_and_checker(models):
    wanted = re.search(r"\| operator set \| (\d+), IR version (\d+) \|", PAGE).groups()
    for model in models.values():
        onnx.checker.check_model(model, full_check=True)
        assert [(s.domain, str(s.version)) for s in model.opset_import] == [("", wanted[0])]
        assert str(model.ir_version) == wanted[1]


def test_names_and_types(models):
    allowed = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32}
    allowed |= {onnx.TensorProto.BOOL}
    for name, model in models.items():
        assert [i.name for i in model.graph.input] == ["input_0"], name
        assert [o.name for o in model.graph.output] == ["output_0"], name
        assert {w.data_type for w in model.graph.initializer} <= allowed, name


def test_what_tensorrt_restricts(models):
    """Axes and numbers of turns are known when an engine is built; windows have 2 or 3 axes."""
    seen = set()
    for name, model in models.items():
        known = {w.name for g in graphs(model) for w in g.initializer}
        for node in nodes(model):
            if node.op_type.startswith("Reduce") or "squeeze" in node.op_type.lower():
                assert all(axes in known for axes in node.input[1:]), (name, node)
            if node.op_type == "Loop":
                assert node.input[0] in known, (name, node)
            if node.op_type == "MaxPool":
                given = {a.name: [*a.ints] for a in node.attribute}
                assert len(given["kernel_shape"]) in (2, 3) and len(node.output) == 1
                assert set(given.get("dilations", [1])) == {1}
            seen.add(node.op_type)
    assert {"ReduceSum", "Squeeze", "Loop", "MaxPool"} <= seen


def test_the_int8_file_is_symmetric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for line, code, _ in blocks("tensorrt.md"):
        exec(compile("\n" * (line - 1) + code, "tensorrt.md", "exec"), names)
    model = onnx.load("served/int8.onnx")
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    both = [node for node in nodes(model) if node.op_type.lower().endswith("quantizelinear")]
    points = [weights[node.input[2]] for node in both]
    assert len(points) > 4 and all(p.dtype == np.int8 and not p.any() for p in points)
    others = {n.op_type for n in nodes(model)} - LISTED
    assert others == {"QuantizeLinear", "DequantizeLinear"}
    import onnxruntime as ort

    session = ort.InferenceSession("served/int8.onnx", providers=["CPUExecutionProvider"])
    x = jax.random.normal(jax.random.key(3), (5, 16))
    wanted = names["fn"](names["params"], x)
    (got,) = session.run(None, {"input_0": np.asarray(x)})
    assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()
