"""Patterns: scores + sparsity -> masks. The only place where masks are born.

Each factory returns ``(scores, sparsity) -> masks``. Leaves that ``where`` doesn't mean get a
scalar True. Within a leaf the entries (or blocks, or channels) of largest score are kept, among
equals the earlier ones, so that counts are exact and a higher sparsity gives a subset.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.chosen import (
    check_sparsity,
    choose,
    distribute,
    is_kernel,
    is_number,
    kept_counts,
)
from jaxprune.distributions import Rule, uniform
from jaxprune.scores.weights import widen
from jaxprune.selection import keep_largest, keep_n_of_m, kept_count, known
from jaxprune.sharding import on_meshes
from jaxprune.typing import Distribution, Masks, Pattern, Scores, Where


def _of_units(
    distribution: Distribution | Mapping[str, Rule],
    where: Where,
    pool: Callable[[str, jax.Array], jax.Array],
    spread: Callable[[jax.Array, tuple[int, ...]], jax.Array],
) -> Pattern:
    """The pattern that ranks units: ``pool`` gives their scores, ``spread`` their entries."""

    @on_meshes(1)
    def pattern(scores: Scores, sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        chosen = choose(scores, where)
        units = {path: pool(path, leaf) for path, leaf in chosen.leaves.items()}
        counts = kept_counts(distribution, units, sparsity)
        return chosen.masks(
            {
                path: spread(keep_largest(unit, counts[path]), chosen.leaves[path].shape)
                for path, unit in units.items()
            }
        )

    return pattern


def unstructured(
    distribution: Distribution | Mapping[str, Rule] = uniform,
    *,
    per_output: bool = False,
    where: Where = is_kernel,
) -> Pattern:
    """Returns the pattern that keeps single entries, the largest of each leaf.

    Args:
      distribution: global sparsity -> one per leaf, or a mapping for
        :func:`jaxprune.distributions.by_path`.
      per_output: rank within each slice of the last axis (kernels are (..., in, out)) instead of
        over the whole leaf, so that each output keeps as many inputs.
      where: (path, leaf) -> whether the leaf is pruned. To leave out the first and the last layer:
        ``lambda path, leaf: jp.is_kernel(path, leaf) and not path.startswith(("stem", "head"))``.

    Returns:
      ``(scores, sparsity) -> masks``, jittable, also for a traced sparsity. A leaf of n entries
      keeps n - round(sparsity * n), and at least one while sparsity < 1; with ``per_output`` that
      holds for each slice. NaN counts as the lowest score where it is traced.

    Raises:
      ValueError: (on use) for NaN scores, a sparsity outside [0, 1], an empty tree, a ``where``
        that selects nothing.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.unstructured()({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, 0.5)["w"].astype(int)
      Array([[0, 1],
             [1, 0]], dtype=int32)
    """

    @on_meshes(1)
    def pattern(scores: Scores, sparsity: Any) -> Masks:
        check_sparsity(sparsity)
        chosen = choose(scores, where)
        leaves = chosen.leaves
        if per_output:
            sparsities = distribute(distribution, leaves, sparsity)
            return chosen.masks({p: keep(p, x, sparsities[p]) for p, x in leaves.items()})
        counts = kept_counts(distribution, leaves, sparsity)
        return chosen.masks({p: keep_largest(x, counts[p]) for p, x in leaves.items()})

    keep = _keep_per_output if per_output else _keep_entries
    return _choosing(pattern, functools.partial(keep, "a matrix"), where)


def _choosing(
    pattern: Pattern,
    within: Callable[[jax.Array, Any], jax.Array],
    where: Where,
    *,
    within_at: Callable[[Any], Callable[[jax.Array, Any], jax.Array]] | None = None,
    group: int | None = None,
    rows: int | None = None,
    inputs: Callable[[str, tuple[int, ...], Any], tuple[int, ...]] | None = None,
) -> Pattern:
    """Tells ``jp.oneshot`` how a pattern chooses within one matrix (in, out) of scores.

    Args:
      pattern: gets the others as attributes.
      within: (scores, sparsity) -> mask, of a matrix.
      where: which leaves the pattern prunes.
      within_at: (sparsity) -> the ``within`` for it, where that is not always the same.
      group: how many inputs are chosen together.
      rows: of a block, which are kept or go together.
      inputs: (path, shape, layout) -> the order of the leaf's input axes in which a mask of the
        matrix is one of the leaf; raises ValueError where there is none. None: any order.
    """
    told = {"within": within, "where": where, "group": group, "rows": rows, "inputs": inputs}
    vars(pattern).update(told, within_at=within_at or (lambda sparsity: within))
    return pattern


def _keep_entries(path: str, scores: jax.Array, sparsity: Any) -> jax.Array:
    return keep_largest(scores, kept_count(scores.size, sparsity))


def _keep_per_output(path: str, scores: jax.Array, sparsity: Any) -> jax.Array:
    if scores.ndim < 2:
        raise ValueError(
            f"per_output on {path}, shape {scores.shape}: there are no inputs to choose from; "
            "leave the leaf out with where=lambda path, leaf: leaf.ndim >= 2"
        )
    if scores.size == 0:
        return jnp.ones(scores.shape, bool)
    columns = scores.reshape(-1, scores.shape[-1])
    one = functools.partial(keep_largest, entries=scores.size)
    keep = jax.vmap(one, in_axes=(1, None), out_axes=1)
    return keep(columns, kept_count(len(columns), sparsity)).reshape(scores.shape)


def n_m(n: int, m: int, *, axis: int = -2, where: Where = is_kernel) -> Pattern:
    """Returns the pattern that keeps n of every m neighbours along ``axis``.

    Kernels are (..., in, out): the default runs along the inputs, as hardware for 2:4 wants it.

    The sparsity is 1 - n/m, and only this number, 0 or None (the same as 1 - n/m) can be asked
    for. A *schedule* may pass through the values in between, traced or as arrays: then whole groups
    are n:m and the others still dense, first those whose largest entry to go is smallest. So the
    density follows the schedule, and each group is n:m when it arrives. Traced values beyond
    1 - n/m give n:m.

    Raises:
      ValueError: unless 0 < n < m; on use, for an axis that m doesn't divide, and for a number
        that n:m can't express.

    References:
      Mishra et al., [Accelerating Sparse Deep Neural Networks](https://arxiv.org/abs/2104.08378),
      2021, section 3.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.n_m(2, 4)({"w": jnp.array([[1.0], [4.0], [3.0], [2.0]])}, 0.5)["w"][:, 0].astype(int)
      Array([0, 1, 1, 0], dtype=int32)
    """
    if not 0 < n < m:
        raise ValueError(f"n_m({n}, {m}): wanted 0 < n < m, such as n_m(2, 4)")

    @on_meshes(1)
    def pattern(scores: Scores, sparsity: Any = None) -> Masks:
        part = _part_of_target(sparsity, n, m)
        chosen = choose(scores, where)
        masks = {}
        for path, leaf in chosen.leaves.items():
            groups, place = _groups(path, leaf, n, m, axis)
            masks[path] = _keep_n_of_m(groups, n, place, part).reshape(leaf.shape)
        return chosen.masks(masks)

    def whole(scores: jax.Array, sparsity: Any) -> jax.Array:
        groups, place = _groups("a matrix", scores, n, m, -2)
        return keep_n_of_m(groups, n, place).reshape(scores.shape)

    def partly(scores: jax.Array, sparsity: Any) -> jax.Array:
        groups, place = _groups("a matrix", scores, n, m, -2)
        part = _part_of_target(sparsity, n, m)
        return _keep_n_of_m(groups, n, place, part).reshape(scores.shape)

    def within_at(sparsity: Any) -> Callable[[jax.Array, Any], jax.Array]:
        part = _part_of_target(sparsity, n, m)
        return whole if known(part) and part == 1 else partly

    inputs = functools.partial(_along, n, m, axis)
    return _choosing(pattern, whole, where, within_at=within_at, group=m, inputs=inputs)


def _along(
    n: int, m: int, axis: int, path: str, shape: tuple[int, ...], layout: Any
) -> tuple[int, ...]:
    """The leaf's input axes with the one that groups run along as the last: the fastest."""
    k = axis % len(shape) if -len(shape) <= axis < len(shape) else None
    if k in layout.ins:
        return (*(i for i in layout.ins if i != k), k)
    better = max(layout.ins, key=lambda i: (shape[i] % m == 0, shape[i]))
    raise ValueError(
        f"n_m({n}, {m}) on {path}, shape {shape}: axis {axis} is none of its inputs, which are "
        f"its axes {layout.ins}; write jp.n_m({n}, {m}, axis={better - len(shape)}), with "
        "where=lambda path, leaf: ... for the leaves that this fits"
    )


def _part_of_target(sparsity: Any, n: int, m: int) -> Any:
    """The fraction of groups that are to be n:m, from 0 to 1."""
    if sparsity is None:
        return 1.0
    check_sparsity(sparsity)
    target = 1 - n / m
    part = (float(sparsity) if known(sparsity) else sparsity) / target
    if not known(sparsity):
        return jnp.where(part > 1 - 1e-6, 1, part)  # a float32 target may lie just below
    if part > 1 + 1e-6 or (1e-6 < part < 1 - 1e-6 and not isinstance(sparsity, jax.Array)):
        raise ValueError(
            f"n_m({n}, {m}) has sparsity {target:g} and can't express {sparsity}; write "
            f"n_m({n}, {m})(scores, {target:g}), end the schedule at {target:g}, or use "
            "jp.unstructured()"
        )
    return 1.0 if part > 1 - 1e-6 else part


def _groups(path: str, scores: jax.Array, n: int, m: int, axis: int) -> tuple[jax.Array, int]:
    """Scores with the axis cut into (groups, m), and the place of m."""
    _check_axis(f"n_m({n}, {m})", path, scores, axis)
    k = axis % scores.ndim
    if scores.shape[k] % m:
        raise ValueError(
            f"n_m({n}, {m}) on {path}, shape {scores.shape}: {m} does not divide axis {axis} of "
            f"size {scores.shape[k]}; leave such leaves out: where=lambda path, leaf: "
            f"jp.is_kernel(path, leaf) and leaf.shape[{axis}] % {m} == 0"
        )
    shape = (*scores.shape[:k], scores.shape[k] // m, m, *scores.shape[k + 1 :])
    return scores.reshape(shape), k + 1


def _keep_n_of_m(groups: jax.Array, n: int, place: int, part: Any) -> jax.Array:
    kept = keep_n_of_m(groups, n, place)
    if known(part) and part == 1:
        return kept
    loss = _largest_to_go(kept, groups, place)
    return kept | keep_largest(loss, kept_count(loss.size, part))


def _largest_to_go(kept: jax.Array, groups: jax.Array, place: int) -> jax.Array:
    """Per group, the largest score that isn't kept; NaN counts as lowest."""
    scores = jax.lax.stop_gradient(groups)
    scores = widen(scores) if scores.dtype.itemsize == 1 else scores  # some have no infinity
    lowest = np.asarray(-np.inf, scores.dtype)[()]
    gone = jnp.where(kept | jnp.isnan(scores), lowest, scores)
    # Not jnp.max: XLA on a CPU would store what that reduces.
    larger = lambda a, b: jnp.where(a > b, a, b)  # noqa: E731
    return jnp.expand_dims(jax.lax.reduce(gone, lowest, larger, [place]), place)


def _check_axis(what: str, path: str, scores: jax.Array, axis: int) -> None:
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"{what} on {path}, shape {scores.shape}: there is no axis {axis}; pass another axis=, "
            "or leave the leaf out with where=lambda path, leaf: ..."
        )


def block(
    shape: tuple[int, ...],
    distribution: Distribution | Mapping[str, Rule] = uniform,
    *,
    where: Where = is_kernel,
) -> Pattern:
    """Returns the pattern that keeps blocks of ``shape``, ranked by their mean score.

    Blocks lie on the last ``len(shape)`` axes: ``(4, 4)`` cuts the (in, out) of a convolution's
    (height, width, in, out), at each position of the window. Sparsity and distribution count
    blocks.

    Raises:
      ValueError: for a shape that isn't a tuple of positive integers; on use, for a leaf that the
        blocks don't tile.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.block((1, 2))({"w": jnp.array([[1.0, 1.0, 5.0, 0.0]])}, 0.5)["w"].astype(int)
      Array([[0, 0, 1, 1]], dtype=int32)
    """
    if not (isinstance(shape, tuple) and shape and all(_is_size(b) for b in shape)):
        raise ValueError(f"block({shape!r}): wanted a tuple of positive integers such as (4, 4)")

    def cut(leaf: tuple[int, ...]) -> tuple[int, ...]:
        tail = zip(leaf[-len(shape) :], shape, strict=True)
        return (*leaf[: -len(shape)], *(x for size, b in tail for x in (size // b, b)))

    def pool(path: str, scores: jax.Array) -> jax.Array:
        tail = scores.shape[-len(shape) :]
        if len(tail) < len(shape) or any(size % b for size, b in zip(tail, shape, strict=True)):
            raise ValueError(
                f"block({shape}) does not tile {path}, shape {scores.shape}: blocks lie on the "
                f"last {len(shape)} axes; choose sizes that divide {tail}, or leave the leaf out "
                "with where=lambda path, leaf: ..."
            )
        return _mean(scores.reshape(cut(scores.shape)), tuple(range(1 - 2 * len(shape), 0, 2)))

    def spread(kept: jax.Array, leaf: tuple[int, ...]) -> jax.Array:
        full = cut(leaf)
        lead = len(leaf) - len(shape)
        thin = tuple(1 if i >= lead and (i - lead) % 2 else size for i, size in enumerate(full))
        return jnp.broadcast_to(kept.reshape(thin), full).reshape(leaf)

    def within(scores: jax.Array, sparsity: Any) -> jax.Array:
        means = pool("a matrix", scores)
        return spread(keep_largest(means, kept_count(means.size, sparsity)), scores.shape)

    units = _of_units(distribution, where, pool, spread)
    rows = shape[-2] if len(shape) > 1 else 1
    return _choosing(units, within, where, rows=rows, inputs=functools.partial(_upright, shape))


def _upright(
    block: tuple[int, ...], path: str, shape: tuple[int, ...], layout: Any
) -> tuple[int, ...]:
    """The leaf's input axes as they are, where blocks of the leaf are blocks of its matrices."""
    outs = layout.outs[-1:] == (len(shape) - 1,)
    ins = len(block) == 1 or layout.ins[-1:] == (len(shape) - 2,)
    if len(block) <= 2 and ins and outs:
        return tuple(layout.ins)
    raise ValueError(
        f"block({block}) on {path}, shape {shape}: one-shot methods follow blocks of (in, out) on "
        f"the last two axes, and its inputs are its axes {layout.ins}, its outputs {layout.outs}; "
        "leave it out with jp.block(shape, where=lambda path, leaf: ...), or choose first and "
        "repair after: masks = pattern(scores, sparsity); jp.oneshot.refit(params, masks, stats)"
    )


def _is_size(x: Any) -> bool:
    return isinstance(x, int | np.integer) and bool(x > 0)


def _mean(scores: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.mean(widen(scores), axis=axes)  # in half precision means would tie


def channel(
    axis: int = -1,
    distribution: Distribution | Mapping[str, Rule] = uniform,
    *,
    where: Where = is_kernel,
) -> Pattern:
    """Returns the pattern that keeps slices along ``axis`` of each leaf, ranked by mean score.

    Each leaf is cut on its own: nothing is removed from biases, normalisations and consumers, and
    an output layer loses logits. A UserWarning says so on each use. For whole networks there is
    ``jp.structured``.

    Returns:
      ``(scores, sparsity) -> masks`` of shape (1, ..., size, ..., 1). Sparsity and distribution
      count channels.

    Example:
      >>> import warnings, jax.numpy as jnp, jaxprune as jp
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     jp.channel()({"w": jnp.array([[1.0, 4.0]])}, 0.5)["w"].astype(int)
      Array([[0, 1]], dtype=int32)
    """

    def pool(path: str, scores: jax.Array) -> jax.Array:
        _check_axis(f"channel({axis})", path, scores, axis)
        return _mean(scores, tuple(i for i in range(scores.ndim) if i != axis % scores.ndim))

    def spread(kept: jax.Array, leaf: tuple[int, ...]) -> jax.Array:
        return kept.reshape([-1 if i == axis % len(leaf) else 1 for i in range(len(leaf))])

    units = _of_units(distribution, where, pool, spread)

    def pattern(scores: Scores, sparsity: Any) -> Masks:
        warnings.warn(
            f"channel({axis}) cuts each leaf on its own: biases, normalisations and consumers stay "
            "uncoupled, and an output layer loses logits; write jp.structured("
            "jp.infer_structure(fn, params, x)) to cut whole units of a network",
            stacklevel=2,
        )
        return units(scores, sparsity)

    return pattern


def threshold(tau: float | Callable[[str], float], *, where: Where = is_kernel) -> Pattern:
    """Returns the pattern that keeps the entries whose score is at least ``tau``.

    Args:
      tau: a number, or a function of the leaf's path: one value for convolutions, another for
        dense layers.
      where: (path, leaf) -> whether the leaf is pruned.

    Returns:
      ``(scores, sparsity=None) -> masks``; the sparsity follows from tau and is not read. A
      UserWarning names the leaves that would be emptied, where scores are known.

    Raises:
      ValueError: (on use) for a tau that isn't a number.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.threshold(2.0)({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])})["w"].astype(int)
      Array([[0, 1],
             [1, 1]], dtype=int32)
      >>> rule = jp.threshold(lambda path: 0.1 if "Conv" in path else 0.01)
    """

    def pattern(scores: Scores, sparsity: Any = None) -> Masks:
        chosen = choose(scores, where)
        masks = {path: widen(leaf) >= _tau(tau, path) for path, leaf in chosen.leaves.items()}
        full = {path: mask for path, mask in masks.items() if mask.size and known(mask)}
        empty = [path for path, mask in full.items() if not bool(jnp.any(mask))]
        if empty:
            warnings.warn(
                f"threshold empties {', '.join(empty[:8])}: no score there reaches tau; pass a "
                "smaller tau for these paths",
                stacklevel=2,
            )
        return chosen.masks(masks)

    return pattern


def _tau(tau: Any, path: str) -> Any:
    value = tau(path) if callable(tau) else tau
    if not is_number(value) or (known(value) and math.isnan(value)):
        raise ValueError(
            f"threshold: tau for {path} is {value!r}; wanted a number, or a function of the path "
            "that returns one"
        )
    return value
