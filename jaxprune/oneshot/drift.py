"""Weights that make up for what pruning before them has changed.

A weight that is fit to the inputs it will meet gives what it would have given for those: the inputs
themselves have drifted from the dense network's. Corrected weights W' give, from the inputs X here,
a share s of what W gave for the dense network's inputs D of the same tokens:

    minimise |X W' - ((1 - s) X W + s D W)|^2 + damping |W' - W|^2

All of it (s = 1) fits the calibration's tokens, and loses on others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
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


class Corrector:
    """Corrects one tree of parameters of a function after another, compiled once for all."""

    def __init__(self, fn: Callable[..., Any]):
        self._cross = jax.jit(functools.partial(_cross, fn), static_argnums=0)

    def __call__(
        self, params: Params, batches: Iterable[tuple[Any, Any]], stats: Stats, share: float
    ) -> Params:
        """Params whose leaves that have statistics are corrected.

        ``batches``: pairs of what follows params in ``fn``, as a tuple: here, and in the dense
        network.
        """
        return _corrected(self._cross, params, batches, stats, share)


def _corrected(
    products: Callable[..., dict[int, jax.Array]],
    params: Params,
    batches: Iterable[tuple[Any, Any]],
    stats: Stats,
    share: float,
) -> Params:
    flat = jax.tree_util.tree_leaves_with_path(params)
    treedef: Any = jax.tree.structure(params)
    grams = treedef.flatten_up_to(stats.grams)
    chosen = tuple(path_str(path) in stats.layouts for path, _ in flat)
    cross: dict[int, Any] = {}
    for here, dense in batches:
        new = products(chosen, params, here, dense)
        cross = {k: m + cross[k] if k in cross else m for k, m in new.items()}
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
        new = _solved(w, layer.gram, cross[k].reshape(layer.gram.shape), share)
        leaves.append(layer.restore(new).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, leaves)


def _cross(
    fn: Callable[..., Any], chosen: tuple[bool, ...], params: Params, here: Any, dense: Any
) -> dict[int, jax.Array]:
    """X^T D for each chosen leaf outside of loops, (batch..., in, in)."""
    shapes = [np.shape(leaf) if ok else None for ok, leaf in zip(chosen, jax.tree.leaves(params))]
    wish = Wish(tuple(shapes), (False,) * len(shapes), jnp.dtype(jnp.float32))
    ours, theirs = (read_rows(fn, wish, params, args) for args in (here, dense))

    def product(k: int) -> jax.Array:
        uses = zip(ours[k], theirs[k], strict=True)
        products = [matmul(x.mT, d) for x, d in uses]
        return functools.reduce(jnp.add, products)

    return {k: product(k) for k in ours}


@jax.jit
def _solved(w: jax.Array, grams: jax.Array, cross: jax.Array, share: Any) -> jax.Array:
    def one(args: Any) -> jax.Array:
        w, gram, c = args
        h = damped(gram, DAMPING)
        drift = matmul(c - gram, w)
        return w + share * jax.scipy.linalg.solve(h, drift, assume_a="pos")

    return jax.lax.map(one, (w, grams, cross))
