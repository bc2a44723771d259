"""The controls that the literature asks for, and what to look at before a result is believed.

Does a mask know *which* entries matter, or only how many of each layer? Then it must beat its own
shuffle, and its weights must beat a fresh draw of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_float
from jaxprune.distributions import like
from jaxprune.masks import apply_masks, check_masks, overlap
from jaxprune.patterns import unstructured
from jaxprune.scores.synaptic_flow import synflow, total_flow
from jaxprune.scores.weights import random
from jaxprune.selection import known
from jaxprune.sharding import host
from jaxprune.typing import Masks, Params, path_str


def shuffle(masks: Masks, *, key: jax.Array) -> Masks:
    """Returns masks with the entries of each leaf in random order: the densities are the same.

    For masks of single entries. A pattern within the leaf is lost; masks of whole channels that
    several leaves share no longer agree.

    References:
      Frankle et al., `Missing the Mark <https://arxiv.org/abs/2009.08576>`__, 2021; Su et al.,
      `Sanity-Checking Pruning <https://arxiv.org/abs/2009.11094>`__, 2020 (layerwise rearrange).

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> masks = {"w": jnp.arange(6).reshape(2, 3) < 2}
      >>> int(jp.sanity.shuffle(masks, key=jax.random.key(0))["w"].sum())
      2
    """
    return _each(lambda key, mask: _permuted(key, jnp.asarray(mask)), key, masks)


def reinitialize(params: Params, *, key: jax.Array) -> Params:
    """Returns initial parameters drawn anew: the entries of each leaf in random order.

    Where the entries of a leaf were drawn independently from one distribution, a random order of
    them is another such draw; constant leaves (biases, scales) stay what they are. For other
    initialisers, such as orthogonal ones, call yours with another key.

    Args:
      params: as they were *initialised*, before any training and without masks.
      key: a ``jax.random.key``.

    References:
      Frankle and Carbin, `Lottery Tickets <https://arxiv.org/abs/1803.03635>`__, 2019, and Frankle
      et al., `Missing the Mark <https://arxiv.org/abs/2009.08576>`__, 2021, which draw from the
      initialiser again.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0])}
      >>> sorted(jp.sanity.reinitialize(params, key=jax.random.key(1))["w"].tolist())
      [1.0, 2.0, 3.0]
    """
    return _each(lambda key, w: _permuted(key, w) if is_float(w) else w, key, params)


def random_like(params: Params, masks: Masks, *, key: jax.Array) -> Masks:
    """Returns random masks with the same number of kept entries in each leaf.

    Unlike :func:`shuffle` it draws single entries where ``masks`` hold whole channels. For another
    score at these densities, or another pattern, use ``jp.distributions.like(masks)``.

    Raises:
      ValueError: when masks do not fit params.

    References:
      Su et al., `Sanity-Checking Pruning <https://arxiv.org/abs/2009.11094>`__, 2020 (random
      tickets).

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> masks = {"w": jnp.array([[True], [False]])}  # one row of two
      >>> drawn = jp.sanity.random_like({"w": jnp.ones((2, 3))}, masks, key=jax.random.key(0))
      >>> int(drawn["w"].sum())
      3
    """
    check_masks(params, masks)
    pruned = {path for path, mask in _named(masks) if np.shape(mask)}
    if not pruned:
        return masks
    where = lambda path, leaf: path in pruned and is_float(leaf)  # noqa: E731
    return unstructured(like(masks), where=where)(random(params, key=key), 0.0)


class Collapse(NamedTuple):
    """One layer that lets nothing through."""

    path: str
    kept: int  # entries that the mask keeps
    size: int  # entries of the mask

    def __str__(self) -> str:
        return f"{self.path} keeps {self.kept} of {self.size}"


def collapsed(masks: Masks, *, least: int = 1) -> list[Collapse]:
    """Returns the leaves whose masks keep fewer than ``least`` entries; an empty list is good.

    Counts alone do not see entries that are kept but cut off, because all that feeds them or all
    that they feed is gone: look at ``collapsed(active(fn, params, masks, *args))`` for these.

    Raises:
      TypeError: inside of jit, where nothing can be reported.

    References:
      Tanaka et al., `SynFlow <https://arxiv.org/abs/2006.05467>`__, 2020, section 3
      (layer-collapse).

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.sanity.collapsed({"a": jnp.array([True, False]), "b": jnp.array([False, False])})
      [Collapse(path='b', kept=0, size=2)]
    """
    found = []
    for path, mask in _named(masks):
        if not known(mask):
            raise TypeError(
                f"collapsed: the mask of {path} is traced; call it outside of jax.jit, on masks "
                "that a step returned"
            )
        kept, size = int(np.count_nonzero(host(mask))), int(np.size(mask))
        if kept < min(least, size):
            found.append(Collapse(path, kept, size))
    return found


def check_collapse(masks: Masks, *, least: int = 1) -> None:
    """Raises ValueError, naming the layers, when :func:`collapsed` finds any.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.sanity.check_collapse({"a": jnp.array([True, False])})
    """
    found = collapsed(masks, least=least)
    if found:
        raise ValueError(
            f"layer collapse: {'; '.join(map(str, found[:8]))}; nothing passes such a layer: lower "
            "the sparsity, or give each leaf a share with jp.erk or jp.global_threshold(floor=0.05)"
        )


def active(fn: Callable[..., Any], params: Params, masks: Masks, *args: Any) -> Masks:
    """Returns the kept entries that lie on a path from the inputs to the outputs.

    An entry is active when something flows through it while all weights and inputs are positive
    (the score of SynFlow is not zero), for ReLU networks without biases exactly: there an inactive
    entry has no effect on the output. Only the leaves that masks prune are looked at.

    Args:
      fn: ``fn(params, *args)``: the network in evaluation mode.
      masks: booleans that fit params.
      params: any pytree; of its values only whether they are 0 matters.
      args: arrays or ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: when masks do not fit params.

    References:
      Vysogorets and Kempe, `Connectivity Matters <https://arxiv.org/abs/2107.02306>`__, 2021:
      effective sparsity.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> params = {"up": jnp.ones((1, 2)), "down": jnp.ones((2, 1))}
      >>> masks = {"up": jnp.array([[True, True]]), "down": jnp.array([[True], [False]])}
      >>> jp.sanity.active(fn, params, masks, jnp.ones((1, 1)))["up"].astype(int)
      Array([[1, 0]], dtype=int32)
    """
    check_masks(params, masks)
    paths = jax.tree.map(lambda w: _paths(w) if is_float(w) else w, apply_masks(params, masks))
    flow = synflow(_levelled(fn, paths, args), fn=fn, args=args)

    def one(mask: Any, score: Any) -> Any:
        return mask if not np.shape(mask) or not is_float(score) else mask & (score > 0)

    return jax.tree.map(one, masks, flow)


class Overlap(NamedTuple):
    """How masks move over time: kept in both over kept in either (Jaccard), float32, (T - 1,).

    Independent masks of density d overlap by d / (2 - d).
    """

    previous: jax.Array  # of masks 1, 2, ... with the masks before
    first: jax.Array  # with masks 0


def overlap_over_time(params: Params, history: Sequence[Masks]) -> Overlap:
    """Returns how much each of a sequence of masks has in common with the ones before.

    Args:
      history: masks at successive times, at least two.
      params: the tree that they were made for.

    Raises:
      ValueError: for fewer than two, or masks that do not fit params.

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`__, 2020, and You et al., `Early-Bird
      Tickets <https://arxiv.org/abs/1909.11957>`__, 2020, which stop when masks stop moving.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> history = [{"w": jnp.array(m)} for m in ([1, 1, 0], [1, 0, 0], [1, 0, 0])]
      >>> history = [{"w": m["w"].astype(bool)} for m in history]
      >>> jp.sanity.overlap_over_time({"w": jnp.ones(3)}, history)
      Overlap(previous=Array([0.5, 1. ], dtype=float32), first=Array([0.5, 0.5], dtype=float32))
    """
    if len(history) < 2:
        raise ValueError(f"history holds {len(history)} masks; wanted those of two times or more")
    return Overlap(
        jnp.stack([overlap(params, a, b) for a, b in zip(history, history[1:])]),
        jnp.stack([overlap(params, history[0], b) for b in history[1:]]),
    )


def _each(change: Callable[[jax.Array, Any], Any], key: jax.Array, tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    changed = [change(jax.random.fold_in(key, i), leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, changed)


def _permuted(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.permutation(key, jnp.ravel(x)).reshape(x.shape)


def _named(masks: Masks) -> list[tuple[str, Any]]:
    return [(path_str(path), mask) for path, mask in jax.tree_util.tree_leaves_with_path(masks)]


def _paths(w: Any) -> Any:
    """Equal weights: each output of each matrix gets about as much as came in."""
    there = (w != 0).astype(jnp.float32)
    if there.ndim < 2 or not there.size:
        return there
    each = jnp.sum(there, (-2, -1), keepdims=True) / there.shape[-1]
    return there / jnp.maximum(each, 1)


def _levelled(fn: Callable[..., Any], params: Params, args: tuple[Any, ...]) -> Params:
    """Params times the one number for which the total flow is about 1, found by bisection."""

    def scaled(exponent: jax.Array) -> Params:
        return jax.tree.map(lambda w: w * 2.0**exponent if is_float(w) else w, params)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = (ends[0] + ends[1]) / 2
        much = ~(total_flow(fn, scaled(middle), args) < 1)  # infinite and NaN are much, too
        return jnp.where(much, ends[0], middle), jnp.where(much, middle, ends[1])

    ends = jax.lax.fori_loop(0, 12, halve, (jnp.float32(-32), jnp.float32(32)))
    return scaled(ends[1])
