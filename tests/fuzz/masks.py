"""Kinds of masks for random programs: whole units, parts of them, other ones under each parent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from tests.fuzz.numpy_eval import evaluate

Leaves = list[np.ndarray]


def random_keep(structure: Any, rng: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    """For about ``share`` of the prunable dimensions, a random number of random units."""
    keep = {}
    for name, dim in structure.dims.items():
        if not dim.frozen and rng.random() < share:
            count = int(rng.integers(1, dim.size)) if dim.size > 1 else 1
            keep[name] = np.zeros(dim.size, bool)
            keep[name][rng.permutation(dim.size)[:count]] = True
    return keep


def _leaves(structure: Any, keep: Any) -> Leaves:
    return [np.asarray(mask) for mask in jax.tree.leaves(structure.masks(keep))]


def whole(structure: Any, params: Any, rng: np.random.Generator, share: float = 1.0) -> Leaves:
    return _leaves(structure, random_keep(structure, rng, share))


def _one_sided(mask: np.ndarray, producing: bool) -> np.ndarray:
    """Only what makes the removed units (the last axis), or only what reads them."""
    if mask.ndim == 0:
        return mask
    lines = [
        mask.any(tuple(i for i in range(mask.ndim) if i != k), keepdims=True)
        for k in range(mask.ndim)
    ]
    chosen = lines[-1:] if producing else lines[:-1]
    return np.logical_and.reduce(np.broadcast_arrays(*chosen)) if chosen else np.array(True)


def producers(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    return [_one_sided(mask, True) for mask in whole(structure, params, rng)]


def consumers(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    return [_one_sided(mask, False) for mask in whole(structure, params, rng)]


def some_leaves(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    return [m if rng.random() < 0.6 else np.array(True) for m in whole(structure, params, rng)]


def leaves_gone(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    """Whole leaves are masked, by a scalar or by as many entries as they have."""
    return [
        np.full(shape if rng.random() < 0.5 else (), rng.random() < 0.7)
        for shape in structure.shapes
    ]


def scattered(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    """Single entries, and here and there a whole slice that nothing couples to others."""
    masks = []
    for shape in structure.shapes:
        mask = rng.random(shape) < 0.8
        for k in range(len(shape)):
            if rng.random() < 0.5:
                gone: list[Any] = [slice(None)] * len(shape)
                gone[k] = rng.random(shape[k]) < 0.4
                mask[tuple(gone)] = False
        masks.append(np.asarray(mask))
    return masks


# --------------------------------------------------------------------------- other ones per parent


def _rows(rng: np.random.Generator, parents: int, units: int) -> np.ndarray:
    """As many units in each row, at places of its own."""
    count = int(rng.integers(1, units))
    return np.argsort(rng.random((parents, units)), axis=1) < count


def under_parents(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    """Other units under each unit of a parent, as many under each; beside whole units or alone."""
    free = [name for name, dim in structure.dims.items() if not dim.frozen and dim.size > 1]
    keep: dict[str, Any] = random_keep(structure, rng, 0.3) if rng.random() < 0.5 else {}
    for name in free:
        above = structure.parents(name)
        if above and rng.random() < 0.7:
            parent = above[int(rng.integers(len(above)))]
            rows = _rows(rng, structure.dims[parent].size, structure.dims[name].size)
            keep[name] = {parent: rows}
    return _leaves(structure, keep)


def _evenly(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """As many entries in each row of a matrix and, where the sizes allow, in each column."""
    if len(shape) < 2 or min(shape) < 2:
        return np.array(True)
    j, k = (int(i) for i in rng.permutation(len(shape))[:2])
    m, n = shape[j], shape[k]
    period = math.gcd(m, n) if math.gcd(m, n) > 1 else n
    count = int(rng.integers(1, period))
    lines = (rng.permutation(m)[:, None] + rng.permutation(n)) % period < count
    lines = lines if j < k else lines.T
    return lines.reshape([size if i in (j, k) else 1 for i, size in enumerate(shape)])


def evenly(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    """The same count in each row and each column at other places, of some leaves or of all."""
    share = rng.choice([0.3, 1.0])
    return [_evenly(rng, s) if rng.random() < share else np.array(True) for s in structure.shapes]


def evenly_and_whole(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    pairs = zip(evenly(structure, params, rng), whole(structure, params, rng, 0.5), strict=True)
    return [a & b for a, b in pairs]


def n_of_m(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    """2:4 or 1:2 along the inputs of each kernel that it divides."""
    n, m = [(2, 4), (1, 2), (1, 4)][int(rng.integers(3))]
    pattern = jp.n_m(n, m)
    masks = []
    for leaf in map(np.abs, map(np.asarray, jax.tree.leaves(params))):
        fits = leaf.ndim > 1 and leaf.size and leaf.shape[-2] % m == 0
        scores = {"w": leaf.astype(float)}
        masks.append(np.asarray(_computed(pattern, scores)) if fits else np.array(True))
    return masks


def _computed(pattern: Any, scores: Any) -> Any:
    """A pattern of one leaf, without compiling it."""
    closed = jax.make_jaxpr(lambda s: pattern(s, None)["w"])(scores)
    return evaluate(closed, scores["w"])[0]


def smallest(structure: Any, params: Any, rng: np.random.Generator) -> Leaves:
    """Plain unstructured: the smallest entries of each kernel."""
    share = rng.choice([0.3, 0.5, 0.9])
    masks = []
    for leaf in map(np.abs, map(np.asarray, jax.tree.leaves(params))):
        ranks = np.argsort(np.argsort(leaf, axis=None), axis=None).reshape(leaf.shape)
        masks.append(ranks >= share * leaf.size if leaf.ndim > 1 else np.array(True))
    return masks


Kind = Callable[[Any, Any, np.random.Generator], Leaves]
MASKS: dict[str, Kind] = {
    "all dimensions": whole,
    "some dimensions": lambda structure, params, rng: whole(structure, params, rng, 0.4),
    "producers only": producers,
    "consumers only": consumers,
    "some leaves": some_leaves,
    "leaves gone": leaves_gone,
    "scattered": scattered,
    "under parents": under_parents,
    "evenly": evenly,
    "evenly and whole": evenly_and_whole,
    "n of m": n_of_m,
    "smallest": smallest,
}


def draw_masks(structure: Any, params: Any, seed: int, count: int) -> Iterator[tuple[str, Any]]:
    """All dimensions first, then the other kinds in an order of the program's own."""
    rng = np.random.default_rng([seed, 1])
    first, *others = MASKS
    for name in [first, *rng.permutation(others)][:count]:
        leaves = MASKS[name](structure, params, rng)
        yield str(name), jax.tree.unflatten(structure.treedef, leaves)


def masked_params(params: Any, masks: Any) -> Any:
    """The oracle's parameters, in numpy and in their own types."""
    return jax.tree.map(
        lambda w, m: np.where(np.broadcast_to(m, np.shape(w)), w, np.zeros_like(w)), params, masks
    )
