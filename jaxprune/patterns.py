"""Patterns: scores + sparsity -> masks. The only place where masks are born.

Each factory returns ``(scores, sparsity) -> masks``; leaves that ``where`` does not mean get a
scalar True.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import selection
from jaxprune.distributions import uniform
from jaxprune.scores.weights import is_float
from jaxprune.types import Distribution, Masks, Pattern, Scores, Where, path_str

_NOT_KERNELS = ("bias", "scale", "mean", "var")


def is_kernel(path: str, leaf: Any) -> bool:
    """A float leaf of rank 2 or more that is not named bias, scale, mean or var."""
    return leaf.ndim >= 2 and is_float(leaf) and path.rsplit("/", 1)[-1] not in _NOT_KERNELS


def known(x: Any) -> bool:
    """Whether a value is at hand, so that it can be checked."""
    return not isinstance(x, jax.core.Tracer)


def check_sparsity(sparsity: Any) -> None:
    """Raises ValueError for a known sparsity outside [0, 1]."""
    if known(sparsity) and not 0.0 <= float(sparsity) <= 1.0:
        raise ValueError(f"sparsity is {sparsity}; wanted a fraction in [0, 1] such as 0.9")


def chosen_leaves(scores: Scores, where: Where) -> tuple[dict[str, jax.Array], list[str], Any]:
    """The leaves that ``where`` means, by path; all paths; the tree's structure."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(scores)
    if not flat:
        raise ValueError("scores is an empty tree; pass score(params), for example jp.magnitude")
    paths = [path_str(path) for path, _ in flat]
    found = {p: leaf for p, (_, leaf) in zip(paths, flat, strict=True) if where(p, leaf)}
    if not found:
        shapes = [f"{p}{leaf.shape}" for p, (_, leaf) in zip(paths, flat, strict=True)][:6]
        raise ValueError(
            f"where={getattr(where, '__name__', where)} selects none of the leaves {shapes}; "
            "pass where=lambda path, leaf: ..."
        )
    for path, leaf in found.items():
        if known(leaf) and bool(jnp.any(jnp.isnan(leaf))):
            raise ValueError(
                f"the scores of {path}, shape {leaf.shape}, hold NaN; repair them first, for "
                "example with jnp.nan_to_num"
            )
    return found, paths, treedef


def _masks(found: dict[str, Any], paths: list[str], treedef: Any) -> Masks:
    dense = jnp.asarray(True)
    return jax.tree.unflatten(treedef, [found.get(p, dense) for p in paths])


def kept_count(size: int, sparsity: Any) -> jax.Array:
    """Entries to keep of ``size``: size - round(sparsity * size)."""
    removed = jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)
    return jnp.clip(size - removed, 0, size)


def unstructured(
    distribution: Distribution = uniform, *, per_output: bool = False, where: Where = is_kernel
) -> Pattern:
    """Keeps single entries, the largest of each leaf.

    Args:
      distribution: global sparsity -> one per leaf.
      per_output: rank within each slice of the last axis (kernels are (in, out)) instead of over
        the whole leaf.
      where: (path, leaf) -> whether the leaf is pruned.

    Returns:
      ``(scores, sparsity) -> masks``; each leaf keeps size - round(sparsity * size) entries,
      exactly, under ties, too.

    Raises:
      ValueError: (on use) for NaN scores, a sparsity outside [0, 1], a ``where`` that selects
        nothing.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.unstructured()({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, 0.5)["w"].astype(int)
      Array([[0, 1],
             [1, 0]], dtype=int32)
    """

    def pattern(scores: Scores, sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        found, paths, treedef = chosen_leaves(scores, where)
        wanted = distribution(found, sparsity)
        return _masks({p: _keep(found[p], wanted[p], per_output) for p in found}, paths, treedef)

    return pattern


def _keep(scores: jax.Array, sparsity: Any, per_output: bool) -> jax.Array:
    if not per_output:
        return selection.keep_largest(scores, kept_count(scores.size, sparsity))
    rows = jnp.moveaxis(scores, -1, 0).reshape(scores.shape[-1], -1)
    count = kept_count(rows.shape[1], sparsity)
    kept = jax.vmap(lambda row: selection.keep_largest(row, count))(rows)
    shape = (scores.shape[-1], *scores.shape[:-1])
    return jnp.moveaxis(kept.reshape(shape), 0, -1)


def n_m(n: int, m: int, *, axis: int = -2, where: Where = is_kernel) -> Pattern:
    """Keeps n of every m entries in a row along ``axis``, the inputs of an (in, out) kernel.

    The sparsity of the pattern is 1 - n/m; it can also be 0 (all kept). A traced sparsity below
    1 - n/m keeps everything: the pattern comes when the schedule reaches it.

    Raises:
      ValueError: for n, m out of order; (on use) for an axis that m does not divide, and for a
        sparsity that n:m can't express.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.n_m(2, 4)({"w": jnp.array([[1.0], [4.0], [3.0], [2.0]])}, 0.5)["w"][:, 0].astype(int)
      Array([0, 1, 1, 0], dtype=int32)
    """
    if not 0 < n < m:
        raise ValueError(f"n_m({n}, {m}): wanted 0 < n < m, for example n_m(2, 4)")
    reached = 1.0 - n / m

    def pattern(scores: Scores, sparsity: Any = reached) -> Masks:
        check_sparsity(sparsity)
        if known(sparsity) and not (float(sparsity) == 0 or abs(float(sparsity) - reached) < 1e-6):
            raise ValueError(
                f"n_m({n}, {m}) has sparsity {reached:g} and can't express {sparsity}; pass "
                f"{reached:g}, or use jp.unstructured()"
            )
        found, paths, treedef = chosen_leaves(scores, where)
        masks = {p: _n_of_m(p, leaf, n, m, axis) for p, leaf in found.items()}
        dense = jnp.asarray(sparsity, jnp.float32) < reached - 1e-6
        return _masks({p: mask | dense for p, mask in masks.items()}, paths, treedef)

    return pattern


def _n_of_m(path: str, scores: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    k = axis % scores.ndim
    if scores.shape[k] % m:
        raise ValueError(
            f"n_m({n}, {m}) on {path}, shape {scores.shape}: {m} does not divide axis {axis} of "
            f"size {scores.shape[k]}; leave the leaf out with where=lambda path, leaf: ..."
        )
    shape = (*scores.shape[:k], scores.shape[k] // m, m, *scores.shape[k + 1 :])
    return selection.keep_n_of_m(scores.reshape(shape), n, k + 1).reshape(scores.shape)


def block(
    shape: tuple[int, ...], distribution: Distribution = uniform, *, where: Where = is_kernel
) -> Pattern:
    """Keeps blocks of ``shape`` over the last axes, ranked by their mean score.

    Raises:
      ValueError: (on use) for a leaf that the blocks do not tile.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.block((1, 2))({"w": jnp.array([[1.0, 1.0, 5.0, 0.0]])}, 0.5)["w"].astype(int)
      Array([[0, 0, 1, 1]], dtype=int32)
    """

    def pattern(scores: Scores, sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        found, paths, treedef = chosen_leaves(scores, where)
        means = {p: _block_means(p, leaf, shape) for p, leaf in found.items()}
        wanted = distribution(means, sparsity)
        masks = {}
        for p, mean in means.items():
            mask = _keep(mean, wanted[p], per_output=False)
            for i, size in enumerate(shape):
                mask = jnp.repeat(mask, size, axis=mean.ndim - len(shape) + i)
            masks[p] = mask
        return _masks(masks, paths, treedef)

    return pattern


def _block_means(path: str, scores: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    lead, tail = scores.shape[: scores.ndim - len(shape)], scores.shape[-len(shape) :]
    if len(shape) > scores.ndim or any(n % b for n, b in zip(tail, shape, strict=True)):
        raise ValueError(
            f"block({shape}) does not tile {path}, shape {scores.shape}: blocks act on the last "
            f"{len(shape)} axes; choose sizes that divide {tail} or leave the leaf out with where="
        )
    cut = [x for n, b in zip(tail, shape, strict=True) for x in (n // b, b)]
    inner = tuple(len(lead) + 2 * i + 1 for i in range(len(shape)))
    return jnp.mean(scores.reshape(*lead, *cut), axis=inner)


def channel(
    axis: int = -1, distribution: Distribution = uniform, *, where: Where = is_kernel
) -> Pattern:
    """Keeps whole slices along ``axis`` of each leaf on its own, ranked by their mean score.

    Biases and consumers are not coupled and the logits layer is cut like any other, so a warning
    says so: for networks use ``jp.structured``.

    Example:
      >>> import warnings, jax.numpy as jnp, jaxprune as jp
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     jp.channel()({"w": jnp.array([[1.0, 4.0]])}, 0.5)["w"].astype(int)
      Array([[0, 1]], dtype=int32)
    """

    def pattern(scores: Scores, sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        found, paths, treedef = chosen_leaves(scores, where)
        warnings.warn(
            f"channel({axis}) masks {len(found)} leaves one by one: biases, normalisations and "
            "consumers stay uncoupled and an output layer loses logits; use "
            "jp.structured(jp.infer_structure(fn, params, x)), or where= to choose the leaves",
            stacklevel=2,
        )
        means = {}
        for p, leaf in found.items():
            others = tuple(i for i in range(leaf.ndim) if i != axis % leaf.ndim)
            means[p] = jnp.mean(leaf, axis=others, keepdims=True)
        wanted = distribution(means, sparsity)
        return _masks({p: _keep(means[p], wanted[p], False) for p in means}, paths, treedef)

    return pattern


def threshold(tau: float | Callable[[str], float], *, where: Where = is_kernel) -> Pattern:
    """Keeps the entries whose score is at least ``tau``; the sparsity follows from it.

    Args:
      tau: a number, or a function of the leaf's path: one value for convolutions, another for
        dense layers.
      where: (path, leaf) -> whether the leaf is pruned.

    Returns:
      ``(scores, sparsity=None) -> masks``; the sparsity is not used.

    Raises:
      ValueError: (on use) when a leaf would be emptied.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.threshold(2.0)({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, None)["w"].astype(int)
      Array([[0, 1],
             [1, 1]], dtype=int32)
    """

    def pattern(scores: Scores, sparsity: Any = None) -> Masks:
        found, paths, treedef = chosen_leaves(scores, where)
        masks = {}
        for path, leaf in found.items():
            cut = tau(path) if callable(tau) else tau
            masks[path] = leaf >= cut
            if known(masks[path]) and not bool(jnp.any(masks[path])):
                raise ValueError(
                    f"threshold({cut}) empties {path}, shape {leaf.shape}, whose largest score is "
                    f"{float(jnp.max(leaf)):.3g}; choose a smaller tau for it"
                )
        return _masks(masks, paths, treedef)

    return pattern
