"""Weights that make up for what pruning before them has changed.

A weight that is fit to the inputs it will meet gives what it would have given for those: the inputs
themselves have drifted from the dense network's. Corrected weights W' give, from the inputs X here,
a share s of what W gave for the dense network's inputs D of the same tokens:

    minimise |X W' - ((1 - s) X W + s D W)|^2 + damping |W' - W|^2

All of it (s = 1) fits the calibration's tokens, and loses on others.

A residual block passes its hidden states on, with all that blocks before it have changed of them. A
weight whose outputs are added to them can make up for a share of how far they are from the dense
network's behind the block, H from K:

    minimise |X W' - (X W + s (K - H))|^2 + damping |W' - W|^2
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.api import Stats
from jaxprune.calibration.reader import Wish, read_rows
from jaxprune.oneshot._leaves import layer_of
from jaxprune.oneshot._linalg import damped, matmul
from jaxprune.typing import Params, path_str

DAMPING = 0.01  # This share of the mean diagonal of X^T X is added to it.
ALIKE = 1e-2  # What a weight gives is added if the function's outputs change by it up to this.

Chosen = tuple[bool, ...]  # one for each leaf


Pairs = Iterable[tuple[Any, Any]]  # what follows params: here, and in the dense network


class Corrector:
    """Corrects one tree of parameters of a function after another, compiled once for all.

    ``states``: weights whose outputs are added to the hidden states make up for theirs.
    """

    def __init__(self, fn: Callable[..., Any], states: bool = False):
        self._fn, self._states = jax.jit(lambda *args: fn(*args)), states
        self._cross = jax.jit(functools.partial(_cross, fn), static_argnums=(0, 1))
        self._rows = jax.jit(functools.partial(_rows, fn), static_argnums=0)
        self._known: dict[Any, Chosen] = {}  # which weights are added, by shapes

    def __call__(self, params: Params, batches: Pairs, stats: Stats, share: float) -> Params:
        """Params whose leaves that have statistics are corrected."""
        pairs = list(batches)
        paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        chosen = tuple(path in stats.layouts for path in paths)
        added = self._added(chosen, params, pairs[0][0], stats)
        cross: dict[int, Any] = {}
        for here, dense in pairs:
            new = self._cross(chosen, added, params, here, dense)
            cross = {k: m + cross[k] if k in cross else m for k, m in new.items()}
        return _corrected(params, chosen, added, cross, stats, share)

    def _added(self, chosen: Chosen, params: Params, here: Any, stats: Stats) -> Chosen:
        """Which of the chosen leaves have outputs that are added to what the function gives."""
        if not self._states:
            return (False,) * len(chosen)
        shapes = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), (params, here))
        key = chosen, jax.tree.structure(params), str(shapes)
        if key not in self._known:
            rows = self._rows(chosen, params, here)
            before = self._fn(params, *here)
            self._known[key] = tuple(
                k in rows and self._is_added(k, rows[k], before, params, here, stats)
                for k in range(len(chosen))
            )
        return self._known[key]

    def _is_added(
        self,
        k: int,
        uses: Sequence[jax.Array],
        before: Any,
        params: Params,
        here: Any,
        stats: Stats,
    ) -> bool:
        """Whether the function gives X E more with W + E in place of W."""
        leaves = jax.tree.leaves(params)
        treedef: Any = jax.tree.structure(params)
        path = path_str(jax.tree_util.tree_leaves_with_path(params)[k][0])
        gram = treedef.flatten_up_to(stats.grams)[k]
        layer = layer_of("sequential(error_of=)", path, leaves[k], gram, stats)
        more = jax.random.normal(jax.random.key(k), jnp.shape(leaves[k]), leaves[k].dtype)
        more *= jnp.std(leaves[k]) + 1e-6
        matrix = layer.matrices(more)
        if len(uses) != 1 or len(matrix) != 1 or matrix.shape[-1] != before.shape[-1]:
            return False
        changed = [leaf + more if i == k else leaf for i, leaf in enumerate(leaves)]
        got = self._fn(jax.tree.unflatten(treedef, changed), *here) - before
        want = matmul(uses[0].reshape(-1, matrix.shape[1]), matrix[0]).reshape(-1, before.shape[-1])
        got = got.reshape(-1, before.shape[-1])
        return want.shape == got.shape and bool(
            jnp.linalg.norm(got - want) <= ALIKE * jnp.linalg.norm(want)
        )


def _corrected(
    params: Params,
    chosen: Chosen,
    added: Chosen,
    cross: dict[int, Any],
    stats: Stats,
    share: float,
) -> Params:
    flat = jax.tree_util.tree_leaves_with_path(params)
    treedef: Any = jax.tree.structure(params)
    grams = treedef.flatten_up_to(stats.grams)
    leaves = []
    for k, ((path, leaf), gram) in enumerate(zip(flat, grams, strict=True)):
        if not chosen[k]:
            leaves.append(leaf)
            continue
        layer = layer_of("sequential(error_propagation=)", path_str(path), leaf, gram, stats)
        if k not in cross:
            raise ValueError(
                f"sequential: error_propagation={share} asks for the inputs of {layer.path}, shape "
                f"{np.shape(leaf)}, token by token; within a loop of the block there are none: "
                "unroll the loop, or pass error_propagation=0"
            )
        w = layer.matrices(leaf).astype(layer.gram.dtype)
        if added[k]:
            new = _moved(w, layer.gram, cross[k].reshape(w.shape), share / sum(added))
        else:
            new = _solved(w, layer.gram, cross[k].reshape(layer.gram.shape), share)
        leaves.append(layer.restore(new).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, leaves)


def _rows(
    fn: Callable[..., Any], chosen: Chosen, params: Params, args: Any
) -> dict[int, list[jax.Array]]:
    """The inputs of each chosen leaf outside of loops, use by use, (batch..., tokens, in)."""
    shapes = [np.shape(leaf) if ok else None for ok, leaf in zip(chosen, jax.tree.leaves(params))]
    wish = Wish(tuple(shapes), (False,) * len(shapes), jnp.dtype(jnp.float32))
    return read_rows(fn, wish, params, args)


def _cross(
    fn: Callable[..., Any], chosen: Chosen, added: Chosen, params: Params, here: Any, dense: Any
) -> dict[int, jax.Array]:
    """X^T D for each chosen leaf outside of loops, (batch..., in, in); X^T (K - H) if added."""
    ours, theirs = (_rows(fn, chosen, params, args) for args in (here, dense))

    def product(k: int) -> jax.Array:
        uses = zip(ours[k], theirs[k], strict=True)
        products = [matmul(x.mT, d) for x, d in uses]
        return functools.reduce(jnp.add, products)

    def of_states(k: int) -> jax.Array:
        away = fn(params, *dense) - fn(params, *here)
        rows = ours[k][0].reshape(-1, ours[k][0].shape[-1])
        return matmul(rows.T, away.reshape(len(rows), -1).astype(rows.dtype))

    return {k: of_states(k) if added[k] else product(k) for k in ours}


def _solved(w: jax.Array, grams: jax.Array, cross: jax.Array, share: Any) -> jax.Array:
    return _moved(w, grams, matmul(cross - grams, w), share)


@jax.jit
def _moved(w: jax.Array, grams: jax.Array, drift: jax.Array, share: Any) -> jax.Array:
    """W + s (X^T X + damping)^-1 X^T (what is missing of the outputs)."""

    def one(args: Any) -> jax.Array:
        w, gram, drift = args
        return w + share * jax.scipy.linalg.solve(damped(gram, DAMPING), drift, assume_a="pos")

    return jax.lax.map(one, (w, grams, drift))
