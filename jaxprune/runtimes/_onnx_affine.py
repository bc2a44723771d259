"""Scales and shifts of channels after a convolution, BatchNorm as it is served, within it.

ONNX Runtime would run each as a pass over memory, and quantisers would stop at each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np


def fold(graph: Any, read: Counter[str]) -> None:
    """Folds chains of Add, Sub, Mul and Div with constants into the convolution before them.

    Args:
      graph: a graph that is being rewritten.
      read: how often each name is read, in graphs within it, too, and as a result.
    """
    readers = {name: node for node in graph.graph.node for name in node.input}
    gone: set[int] = set()
    for conv in graph.graph.node:
        if conv.op_type != "Conv" or conv.input[1] not in graph.weights:
            continue
        turn = readers.get(conv.output[0])
        if turn is None or turn.op_type != "Transpose" or read[conv.output[0]] != 1:
            continue
        if turn.attribute[0].ints[-1] != 1:  # channels don't come last
            continue
        chain = list(_chain(graph, readers, read, turn.output[0]))
        if chain and _takes(graph, conv):
            _fold(graph, conv, chain)
            turn.output[0] = chain[-1][0].output[0]
            gone |= {id(node) for node, _ in chain}
    kept = [node for node in graph.graph.node if id(node) not in gone]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)


def _takes(graph: Any, conv: Any) -> bool:
    return len(conv.input) < 3 or conv.input[2] in graph.weights


def _chain(graph: Any, readers: Any, read: Counter[str], name: str) -> Iterator[tuple[Any, Any]]:
    """Operations on the channels alone, one after the other, with their constants."""
    while read[name] == 1 and name in readers:
        node = readers[name]
        if node.op_type not in ("Add", "Sub", "Mul", "Div"):
            return
        other = node.input[1] if node.input[0] == name else node.input[0]
        backwards = node.op_type in ("Sub", "Div") and node.input[0] != name
        if other not in graph.weights or backwards:
            return
        constant = graph.array(other)
        if constant.size != (constant.shape[-1] if constant.ndim else 1):
            return
        yield node, constant.reshape(-1)
        name = node.output[0]


def _fold(graph: Any, conv: Any, chain: list[tuple[Any, np.ndarray]]) -> None:
    weight = graph.array(conv.input[1])
    scale = np.ones(len(weight))
    shift = graph.array(conv.input[2]).astype(float) if len(conv.input) > 2 else np.zeros(1)
    for node, constant in chain:
        number = constant.astype(float)
        if node.op_type in ("Mul", "Div"):
            number = number if node.op_type == "Mul" else 1 / number
            scale, shift = scale * number, shift * number
        else:
            shift = shift + (number if node.op_type == "Add" else -number)
    scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    bias = np.broadcast_to(shift, len(weight))
    inputs = [conv.input[0], *(graph.weight(x.astype(weight.dtype)) for x in (scaled, bias))]
    del conv.input[:]
    conv.input.extend(inputs)
