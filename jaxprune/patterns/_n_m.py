"""N:M: n of every m neighbours along an axis, as hardware for 2:4 wants them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._alike import map_alike
from jaxprune._leaf import widen
from jaxprune.patterns._factory import factory
from jaxprune.patterns._units import check_axis
from jaxprune.patterns.choose import check_sparsity, choose, is_kernel
from jaxprune.selection import keep_largest, keep_n_of_m, kept_count, known
from jaxprune.sharding import on_meshes
from jaxprune.typing import ChooseInMatrix, Masks, Pattern, Scores, Where


@factory("jp.n_m(2, 4)")
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
      Mishra et al., `Accelerating Sparse Deep Neural Networks <https://arxiv.org/abs/2104.08378>`__,
      2021, section 3.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.n_m(2, 4)({"w": jnp.array([[1.0], [4.0], [3.0], [2.0]])}, 0.5)["w"][:, 0].astype(int)
      Array([0, 1, 1, 0], dtype=int32)
    """
    if not 0 < n < m:
        raise ValueError(f"n_m({n}, {m}): wanted 0 < n < m, such as n_m(2, 4)")

    @on_meshes(1)
    def masks(scores: Scores, sparsity: Any) -> Masks:
        part = _part_of_target(sparsity, n, m)
        chosen = choose(scores, where)
        for path, leaf in chosen.leaves.items():
            _check(path, leaf, n, m, axis)

        def keep(leaf: jax.Array) -> jax.Array:
            groups, place = _groups(leaf, m, axis)
            return _keep_n_of_m(groups, n, place, part).reshape(leaf.shape)

        return chosen.masks(dict(zip(chosen.leaves, map_alike(keep, chosen.leaves.values()))))

    within, inputs = _within(n, m), functools.partial(_along, n, m, axis)
    return Pattern(masks, f"jp.n_m({n}, {m})", where, within=within, group=m, inputs=inputs)


def _within(n: int, m: int) -> Callable[[Any], ChooseInMatrix]:
    """sparsity -> how a matrix (in, out) is chosen from; the same function for all n:m groups."""

    def whole(scores: jax.Array, sparsity: Any) -> jax.Array:
        _check("a matrix", scores, n, m, -2)
        groups, place = _groups(scores, m, -2)
        return keep_n_of_m(groups, n, place).reshape(scores.shape)

    def partly(scores: jax.Array, sparsity: Any) -> jax.Array:
        _check("a matrix", scores, n, m, -2)
        groups, place = _groups(scores, m, -2)
        part = _part_of_target(sparsity, n, m)
        return _keep_n_of_m(groups, n, place, part).reshape(scores.shape)

    def within(sparsity: Any) -> ChooseInMatrix:
        part = _part_of_target(sparsity, n, m)
        return whole if known(part) and part == 1 else partly

    return within


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


def _check(path: str, scores: jax.Array, n: int, m: int, axis: int) -> None:
    """Raises ValueError unless m divides the axis."""
    check_axis(f"n_m({n}, {m})", path, scores, axis)
    if scores.shape[axis] % m:
        raise ValueError(
            f"n_m({n}, {m}) on {path}, shape {scores.shape}: {m} does not divide axis {axis} of "
            f"size {scores.shape[axis]}; leave such leaves out: where=lambda path, leaf: "
            f"jp.is_kernel(path, leaf) and leaf.shape[{axis}] % {m} == 0"
        )


def _groups(scores: jax.Array, m: int, axis: int) -> tuple[jax.Array, int]:
    """Scores with the axis cut into (groups, m), and the place of m."""
    k = axis % scores.ndim
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
