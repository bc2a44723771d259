"""Layout: primitives that only move entries. Zeros move as the entries do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxprune.ir import axes, compat
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.registry import View, register
from jaxprune.rules.zeros import Zeros


def _out_shape(step: Step) -> tuple[int, ...]:
    return step.eqn.outvars[0].aval.shape


def _result_shape(view: View, step: Step) -> tuple[int, ...]:
    return view.shape(step.outs[0].axes)


# ------------------------------------------------------------------------ transpose, squeeze


def couple_transpose(step: Step) -> list[list[Axis]]:
    return [[step.ins[0].axes[k] for k in step.params["permutation"]]]


def zeros_transpose(step: Step, known: list[Zeros]) -> list[Zeros]:
    return [known[0]._replace(axes=tuple(known[0].axes[k] for k in step.params["permutation"]))]


register("transpose", couple=couple_transpose, zeros=zeros_transpose)


def _stay(step: Step) -> list[int]:
    return [k for k in range(len(step.ins[0].shape)) if k not in step.params["dimensions"]]


def couple_squeeze(step: Step) -> list[list[Axis]]:
    return [[step.ins[0].axes[k] for k in _stay(step)]]


def zeros_squeeze(step: Step, known: list[Zeros]) -> list[Zeros]:
    return [known[0]._replace(axes=tuple(known[0].axes[k] for k in _stay(step)))]


register("squeeze", couple=couple_squeeze, zeros=zeros_squeeze)

# ------------------------------------------------------------------------------- broadcasting


def couple_broadcast(step: Step) -> list[list[Axis]]:
    source = step.ins[0]
    result = [axes.leaf(n) for n in _out_shape(step)]
    for k, target in enumerate(step.params["broadcast_dimensions"]):
        if source.shape[k] == _out_shape(step)[target]:
            result[target] = source.axes[k]
    return [result]


def zeros_broadcast(step: Step, known: list[Zeros]) -> list[Zeros]:
    shape = _out_shape(step)
    if known[0].all:
        return [zeros.everywhere(shape)]
    vectors = [np.zeros(n, bool) for n in shape]
    for k, target in enumerate(step.params["broadcast_dimensions"]):
        vectors[target] = np.broadcast_to(known[0].axes[k], shape[target])
    return [Zeros(False, tuple(vectors))]


def evaluate_broadcast(view: View, step: Step, xs: list[Any]) -> list[Any]:
    return compat.bind(step.eqn, xs[:1], shape=_result_shape(view, step))


register(
    "broadcast_in_dim", couple=couple_broadcast, zeros=zeros_broadcast, evaluate=evaluate_broadcast
)

# ------------------------------------------------------------------------------------ reshape


def reshape_groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Positions of ``a`` and of ``b`` that have equal running products, units dropped."""
    groups, left, right, pa, pb = [], [], [], 1, 1
    rest = [(i, n) for i, n in enumerate(b) if n != 1]
    for i, n in [(i, n) for i, n in enumerate(a) if n != 1]:
        left.append(i)
        pa *= n
        while rest and pb < pa:
            j, m = rest.pop(0)
            right.append(j)
            pb *= m
        if pa == pb:
            groups.append((left, right))
            left, right = [], []
    if left or right:
        groups.append((left, right + [j for j, _ in rest]))
    return groups


def _permuted(step: Step, items: Sequence[Any]) -> list[Any]:
    """A reshape with ``dimensions`` is a transpose first."""
    order = step.params.get("dimensions")
    return list(items) if order is None else [items[k] for k in order]


def couple_reshape(step: Step) -> Any:
    source, shape = _permuted(step, step.ins[0].axes), _out_shape(step)
    result = [axes.leaf(n) for n in shape]
    for left, right in reshape_groups([a.size for a in source], shape):
        if len(left) == len(right) == 1:
            result[right[0]] = source[left[0]]
        else:
            step.unify(axes.prod(source[i] for i in left), axes.prod(result[j] for j in right))
    return [result]


def zeros_reshape(step: Step, known: list[Zeros]) -> list[Zeros]:
    shape, vectors = _out_shape(step), [np.zeros(n, bool) for n in _out_shape(step)]
    if known[0].all:
        return [zeros.everywhere(shape)]
    source = _permuted(step, step.ins[0].shape)
    facts = _permuted(step, known[0].axes)
    for left, right in reshape_groups(source, shape):
        flat = np.zeros([source[i] for i in left], bool)
        for k, i in enumerate(left):  # a flat position is zero if any of its slices is
            flat |= facts[i].reshape([-1 if j == k else 1 for j in range(len(left))])
        split = zeros.of_array(~flat.reshape([shape[j] for j in right]))
        for j, vector in zip(right, split.axes, strict=True):
            vectors[j] = vector
    return [Zeros(False, tuple(vectors))]


def evaluate_reshape(view: View, step: Step, xs: list[Any]) -> list[Any]:
    return compat.bind(step.eqn, xs, new_sizes=_result_shape(view, step))


register("reshape", couple=couple_reshape, zeros=zeros_reshape, evaluate=evaluate_reshape)

# ---------------------------------------------------------------- concatenate, split, pad, slice


def couple_concatenate(step: Step) -> list[list[Axis]]:
    d, result = step.params["dimension"], list(step.ins[0].axes)
    for v in step.ins[1:]:
        for k, a in enumerate(v.axes):
            if k != d:
                step.unify(result[k], a)
    result[d] = axes.sum_(v.axes[d] for v in step.ins)
    return [result]


def zeros_concatenate(step: Step, known: list[Zeros]) -> list[Zeros]:
    d, vectors = step.params["dimension"], []
    for k in range(len(_out_shape(step))):
        rows = [z.along(k) for z in known]
        vectors.append(np.concatenate(rows) if k == d else np.logical_and.reduce(rows))
    return [Zeros(all(z.all for z in known), tuple(vectors))]


register("concatenate", couple=couple_concatenate, zeros=zeros_concatenate)


def couple_split(step: Step) -> list[list[Axis]]:
    d, source = step.params["axis"], step.ins[0]
    pieces = [axes.leaf(int(n)) for n in step.params["sizes"]]
    step.unify(source.axes[d], axes.sum_(pieces))
    return [[*source.axes[:d], piece, *source.axes[d + 1 :]] for piece in pieces]


def zeros_split(step: Step, known: list[Zeros]) -> list[Zeros]:
    d, ends = step.params["axis"], np.cumsum([int(n) for n in step.params["sizes"]])[:-1]
    return [
        Zeros(known[0].all, (*known[0].axes[:d], piece, *known[0].axes[d + 1 :]))
        for piece in np.split(known[0].axes[d], ends)
    ]


def evaluate_split(view: View, step: Step, xs: list[Any]) -> list[Any]:
    sizes = tuple(view.size(out.axes[step.params["axis"]]) for out in step.outs)
    return compat.bind(step.eqn, xs, sizes=sizes)


register("split", couple=couple_split, zeros=zeros_split, evaluate=evaluate_split)


def couple_slice(step: Step) -> list[list[Axis]]:
    """Stride 1 cuts a sum; a full stride that divides cuts a product; the rest freezes."""
    p, source, result = step.params, step.ins[0], []
    strides = p["strides"] or (1,) * len(source.shape)
    for k, n in enumerate(source.shape):
        start, stop, stride = p["start_indices"][k], p["limit_indices"][k], strides[k]
        out = axes.leaf(_out_shape(step)[k])
        if stride == 1:
            step.unify(source.axes[k], axes.sum_([axes.leaf(start), out, axes.leaf(n - stop)]))
        elif n % stride == 0 and start < stride and _out_shape(step)[k] == n // stride:
            phase = axes.leaf(stride)
            step.unify(source.axes[k], axes.prod([out, phase]))
            step.freeze(phase, "strided slice")
        else:
            step.freeze(source.axes[k], "strided slice")
            step.freeze(out, "strided slice")
        result.append(out)
    return [result]


def zeros_slice(step: Step, known: list[Zeros]) -> list[Zeros]:
    p = step.params
    strides = p["strides"] or (1,) * len(known[0].axes)
    cuts = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    vectors = [v[a:b:s] for v, (a, b, s) in zip(known[0].axes, cuts, strict=True)]
    return [Zeros(known[0].all, tuple(vectors))]


def evaluate_slice(view: View, step: Step, xs: list[Any]) -> list[Any]:
    p, starts, stops = step.params, [], []
    strides = p["strides"] or (1,) * len(xs[0].shape)
    for k, axis in enumerate(step.ins[0].axes):
        wanted = step.outs[0].axes[k]
        if strides[k] != 1:
            starts.append(p["start_indices"][k])
            stops.append(min(p["limit_indices"][k], xs[0].shape[k]))
            continue
        before = _kept_before(view, axis, p["start_indices"][k])
        starts.append(before)
        stops.append(before + view.size(wanted))
    return compat.bind(step.eqn, xs, start_indices=tuple(starts), limit_indices=tuple(stops))


def _kept_before(view: View, axis: Axis, start: int) -> int:
    """How many kept positions precede ``start``."""
    untouched = start == 0 or view.size(axis) == axis.size
    return start if untouched else int((view.index(axis) < start).sum())


register("slice", couple=couple_slice, zeros=zeros_slice, evaluate=evaluate_slice)


def couple_pad(step: Step) -> list[list[Axis]]:
    result = []
    for axis, size, (low, high, inside) in zip(
        step.ins[0].axes, _out_shape(step), step.params["padding_config"], strict=True
    ):
        if low >= 0 and high >= 0 and inside == 0:
            result.append(axes.sum_([axes.leaf(low), axis, axes.leaf(high)]))
        else:
            result.append(axes.leaf(size))
            step.freeze(axis, "negative or interior padding")
            step.freeze(result[-1], "negative or interior padding")
    return [result]


def zeros_pad(step: Step, known: list[Zeros]) -> list[Zeros]:
    """Padding with another value than zero leaves an axis its zeros where no other is padded."""
    config, vectors = step.params["padding_config"], []
    for k in range(len(config)):
        elsewhere = any(tuple(c) != (0, 0, 0) for j, c in enumerate(config) if j != k)
        facts = known[0].along(k) & (known[1].all or not elsewhere)
        vectors.append(_padded(facts, config[k], known[1].all))
    return [Zeros(known[0].all and known[1].all, tuple(vectors))]


def _padded(vector: np.ndarray, config: tuple[int, int, int], filled: bool) -> np.ndarray:
    low, high, inside = config
    spread = np.full(max(len(vector) + inside * (len(vector) - 1), 0), filled)
    spread[:: inside + 1] = vector
    left, right = max(-low, 0), len(spread) - max(-high, 0)
    ends = np.full(max(low, 0), filled), np.full(max(high, 0), filled)
    return np.concatenate([ends[0], spread[left:right], ends[1]])


def evaluate_pad(view: View, step: Step, xs: list[Any]) -> list[Any]:
    config = []
    for axis, (low, high, inside) in zip(
        step.outs[0].axes, step.params["padding_config"], strict=True
    ):
        if view.size(axis) == axis.size:
            config.append((low, high, inside))
            continue
        index = view.index(axis)
        before, after = int((index < low).sum()), int((index >= axis.size - high).sum())
        config.append((before, after, inside))
    return compat.bind(step.eqn, xs, padding_config=tuple(config))


register("pad", couple=couple_pad, zeros=zeros_pad, evaluate=evaluate_pad)

# --------------------------------------------------------------------------- stack, tile, rev


def couple_stack(step: Step) -> list[list[Axis]]:
    d, result = step.params["axis"], list(step.ins[0].axes)
    for v in step.ins[1:]:
        for a, b in zip(result, v.axes, strict=True):
            step.unify(a, b)
    count = axes.leaf(len(step.ins))
    step.freeze(count, "stacked operands")
    return [[*result[:d], count, *result[d:]]]


def zeros_stack(step: Step, known: list[Zeros]) -> list[Zeros]:
    d = step.params["axis"]
    vectors = [
        np.logical_and.reduce([z.along(k) for z in known]) for k in range(len(known[0].axes))
    ]
    vectors.insert(d, np.array([z.all for z in known]))
    return [Zeros(all(z.all for z in known), tuple(vectors))]


register("stack", couple=couple_stack, zeros=zeros_stack)


def couple_unstack(step: Step) -> list[list[Axis]]:
    d, source = step.params["axis"], step.ins[0].axes
    step.freeze(source[d], "unstacked")
    return [[*source[:d], *source[d + 1 :]]] * len(step.eqn.outvars)


def zeros_unstack(step: Step, known: list[Zeros]) -> list[Zeros]:
    d, vectors = step.params["axis"], known[0].axes
    rest = (*vectors[:d], *vectors[d + 1 :])
    shape = _out_shape(step)
    return [zeros.everywhere(shape) if z else Zeros(False, rest) for z in known[0].along(d)]


register("unstack", couple=couple_unstack, zeros=zeros_unstack)


def couple_tile(step: Step) -> list[list[Axis]]:
    repeats = step.params["reps"]
    return [
        [
            a if r == 1 else axes.prod([axes.leaf(r), a])
            for a, r in zip(step.ins[0].axes, repeats, strict=True)
        ]
    ]


def zeros_tile(step: Step, known: list[Zeros]) -> list[Zeros]:
    vectors = [np.tile(v, r) for v, r in zip(known[0].axes, step.params["reps"], strict=True)]
    return [Zeros(known[0].all, tuple(vectors))]


def evaluate_tile(view: View, step: Step, xs: list[Any]) -> list[Any]:
    pairs = zip(step.outs[0].axes, step.ins[0].axes, strict=True)
    reps = tuple(view.size(o) // max(view.size(i), 1) for o, i in pairs)
    return compat.bind(step.eqn, xs, reps=reps)


register("tile", couple=couple_tile, zeros=zeros_tile, evaluate=evaluate_tile)


def couple_rev(step: Step) -> list[list[Axis]]:
    """An axis in the reverse order."""
    result = list(step.ins[0].axes)
    for k in step.params["dimensions"]:
        result[k] = reordered(step, result[k], np.arange(_out_shape(step)[k])[::-1])
    return [result]


def reordered(step: Step, axis: Axis, index: np.ndarray) -> Axis:
    """``axis`` at constant positions, each at most once: a slice of it in another order."""
    size, count = len(index), axis.size
    first = int(index[0]) if size else 0
    out, rest = axes.leaf(size), np.setdiff1d(np.arange(count), index)
    if size == count:
        return axes.perm(axis, index)
    if np.array_equal(index, np.arange(first, first + size)):
        pieces = [axes.leaf(first), out, axes.leaf(count - first - size)]
        step.unify(axis, axes.sum_(pieces))
    else:
        order = np.concatenate([index, rest])
        step.unify(axes.perm(axis, order), axes.sum_([out, axes.leaf(len(rest))]))
    return out


def zeros_rev(step: Step, known: list[Zeros]) -> list[Zeros]:
    turned = step.params["dimensions"]
    vectors = [v[::-1] if k in turned else v for k, v in enumerate(known[0].axes)]
    return [known[0]._replace(axes=tuple(vectors))]


register("rev", couple=couple_rev, zeros=zeros_rev)

# ---------------------------------------------------------------- arrays that come from nothing


def couple_fresh(step: Step) -> list[list[Axis]]:
    return [[axes.leaf(n) for n in v.aval.shape] for v in step.eqn.outvars]


def evaluate_positions(view: View, step: Step, xs: list[Any]) -> list[Any]:
    """The original values at the kept positions: a constant where units are gone."""
    axs, k = step.outs[0].axes, step.params["dimension"]
    if view.size(axs[k]) == axs[k].size:
        return compat.bind(step.eqn, xs, shape=view.shape(axs))
    positions = view.index(axs[k]).astype(step.params["dtype"])
    return [lax.broadcast_in_dim(positions, view.shape(axs), (k,))]


register("iota", couple=couple_fresh, evaluate=evaluate_positions)


def evaluate_empty(view: View, step: Step, xs: list[Any]) -> list[Any]:
    return compat.bind(step.eqn, xs, shape=_result_shape(view, step))


register("empty", couple=couple_fresh, evaluate=evaluate_empty)
register(
    "zeros_like",
    couple=lambda step: [list(step.ins[0].axes)],
    zeros=lambda step, known: [zeros.everywhere(_out_shape(step))],
)
