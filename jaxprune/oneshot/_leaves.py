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

from jaxprune._progress import Progress, track
from jaxprune.calibration.api import Stats
from jaxprune.calibration.origins import Layout
from jaxprune.calibration.reader import GROUPED, UNREAD
from jaxprune.masks import apply_masks
from jaxprune.scores.required import check_stats
from jaxprune.selection import count, known
from jaxprune.sharding import whole
from jaxprune.typing import Masks, Params, named_leaves, path_str


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


LEAVE_OUT = "leave it out with where=lambda path, leaf: path in stats.layouts in {}"
MAKER = LEAVE_OUT.format("the pattern that makes masks")


def layers(
    method: str, params: Params, stats: Stats, masks: Masks, instead: str = MAKER
) -> list[Layer | None]:
    """The leaves whose mask is not a scalar, with their Gram matrices.

    None for dense ones, and for vectors: a bias has no inputs, its mask alone says what it is.

    Raises:
      ValueError: for statistics of other params; where such a leaf has no Gram matrix.
    """
    check_stats(method, params, stats)

    def one(path: str, leaf: Any, gram: Any, mask: Any) -> Layer | None:
        wanted = np.ndim(mask) and np.ndim(leaf) > 1
        return layer_of(method, path, leaf, gram, stats, instead) if wanted else None

    return [one(*row) for row in _each(params, stats, masks)]


def without_inputs(params: Params, stats: Stats) -> dict[str, str]:
    """path -> why, of leaves whose inputs ``calibrate`` looked for in vain, as of embeddings."""
    without = [path for path, _ in named_leaves(params) if path not in stats.layouts]
    return {path: stats.reasons[path] for path in without if path in stats.reasons}


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


def layer_of(
    method: str, path: str, leaf: Any, gram: Any, stats: Stats, instead: str = MAKER
) -> Layer:
    """Returns one leaf beside its Gram matrix; raises ValueError, with what to do, without one."""
    if gram is None:
        reason = stats.reasons.get(path, "it was left out of the calibration")
        why = f"{reason}; {instead}"
        if path in stats.layouts:
            why = "it was calibrated without grams; write jp.calibrate(..., grams=True)"
        raise ValueError(
            f"{method}: {path}, shape {np.shape(leaf)}, has no Gram matrix of its inputs: {why}"
        )
    return Layer(path, leaf, stats.layouts[path], gram.reshape(-1, *gram.shape[-2:]))


def map_layers(
    found: list[Layer | None],
    params: Params,
    masks: Masks,
    solve: Callable[..., tuple[jax.Array, jax.Array]],
    progress: Progress = None,
) -> tuple[Params, Masks]:
    """``solve(layer, mask) -> (weights, mask)`` in matrices, for each layer; others are masked.

    ``progress`` wraps the leaves, see :func:`track`.

    Raises:
      FloatingPointError: where a solution is not finite, naming the leaf.
    """
    flat, treedef = _flatten(params)
    given = treedef.flatten_up_to(masks)
    results = [
        (_masked(leaf, mask), mask) if layer is None else _solved(layer, mask, solve)
        for layer, (_, leaf), mask in track(
            list(zip(found, flat, given, strict=True)),
            "solving leaves",
            progress,
            label=lambda each: path_str(each[1][0]),
        )  # fmt: skip
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
