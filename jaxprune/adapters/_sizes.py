"""Sizes that modules store: where each is read off the small parameters, as tables of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from jaxprune.ir import axes
from jaxprune.typing import Compact


class Size(NamedTuple):
    """A number of entries, before and after."""

    full: int
    small: int


@dataclass(frozen=True)
class Leaf:
    """Stands in a module for one of its arrays: the factors of each of its axes."""

    path: str
    factors: tuple[tuple[Size, ...], ...]

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(map(times, self.factors))


def times(sizes: Sequence[Size]) -> Size:
    """The product of sizes."""
    return Size(prod(s.full for s in sizes), prod(s.small for s in sizes))


def leaves(small: Compact) -> Any:
    """A tree like the parameters, of what stands for them."""
    structure, view = small._structure, small._cut.view
    rows = zip(structure.paths, structure.param_axes, strict=True)
    found = [
        Leaf(path, tuple(tuple(Size(f.size, view.size(f)) for f in axes.factors(a)) for a in axs))
        for path, axs in rows
    ]
    return structure.treedef.unflatten(found)


def unchanged(path: str, shape: Sequence[int]) -> Leaf:
    """Stands for an array that is no parameter of the compact model."""
    return Leaf(path, tuple((Size(n, n),) for n in shape))


Read = Size | tuple[Size, ...] | None
Reader = Callable[[Any, Any], Read]  # (module of leaves, stored value) -> sizes; None: no array


@dataclass(frozen=True)
class Scale:
    """A layer that divides by the root of one of its sizes, and what makes up for a change of it.

    Of the groups of leaves in ``into`` the first that the layer has is multiplied.
    """

    size: str
    into: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Rows:
    """What a type of layers stores: attribute -> where it is read; and its scale, if it has one."""

    sizes: Mapping[str, Reader]
    scale: Scale | None = None


class Table(dict[type, Rows]):
    """Rows by type; a class without rows has those of its nearest base."""

    def rows(self, kind: type) -> Rows | None:
        return next((self[base] for base in kind.__mro__ if base in self), None)


def inside(module: Any, path: str) -> Any:
    """What stands at a dotted path in a module, or None."""
    for key in path.split("."):
        module = module[int(key)] if key.lstrip("-").isdigit() else getattr(module, key, None)
        if module is None:
            return None
    return module


def leaf(module: Any, path: str) -> Leaf | None:
    """The stand-in at a dotted path; None where the layer has no such array."""
    found = inside(module, path)
    found = found.get_raw_value() if hasattr(found, "get_raw_value") else found  # of a variable
    return found if isinstance(found, Leaf) else None


def size(path: str, axis: int) -> Reader:
    """Reads a size off an axis of the array at a dotted path, ``size("kernel", -1)``."""

    def read(module: Any, stored: Any) -> Read:
        found = leaf(module, path)
        return None if found is None else found.shape[axis]

    return read


def shape(path: str) -> Reader:
    """Reads as many of the last axes as are stored; earlier ones count stacked layers."""

    def read(module: Any, stored: Any) -> Read:
        found = leaf(module, path)
        return None if found is None else found.shape[len(found.shape) - len(stored) :]

    return read


def leading(path: str, axis: int) -> Reader:
    """Reads the outer factor of an axis that is the stored size: the heads of heads x size."""
    return _part(path, axis, lambda factors: factors)


def trailing(path: str, axis: int) -> Reader:
    """Reads the inner factor of an axis that is the stored size: the size of heads x size."""
    return _part(path, axis, lambda factors: factors[::-1])


def _part(path: str, axis: int, order: Callable[[Any], Any]) -> Reader:
    def read(module: Any, stored: Any) -> Read:
        found = leaf(module, path)
        if found is None:
            return None
        factors = order(found.factors[axis])
        heads = [times(factors[:k]) for k in range(len(factors) + 1)]
        whole = found.shape[axis]
        if whole.full == whole.small:  # Nothing of it is cut, however it is made up.
            return Size(stored, stored)
        return next((h for h in heads if h.full == stored), whole)

    return read


def first(*readers: Reader) -> Reader:
    """Reads what the first of several finds: a norm may have a scale, a bias or neither."""

    def read(module: Any, stored: Any) -> Read:
        return next((found for r in readers if (found := r(module, stored)) is not None), None)

    return read


def product(*readers: Reader) -> Reader:
    """Reads the product of what several read."""

    def read(module: Any, stored: Any) -> Read:
        found = [r(module, stored) for r in readers]
        sizes = [s for s in found if isinstance(s, Size)]
        return times(sizes) if len(sizes) == len(found) else None

    return read


def of(name: str, reader: Reader) -> Reader:
    """Reads another stored size: a factor of this one."""
    return lambda module, stored: reader(module, getattr(module, name))
