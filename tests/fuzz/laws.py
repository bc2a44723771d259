"""What holds of every compact model beside its values, each law written the slow way.

A law yields a line for whatever breaks it. Which entries are removed is read off ``small.keep``
and the places of each dimension, independently of ``small.expand``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxprune as jp
from jaxprune.ir import axes
from tests.fuzz.numpy_eval import evaluate, widened

Entries = list[np.ndarray]  # for each leaf, a boolean for each of its entries


class Case(NamedTuple):
    """One program under one mask."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    masks: Any
    masked: Any  # the masked parameters
    small: Any
    seed: int


def trace(fn: Any, *args: Any) -> Any:
    return jax.make_jaxpr(fn, return_shape=True)(*args)


def run(traced: Any, *args: Any) -> Any:
    closed, shape = traced
    return jax.tree.unflatten(jax.tree.structure(shape), evaluate(closed, *jax.tree.leaves(args)))


def computed(fn: Any, *args: Any) -> Any:
    """A function's results by numpy, without compiling it."""
    return run(trace(fn, *args), *args)


# ----------------------------------------------------------------------------- what is removed


def _lines(axs: Sequence[Any], dimension: Any) -> list[tuple[int, np.ndarray]]:
    """Each place of a dimension in a leaf: an axis, and the unit (or -1) at each position."""
    return [(k, units) for k, axis in enumerate(axs) for units in axes.units_along(axis, dimension)]


def _shaped(line: np.ndarray, k: int, rank: int) -> np.ndarray:
    return line.reshape([-1 if i == k else 1 for i in range(rank)])


def _gone(shape: Sequence[int], axs: Sequence[Any], dimension: Any, kept: np.ndarray) -> np.ndarray:
    """Entries of a leaf at units that a vector doesn't keep."""
    gone = np.zeros(shape, bool)
    for k, units in _lines(axs, dimension):
        line = (units >= 0) & ~kept[np.maximum(units, 0)]
        gone |= _shaped(line, k, len(shape))
    return gone


def _gone_under(
    shape: Sequence[int], axs: Sequence[Any], dimension: Any, parent: Any, kept: np.ndarray
) -> np.ndarray:
    """As :func:`_gone`, where a matrix keeps other units under each unit of a parent."""
    gone = np.zeros(shape, bool)
    for (k, units), (j, above) in itertools.product(_lines(axs, dimension), _lines(axs, parent)):
        u, a = _shaped(units, k, len(shape)), _shaped(above, j, len(shape))
        gone |= (u >= 0) & (a >= 0) & ~kept[np.maximum(a, 0), np.maximum(u, 0)]
    return gone


def removed(small: Any, structure: Any) -> Iterator[Entries]:
    """The removed entries of all leaves; one answer for each way to read ``keep``'s matrices."""
    shapes, param_axes = structure.shapes, structure.param_axes
    parents = {}
    for name, kept in small.keep.items():
        if kept.ndim == 2:
            above = structure.parents(name)
            parents[name] = [n for n in above if structure.dims[n].size == len(kept)]
    for chosen in itertools.product(*parents.values()):
        entries = [np.zeros(shape, bool) for shape in shapes]
        for name, kept in small.keep.items():
            dim, above = structure.dims[name], dict(zip(parents, chosen)).get(name)
            for gone, shape, axs in zip(entries, shapes, param_axes, strict=True):
                if above is None:
                    gone |= _gone(shape, axs, dim.axis, kept)
                else:
                    gone |= _gone_under(shape, axs, dim.axis, structure.dims[above].axis, kept)
        yield entries


# ------------------------------------------------------------------------------------- the laws


def _same(a: Any, b: Any) -> bool:
    """Bitwise, types included."""
    a, b = widened(a), widened(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _unlike(paths: Sequence[str], a: Any, b: Any) -> list[str]:
    pairs = zip(paths, jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [path for path, x, y in pairs if not _same(x, y)]


def expands_in_place(case: Case) -> Iterator[str]:
    """``expand(small.params)`` is the masked params where units stay, and zero where they went."""
    structure = case.small._structure
    full = jax.tree.leaves(computed(case.small.expand, case.small.params))
    masked, reasons = jax.tree.leaves(case.masked), []
    for entries in removed(case.small, structure):
        want = [np.where(gone, np.zeros_like(w), w) for w, gone in zip(masked, entries)]
        wrong = _unlike(structure.paths, want, full)
        if not wrong:
            return
        reasons.append(f"expand(small.params) is not the masked params in place: {wrong}")
    yield from reasons[:1] or ["no parent of a dimension fits the matrix in small.keep"]


def restricts_back(case: Case) -> Iterator[str]:
    """``restrict(expand(p)) == p`` for the small params and for any others of these shapes."""
    small, paths = case.small, case.small._structure.paths
    rng = np.random.default_rng([case.seed, 2])
    other = jax.tree.map(lambda w: _random_like(w, rng), small.params)
    for name, p in (("small.params", small.params), ("random params", other)):
        back = small.restrict(_in_type(computed(small.expand, p), p))
        wrong = _unlike(paths, p, back)
        if wrong:
            yield f"restrict(expand(p)) != p for {name}: {wrong}"
    wrong = _unlike(paths, small.params, small.restrict(case.masked))
    if wrong:
        yield f"restrict(masked params) != small.params: {wrong}"


def _random_like(w: Any, rng: np.random.Generator) -> Any:
    return (3 * rng.normal(size=np.shape(w)) + 1).astype(w.dtype)


def _in_type(full: Any, small: Any) -> Any:
    return jax.tree.map(lambda x, w: x.astype(w.dtype), full, small)


def names_what_stays(case: Case) -> Iterator[str]:
    """``exact`` is False where a unit stays that some leaf has masked whole."""
    if not case.small.certificate.exact:
        return
    structure = case.small._structure
    for entries in removed(case.small, structure):
        stays = list(_stays(structure, jax.tree.leaves(case.masks), entries))
        if not stays:
            return
        yield f"called exact, but masked units stay: {stays[:4]}"
        return


def _stays(structure: Any, masks: Any, entries: Entries) -> Iterator[str]:
    for path, axs, mask, gone in zip(
        structure.paths, structure.param_axes, masks, entries, strict=True
    ):
        alive = np.broadcast_to(mask, gone.shape)
        for k, axis in enumerate(axs):
            if axis.size < 2 or not gone.size:
                continue
            rest = tuple(i for i in range(gone.ndim) if i != k)
            dead, left = np.asarray(~alive.any(rest)), np.asarray(~gone.all(rest))
            for leaf in dict.fromkeys(axes.leaves(axis)):
                for units in axes.units_along(axis, leaf):
                    for u in range(leaf.size):
                        here = units == u
                        if here.any() and dead[here].all() and left[here].any():
                            yield f"{path} axis {k} at {np.flatnonzero(here)}"


def keeps_types(case: Case) -> Iterator[str]:
    """Parameters and results have the types of the masked model's."""
    types = [np.dtype(w.dtype) for w in jax.tree.leaves(case.small.params)]
    wanted = [np.dtype(w.dtype) for w in jax.tree.leaves(case.params)]
    if types != wanted:
        yield f"types of small.params are {types}, wanted {wanted}"


def prints(case: Case) -> Iterator[str]:
    """The certificate says something, and names each entry."""
    text = str(case.small.certificate)
    missing = [e.name for e in case.small.certificate.entries if e.name not in text]
    if not text or missing:
        yield f"the certificate doesn't print {missing}"


LAWS = (expands_in_place, restricts_back, names_what_stays, keeps_types, prints)


def broken(case: Case) -> list[str]:
    """All that is broken, each with the name of its law."""
    return [f"{law.__name__}: {line}" for law in LAWS for line in law(case)]


def all_true_is_the_identity(fn: Any, params: Any, args: Any) -> list[str]:
    """All-True masks change nothing, not even the shapes."""
    masks = jax.tree.map(lambda w: np.array(True), params)
    small = jp.compact(fn, params, masks, *args)
    paths = small._structure.paths
    lines = [f"small.params differ: {p}" for p in _unlike(paths, small.params, params)]
    if not small.certificate.exact or small.certificate.entries:
        lines.append(f"the certificate says: {small.certificate}")
    return [f"all_true_is_the_identity: {line}" for line in lines]
