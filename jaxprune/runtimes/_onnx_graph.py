"""ONNX graphs rewritten so that kernels and quantisers see matrix products and their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxprune.runtimes import _onnx_affine
from jaxprune.runtimes._runtime import package


def rewrite(model: Any) -> None:
    """Einsum becomes MatMul, Gemm loses a bias of zero, and so on, in loops too; in place."""
    _name_results(model.graph)
    for graph in graphs(model.graph):
        _Graph(graph).rewrite()


def graphs(graph: Any) -> Iterator[Any]:
    """A graph and those that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def weights(model: Any) -> dict[str, np.ndarray]:
    """The constants of all graphs, by name."""
    to_array = package("onnx", "onnx").numpy_helper.to_array
    return {w.name: to_array(w) for graph in graphs(model.graph) for w in graph.initializer}


class _Graph:
    """One graph that is being rewritten."""

    def __init__(self, graph: Any):
        self.onnx = package("onnx", "onnx")
        self.graph, self.nodes = graph, list[Any]()
        self.weights = {w.name: w for w in graph.initializer}
        self._count = 0

    def rewrite(self) -> None:
        """Writes all nodes anew, and drops weights that nothing reads any more."""
        _onnx_affine.fold(self, _read(self.graph))
        for node in self.graph.node:
            rule = _RULES.get(node.op_type)
            if rule is None or not rule(self, node):
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = _read(self.graph)
        kept = [w for w in self.graph.initializer if w.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def transpose(self, node: Any) -> bool:
        """Weights are transposed now."""
        if node.input[0] not in self.weights:
            return False
        perm = [*node.attribute[0].ints] if node.attribute else None
        self.weight(self.array(node.input[0]).transpose(perm), node.output[0])
        return True

    def gemm(self, node: Any) -> bool:
        """A product without a bias, or with the number 0, which has no axes to quantise."""
        given = {a.name: a.f or a.i for a in node.attribute}
        biased = len(node.input) > 2 and given.get("beta", 1) != 0
        if biased or given.get("transA") or given.get("transB") or given.get("alpha", 1) != 1:
            return False
        inputs = [node.input[0], node.input[1]]
        self.nodes.append(self.onnx.helper.make_node("MatMul", inputs, node.output, node.name))
        return True

    def max(self, node: Any) -> bool:
        """A maximum with 0, which kernels and quantisers know by another name."""
        for x, other in zip(node.input, reversed(node.input)):
            zero = self.array(other) if other in self.weights else np.ones(1)
            is_float = np.issubdtype(zero.dtype, np.floating)
            if len(node.input) == 2 and is_float and zero.size == 1 and not zero.any():
                make = self.onnx.helper.make_node
                self.nodes.append(make("Relu", [x], node.output, node.name))
                return True
        return False

    def max_pool(self, node: Any) -> bool:
        """Windows along few axes; jax2onnx pools all axes, and ONNX Runtime at most three."""
        given = {a.name: [*a.ints] for a in node.attribute if a.ints}
        window = given.pop("kernel_shape")
        n = len(window)
        pads = given.pop("pads", [0] * 2 * n)
        strides = given.get("strides", [1] * n)
        along = [
            i for i in range(n) if (window[i], strides[i], pads[i], pads[n + i]) != (1, 1, 0, 0)
        ]
        rest = [i for i in range(n) if i not in along]
        while len(rest) > 2:
            along = sorted([*along, rest.pop(1)])
        if not rest or not 0 < len(along) < 4:
            return False
        gone = len(rest)  # So many of the two ones in front make room for the other axes.
        front = [*range(2 - gone)]
        order = [*front, *(2 - gone + i for i in [*rest, *along])]
        axes = self.weight(np.array([*range(gone)], np.int64))
        x = self._add("Transpose", [self._add("Squeeze", [node.input[0], axes])], perm=order)
        mine = {name: [values[i] for i in along] for name, values in given.items()}
        both = [pads[i] for i in along] + [pads[n + i] for i in along]
        x = self._add("MaxPool", [x], kernel_shape=[window[i] for i in along], pads=both, **mine)
        x = self._add("Transpose", [x], perm=[*map(int, np.argsort(order))])
        self._add("Unsqueeze", [x, axes])
        self.nodes[-1].output[0] = node.output[0]
        return True

    # ------------------------------------------------------------------------------- Einsum

    def einsum(self, node: Any) -> bool:
        """``abc,cde->abde`` as one product: axes of both, then one side's own, then the sum's."""
        if len(node.input) != 2:
            return False
        equation = node.attribute[0].s.decode()
        (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
        names = list(node.input)
        if names[0] in self.weights and names[1] not in self.weights:
            left, right, names = right, left, names[::-1]
        both = [a for a in left if a in right]
        batch, summed = ([a for a in both if (a in out) == w] for w in (True, False))
        own = [[a for a in side if a not in both] for side in (left, right)]
        if {*left, *right} - {*out, *summed} or len({*left}) + len({*right}) < len(left + right):
            return False  # a diagonal, or a sum over one side alone
        if names[1] in self.weights and not batch:
            self._by_weights(names, left, right, own, summed, out, node.output[0])
        else:
            self._by_both(names, left, right, own, batch, summed, out, node.output[0])
        return True

    def _by_weights(
        self, names: Any, left: str, right: str, own: Any, summed: Any, out: str, result: str
    ) -> None:
        """Weights become one matrix of (summed, own) axes, now."""
        sizes = dict(zip(right, self.weights[names[1]].dims, strict=True))
        order = [right.index(a) for a in (*summed, *own[1])]
        matrix = self.array(names[1]).transpose(order)
        matrix = matrix.reshape(int(np.prod([sizes[a] for a in summed])), -1)
        x = self._transposed(names[0], left, [*own[0], *summed])
        if len(summed) != 1:
            x = self._reshaped(x, [*[0] * len(own[0]), len(matrix)])
        x = self._add("MatMul", [x, self.weight(matrix)])
        if len(own[1]) != 1:
            x = self._reshaped(x, [*[0] * len(own[0]), *(sizes[a] for a in own[1])])
        self._as_output(x, "".join([*own[0], *own[1]]), out, result)

    def _by_both(
        self, names: Any, left: str, right: str, own: Any, batch: Any, summed: Any, out: str,
        result: str,
    ) -> None:  # fmt: skip
        """All but the last own axis of a side are batches that the other side repeats along."""
        before = [side[:-1] for side in own]
        last = [side[-1:] or [" "] for side in own]
        x = self._laid_out(names[0], left, batch, [before[0], ""], len(before[1]), last[0], summed)
        y = self._laid_out(names[1], right, batch, ["", before[1]], len(before[0]), last[1], summed)
        y = self._add("Transpose", [y], perm=_swapped(len(batch + before[0] + before[1]) + 2))
        z = self._add("MatMul", [x, y])
        labels = "".join([*batch, *before[0], *before[1], *last[0], *last[1]])
        gone = [i for i, a in enumerate(labels) if a == " "]
        if gone:
            z = self._add("Squeeze", [z, self.weight(np.array(gone, np.int64))])
        self._as_output(z, labels.replace(" ", ""), out, result)

    def _laid_out(
        self, name: str, labels: str, batch: Any, before: Any, other: int, last: Any, summed: Any
    ) -> str:
        """One side as (batch, own but the last, ones for the other's, last own, sum)."""
        mine = [*before[0], *before[1]]
        x = self._transposed(name, labels, [*batch, *mine, *(a for a in last if a != " "), *summed])
        if len(summed) != 1:
            free = len(batch) + len(mine) + (last != [" "])
            x = self._reshaped(x, [*[0] * free, -1] if summed else [*[0] * free, 1])
        at = len(batch) + (len(mine) if before[0] else 0)
        ones = [at + i for i in range(other)]
        if last == [" "]:
            ones.append(len(batch) + len(mine) + other)
        return self._add("Unsqueeze", [x, self.weight(np.array(ones, np.int64))]) if ones else x

    def _as_output(self, name: str, labels: str, out: str, result: str) -> None:
        order = [labels.index(a) for a in out]
        if order != sorted(order):
            self._add("Transpose", [name], perm=order)
        self.nodes[-1].output[0] = result

    # -------------------------------------------------------------------------------- nodes

    def _add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = self._name(kind)
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _transposed(self, name: str, labels: str, order: Sequence[str]) -> str:
        perm = [labels.index(a) for a in order]
        if perm == sorted(perm):
            return name
        if name in self.weights:
            return self.weight(self.array(name).transpose(perm))
        return self._add("Transpose", [name], perm=perm)

    def _reshaped(self, name: str, sizes: Sequence[int]) -> str:
        """0 stands for the size that is there."""
        return self._add("Reshape", [name, self.weight(np.array(sizes, np.int64))])

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self.onnx.numpy_helper.to_array(self.weights[name]))

    def weight(self, array: np.ndarray, name: str = "") -> str:
        name = name or self._name("weight")
        tensor = self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        self.weights[name] = tensor
        self.graph.initializer.append(tensor)
        return name

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self.graph.name}_{kind}_{self._count}"


_RULES = {
    "Einsum": _Graph.einsum,
    "Gemm": _Graph.gemm,
    "Transpose": _Graph.transpose,
    "Max": _Graph.max,
    "MaxPool": _Graph.max_pool,
}


def _name_results(graph: Any) -> None:
    """Names results in their order; what is an argument, a constant or another result is copied."""
    onnx = package("onnx", "onnx")
    made = {name for node in graph.node for name in node.output}
    new: dict[str, str] = {}
    for i, result in enumerate(graph.output):
        name = f"output_{i}"
        if result.name in made and result.name not in new:
            new[result.name] = name
        else:
            source = new.get(result.name, result.name)
            graph.node.append(onnx.helper.make_node("Identity", [source], [name], name))
        result.name = name
    for node in (node for g in graphs(graph) for node in g.node):
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _read(graph: Any) -> Counter[str]:
    """How often each name is read, in graphs within, too, and as a result."""
    found = Counter(name for g in graphs(graph) for node in g.node for name in node.input)
    return found + Counter(result.name for g in graphs(graph) for result in g.output)
