"""Where the axes of an operand land: in the result, or in the indices that an equation sums over.

An equation's *frame* is its result's axes, numbered as in the result, and then the indices that it
reduces away. A :class:`Way` says at which positions of the frame a group of an operand's axes is
found. Only equations that treat all positions of the frame alike have ways; they stand in the
table at the end. Everything else may tell one position from another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.ir import primitives, views
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step
from jaxprune.rules.layout import reshape_groups


class Way(NamedTuple):
    """A group of an operand's axes, and where its positions are in a group of the frame's axes.

    Both groups count as one flat axis each, row-major.
    """

    axes: tuple[int, ...]
    frame: tuple[int, ...]
    source: np.ndarray | None = None  # positions of the operand that are used; None: all
    target: np.ndarray | None = None  # where they are in the frame; None: at the same positions


class Landing(NamedTuple):
    """How one operand goes into one result."""

    operand: int
    result: int
    ways: Sequence[Way]


def _straight(pairs: Sequence[tuple[int, int]]) -> list[Way]:
    return [Way((k,), (place,)) for k, place in pairs]


def _pointwise(step: Step) -> list[Landing]:
    shape = step.outs[0].shape
    return [
        Landing(i, j, _straight([(k, k) for k, n in enumerate(v.shape) if n == shape[k]]))
        for i, v in enumerate(step.ins)
        for j in range(len(step.outs))
    ]


def _one_by_one(step: Step) -> list[Landing]:
    return [
        Landing(i, i, _straight([(k, k) for k in range(len(v.shape))]))
        for i, v in enumerate(step.ins)
    ]


def _dot(step: Step) -> list[Landing]:
    dims = views.contraction(step)
    (lc, rc), (lb, rb) = dims.contract, dims.batch
    free_l, free_r = (dims.free(side, len(v.shape)) for side, v in enumerate(step.ins))
    rank, shared = len(step.outs[0].shape), len(lb)
    reduced = range(rank, rank + len(lc))
    left = [*enumerate(lb), *enumerate(free_l, shared), *zip(reduced, lc)]
    right = [*enumerate(rb), *enumerate(free_r, shared + len(free_l)), *zip(reduced, rc)]
    sides = (left, right)
    return [Landing(i, 0, _straight([(k, p) for p, k in side])) for i, side in enumerate(sides)]


def _reduce(step: Step) -> list[Landing]:
    gone = views.reduction(step).axes
    stay = [k for k in range(len(step.ins[0].shape)) if k not in gone]
    return [Landing(0, 0, _straight([(k, p) for p, k in enumerate([*stay, *gone])]))]


def _transpose(step: Step) -> list[Landing]:
    return [Landing(0, 0, _straight([(k, p) for p, k in enumerate(views.permutation(step))]))]


def _squeeze(step: Step) -> list[Landing]:
    stay = views.squeezed(step, len(step.ins[0].shape))
    return [Landing(0, 0, _straight([(k, p) for p, k in enumerate(stay)]))]


def _broadcast(step: Step) -> list[Landing]:
    shape = step.outs[0].shape
    pairs = enumerate(views.broadcast(step).places)
    here = [(k, place) for k, place in pairs if step.ins[0].shape[k] == shape[place]]
    return [Landing(0, 0, _straight(here))]


def _reshape(step: Step) -> list[Landing]:
    shape = step.ins[0].shape
    order = views.reshape_order(step) or range(len(shape))
    groups = reshape_groups([shape[k] for k in order], step.outs[0].shape)
    return [Landing(0, 0, [Way(tuple(order[k] for k in a), tuple(b)) for a, b in groups])]


def _concatenate(step: Step) -> list[Landing]:
    along, found, start = views.concatenated(step), [], 0
    for i, v in enumerate(step.ins):
        ways = _straight([(k, k) for k in range(len(v.shape)) if k != along])
        place = np.arange(start, start + v.shape[along])
        found.append(Landing(i, 0, [*ways, Way((along,), (along,), None, place)]))
        start += v.shape[along]
    return found


def _split(step: Step) -> list[Landing]:
    along, found, start = views.split_axis(step), [], 0
    for j, v in enumerate(step.outs):
        ways = _straight([(k, k) for k in range(len(v.shape)) if k != along])
        place = np.arange(start, start + v.shape[along])
        found.append(Landing(0, j, [*ways, Way((along,), (along,), place, None)]))
        start += v.shape[along]
    return found


def _slice(step: Step) -> list[Landing]:
    cuts = zip(*views.slices(step))
    return [Landing(0, 0, [Way((k,), (k,), np.arange(*cut)) for k, cut in enumerate(cuts)])]


def _pad(step: Step) -> list[Landing]:
    ways = []
    for k, (low, _, inside) in enumerate(views.padding(step)):
        place = low + np.arange(step.ins[0].shape[k]) * (inside + 1)
        there = np.flatnonzero((place >= 0) & (place < step.outs[0].shape[k]))
        ways.append(Way((k,), (k,), there, place[there]))
    return [Landing(0, 0, ways)]


_LANDINGS: dict[Kind, Callable[[Step], list[Landing]]] = {
    **dict.fromkeys([Kind.ELEMENTWISE, Kind.TYPE, Kind.RESHARDING], _pointwise),
    Kind.REDUCTION: _reduce,
    Kind.BROADCAST: _broadcast,
    Kind.CONCATENATE: _concatenate,
    Kind.CONTRACTION: _dot,
    Kind.EACH: _one_by_one,
    Kind.PAD: _pad,
    Kind.RESHAPE: _reshape,
    Kind.SLICE: _slice,
    Kind.SPLIT: _split,
    Kind.SQUEEZE: _squeeze,
    Kind.TRANSPOSE: _transpose,
}


def landings(step: Step) -> list[Landing] | None:
    """Where the operands of a step land; None for a step that may tell positions apart."""
    found = _LANDINGS.get(primitives.kind(step))
    return None if found is None else found(step)


def flat(shape: Sequence[int], group: Sequence[int], axis: int, line: np.ndarray) -> np.ndarray:
    """A vector along one axis as it lies along the flattened group of axes that holds it."""
    sizes = [shape[k] for k in group]
    at = [-1 if k == axis else 1 for k in group]
    return np.broadcast_to(line.reshape(at), sizes).reshape(-1)


def landed(way: Way, shape: Sequence[int], axis: int, line: np.ndarray) -> Any:
    """A vector along an operand's axis, at the positions of the frame that the way leads to."""
    whole = flat(shape, way.axes, axis, line)
    return whole if way.source is None else whole[way.source]
