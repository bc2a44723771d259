"""int8 by ONNX Runtime's quantisers, which say nothing of what they leave in float."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.runtimes._onnx_graph import graphs
from jaxprune.runtimes._runtime import NothingQuantized, Options, check_arguments, package
from jaxprune.runtimes.freezing import Frozen

DYNAMIC = ("MatMul", "Gather", "LSTM", "Attention")  # Convolutions in integers take longer so.
FEW = 0.01  # Less than this share of the weights' bytes may be left in float without a word.


def quantize(frozen: Frozen, path: Path, options: Options, signed: bool) -> None:
    """Replaces an ONNX file by its int8 version.

    ONNX Runtime takes unsigned activations beside signed weights.

    Raises:
      NothingQuantized: a ValueError, when no weight could be quantised.
    """
    tools = package("onnxruntime.quantization", "onnx")
    onnx = package("onnx", "onnx")
    model = onnx.load(os.fspath(path))
    if options.quantize == "dynamic":
        tools.quantize_dynamic(
            model, path, DYNAMIC, per_channel=True, extra_options={"EnableSubgraph": True}
        )
    else:
        tools.quantize_static(
            model, path, _reader(frozen, options, tools), per_channel=True,
            activation_type=tools.QuantType.QInt8 if signed else tools.QuantType.QUInt8,
        )  # fmt: skip
    _tell(onnx.load(os.fspath(path)), onnx, options)


def _reader(frozen: Frozen, options: Options, tools: Any) -> Any:
    """Calibration data as ONNX Runtime asks for it, one batch at a time."""
    assert options.calibration is not None
    batches = iter([check_arguments(frozen.signature, args) for args in options.calibration])

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> Any:
            flat = next(batches, None)
            return None if flat is None else {f"input_{i}": x for i, x in enumerate(flat)}

    return Reader()


def _tell(model: Any, onnx: Any, options: Options) -> None:
    """Warns of matrices that are left in float."""
    every = [w for g in graphs(model.graph) for w in g.initializer]
    matrices = [w for w in every if sum(n > 1 for n in w.dims) > 1]
    left = [w for w in matrices if w.data_type == onnx.TensorProto.FLOAT]
    sizes = {w.name: int(np.prod(w.dims)) for w in matrices}
    floats = sum(4 * sizes[w.name] for w in left)
    share = floats / max(floats + sum(sizes[w.name] for w in matrices if w not in left), 1)
    told = "; ".join(f"{n} {what}" for what, n in _readers(model, left).most_common(6))
    if len(left) == len(matrices):
        raise NothingQuantized(
            f"ONNX Runtime's {options.quantize} quantisation quantised nothing, all weights stay "
            f"in float: {told}; {_WAYS[options.quantize]}"
        )
    if share > FEW:
        warnings.warn(
            f"ONNX Runtime's {options.quantize} quantisation left {share:.0%} of the file's "
            f"weights in float: {told}; {_WAYS[options.quantize]}",
            stacklevel=5,
        )


_WAYS = {
    "dynamic": 'quantize="static" with calibration data takes convolutions, too',
    "static": 'quantize="dynamic" takes weights within loops, too',
    None: "",
}


def _readers(model: Any, left: Any) -> Counter[str]:
    """How many weights of which shapes which operations read."""
    of = {w.name: f"of {tuple(w.dims)}" for w in left}
    nodes = [n for g in graphs(model.graph) for n in g.node]
    return Counter(f"{n.op_type} {of[name]}" for n in nodes for name in n.input if name in of)
