"""int8 by ai-edge-quantizer: weights per channel, activations while it runs or by calibration."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxprune.compaction.checking import error as difference
from jaxprune.ir import compat, primitives
from jaxprune.runtimes import _tensorflow
from jaxprune.runtimes._runtime import Flat, NothingQuantized, Options, check_arguments, package
from jaxprune.runtimes.freezing import Frozen
from jaxprune.runtimes.keeping import differing

# What is calibrated. Between them activations are floats: softmax, norms and masks of attention
# have ranges that 8 bits can't hold (a mask of -1e9 beside scores of 1).
CALIBRATED = "FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE"
FEW = 0.01  # Less than this share of the weights' bytes may be left in float without a word.
FAR = 0.1  # A relative difference from the float model that is told.


def check(frozen: Frozen, options: Options) -> None:
    """Raises where the quantiser is known to fail.

    Raises:
      NotImplementedError: for loops and branches, which can't be calibrated.
      ValueError: for calibration data of other types than the arguments.
    """
    if options.quantize != "static":
        return
    for eqn in frozen.closed.jaxpr.eqns:
        if primitives.kind(eqn) in primitives.CONTROL:
            raise NotImplementedError(
                'the runtime litert with quantize="static" can\'t calibrate what runs within '
                f"{eqn.primitive.name} at {compat.source_line(eqn)}; "
                'quantize="dynamic" takes weights within loops'
            )
    _batches(frozen, options)


def _batches(frozen: Frozen, options: Options) -> list[list[np.ndarray]]:
    assert options.calibration is not None
    return [check_arguments(frozen.signature, args) for args in options.calibration]


def quantized(
    model: bytes,
    frozen: Frozen,
    options: Options,
    run: Callable[[bytes, int | None], Flat],
    twin: bytes | None = None,
) -> bytes:
    """The int8 version of a model; warns of what stays in float, and of results that are far off.

    Args:
      model: in float.
      frozen, options: what it is, and what was asked for.
      run: makes a function of a model.
      twin: the model in which the constants differ that stay in float, if any do.

    Raises:
      NothingQuantized: a ValueError, when no weight could be quantised.
    """
    batches = _batches(frozen, options) if options.quantize == "static" else []
    floats = _in_float(model, twin, options) if twin else set[str]()
    with _tensorflow.quiet():
        found = _RECIPES[options.quantize](model, batches, floats)
    _tell(found, options, floats)
    if batches:
        _compare(run(model, options.threads), run(found, options.threads), batches)
    return found


def _in_float(model: bytes, twin: bytes, options: Options) -> set[str]:
    """What the operations give that read constants which differ in the twin."""
    mine, other = ({read.place: read for read in _matrices(x)} for x in (model, twin))
    values = [{place: read.values for place, read in each.items()} for each in (mine, other)]
    places = differing(values[0], values[1], options.keep_float)
    return {name for place in places for name in mine[place].gives}


def _dynamic(model: bytes, batches: Any, floats: Collection[str]) -> bytes:
    quantizer = package("ai_edge_quantizer.quantizer", "litert").Quantizer(model)
    quantizer.add_dynamic_config(regex=".*", operation_name="*", num_bits=8)
    return _run(quantizer, model, {}, floats)


def _static(model: bytes, batches: list[list[np.ndarray]], floats: Collection[str]) -> bytes:
    quantizer = package("ai_edge_quantizer.quantizer", "litert").Quantizer(model)
    for name in CALIBRATED:
        quantizer.add_static_config(".*", name, activation_num_bits=8, weight_num_bits=8)
    return _run(quantizer, model, _ranges(quantizer, batches), floats)


def _ranges(quantizer: Any, batches: list[list[np.ndarray]]) -> dict[str, Any]:
    """The least and largest values of each tensor in all batches.

    Of several batches the calibrator takes an average of ranges, which cuts results off.
    """
    found: dict[str, Any] = {}
    for flat in batches:
        inputs = {f"x{i}": x for i, x in enumerate(flat)}
        for name, said in quantizer.calibrate({"serving_default": [inputs]}).items():
            mine = found.setdefault(name, said)
            for key, widest in (("min", np.minimum), ("max", np.maximum)):
                if key in said:
                    mine[key] = widest(mine[key], said[key])
    return found


_RECIPES: dict[str | None, Callable[[bytes, Any, Collection[str]], bytes]] = {
    "dynamic": _dynamic,
    "static": _static,
}


def _run(quantizer: Any, model: bytes, ranges: dict[str, Any], floats: Collection[str]) -> bytes:
    """Quantises a model, tables of embeddings too: the range of what they give is their own."""
    for read in _matrices(model):
        for by, name in read.readers:
            if by in ("GATHER", "GATHER_ND") and read.values is not None:
                low, high = np.min(read.values), np.max(read.values)
                ranges[name] = {"min": np.array([[low]]), "max": np.array([[high]])}
                quantizer.add_static_config(
                    f"^{re.escape(name)};$", by, activation_num_bits=8, weight_num_bits=8
                )
    for name in floats:  # The last recipe of an operation counts.
        quantizer.update_quantization_recipe(
            f"^{re.escape(name)};", "*", algorithm_key="no_quantize"
        )
    done = quantizer.quantize(
        ranges or None, enable_progress_bar=False, enable_progress_report=False
    )
    return bytes(done.quantized_model)


# ------------------------------------------------------------------------------- what is told


def _tell(model: bytes, options: Options, asked: Collection[str]) -> None:
    """Warns of matrices that are left in float, though they were not asked to be."""
    every = [read for read in _matrices(model) if not read.gives <= set(asked)]
    left = [read for read in every if read.values is not None]
    share = sum(4 * read.size for read in left) / max(sum(read.bytes for read in every), 1)
    told = Counter(f"{read.readers[-1][0]} of {read.shape}" for read in left).most_common(6)
    named = "; ".join(f"{n} {what}" for what, n in told)
    if len(left) == len(every):
        raise NothingQuantized(
            f"LiteRT's {options.quantize} quantisation quantised nothing, all weights stay in "
            f"float: {named or 'there is no matrix'}"
        )
    if share > FEW:
        warnings.warn(
            f"LiteRT's {options.quantize} quantisation left {share:.0%} of the file's weights in "
            f"float: {named}",
            stacklevel=6,
        )


class Read(NamedTuple):
    """A constant with several axes, and what reads it."""

    place: tuple[int, int]  # of the graph, and of the constant in it
    readers: tuple[tuple[str, str], ...]  # operations, and the names of their first results
    shape: tuple[int, ...]
    values: np.ndarray | None  # None where it is quantised

    @property
    def gives(self) -> set[str]:
        """The names of the first results of all that read it."""
        return {name for _, name in self.readers}

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * (1 if self.values is None else 4)


def _matrices(model: bytes) -> Iterator[Read]:
    """Weights of two axes and more, in loops too; zeros and tables of whole numbers are none."""
    schema = package("ai_edge_litert.schema_py_generated", "litert")
    file = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model, 0))
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in file.operatorCodes]
    names = {n: name for name, n in vars(schema.BuiltinOperator).items() if isinstance(n, int)}
    small = schema.TensorType.INT8, schema.TensorType.INT4
    for g, graph in enumerate(file.subgraphs):
        for i, tensor in enumerate(graph.tensors):
            data, shape = _data(model, file, tensor), tuple(map(int, _listed(tensor.shape)))
            is_float = tensor.type == schema.TensorType.FLOAT32
            readers = [op for op in graph.operators if i in op.inputs]
            if readers and _is_matrix(shape, data) and (is_float or tensor.type in small):
                by = [
                    (names[codes[op.opcodeIndex]], graph.tensors[op.outputs[0]].name.decode())
                    for op in readers
                ]
                values = np.frombuffer(bytes(data), np.float32) if is_float else None
                yield Read((g, i), tuple(by), shape, values)


def _data(model: bytes, file: Any, tensor: Any) -> Any:
    """What a tensor holds: within the file's tables, or behind them, where a model is large."""
    buffer = file.buffers[tensor.buffer]
    if buffer.offset > 1:  # 0 and 1 are no places.
        return np.frombuffer(model, np.uint8, buffer.size, buffer.offset)
    return buffer.data


def _listed(found: Any) -> Any:
    return () if found is None else found


def _is_matrix(shape: tuple[int, ...], data: Any) -> bool:
    return sum(n > 1 for n in shape) > 1 and bool(np.any(_listed(data)))


def _compare(exact: Flat, found: Flat, batches: list[list[np.ndarray]]) -> None:
    """Warns where the int8 model is far from the float one on the calibration data."""
    pairs = [pair for flat in batches for pair in zip(exact(*flat), found(*flat))]
    furthest = max(float(difference(a, b)) for a, b in pairs)
    if not furthest <= FAR:
        warnings.warn(
            f"the int8 model differs by {furthest:.2g} of the largest result from the float one "
            "on the calibration data: measure its accuracy, and see jp.runtimes.sensitivity for "
            "what ruins it",
            stacklevel=6,
        )
