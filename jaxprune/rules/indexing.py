"""Gathers, scatters and dynamic slices: whole windows pass, indexed axes are frozen.

What is indexed by positions that were chosen along an axis is that axis, see
``jaxprune/ir/positions.py``. Such positions are those of the whole program everywhere but here,
where they become those of the kept entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from jaxprune.ir import axes, compat, positions, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.content import content
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step
from jaxprune.rules import zeros
from jaxprune.rules.layout import reordered
from jaxprune.rules.registry import Mix, View, register
from jaxprune.rules.zeros import Zeros


def couple_dynamic_slice(step: Step) -> list[list[Axis]]:
    result = []
    for axis, size in zip(step.ins[0].axes, step.params["slice_sizes"], strict=True):
        if size != axis.size:
            step.freeze(axis, "sliced at a computed place")
            axis = axes.leaf(size)
            step.freeze(axis, "sliced at a computed place")
        result.append(axis)
    return [result]


def zeros_dynamic_slice(step: Step, known: list[Zeros]) -> list[Zeros]:
    sizes, operand = step.params["slice_sizes"], known[0]
    vectors = [v if len(v) == n else np.full(n, operand.all) for v, n in zip(operand.axes, sizes)]
    return [Zeros(operand.all, tuple(vectors))]


def evaluate_dynamic_slice(view: View, step: Step, xs: list[Any]) -> list[Any]:
    return compat.bind(step.eqn, xs, slice_sizes=view.shape(step.outs[0].axes))


register(
    "dynamic_slice",
    couple=couple_dynamic_slice,
    zeros=zeros_dynamic_slice,
    evaluate=evaluate_dynamic_slice,
)


def couple_dynamic_update(step: Step) -> list[list[Axis]]:
    operand, update = step.ins[:2]
    for a, b in zip(operand.axes, update.axes, strict=True):
        if a.size == b.size:
            step.unify(a, b)
        else:
            step.freeze(a, "updated at a computed place")
            step.freeze(b, "updated at a computed place")
    return [list(operand.axes)]


def zeros_dynamic_update(step: Step, known: list[Zeros]) -> list[Zeros]:
    """Zero in both; an update of zeros leaves the operand's zeros, wherever it lands."""
    operand, update = known[:2]
    vectors = [
        a & (b if len(a) == len(b) else update.all)
        for a, b in zip(_alongs(operand), _alongs(update), strict=True)
    ]
    return [Zeros(operand.all and update.all, tuple(vectors))]


def _alongs(known: Zeros) -> list[np.ndarray]:
    return [known.along(k) for k in range(len(known.axes))]


register("dynamic_update_slice", couple=couple_dynamic_update, zeros=zeros_dynamic_update)


def _gather_windows(step: Step) -> tuple[dict[int, int], dict[int, int]]:
    """Operand axis -> result axis, for windows; operand axis -> indices axis, for batch axes."""
    numbers, rank = step.params["dimension_numbers"], len(step.ins[0].shape)
    batch = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    windows = [k for k in range(rank) if k not in numbers.collapsed_slice_dims and k not in batch]
    return dict(zip(windows, numbers.offset_dims, strict=True)), batch


def _gather_places(step: Step) -> dict[int, int]:
    """Indices axis -> result axis."""
    offsets = step.params["dimension_numbers"].offset_dims
    rest = [j for j in range(len(step.eqn.outvars[0].aval.shape)) if j not in offsets]
    return dict(enumerate(rest))


class Constant(NamedTuple):
    """A gather along one axis at constant positions, ``h[:, order]``."""

    axis: int  # of the operand
    place: int  # of the result
    positions: np.ndarray  # each at most once


def constant_gather(step: Step) -> Constant | None:
    """How a gather reads one axis at constant positions, or None: then it is of another kind."""
    numbers, (operand, indices) = step.params["dimension_numbers"], step.ins[:2]
    windows, batch = _gather_windows(step)
    whole = all(step.params["slice_sizes"][k] == operand.shape[k] for k in windows)
    if batch or not whole or len(numbers.collapsed_slice_dims) != 1 or len(indices.shape) != 2:
        return None
    (axis,), (place,) = numbers.collapsed_slice_dims, _gather_places(step).values()
    index = content(indices)
    if numbers.start_index_map != (axis,) or index is None:
        return None
    index = index.reshape(-1).astype(np.int64)
    inside = not len(index) or (index.min() >= 0 and index.max() < operand.shape[axis])
    return Constant(axis, place, index) if inside and len(set(index)) == len(index) else None


def in_the_whole(view: View, axis: Axis, found: Any) -> Any:
    """Positions along what is kept of an axis, as positions along all of it."""
    return _looked_up(view.index(axis), found) if _is_cut(view, axis) else found


def among_kept(view: View, axis: Axis, found: Any) -> Any:
    """Positions along an axis, all of kept entries, as positions along what is kept."""
    if not _is_cut(view, axis):
        return found
    table = np.zeros(axis.size, np.int32)
    table[view.index(axis)] = np.arange(view.size(axis))
    return _looked_up(table, found)


def _looked_up(table: np.ndarray, found: Any) -> Any:
    numbers = jnp.asarray(table.astype(found.dtype))
    return numbers.at[found].get(mode="promise_in_bounds")


def _small_indices(view: View, step: Step) -> Callable[[Any], Any]:
    """Index vectors into what is kept of the operand."""
    indexed = [step.ins[0].axes[k] for k in views.indexed(step)]

    def small(indices: Any) -> Any:
        if not any(_is_cut(view, axis) for axis in indexed):
            return indices
        rows = [among_kept(view, axis, indices[..., c]) for c, axis in enumerate(indexed)]
        return jnp.stack(rows, -1)

    return small


def _couple_indexed(step: Step, k: int, single: bool) -> None:
    """An axis that is indexed: one that was chosen along, or frozen."""
    axis, indexed = step.ins[0].axes[k], views.indexed(step)
    along = positions.component(step.ins[1], indexed.index(k)) if k in indexed else None
    if along is not None and along.size == axis.size and single:
        step.chosen_from(axis, along)
    else:
        step.freeze(axis, "indexed")


def couple_gather(step: Step) -> list[list[Axis]]:
    """Full windows pass; what is indexed is frozen; batch axes of the indices pass.

    At constant positions that differ from each other an axis passes in their order.
    """
    operand, indices = step.ins[:2]
    constant = constant_gather(step)
    if constant is not None:
        result = [a for k, a in enumerate(operand.axes) if k != constant.axis]
        along = reordered(step, operand.axes[constant.axis], constant.positions)
        return [[*result[: constant.place], along, *result[constant.place :]]]
    windows, batch = _gather_windows(step)
    result = [axes.leaf(n) for n in step.eqn.outvars[0].aval.shape]
    for j, place in _gather_places(step).items():
        result[place] = indices.axes[j]
    for k, axis in enumerate(operand.axes):
        if k in batch:
            step.unify(axis, indices.axes[batch[k]])
        elif k in windows and step.params["slice_sizes"][k] == axis.size:
            result[windows[k]] = axis
        else:
            _couple_indexed(step, k, step.params["slice_sizes"][k] == 1)
            if k in windows:
                step.freeze(result[windows[k]], "indexed")
    step.freeze(indices.axes[-1], "index vector")
    return [result]


def _fills_nonzero(step: Step) -> bool:
    """Whether indices out of bounds give entries that a program may count on, other than zero.

    NaN, which ``jnp.take`` fills in, is the mark of a mistake: programs are read as if none of
    their indices made it. Integers have their lowest or highest value as that mark.
    """
    fill = step.params["fill_value"]
    marks = step.params["mode"] == GatherScatterMode.FILL_OR_DROP and fill is not None
    return bool(marks and fill != 0 and not np.isnan(fill))


def zeros_gather(step: Step, known: list[Zeros]) -> list[Zeros]:
    """Zero slices along full windows and batch axes stay zero, whatever row is read."""
    operand, shape = known[0], step.eqn.outvars[0].aval.shape
    if _fills_nonzero(step):
        return [zeros.unknown(shape)]
    (windows, batch), places = _gather_windows(step), _gather_places(step)
    vectors = [np.full(n, operand.all) for n in shape]
    constant = constant_gather(step)
    if constant is not None:
        vectors[constant.place] = operand.along(constant.axis)[constant.positions]
    for k, vector in enumerate(_alongs(operand)):
        to = places[batch[k]] if k in batch else windows.get(k)
        if to is not None and len(vector) == shape[to]:
            vectors[to] = vector
    return [Zeros(operand.all, tuple(vectors))]


def evaluate_gather(view: View, step: Step, xs: list[Any]) -> list[Any]:
    constant = constant_gather(step)
    if constant is not None and _is_cut(view, step.ins[0].axes[constant.axis]):
        xs = [xs[0], _kept_index(view, step, constant)]
    elif constant is None:
        xs = [xs[0], _small_indices(view, step)(xs[1])]
    sizes = tuple(
        view.size(axis) if size == axis.size else size
        for axis, size in zip(step.ins[0].axes, step.params["slice_sizes"], strict=True)
    )
    return compat.bind(step.eqn, xs, slice_sizes=sizes)


def _kept_index(view: View, step: Step, constant: Constant) -> np.ndarray:
    """Where the kept positions of the result stand among the kept ones of the operand."""
    source, result = step.ins[0].axes[constant.axis], step.outs[0].axes[constant.place]
    index = np.searchsorted(view.index(source), constant.positions[view.index(result)])
    return index.astype(step.ins[1].aval.dtype)[:, None]


def _is_cut(view: View, axis: Axis) -> bool:
    """Whether units of an axis are gone; where none is, the program's own index may have names."""
    return view.size(axis) != axes.find(axis).size


register("gather", couple=couple_gather, zeros=zeros_gather, evaluate=evaluate_gather)


def _scatter_windows(step: Step) -> tuple[dict[int, int], dict[int, int]]:
    """Operand axis -> update axis, for windows; operand axis -> indices axis, for batch axes."""
    numbers, rank = step.params["dimension_numbers"], len(step.ins[0].shape)
    batch = dict(
        zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    )
    windows = [k for k in range(rank) if k not in numbers.inserted_window_dims + tuple(batch)]
    return dict(zip(windows, numbers.update_window_dims, strict=True)), batch


def _scatter_places(step: Step) -> dict[int, int]:
    """Indices axis -> update axis."""
    inside = step.params["dimension_numbers"].update_window_dims
    return dict(enumerate(j for j in range(len(step.ins[2].shape)) if j not in inside))


def couple_scatter(step: Step) -> list[list[Axis]]:
    """The mirror of gather: windows of the update that span the operand pass."""
    operand, indices, update = step.ins
    windows, batch = _scatter_windows(step)
    for k, axis in enumerate(operand.axes):
        if k in batch:
            step.unify(axis, indices.axes[batch[k]])
        elif k in windows and update.shape[windows[k]] == axis.size:
            step.unify(axis, update.axes[windows[k]])
        else:
            _couple_indexed(step, k, k not in windows or update.shape[windows[k]] == 1)
            if k in windows:
                step.freeze(update.axes[windows[k]], "indexed")
    for j, place in _scatter_places(step).items():
        step.unify(update.axes[place], indices.axes[j])
    step.freeze(indices.axes[-1], "index vector")
    return [list(operand.axes)]


def _combines_zeros_to_zero(step: Step) -> bool:
    """``.at[].apply(f)`` writes f of the operand: is f(0) = 0?"""
    combine = step.params["update_jaxpr"]
    if step.name != "scatter" or combine is None:
        return True
    jaxpr, consts = compat.open_jaxpr(combine)
    zero = np.zeros((), step.ins[0].aval.dtype)
    with jax.ensure_compile_time_eval():
        (out,) = jax.core.eval_jaxpr(jaxpr, consts or step.params["update_consts"], zero, zero)
    return bool(np.all(np.asarray(out) == 0))


def zeros_scatter(step: Step, known: list[Zeros]) -> list[Zeros]:
    """Zero in the operand and in all that may be written; a product needs the operand only."""
    operand, _, update = known
    if step.name == "scatter-mul":
        return [operand]
    if not _combines_zeros_to_zero(step):
        return [zeros.unknown(step.ins[0].shape)]
    (windows, batch), places = _scatter_windows(step), _scatter_places(step)
    vectors = []
    for k, vector in enumerate(_alongs(operand)):
        source = places[batch[k]] if k in batch else windows.get(k)
        written = np.full(len(vector), update.all)
        if source is not None and step.ins[2].shape[source] == len(vector):
            written = update.along(source)
        vectors.append(vector & written)
    return [Zeros(operand.all and update.all, tuple(vectors))]


def mixes_scatter(step: Step, known: list[Zeros]) -> list[Mix]:
    """Updates meet in the operand; sums of them don't notice zeros. The operand is read once."""
    adds, places = step.name.endswith(("add", "sub")), _scatter_places(step)
    kept = set(_scatter_windows(step)[1].values())
    found = [(step.ins[2].axes[k], known[2].along(k)) for j, k in places.items() if j not in kept]
    return [Mix(a, zero & adds, "none") for a, zero in found]


def evaluate_scatter(view: View, step: Step, xs: list[Any]) -> list[Any]:
    return compat.bind(step.eqn, [xs[0], _small_indices(view, step)(xs[1]), xs[2]])


register(
    *primitives.names(Kind.SCATTER),
    couple=couple_scatter, zeros=zeros_scatter, mixes=mixes_scatter, evaluate=evaluate_scatter,
)  # fmt: skip
