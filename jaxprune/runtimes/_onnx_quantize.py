"""int8 by ONNX Runtime's quantisers, which say nothing of what they leave in float."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxprune.runtimes._onnx_graph import graphs
from jaxprune.runtimes._runtime import NothingQuantized, Options, check_arguments, package
from jaxprune.runtimes.freezing import Frozen

DYNAMIC = ("MatMul", "Gather", "LSTM", "Attention")  # Convolutions in integers take longer so.
STATIC = (  # Not Where: a range up to the -1e9 of a mask leaves nothing for the rest.
    "Conv", "ConvTranspose", "MatMul", "Gemm", "Gather", "Relu", "MaxPool", "AveragePool",
    "Transpose", "Reshape", "Squeeze", "Unsqueeze",
)  # fmt: skip
WEIGHTED = {*DYNAMIC, *STATIC[:5], "Einsum", "GRU", "RNN"}
FEW = 0.01  # Less than this share of the weights' bytes may be left in float without a word.


def quantize(
    frozen: Frozen, path: Path, options: Options, signed: bool, floats: Collection[str] = ()
) -> None:
    """Replaces an ONNX file by its int8 version; what reads weights of these names stays in float.

    ONNX Runtime takes unsigned activations beside signed weights.

    Raises:
      NothingQuantized: a ValueError, when no weight could be quantised.
    """
    tools = package("onnxruntime.quantization", "onnx")
    onnx = package("onnx", "onnx")
    model = onnx.load(os.fspath(path))
    left_out = _readers(model, floats)
    if options.quantize == "dynamic":
        tools.quantize_dynamic(
            model, path, DYNAMIC, per_channel=True, nodes_to_exclude=left_out,
            extra_options={"EnableSubgraph": True},
        )  # fmt: skip
    else:
        tools.quantize_static(
            model, path, _reader(frozen, options, tools), op_types_to_quantize=STATIC,
            per_channel=True, nodes_to_exclude=left_out,
            activation_type=tools.QuantType.QInt8 if signed else tools.QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    _tell(onnx.load(os.fspath(path)), onnx, options, floats)


def _readers(model: Any, names: Collection[str]) -> list[str]:
    """The nodes that read weights, by names of their own that they get here."""
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    found = [node for node in nodes if not set(names).isdisjoint(node.input)]
    for i, node in enumerate(found):
        node.name = f"in_float_{i}"
    return [node.name for node in found]


def _reader(frozen: Frozen, options: Options, tools: Any) -> Any:
    """Calibration data as ONNX Runtime asks for it, one batch at a time."""
    assert options.calibration is not None
    batches = iter([check_arguments(frozen.signature, args) for args in options.calibration])

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> Any:
            flat = next(batches, None)
            return None if flat is None else {f"input_{i}": x for i, x in enumerate(flat)}

    return Reader()


def _tell(model: Any, onnx: Any, options: Options, asked: Collection[str]) -> None:
    """Warns of weights that are left in float, though they were not asked to be."""
    weights = [w for g in graphs(model.graph) for w in g.initializer]
    done = sum(
        _size(w) for w in weights if w.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    )
    floats = {w.name: w for w in weights if w.data_type == onnx.TensorProto.FLOAT}
    nodes = [n for g in graphs(model.graph) for n in g.node if n.op_type in WEIGHTED]
    left = [(n.op_type, floats[name]) for n in nodes for name in n.input if name in floats]
    left = [(kind, w) for kind, w in left if len(w.dims) > 1 and w.name not in asked]
    counted = Counter(f"{kind} of {tuple(w.dims)}" for kind, w in left).most_common(6)
    told = "; ".join(f"{n} {what}" for what, n in counted) or "there are none of products"
    if not done:
        raise NothingQuantized(
            f"ONNX Runtime's {options.quantize} quantisation quantised no weights ({told}); "
            f"{_WAYS[options.quantize]}"
        )
    in_float = sum(4 * _size(w) for _, w in left)
    if in_float > FEW * (in_float + done):
        warnings.warn(
            f"ONNX Runtime's {options.quantize} quantisation left "
            f"{in_float / (in_float + done):.0%} of the weights' bytes in float: {told}; "
            f"{_WAYS[options.quantize]}",
            stacklevel=5,
        )


_WAYS = {
    "dynamic": 'quantize="static" with calibration data takes convolutions, too',
    "static": 'quantize="dynamic" takes weights within loops, too',
    None: "",
}


def _size(weight: Any) -> int:
    return math.prod(weight.dims) if len(weight.dims) > 1 else 0
