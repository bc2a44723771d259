"""One runner for methods that choose masks and weights of each matrix together.

A method is a function of one matrix (in, out) and the Gram matrix of its inputs; what is here turns
leaves into matrices, asks the pattern how much of each goes, and puts the results back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune._progress import Progress
from jaxprune.calibration.api import Stats
from jaxprune.oneshot._checks import check_damping
from jaxprune.oneshot._leaves import (
    LEAVE_OUT,
    Layer,
    layers,
    map_layers,
    sparsity_of,
    without_inputs,
)
from jaxprune.patterns import as_pattern, is_kernel
from jaxprune.scores.activations import wanda
from jaxprune.scores.required import check_stats
from jaxprune.sharding import on_meshes
from jaxprune.typing import (
    ChooseInMatrix,
    Masks,
    Params,
    Pattern,
    PatternFn,
    named_leaves,
    path_str,
)

# (weights, gram, sparsity, damping, **options) -> (weights, mask)
Matrix = Callable[..., tuple[jax.Array, jax.Array]]


class Pruned(NamedTuple):
    """What a one-shot method gives; unpacks as ``params, masks``.

    Attributes:
      params: like those that it was given, zero where they are pruned.
      masks: the same tree, True = kept.
    """

    params: Params
    masks: Masks


def in_matrix(method: str, pattern: PatternFn) -> Pattern:
    """Returns the pattern, which can choose within one matrix.

    Raises:
      TypeError: for one that can't: ``jp.structured``, or a function of the user's own.
    """
    found = as_pattern(pattern)
    if found.within is None:
        raise _cannot(method, found)
    return found


def within(method: str, pattern: Pattern, sparsity: Any) -> ChooseInMatrix:
    """Returns how the pattern chooses within one matrix (in, out); raises as :func:`in_matrix`."""
    if pattern.within is None:
        raise _cannot(method, pattern)
    return pattern.within(sparsity)


def _cannot(method: str, pattern: Pattern) -> TypeError:
    return TypeError(
        f"{method}: pattern={pattern!r} can't choose within one matrix while it changes; pass "
        "jp.unstructured(), jp.n_m() or jp.block(), or choose first and repair after: "
        "masks = pattern(scores, sparsity); jp.oneshot.refit(params, masks, stats)"
    )


def per_matrix(
    method: str,
    matrix: Matrix,
    params: Params,
    stats: Stats,
    sparsity: Any,
    *,
    pattern: Pattern,
    damping: Any,
    progress: Progress,
    check: Callable[[Layer], None] = lambda layer: None,
    **options: Any,
) -> Pruned:
    """Returns params and masks after ``matrix`` has solved each matrix that the pattern prunes.

    Args:
      method: its name, for messages.
      matrix: ``(weights, gram, sparsity, damping, within=, **options) -> (weights, mask)`` of one
        matrix (in, out); ``within`` is how the pattern chooses in it. It is compiled once for all
        leaves of one shape.
      params, stats, sparsity, damping: of the method.
      pattern: of :func:`in_matrix`.
      progress: of the method; it wraps the leaves.
      check: raises for a leaf that the method can't prune.
      **options: hashable, for ``matrix``.

    Raises:
      ValueError: for a damping below 0, statistics of other params, a leaf without Gram matrix.
      FloatingPointError: where a solution is not finite.
    """
    check_stats(method, params, stats)
    _tell(method, _left_out(params, stats, pattern))
    run = functools.partial(_solved, params, stats, sparsity, damping, method, matrix, pattern)
    return Pruned(*run(check, progress, options))


@on_meshes(2)
def _solved(
    params: Params,
    stats: Stats,
    sparsity: Any,
    damping: Any,
    method: str,
    matrix: Matrix,
    pattern: Pattern,
    check: Callable[[Layer], None],
    progress: Progress,
    options: dict[str, Any],
) -> tuple[Params, Masks]:
    check_damping(method, damping)
    found, masks = _chosen(method, params, stats, sparsity, pattern)
    for layer in found:
        if layer is not None:
            check(layer)
    static = tuple((options | {"within": within(method, pattern, sparsity)}).items())

    def solve(layer: Layer, mask: Any) -> tuple[jax.Array, jax.Array]:
        weights = layer.matrices(layer.leaf).astype(layer.gram.dtype)
        return _stack(matrix, static, weights, layer.gram, sparsity_of(mask), damping)

    return map_layers(found, params, masks, solve, progress)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stack(
    matrix: Matrix, static: Any, weights: jax.Array, grams: jax.Array, sparsity: Any, damping: Any
) -> tuple[jax.Array, jax.Array]:
    """All matrices of a leaf, (layers, in, out), one after another."""
    one = functools.partial(matrix, **dict(static))
    return jax.lax.map(lambda wh: one(wh[0], wh[1], sparsity, damping), (weights, grams))


def _chosen(
    method: str, params: Params, stats: Stats, sparsity: Any, pattern: Pattern
) -> tuple[list[Layer | None], Masks]:
    """The leaves that a pattern prunes, and its masks for Wanda's scores: how much of each.

    Their inputs are in the order in which the pattern's masks of a matrix are masks of the leaf.
    """
    left_out = _left_out(params, stats, pattern)
    scores = jax.tree_util.tree_map_with_path(
        lambda path, score: _NO_KERNEL if path_str(path) in left_out else score,
        wanda(params, input_norms=stats.norms),
    )
    orders = _orders(scores, stats, pattern)
    masks = pattern(scores, sparsity)
    found = layers(method, params, stats, masks, LEAVE_OUT.format(pattern))
    return [layer and layer.ordered(orders[layer.path]) for layer in found], masks


_NO_KERNEL = np.float32(0)  # No pattern takes it by default.


def _left_out(params: Params, stats: Stats, pattern: Pattern) -> dict[str, str]:
    """path -> why, of leaves that the default choice of a pattern takes, and no method can solve.

    A ``where`` of the user's own is taken at its word.
    """
    return without_inputs(params, stats) if pattern.where is is_kernel else {}


def _tell(method: str, left_out: dict[str, str]) -> None:
    if left_out:
        told = [f"{path} ({why})" for path, why in left_out.items()]
        others = f" and {len(told) - 3} more" if len(told) > 3 else ""
        warnings.warn(
            f"{method} leaves dense what has no inputs to be pruned by: {', '.join(told[:3])}"
            f"{others}; a pattern with where=lambda path, leaf: path in stats.layouts does so "
            "without a warning",
            stacklevel=4,
        )


def _orders(scores: Any, stats: Stats, pattern: Pattern) -> dict[str, Sequence[int]]:
    """path -> the order of a leaf's input axes, for those that the pattern prunes."""
    orders: dict[str, Sequence[int]] = {}
    for path, leaf in named_leaves(scores):
        layout = stats.layouts.get(path)
        if layout is not None and (pattern.where is None or pattern.where(path, leaf)):
            inputs = pattern.inputs
            orders[path] = inputs(path, np.shape(leaf), layout) if inputs else layout.ins
    return orders
