"""The logical dimensions of a network: which axes of which leaves must lose the same units."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.masks import fits
from jaxprune.structure import infer as _infer


class Slot(NamedTuple):
    """One place of a dimension: a leaf, one of its axes, and the piece of that axis."""

    path: str
    axis: int
    piece: tuple[int, ...]  # the way down the axis's tree; () = the whole axis

    def __str__(self) -> str:
        return ":".join([self.path, ".".join(map(str, (self.axis, *self.piece)))])


@dataclass(frozen=True)
class Dimension:
    """A logical axis: its units are kept or removed together in all of its slots.

    Attributes:
      name: the path, axis and piece of its first slot.
      size: number of units.
      slots: every (leaf, axis, piece) that carries it.
      frozen: why it can't be pruned, or None.
      params: number of entries in the leaves that it governs.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    frozen: str | None
    params: int
    axis: Axis = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Structure:
    """What :func:`infer_structure` found. ``print`` it to see the table of dimensions."""

    dims: dict[str, Dimension]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    param_axes: tuple[tuple[Axis, ...], ...] = field(repr=False)
    treedef: Any = field(repr=False)

    def masks(self, keep: Mapping[str, Any]) -> Any:
        """Masks of all coupled slots.

        Args:
          keep: dimension name -> boolean vector of its size, True = kept. Dimensions that are
            not named stay whole.

        Returns:
          A tree like params: a mask with size-1 untouched axes, or a scalar True.

        Raises:
          ValueError: for an unknown or frozen dimension, a vector of another length, or one that
            keeps nothing.
        """
        return self.traced_masks({d.name: v for d, v in self._checked(keep) if not v.all()})

    def traced_masks(self, keep: Mapping[str, Any]) -> Any:
        """As :meth:`masks`, for vectors that may be traced; names and contents are not checked."""
        kept = {self.dims[name].axis: jnp.asarray(v, bool) for name, v in keep.items()}
        leaves = [_leaf_mask(axs, kept) for axs in self.param_axes]
        return jax.tree.unflatten(self.treedef, leaves)

    def _checked(self, keep: Mapping[str, Any]) -> Iterator[tuple[Dimension, np.ndarray]]:
        for name, given in keep.items():
            if name not in self.dims:
                near = difflib.get_close_matches(name, self.dims, 3, 0.3)
                raise ValueError(f"no dimension is named {name!r}; near names: {near}")
            dim, vector = self.dims[name], np.asarray(given, bool)
            if vector.shape != (dim.size,):
                raise ValueError(
                    f"keep[{name!r}] has shape {vector.shape}, wanted ({dim.size},): one boolean "
                    "per unit, True = kept"
                )
            if dim.frozen and not vector.all():
                raise ValueError(f"dimension {name!r} can't be pruned: {dim.frozen}")
            if not vector.any():
                raise ValueError(f"keep[{name!r}] keeps none of {dim.size} units; keep at least 1")
            yield dim, vector

    def keep(self, masks: Any) -> dict[str, np.ndarray]:
        """The units that some slot keeps: ``keep(masks(k)) == k`` for whole units.

        Args:
          masks: a tree like params, True = kept, each mask broadcastable to its leaf.
        """
        leaves = self.mask_leaves(masks)
        return {name: self._kept(dim, leaves, "any") for name, dim in self.dims.items()}

    def fully_kept(self, masks: Any) -> dict[str, np.ndarray]:
        """The units that every slot keeps at least in part; the others are candidates."""
        leaves = self.mask_leaves(masks)
        return {name: self._kept(dim, leaves, "all") for name, dim in self.dims.items()}

    def mask_leaves(self, masks: Any) -> list[np.ndarray]:
        """The masks as a flat list, checked against the leaves."""
        if jax.tree.structure(masks) != self.treedef:
            raise ValueError(
                f"masks have another structure than params: got {jax.tree.structure(masks)}, "
                f"wanted {self.treedef}; build them with structure.masks or a pattern"
            )
        out = []
        for path, shape, mask in zip(self.paths, self.shapes, jax.tree.leaves(masks), strict=True):
            array = np.asarray(mask)
            if not fits(array, shape):
                raise ValueError(
                    f"the mask of {path} is {array.dtype}{array.shape}; wanted booleans that "
                    f"broadcast to {shape}, True = kept"
                )
            out.append(array)
        return out

    def _kept(self, dim: Dimension, leaves: list[np.ndarray], how: str) -> np.ndarray:
        kept = np.zeros(dim.size, bool) if how == "any" else np.ones(dim.size, bool)
        for axs, mask in zip(self.param_axes, leaves, strict=True):
            for k, axis in enumerate(axs):
                for units in axes.units_along(axis, dim.axis):
                    alive = np.zeros(dim.size, bool)
                    alive[units[(units >= 0) & _along(mask, k, len(axs), axis.size)]] = True
                    kept = kept | alive if how == "any" else kept & alive
        return kept

    def unit_scores(self, scores: Any, reduce: str = "mean") -> dict[str, np.ndarray | jax.Array]:
        """Sums or averages entry scores over all slots of each unit of every prunable dimension.

        Args:
          scores: a tree like params.
          reduce: "sum" or "mean" over the entries of a unit.

        Returns:
          dimension name -> a vector of its size.
        """
        leaves, treedef = jax.tree.flatten(scores)
        if treedef != self.treedef:
            raise ValueError(
                f"scores have another structure than params: got {treedef}, wanted {self.treedef}"
            )
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce is {reduce!r}; wanted 'sum' or 'mean'")
        free = [d for d in self.dims.values() if not d.frozen]
        return {d.name: _unit_score(d, self.param_axes, leaves, reduce) for d in free}

    def __str__(self) -> str:
        rows = sorted(self.dims.values(), key=lambda d: (d.frozen is not None, -d.params))
        width = max([len(d.name) for d in rows] + [9])
        lines = [f"{'dimension':<{width}}  {'size':>6}  {'slots':>5}  {'params':>10}  frozen"]
        for d in rows:
            why = d.frozen or ""
            lines.append(
                f"{d.name:<{width}}  {d.size:>6}  {len(d.slots):>5}  {d.params:>10,}  {why}"
            )
        return "\n".join(lines)


def _unit_score(dim: Dimension, param_axes: Any, leaves: list[Any], reduce: str) -> jax.Array:
    total, count = jnp.zeros(dim.size), np.zeros(dim.size)
    for axs, leaf in zip(param_axes, leaves, strict=True):
        for k, axis in enumerate(axs):
            for units in axes.units_along(axis, dim.axis):
                others = tuple(i for i in range(len(axs)) if i != k)
                line = jnp.sum(jnp.asarray(leaf, total.dtype), axis=others)
                inside = units >= 0
                total = total.at[units[inside]].add(line[inside])
                np.add.at(count, units[inside], np.prod([axs[i].size for i in others], initial=1))
    return total / np.maximum(count, 1) if reduce == "mean" else total


def _along(mask: np.ndarray, k: int, rank: int, size: int) -> np.ndarray:
    """Which positions along axis ``k`` a broadcastable mask keeps at least in part."""
    full = mask.reshape((1,) * (rank - mask.ndim) + mask.shape)
    alive = full.any(tuple(i for i in range(rank) if i != k))
    return np.broadcast_to(alive, (size,))


def _leaf_mask(axs: tuple[Axis, ...], kept: dict[Axis, jax.Array]) -> jax.Array:
    mask = jnp.asarray(True)
    for k, axis in enumerate(axs):
        for leaf in dict.fromkeys(leaf for leaf in axes.leaves(axis) if leaf in kept):
            for units in axes.units_along(axis, leaf):
                line = jnp.where(units >= 0, kept[leaf][units], True)
                mask = mask & line.reshape([-1 if i == k else 1 for i in range(len(axs))])
    return mask


def infer_structure(fn: Callable[..., Any], params: Any, *args: Any) -> Structure:
    """Finds the logical dimensions of ``fn(params, *args)`` by reading its jaxpr.

    Args:
      fn: a pure function whose first argument is the params tree, in any framework.
      params: any pytree of arrays or ``jax.ShapeDtypeStruct``. State that travels with the
        parameters (batch statistics, caches) belongs here, too.
      *args: the other arguments, arrays or ``jax.ShapeDtypeStruct``; nothing is computed.

    Returns:
      A :class:`Structure`: ``.dims``, ``.masks(keep)``, ``.keep(masks)``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> [(d.name, d.size) for d in structure.dims.values() if not d.frozen]
      [('up:1', 8)]
    """
    program = _infer.infer(fn, params, args)
    return from_program(program, params)


def from_program(program: _infer.Program, params: Any) -> Structure:
    """Names what a trace found."""
    paths = tuple(_infer.paths_of(params))
    param_axes = tuple(tuple(v.axes) for v in program.param_values)
    used, order = _infer.used_leaves(program.tape), _first_use(program)
    slots: dict[Axis, list[tuple[Any, Slot]]] = {}
    for path, axs, when in zip(paths, param_axes, order, strict=True):
        for k, axis in enumerate(axs):
            for leaf, piece in _pieces(axis):
                if leaf.size > 1:
                    makes = len(axs) > 1 and k == len(axs) - 1  # kernels are (..., in, out)
                    slots.setdefault(leaf, []).append(((not makes, when), Slot(path, k, piece)))
    sizes = {path: int(np.prod(v.shape)) for path, v in zip(paths, program.param_values)}
    dims = {}
    for leaf, found in sorted(slots.items(), key=lambda item: min(item[1])):
        ordered = tuple(slot for _, slot in sorted(found))
        why = "; ".join(map(str, leaf.reasons)) or None
        if why is None and leaf not in used:
            why = "nothing in this trace reads it"
        governed = sum(sizes[path] for path in {s.path for s in ordered})
        dims[str(ordered[0])] = Dimension(str(ordered[0]), leaf.size, ordered, why, governed, leaf)
    shapes = tuple(v.shape for v in program.param_values)
    return Structure(dims, paths, shapes, param_axes, jax.tree.structure(params))


def _pieces(axis: Axis, way: tuple[int, ...] = ()) -> Iterator[tuple[Axis, tuple[int, ...]]]:
    axis = axes.find(axis)
    if axis.kind == axes.LEAF:
        yield axis, way
    for i, kid in enumerate(axis.kids):
        yield from _pieces(kid, (*way, i))


def _first_use(program: _infer.Program) -> list[int]:
    seen: dict[Any, int] = {}
    for i, step in enumerate(program.tape.steps):
        for value in step.ins:
            seen.setdefault(value, i)
    return [seen.get(value, len(program.tape.steps)) for value in program.param_values]
