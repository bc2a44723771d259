"""Leaves as stacks of matrices (in, out) beside their Gram matrices, and back again.

Methods are written for one matrix; here they run over the leaves of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.api import Stats, statistic_shape
from jaxprune.calibration.origins import Layout
from jaxprune.calibration.reader import GROUPED, UNREAD
from jaxprune.chosen import is_number
from jaxprune.masks import apply_masks
from jaxprune.patterns import unstructured
from jaxprune.scores.activations import wanda
from jaxprune.selection import count, known
from jaxprune.sharding import whole
from jaxprune.typing import Masks, Params, Pattern, path_str

SINGLE_ENTRIES = unstructured()  # what methods choose by default


class Layer(NamedTuple):
    """One leaf that a method prunes."""

    path: str
    leaf: jax.Array
    layout: Layout
    gram: jax.Array  # (layers, in, in)

    def matrices(self, x: Any) -> jax.Array:
        """What has the leaf's shape, as (layers, in, out), in full on each device.

        A step of a method follows another along the inputs: devices would wait for each other at
        each, where one by itself is as fast.
        """
        x = jnp.broadcast_to(jnp.asarray(whole(x)), np.shape(self.leaf)).transpose(self._order)
        b, i, _ = self.layout
        return x.reshape(prod(x.shape[: len(b)]), prod(x.shape[len(b) : len(b) + len(i)]), -1)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of :meth:`matrices`."""
        shape = np.shape(self.leaf)
        x = x.reshape([shape[k] for k in self._order])
        return x.transpose([self._order.index(k) for k in range(len(shape))])

    @property
    def _order(self) -> list[int]:
        return [*self.layout.batch, *self.layout.ins, *self.layout.outs]

    def ordered(self, ins: Sequence[int]) -> Layer:
        """The same leaf with its input axes flattened in another order."""
        sizes = [np.shape(self.leaf)[k] for k in self.layout.ins]
        places = [self.layout.ins.index(k) for k in ins]
        n = len(sizes)
        gram = self.gram.reshape(-1, *sizes, *sizes)
        gram = gram.transpose(0, *(1 + k for k in places), *(1 + n + k for k in places))
        layout = self.layout._replace(ins=tuple(ins))
        return self._replace(layout=layout, gram=gram.reshape(self.gram.shape))


def layers(method: str, params: Params, stats: Stats, masks: Masks) -> list[Layer | None]:
    """The leaves whose mask is not a scalar, with their Gram matrices.

    None for dense ones, and for vectors: a bias has no inputs, its mask alone says what it is.

    Raises:
      ValueError: for statistics of other params; where such a leaf has no Gram matrix.
    """
    check_stats(method, params, stats)
    return [
        layer_of(method, path, leaf, gram, stats) if np.ndim(mask) and np.ndim(leaf) > 1 else None
        for path, leaf, gram, mask in _each(params, stats, masks)
    ]


def repairable(method: str, params: Params, stats: Stats, masks: Masks) -> list[Layer | None]:
    """As :func:`layers`; None also for leaves of which a mask leaves nothing to repair.

    Raises:
      ValueError: where a leaf's mask cuts along inputs of which there is no Gram matrix.
    """
    check_stats(method, params, stats)

    def one(path: str, leaf: Any, gram: Any, mask: Any) -> Layer | None:
        if _only_masked(path, leaf, mask, stats):
            return None
        instead = f"to mask it alone, calibrate with where=lambda path, leaf: path != {path!r}"
        return layer_of(method, path, leaf, gram, stats, instead)

    return [one(*row) for row in _each(params, stats, masks)]


def _only_masked(path: str, leaf: Any, mask: Any, stats: Stats) -> bool:
    """Is a leaf dense, of no contraction, left out by where=, or cut in whole outputs only?"""
    if not np.ndim(mask) or np.ndim(leaf) < 2:
        return True
    sizes = (1,) * (np.ndim(leaf) - np.ndim(mask)) + np.shape(mask)
    if path in stats.layouts:
        return all(sizes[k] == 1 for k in stats.layouts[path].ins)
    reason = stats.reasons.get(path, UNREAD)
    in_units = sum(size > 1 for size in sizes) <= 1  # a depthwise kernel's channels
    return UNREAD in reason or (GROUPED in reason and in_units)


def _each(params: Params, stats: Stats, masks: Masks) -> list[tuple[str, Any, Any, Any]]:
    """Path, leaf, Gram matrix and mask."""
    flat, treedef = _flatten(params)
    rows = zip(flat, treedef.flatten_up_to(stats.grams), treedef.flatten_up_to(masks), strict=True)
    return [(path_str(path), leaf, gram, mask) for (path, leaf), gram, mask in rows]


def _flatten(params: Params) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten_with_path(params)


LEAVE_OUT = (  # of what a pattern chooses
    "leave it out with pattern=jp.unstructured(where=lambda path, leaf: path in stats.layouts), "
    "where masks are made"
)


def layer_of(
    method: str, path: str, leaf: Any, gram: Any, stats: Stats, instead: str = LEAVE_OUT
) -> Layer:
    if gram is None:
        reason = stats.reasons.get(path, "it was left out of the calibration")
        why = f"{reason}; {instead}"
        if path in stats.layouts:
            why = "it was calibrated without grams; write jp.calibrate(..., grams=True)"
        raise ValueError(
            f"{method}: {path}, shape {np.shape(leaf)}, has no Gram matrix of its inputs: {why}"
        )
    return Layer(path, leaf, stats.layouts[path], gram.reshape(-1, *gram.shape[-2:]))


def check_stats(method: str, params: Params, stats: Stats) -> None:
    """Raises unless stats are what ``jp.calibrate`` gives for params like these."""
    if not isinstance(stats, Stats):
        raise TypeError(
            f"{method}: stats is a {type(stats).__name__}; wanted all that "
            "jp.calibrate(fn, params, batches) returns, not its .norms or .grams alone"
        )
    _check_tree(method, params, stats)
    flat, treedef = _flatten(params)
    for (path, leaf), mean in zip(flat, treedef.flatten_up_to(stats.means), strict=True):
        layout, shape = stats.layouts.get(path_str(path)), np.shape(leaf)
        if layout is not None and np.shape(mean) != statistic_shape(layout, shape):
            raise ValueError(
                f"{method}: the statistics of {path_str(path)}, shape {shape}, have the shape "
                f"{np.shape(mean)}: they are of other params; write "
                "stats = jp.calibrate(fn, params, batches) with these"
            )


def _check_tree(method: str, params: Params, stats: Stats) -> None:
    ours, theirs = (
        [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)]
        for tree in (params, stats.means)
    )
    if ours != theirs:
        odd = [p for p in ours if p not in theirs] + [p for p in theirs if p not in ours]
        raise ValueError(
            f"{method}: stats are of another tree than params, they differ in "
            f"{(odd or ours)[0]!r}; write stats = jp.calibrate(fn, params, batches) with these"
        )


def _is_none(x: Any) -> bool:
    return x is None


def check_damping(method: str, damping: Any) -> None:
    """Raises ValueError unless a known damping is a number from 0 on."""
    if known(damping) and not (is_number(damping) and 0 <= float(damping) < np.inf):
        raise ValueError(
            f"{method}: damping={damping!r}; wanted a number from 0 on such as 0.01, a part of the "
            "mean diagonal of X^T X"
        )


def check_size(method: str, name: str, value: Any, least: int) -> None:
    """Raises ValueError unless ``value`` is an integer from ``least`` on."""
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{method}: {name}={value!r}; wanted an integer from {least} on")


def chosen(
    method: str, params: Params, stats: Stats, pattern: Pattern, sparsity: Any, damping: Any
) -> tuple[list[Layer | None], Masks]:
    """The leaves that a pattern prunes, and its masks for Wanda's scores: how much of each.

    Their inputs are in the order in which the pattern's masks of a matrix are masks of the leaf.

    Raises:
      TypeError: for a pattern that can't choose within one matrix.
    """
    if not hasattr(pattern, "within"):
        raise TypeError(
            f"{method}: pattern={pattern!r} can't choose within one matrix while it changes; pass "
            "jp.unstructured(), jp.n_m() or jp.block(), or choose first and repair after: "
            "masks = pattern(scores, sparsity); jp.oneshot.refit(params, masks, stats)"
        )
    check_damping(method, damping)
    check_stats(method, params, stats)
    scores = wanda(params, input_norms=stats.norms)
    orders = _orders(scores, stats, pattern)
    masks = pattern(scores, sparsity)
    found = layers(method, params, stats, masks)
    return [layer and layer.ordered(orders[layer.path]) for layer in found], masks


def _orders(scores: Any, stats: Stats, pattern: Any) -> dict[str, Sequence[int]]:
    """path -> the order of a leaf's input axes, for those that the pattern prunes."""
    orders: dict[str, Sequence[int]] = {}
    for path, leaf in ((path_str(p), leaf) for p, leaf in _flatten(scores)[0]):
        layout = stats.layouts.get(path)
        if layout is not None and pattern.where(path, leaf):
            whole = pattern.inputs is None
            orders[path] = layout.ins if whole else pattern.inputs(path, np.shape(leaf), layout)
    return orders


def map_layers(
    found: list[Layer | None],
    params: Params,
    masks: Masks,
    solve: Callable[..., tuple[jax.Array, jax.Array]],
) -> tuple[Params, Masks]:
    """``solve(layer, mask) -> (weights, mask)`` in matrices, for each layer; others are masked.

    Raises:
      FloatingPointError: where a solution is not finite, naming the leaf.
    """
    flat, treedef = _flatten(params)
    given = treedef.flatten_up_to(masks)
    results = [
        (_masked(leaf, mask), mask) if layer is None else _solved(layer, mask, solve)
        for layer, (_, leaf), mask in zip(found, flat, given, strict=True)
    ]
    new, kept = ([pair[k] for pair in results] for k in (0, 1))
    return jax.tree.unflatten(treedef, new), jax.tree.unflatten(treedef, kept)


def _masked(leaf: Any, mask: Any) -> Any:
    dense = np.ndim(mask) == 0 and known(mask) and bool(mask)
    return leaf if dense else apply_masks(leaf, mask)


def _solved(layer: Layer, mask: Any, solve: Any) -> tuple[jax.Array, jax.Array]:
    weights, kept = solve(layer._replace(gram=whole(layer.gram)), mask)
    if known(weights) and not _finite(weights):
        about = _OF_GRAMS if _finite(layer.leaf) else _OF_WEIGHTS
        raise FloatingPointError(f"{layer.path}, shape {np.shape(layer.leaf)}: {about}")
    return layer.restore(weights).astype(layer.leaf.dtype), layer.restore(kept)


_OF_WEIGHTS = "the dense weights hold NaN or infinity; look for it in params"
_OF_GRAMS = (
    "the Gram matrix of its inputs is not positive definite even with damping, or holds NaN; pass "
    "a larger damping=, such as 0.1, more calibration data, or grams in float64: "
    "with jax.enable_x64(True): jp.calibrate(..., dtype=jnp.float64)"
)


def _finite(x: Any) -> bool:
    return bool(jnp.all(jnp.isfinite(x)))


def sparsity_of(mask: Any) -> Any:
    """The part of a mask that goes, counted exactly, traced or not."""
    return 1 - count(jnp.asarray(mask)) / max(np.size(mask), 1)


def without_dead(w: jax.Array, gram: jax.Array) -> jax.Array:
    """Weights (in, out) with zeros where an input is never anything but zero.

    Where all are dead (an expert that no token reached) nothing is known of them: they stay, and
    the Gram matrix is the identity once it is damped, so that methods go by magnitude.
    """
    live = jnp.diagonal(gram)[:, None] > 0
    return jnp.where(live | ~jnp.any(live), w, 0)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in full precision, which an accelerator gives only where it is asked for."""
    return jnp.matmul(a, b, precision="highest")


def damped(gram: jax.Array, damping: float | jax.Array) -> jax.Array:
    """The Gram matrix with ``damping`` times the mean of its diagonal added to the diagonal.

    Dead inputs (zero on the diagonal) count neither for the mean nor for the output: their
    diagonal becomes that mean.
    """
    diagonal = jnp.diagonal(gram)
    live = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(live), 1)
    mean = jnp.where(mean > 0, mean, 1)
    return gram + jnp.diag(jnp.where(live, damping * mean, mean))


def factor(gram: jax.Array, damping: float, attempts: int = 4) -> jax.Array:
    """The Cholesky factor of the damped Gram matrix; ten times the damping where it fails.

    It fails, too, where what is left of an input beside those before it is but rounding.
    """
    least = 4 * jnp.finfo(gram.dtype).eps

    def matrix(k: jax.Array) -> jax.Array:  # made anew rather than carried along: less memory
        more = jnp.maximum(damping, 1e-6) * 10.0**k
        return damped(gram, jnp.where(k > 0, more, damping))

    def failed(state: Any) -> jax.Array:
        k, lower = state
        left = jnp.square(jnp.diagonal(lower)) > least * jnp.diagonal(matrix(k))  # False for NaN
        return (k < attempts) & ~jnp.all(left)

    def more(state: Any) -> Any:
        k = state[0] + 1
        return k, jnp.linalg.cholesky(matrix(k))

    begin = jnp.zeros((), gram.dtype)
    return jax.lax.while_loop(failed, more, (begin, jnp.linalg.cholesky(matrix(begin))))[1]
