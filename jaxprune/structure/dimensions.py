"""The logical dimensions of a network: which axes of which leaves must lose the same units."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tables import Part, Shown
from jaxprune._trees import difference
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.numbering import Numbering
from jaxprune.masks import filled, fits
from jaxprune.reduce import Reduction, check_reduce, mean
from jaxprune.selection import known
from jaxprune.sharding import freely, host
from jaxprune.structure import parents, table
from jaxprune.structure.unit_scores import unit_scores


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
      label: what a person would call it, from what the program does with it; may change between
        versions, the name doesn't.
      least: how many units have to stay, for so many are chosen by value at a time.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    frozen: str | None
    params: int
    axis: Axis = field(repr=False, compare=False)
    label: str = field(default="", compare=False)
    least: int = field(default=0, compare=False)

    def matches(self, pattern: str) -> bool:
        """Whether its name or its label is ``pattern``, which may hold wildcards."""
        return any(fnmatch.fnmatchcase(text, pattern) for text in (self.name, self.label))


@dataclass(frozen=True, eq=False)
class Structure(Shown):
    """What :func:`infer_structure` found. ``print`` it to see the table of dimensions.

    Attributes:
      dims: dimension name -> :class:`Dimension`.
      paths, shapes: of the leaves of params, in their order.
      statistics: paths of the leaves that are running means and variances, as BatchNorm has them;
        they have no vote in the scores of units.
      semantics: what removed units are, "masked" or "kept"; see :func:`infer_structure`.
    """

    dims: dict[str, Dimension]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    param_axes: tuple[tuple[Axis, ...], ...] = field(repr=False)
    treedef: Any = field(repr=False)
    layouts: tuple[Any, ...] = field(repr=False, default=())  # how params lie on a mesh, or None
    statistics: tuple[str, ...] = field(repr=False, default=())
    semantics: str = "masked"

    def masks(self, keep: Mapping[str, Any]) -> Any:
        """Masks of all coupled slots.

        Args:
          keep: dimension name -> boolean vector of its size, True = kept. Dimensions that are
            not named stay whole. ``{parent name: matrix}`` instead of a vector keeps other units
            under each unit of a parent (per scanned layer, per head), one row for each; see
            :meth:`parents`.

        Returns:
          A tree like params: a mask with size-1 untouched axes, or a scalar True.

        Raises:
          TypeError: for anything but a mapping.
          ValueError: for an unknown or frozen dimension, a vector of another length or of numbers
            that aren't 0 or 1, or one that keeps nothing; for a parent that does not stand beside
            the dimension everywhere.
        """
        if not isinstance(keep, Mapping):
            raise TypeError(f"masks wants {{dimension name: booleans}}, got {type(keep).__name__}")
        plain = {name: v for name, v in keep.items() if not isinstance(v, Mapping)}
        under = {name: v for name, v in keep.items() if isinstance(v, Mapping)}
        cut = {d.name: v for d, v in self._checked(plain) if not v.all()}
        return self.masks_of({**cut, **under})

    def masks_of(self, kept: Mapping[str, Any]) -> Any:
        """As :meth:`masks`, of what a compact model keeps: a whole branch may be gone."""
        plain = {name: v for name, v in kept.items() if not isinstance(v, Mapping)}
        under = {name: v for name, v in kept.items() if isinstance(v, Mapping)}
        return self._masks_under(under, self.traced_masks(plain))

    def parents(self, name: str) -> list[str]:
        """Dimensions that stand beside this one in all of its leaves.

        Whether its units may differ under each of a parent's units is for ``compact`` to prove.
        """
        own = self._named(name)
        near = self._near(own.slots[0])
        for slot in own.slots[1:] if near else ():
            near &= self._near(slot)
            if not near:
                return []
        beside = [self._names[axis] for axis in near if axis in self._names]
        owned = [self.param_axes[i] for i in self.owners(name)]
        found = [
            n
            for n in beside
            if n != name
            and self.dims[n].size > 1
            and parents.possible(owned, own.axis, self.dims[n].axis)
        ]
        return sorted(found, key=self._rank.__getitem__)

    def _near(self, slot: Slot) -> set[Axis]:
        """The dimensions that may stand beside that of a slot at all of its positions."""
        axs = self.param_axes[self._at[slot.path]]
        others = [parents.covering(a, self._covered) for k, a in enumerate(axs) if k != slot.axis]
        return parents.crossed(axs[slot.axis], self._covered, self._crossed).union(*others)

    def owners(self, name: str) -> Sequence[int]:
        """The positions of the leaves that hold a dimension, in their order."""
        return self._owners[name]

    def voters(self, name: str) -> Sequence[int]:
        """The owners that are no running statistics; all of them where there is no other."""
        owners = self.owners(name)
        return [i for i in owners if i not in self._still] or owners

    @functools.cached_property
    def _still(self) -> set[int]:
        """The positions of the running statistics."""
        return {self._at[path] for path in self.statistics}

    @functools.cached_property
    def _at(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.paths)}

    @functools.cached_property
    def _rank(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.dims)}

    @functools.cached_property
    def _names(self) -> dict[Axis, str]:
        return {axes.find(dim.axis): name for name, dim in self.dims.items()}

    @functools.cached_property
    def _covered(self) -> dict[Axis, Any]:
        """What :func:`parents.covering` has found."""
        return {}

    @functools.cached_property
    def _crossed(self) -> dict[Axis, Any]:
        """What :func:`parents.crossed` has found."""
        return {}

    @functools.cached_property
    def _owners(self) -> dict[str, Sequence[int]]:
        at = self._at
        return {n: sorted({at[slot.path] for slot in d.slots}) for n, d in self.dims.items()}

    def _masks_under(self, keep: Mapping[str, Any], masks: Any) -> Any:
        if not keep:
            return masks
        leaves = self.mask_leaves(masks)
        for name, given in keep.items():
            for dim, parent, kept in self._checked_under(name, given):
                for i in self.owners(name):
                    axs = self.param_axes[i]
                    found = parents.pair(axs, dim.axis, parent.axis)
                    if found is not None:
                        leaves[i] = leaves[i] & found.spread(kept, len(axs), True)
        return jax.tree.unflatten(self.treedef, [jnp.asarray(leaf) for leaf in leaves])

    def _checked_under(
        self, name: str, given: Mapping[str, Any]
    ) -> Iterator[tuple[Dimension, Dimension, np.ndarray]]:
        for above, matrix in given.items():
            dim = next(d for d, _ in self._checked({name: True}, shaped=False))
            if above not in self.parents(name):
                raise ValueError(
                    f"{above!r} is no parent of {name!r}; parents are: {self.parents(name)}"
                )
            parent, kept = self.dims[above], np.asarray(matrix, bool)
            if kept.shape != (parent.size, dim.size) or not kept.any(1).all():
                raise ValueError(
                    f"keep[{name!r}][{above!r}] has shape {kept.shape}, wanted "
                    f"{(parent.size, dim.size)} with at least one True in each row"
                )
            if len(set(kept.sum(1))) > 1:
                raise ValueError(
                    f"keep[{name!r}][{above!r}] keeps between {kept.sum(1).min()} and "
                    f"{kept.sum(1).max()} units; keep equally many under each unit of {above!r}"
                )
            self._check_least(dim, kept)
            yield dim, parent, kept

    def traced_masks(self, keep: Mapping[str, Any]) -> Any:
        """As :meth:`masks`, for vectors that may be traced; names and contents are not checked."""
        if all(map(known, keep.values())):
            keep = {name: host(vector) for name, vector in keep.items()}
        numbers = Numbering(self.dims[name].axis for name in keep)
        xp = np if all(isinstance(v, np.ndarray) for v in keep.values()) else jnp
        kept = xp.concatenate([xp.zeros(0, bool), *keep.values()])
        masks = [_leaf_mask(numbers, axs, kept) for axs in self.param_axes]
        dense = jnp.asarray(True)
        leaves = [dense if mask is None else jnp.asarray(mask, bool) for mask in masks]
        return jax.tree.unflatten(self.treedef, leaves)

    def _checked(
        self, keep: Mapping[str, Any], shaped: bool = True
    ) -> Iterator[tuple[Dimension, np.ndarray]]:
        for name, given in keep.items():
            dim, vector = self._named(name), np.asarray(given)
            if not np.isin(vector, (0, 1)).all():
                raise ValueError(
                    f"keep[{name!r}] holds {vector[~np.isin(vector, (0, 1))][0]}; wanted one "
                    f"boolean for each of {dim.size} units, True = kept: np.isin(np.arange("
                    f"{dim.size}), indices) makes it of indices"
                )
            vector = vector.astype(bool)
            if shaped and vector.shape != (dim.size,):
                raise ValueError(
                    f"keep[{name!r}] has shape {vector.shape}, wanted ({dim.size},): one boolean "
                    "per unit, True = kept"
                )
            if dim.frozen and not vector.all():
                raise ValueError(f"dimension {name!r} can't be pruned: {dim.frozen}")
            if not vector.any():
                raise ValueError(
                    f"keep[{name!r}] keeps none of {dim.size} units; keep at least 1 (where "
                    "jp.search lets a whole branch go, plan.masks says so)"
                )
            if shaped:
                self._check_least(dim, vector)
            yield dim, vector

    @staticmethod
    def _check_least(dim: Dimension, kept: np.ndarray) -> None:
        if kept.sum(-1).min() < dim.least:
            raise ValueError(
                f"keep[{dim.name!r}] keeps {kept.sum(-1).min()} of {dim.size} units, and "
                f"{dim.least} are chosen at a time; keep at least so many"
            )

    def _named(self, name: str) -> Dimension:
        if name in self.dims:
            return self.dims[name]
        labelled = [n for n, d in self.dims.items() if d.label == name]
        near = labelled or difflib.get_close_matches(name, self.dims, 3, 0.3)
        known = f"near names: {near}" if near else f"there are: {list(self.dims)[:5]}"
        raise ValueError(f"no dimension is named {name!r}; {known}")

    def keep(self, masks: Any) -> dict[str, np.ndarray]:
        """The units that some slot keeps: ``keep(masks(k)) == k`` for whole units.

        Args:
          masks: a tree like params, True = kept, each mask broadcastable to its leaf.
        """
        return self.kept_by(self.mask_leaves(masks), "any")

    def kept_by(self, leaves: list[np.ndarray], how: str) -> dict[str, np.ndarray]:
        """The units that "any" or "all" of the slots keep at least in part, by parsed masks."""
        numbers = Numbering(dim.axis for dim in self.dims.values())
        join = np.logical_and if how == "all" else np.logical_or
        kept = np.full(numbers.total, how == "all")
        alive = np.zeros(numbers.total, bool)
        for axs, mask in zip(self.param_axes, leaves, strict=True):
            for k, axis in enumerate(axs):
                line = _along(mask, k, len(axs), axis.size)
                for row in numbers.along(axis):
                    units = row[row >= 0]
                    alive[row[line & (row >= 0)]] = True
                    kept[units] = join(kept[units], alive[units])
                    alive[units] = False
        return {name: kept[numbers.of(dim.axis)].copy() for name, dim in self.dims.items()}

    def mask_leaves(self, masks: Any) -> list[np.ndarray]:
        """The masks as a flat list, checked against the leaves."""
        masks = filled(masks, jax.tree.unflatten(self.treedef, self.paths), True)
        if jax.tree.structure(masks) != self.treedef:
            raise ValueError(
                f"masks have another structure than params: the tree "
                f"{difference(masks, self.treedef)}; build them with structure.masks or a pattern"
            )
        out = []
        for path, shape, mask in zip(self.paths, self.shapes, jax.tree.leaves(masks), strict=True):
            array = host(mask)
            if not fits(array, shape):
                raise ValueError(
                    f"the mask of {path} is {array.dtype}{array.shape}; wanted booleans that "
                    f"broadcast to {shape}, True = kept"
                )
            out.append(array)
        return out

    def unit_scores(
        self, scores: Any, reduce: Reduction = mean, *, statistics: bool = False
    ) -> dict[str, np.ndarray | jax.Array]:
        """Returns a score for each unit of every prunable dimension, over all of its slots.

        Args:
          scores: a tree like params.
          reduce: what becomes of a unit's entries: ``jp.reduce.mean``, ``jp.reduce.sum``,
            ``jp.reduce.taylor``, or another function ``(sums, counts) -> scores``.
          statistics: whether running means and variances (``structure.statistics``) count, too.

        Returns:
          dimension name -> a vector of its size.

        Raises:
          ValueError: for scores of another structure or shape than params, or that hold NaN; for
            a reduce that is no function.
        """
        leaves, treedef = jax.tree.flatten(scores)
        if treedef != self.treedef:
            raise ValueError(
                f"scores have another structure than params: the tree "
                f"{difference(treedef, self.treedef)}; pass one like params: jp.magnitude(params)"
            )
        for path, shape, leaf in zip(self.paths, self.shapes, leaves, strict=True):
            if np.shape(leaf) != shape:
                raise ValueError(
                    f"the scores of {path} have shape {np.shape(leaf)}, wanted {shape}: one number "
                    "for each entry of params"
                )
        check_reduce(reduce)
        free = [d for d in self.dims.values() if not d.frozen]
        silent = {} if statistics else {i: self._silent(i) for i in self._still}
        every = freely(
            lambda xs: unit_scores([d.axis for d in free], self.param_axes, xs, silent, reduce),
            leaves,
        )
        units: dict[str, Any] = {d.name: scores for d, scores in zip(free, every, strict=True)}
        self._check_nan(units, leaves)
        return units

    def _silent(self, i: int) -> list[Axis]:
        """The dimensions on which a running statistic has no vote."""
        held = axes.distinct_leaves(self.param_axes[i])
        dims = [self.dims[self._names[axis]] for axis in held if axis in self._names]
        return [d.axis for d in dims if not d.frozen and d.name not in self._only_still]

    @functools.cached_property
    def _only_still(self) -> set[str]:
        """The dimensions that running statistics alone hold."""
        return {name for name, owners in self._owners.items() if self._still.issuperset(owners)}

    def _check_nan(self, units: Mapping[str, Any], leaves: Sequence[Any]) -> None:
        """Raises for NaN where it is known; traced NaN ranks lowest."""
        bad = [n for n, u in units.items() if known(u) and np.isnan(host(u)).any()]
        if bad:
            slots = {slot.path for slot in self.dims[bad[0]].slots}
            inside = [(p, x) for p, x in zip(self.paths, leaves) if p in slots]
            path = next((p for p, x in inside if np.isnan(host(x).astype(float)).any()), bad[0])
            raise ValueError(
                f"the scores of {path} hold NaN, so that units of {bad[0]} can't be ranked; look "
                "for it in params and gradients, or write jax.tree.map(jnp.nan_to_num, scores)"
            )

    def check_params(self, params: Any) -> None:
        """Raises ValueError unless params are shaped as those that the structure was found for."""
        if jax.tree.structure(params) != self.treedef:
            raise ValueError(
                f"params have another structure than those that the structure was found for: the "
                f"tree {difference(params, self.treedef)}; call jp.infer_structure(fn, params, "
                "*args) for these"
            )
        for path, shape, leaf in zip(self.paths, self.shapes, jax.tree.leaves(params)):
            if np.shape(leaf) != shape:
                raise ValueError(
                    f"{path} has shape {np.shape(leaf)}, the structure was found for {shape}; call "
                    "jp.infer_structure(fn, params, *args) for these params"
                )

    def _parts(self) -> Iterator[Part]:
        return table.parts(self)

    def details(self, pattern: str = "*") -> str:
        """Every dimension with all its slots and all reasons, as text.

        Args:
          pattern: names or labels to show, with wildcards.
        """
        return table.full(self, pattern)


def _along(mask: np.ndarray, k: int, rank: int, size: int) -> np.ndarray:
    """Which positions along axis ``k`` a broadcastable mask keeps at least in part."""
    full = mask.reshape((1,) * (rank - mask.ndim) + mask.shape)
    alive = full.any(tuple(i for i in range(rank) if i != k))
    return np.broadcast_to(alive, (size,))


def _leaf_mask(numbers: Numbering, axs: tuple[Axis, ...], kept: Any) -> Any:
    """The mask of one leaf, from what is kept of all units; None where none of them is in it."""
    mask: Any = None
    for k, axis in enumerate(axs):
        for units in numbers.along(axis):
            line = kept[units] | (units < 0)
            line = line.reshape([-1 if i == k else 1 for i in range(len(axs))])
            mask = line if mask is None else mask & line
    return mask
