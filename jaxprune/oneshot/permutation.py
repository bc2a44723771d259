"""Channel permutation: units in another order, so that N:M masks keep more of the score."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._calls import calls_fn
from jaxprune._progress import Progress, track
from jaxprune._renamed import renamed
from jaxprune._trees import difference
from jaxprune.ir import axes
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.select import chosen_dims
from jaxprune.typing import PyTree

Orders = dict[str, np.ndarray]  # dimension -> for each new place, the unit that comes there
TOLERANCE = 1e-3  # Sums in another order may differ by this share of the largest output.
PAIRS = 8  # Swaps of so many pairs of groups are looked at side by side.


@renamed("jp.oneshot.permute", rounds="sweeps", seed="key")
@calls_fn("jp.oneshot.permute")
def permute(
    fn: Callable[..., Any],
    params: PyTree,
    structure: Structure,
    scores: PyTree,
    *args: Any,
    n: int = 2,
    m: int = 4,
    dims: str | Sequence[str] = "*",
    sweeps: int = 200,
    key: jax.Array | None = None,
    progress: Progress = None,
) -> tuple[PyTree, Orders]:
    """Returns params of the same function whose n:m masks keep more score, and the new orders.

    The units of a dimension are reordered in all of its slots, so the function stays what it is.
    Which m units share a group decides what :func:`jp.n_m` keeps: units are swapped between pairs
    of groups, drawn at random, as long as that raises the kept score of the kernels (..., in, out)
    that read them. Other trees follow by :func:`permuted`.

    Args:
      fn, params, *args: as for :func:`jp.compact`.
      structure: the result of ``jp.infer_structure(fn, params, *args)``.
      scores: a tree like params, larger = keep, such as ``jp.wanda``'s.
      n, m: as of :func:`jp.n_m`.
      dims: names or labels, with wildcards. Those that no kernel reads as its whole input axis,
        or whose size m doesn't divide, keep their order.
      sweeps: number of sweeps; each pairs every group once.
      key: the random key that draws the pairs; ``jax.random.key(0)`` by default.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        dimensions, such as ``tqdm.tqdm``.

    Raises:
      ValueError: unless 0 < n < m; when no chosen dimension can be reordered; where an order
        matters to fn (a rotary position, a sorted table), naming the dimension; for scores of
        another structure.

    References:
      Pool and Yu, `Channel Permutations for N:M Sparsity <https://proceedings.neurips.cc/paper/2021/hash/6e8404c3b93a9527c8db241a1846599a-Abstract.html>`__,
      2021, whose greedy swaps these are; pairs are drawn at random here, and all kernels that read
      a dimension count together.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.array([[4.0]] * 4 + [[1.0]] * 4)}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> better, orders = jp.oneshot.permute(fn, params, structure, params, x)
      >>> pattern = jp.n_m(2, 4, where=lambda path, leaf: path == "down")
      >>> kept = [jp.apply_masks(tree, pattern(tree, 0.5))["down"] for tree in (params, better)]
      >>> [float(kernel.sum()) for kernel in kept]
      [10.0, 16.0]
    """
    if not 0 < n < m:
        raise ValueError(f"permute(n={n}, m={m}): wanted 0 < n < m, such as 2 and 4")
    _check_tree("permute: the tree of scores", scores, structure)
    key = jax.random.key(0) if key is None else key
    orders = {}
    for name in track(chosen_dims(structure, dims), "ordering dimensions", progress, label=str):
        lines = _lines(structure, name, scores)
        if lines is not None and structure.dims[name].size % m == 0:
            orders[name] = _order(lines, n, m, sweeps, key)
    if not orders:
        raise ValueError(
            f"permute: of dims={dims!r} no dimension is the whole input axis of a kernel "
            f"(..., in, out) with a size that {m} divides; see print(structure.details())"
        )
    _check_same(fn, params, structure, orders, args)
    return permuted(params, structure, orders), orders


def permuted(tree: PyTree, structure: Structure, orders: Mapping[str, Any]) -> PyTree:
    """Returns a tree like params (scores, masks, gradients) with its units in new orders.

    Args:
      tree: leaves of the shapes of params; an axis of size 1, such as a mask's, and a scalar stay.
      structure: the result of ``jp.infer_structure``.
      orders: dimension name -> for each new place, the unit that comes there.

    Raises:
      ValueError: for an order that isn't a permutation of its dimension's units, or a tree of
        another structure.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.arange(4.0)[None], "down": jnp.ones((4, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 1)))
      >>> jp.oneshot.permuted(params, structure, {"up:1": [3, 2, 1, 0]})["up"]
      Array([[3., 2., 1., 0.]], dtype=float32)
    """
    _check_tree("permuted: the tree", tree, structure)
    leaves = jax.tree.leaves(tree)
    for name, order in orders.items():
        dim = structure.dims[name]
        order = np.asarray(order)
        if sorted(order.tolist()) != list(range(dim.size)):
            raise ValueError(
                f"permuted: the order of {name} has shape {order.shape}; wanted each of its units "
                f"0 to {dim.size - 1} once"
            )
        own = axes.find(dim.axis)
        leaves = [
            _reordered(leaf, axs, own, order) for leaf, axs in zip(leaves, structure.param_axes)
        ]
    return structure.treedef.unflatten(leaves)


def _check_tree(what: str, tree: PyTree, structure: Structure) -> None:
    if jax.tree.structure(tree) != structure.treedef:
        raise ValueError(
            f"{what} does not match params: it {difference(tree, structure.treedef)}; wanted one "
            "like params, such as jp.magnitude(params)"
        )


def _reordered(leaf: Any, axs: Sequence[Any], own: Any, order: np.ndarray) -> Any:
    if np.ndim(leaf) != len(axs):
        return leaf
    for k, axis in enumerate(axs):
        for units in axes.units_along(axis, own):
            if np.shape(leaf)[k] == len(units):
                leaf = jnp.take(leaf, _places(units, order), axis=k)
    return leaf


def _places(units: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Along an axis whose positions carry ``units`` (-1: none), where each comes from."""
    places = np.arange(len(units))
    at = np.stack([np.flatnonzero(units == unit) for unit in range(len(order))])
    places[at] = at[order]
    return places


def _lines(structure: Structure, name: str, scores: PyTree) -> jax.Array | None:
    """Scores (units, outputs) of all kernels whose whole input axis is this dimension."""
    leaves = dict(zip(structure.paths, jax.tree.leaves(scores)))
    found = []
    for slot in structure.dims[name].slots:
        leaf = leaves[slot.path]
        if np.ndim(leaf) > 1 and slot.axis == np.ndim(leaf) - 2 and not slot.piece:
            found.append(jnp.moveaxis(leaf, -2, 0).reshape(np.shape(leaf)[-2], -1))
    return jnp.concatenate(found, 1).astype(jnp.float32) if found else None


def _order(lines: jax.Array, n: int, m: int, sweeps: int, key: jax.Array) -> np.ndarray:
    order = jnp.arange(len(lines))
    if len(lines) == m:  # one group: nothing to swap with
        return np.asarray(order)
    return np.asarray(_swapped(lines, order, key, n, m, sweeps))


@functools.partial(jax.jit, static_argnames=("n", "m", "sweeps"))
def _swapped(
    lines: jax.Array, order: jax.Array, key: jax.Array, n: int, m: int, sweeps: int
) -> jax.Array:
    """Sweeps of swaps between the groups of a random matching; the kept score never falls."""
    count = len(lines) // m // 2

    def one(k: Any, order: jax.Array) -> jax.Array:
        groups = jax.random.permutation(jax.random.fold_in(key, k), order.reshape(-1, m))
        pairs = groups[: 2 * count].reshape(count, 2, m)
        swap = lambda pair: _best_swap(lines, pair, n)  # noqa: E731
        pairs = jax.lax.map(swap, pairs, batch_size=min(PAIRS, count))
        return groups.at[: 2 * count].set(pairs.reshape(-1, m)).reshape(-1)

    return jax.lax.fori_loop(0, sweeps, one, order)


def _best_swap(lines: jax.Array, pair: jax.Array, n: int) -> jax.Array:
    """A pair of groups (2, m) after the exchange of one unit that gains most, or as it was."""
    m = pair.shape[1]
    a, b = lines[pair[0]], lines[pair[1]]  # (m, outputs)
    gains = _gains(a, b, n) + _gains(b, a, n).T
    best = jnp.argmax(gains)
    x, y = best // m, best % m
    new = pair.at[0, x].set(pair[1, y]).at[1, y].set(pair[0, x])
    # A gain within rounding would let two orders alternate.
    worth = gains.ravel()[best] > 1e-6 * (jnp.sum(jnp.abs(a)) + jnp.sum(jnp.abs(b)))
    return jnp.where(worth, new, pair)


def _gains(group: jax.Array, others: jax.Array, n: int) -> jax.Array:
    """(m, m): what n of m keep more, over all outputs, when unit i gives way to other unit j.

    The n - 1 best of the rest stay, and the better of the next one and the new unit.
    """
    ranked = _descending(group)
    last, following = ranked[n - 1], ranked[n]
    instead = jnp.where(group >= last, following, last)
    won = jnp.maximum(instead[:, None], others[None])
    return jnp.sum(won - jnp.maximum(group, last)[:, None], -1)


def _descending(group: jax.Array) -> jax.Array:
    """Sorted along axis 0, by exchanges of neighbours: jnp.sort of few rows is slow."""
    rows = list(group)
    for turn in range(len(rows)):
        for k in range(turn % 2, len(rows) - 1, 2):
            high, low = jnp.maximum(rows[k], rows[k + 1]), jnp.minimum(rows[k], rows[k + 1])
            rows[k], rows[k + 1] = high, low
    return jnp.stack(rows)


def _check_same(
    fn: Callable[..., Any], params: PyTree, structure: Structure, orders: Orders, args: Any
) -> None:
    """Raises where an order matters to the function."""
    run = jax.jit(fn)
    want = run(params, *args)
    if _apart(want, run(permuted(params, structure, orders), *args)) <= TOLERANCE:
        return
    for name, order in orders.items():
        apart = _apart(want, run(permuted(params, structure, {name: order}), *args))
        if apart > TOLERANCE:
            raise ValueError(
                f"permute: the order of {name} ({structure.dims[name].label}) matters to fn, its "
                f"outputs change by {apart:.2g} of their largest: leave it out with dims="
            )
    raise ValueError("permute: fn's outputs change with the orders of its units; choose by dims=")


def _apart(want: Any, got: Any) -> float:
    pairs = zip(jax.tree.leaves(want), jax.tree.leaves(got))
    apart = [
        float(jnp.max(jnp.abs(w - g)) / jnp.maximum(jnp.max(jnp.abs(w)), 1e-30)) for w, g in pairs
    ]
    return max(apart) if np.isfinite(apart).all() else np.inf
