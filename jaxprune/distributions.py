"""Distributions: one global sparsity -> one sparsity per leaf.

Each takes a tree of scores (patterns pass a dict path -> scores of the prunable leaves alone) and a
sparsity, a number or traced, and returns one scalar per leaf.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import selection
from jaxprune.types import Distribution, Scores, Sparsities, path_str


def uniform(scores: Scores, sparsity: Any) -> Sparsities:
    """The same sparsity for every leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.uniform({"a": jnp.ones(4), "b": jnp.ones(9)}, 0.5)
      {'a': Array(0.5, dtype=float32), 'b': Array(0.5, dtype=float32)}
    """
    return jax.tree.map(lambda _: jnp.asarray(sparsity, jnp.float32), scores)


def erk(scores: Scores, sparsity: Any, *, power: float = 1.0) -> Sparsities:
    r"""Erdős-Rényi-Kernel: densities proportional to :math:`(\sum_i d_i / \prod_i d_i)^p`.

    Leaves whose density would exceed 1 are dense and the others are solved again, so that the
    average over all entries is the target.

    References:
      Evci et al., [RigL](https://arxiv.org/abs/1911.11134), 2020, section 3(1).

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> s = jp.erk({"a": jnp.ones((10, 10)), "b": jnp.ones((100, 100))}, 0.9)
      >>> bool(s["a"] < s["b"])
      True
    """
    leaves, treedef = jax.tree.flatten(scores)
    sizes = np.array([leaf.size for leaf in leaves], np.float32)
    raw = np.array([(sum(leaf.shape) / leaf.size) ** power for leaf in leaves], np.float32)
    budget = (1.0 - jnp.asarray(sparsity, jnp.float32)) * sizes.sum()
    dense = jnp.zeros(len(leaves), bool)
    for _ in leaves:  # each round caps at least one leaf or changes nothing
        free = jnp.sum(jnp.where(dense, 0.0, sizes * raw))
        scale = (budget - jnp.sum(jnp.where(dense, sizes, 0.0))) / jnp.maximum(free, 1e-20)
        dense = dense | (scale * raw > 1.0)
    density = jnp.where(dense, 1.0, jnp.clip(scale * raw, 0.0, 1.0))
    return jax.tree.unflatten(treedef, list(1.0 - density))


def global_threshold(
    scores: Scores, sparsity: Any, *, normalize: bool = True, floor: float = 0.01
) -> Sparsities:
    """One threshold over all leaves, each scaled by its root mean square, none emptied.

    The scaling does not depend on the size of a leaf: two leaves of one distribution keep the
    same fraction, however large they are.

    Args:
      scores: a tree of scores.
      sparsity: global, in [0, 1].
      normalize: divide each leaf's scores by their root mean square.
      floor: the least density of a leaf, and at least one entry; what it adds is not taken back
        elsewhere.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> w = {"a": jax.random.normal(jax.random.key(0), (50, 50))}
      >>> round(float(jp.global_threshold(jp.magnitude(w), 0.9)["a"]), 2)
      0.9
    """
    leaves, treedef = jax.tree.flatten(scores)
    wide = [leaf.astype(jnp.float32) for leaf in leaves]
    if normalize:
        wide = [x / jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(x))), 1e-30) for x in wide]
    bits = [selection.ordered_bits(x) for x in wide]
    total = sum(x.size for x in wide)
    keep = jnp.round((1.0 - jnp.asarray(sparsity, jnp.float32)) * total).astype(jnp.int32)
    cut = selection.kth_largest(bits, jnp.maximum(keep, 1))
    least = [max(floor, 1.0 / x.size) for x in wide]
    kept = [jnp.where(keep > 0, jnp.mean(b >= cut, dtype=jnp.float32), 0.0) for b in bits]
    densities = [jnp.where(keep > 0, jnp.maximum(d, m), 0.0) for d, m in zip(kept, least)]
    return jax.tree.unflatten(treedef, [1.0 - d for d in densities])


def by_path(table: Mapping[str, float], default: Distribution = uniform) -> Distribution:
    """A sparsity per path pattern (``fnmatch``), the first that matches; others by ``default``.

    Args:
      table: pattern -> sparsity, for example ``{"*/Conv_*": 0.5, "*/Dense_*": 0.9}``.
      default: for the leaves that no pattern matches, at the global sparsity.

    Raises:
      ValueError: (on use) for a pattern that matches no leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> rule = jp.distributions.by_path({"conv*": 0.5})
      >>> rule({"conv": jnp.ones(4), "dense": jnp.ones(4)}, 0.9)
      {'conv': Array(0.5, dtype=float32), 'dense': Array(0.9, dtype=float32)}
    """

    def distribution(scores: Scores, sparsity: Any) -> Sparsities:
        flat, treedef = jax.tree_util.tree_flatten_with_path(scores)
        paths = [path_str(path) for path, _ in flat]
        for pattern in table:
            if not any(fnmatch.fnmatchcase(p, pattern) for p in paths):
                raise ValueError(f"by_path: {pattern!r} matches none of {paths[:8]}")
        out = jax.tree.leaves(default(scores, sparsity))
        for i, path in enumerate(paths):
            hit = next((v for p, v in table.items() if fnmatch.fnmatchcase(path, p)), None)
            out[i] = out[i] if hit is None else jnp.asarray(hit, jnp.float32)
        return jax.tree.unflatten(treedef, out)

    return distribution
