"""Sparsities that follow from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.selection import known
from jaxprune.typing import Scores, Sparsities


def uniform(scores: Scores, sparsity: Any) -> Sparsities:
    """Returns the same sparsity for every leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> sparsities = jp.uniform({"a": jnp.ones(4), "b": jnp.ones(9)}, 0.5)
      >>> {path: float(s) for path, s in sparsities.items()}
      {'a': 0.5, 'b': 0.5}
    """
    same = np.asarray(sparsity) if known(sparsity) else sparsity  # 0.9 as is, not as a float32
    return jax.tree.map(lambda _: same, scores)


def erk(scores: Scores, sparsity: Any, *, power: float = 1.0) -> Sparsities:
    r"""Returns Erdős–Rényi-Kernel sparsities: large leaves become sparser than small ones.

    .. math:: 1 - s_l = \min(1, \lambda (\sum_i d_{l,i} / \prod_i d_{l,i})^p)

    for a leaf of shape :math:`(d_{l,1}, d_{l,2}, \dots)`, with the one :math:`\lambda` for which
    the mean over all entries is the target. Capped leaves are dense and the others make up for it.

    Args:
      scores: only the shapes of its leaves matter.
      sparsity: global, in [0, 1].
      power: 0 is uniform; ``functools.partial(jp.erk, power=0.5)`` lies half-way.

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`__, 2020, section 3(1), after Mocanu et
      al., `SET <https://arxiv.org/abs/1707.04780>`__, 2018. Their code caps one leaf a round and
      solves again; this is the same solution in closed form.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> sparsities = jp.erk({"a": jnp.ones((10, 10)), "b": jnp.ones((100, 100))}, 0.9)
      >>> {path: round(float(s), 3) for path, s in sparsities.items()}
      {'a': 0.082, 'b': 0.908}
    """
    leaves, treedef = jax.tree.flatten(scores)
    shapes = [np.shape(leaf) for leaf in leaves if np.size(leaf)]
    if not shapes:
        return uniform(scores, sparsity)
    of = _erk_sparsities(shapes, sparsity, power)
    return jax.tree.unflatten(treedef, [of.get(np.shape(x), np.zeros(())) for x in leaves])


def _erk_sparsities(
    shapes: Sequence[tuple[int, ...]], sparsity: Any, power: float
) -> dict[tuple[int, ...], Any]:
    """One for each shape of leaves that have entries."""
    sizes = np.array([np.prod(shape) for shape in shapes], np.float64)
    raw = (np.array([max(sum(shape), 1) for shape in shapes]) / sizes) ** power
    # With the leaves in order of raw, the first j of them capped, lambda solves a line; the mean
    # density is the lower envelope of these lines, so the largest of the solutions is the one.
    order = np.argsort(-raw)
    entries, slopes = sizes[order], (sizes * raw)[order]
    capped = np.cumsum(entries) - entries
    xp = np if known(sparsity) else jnp
    wanted = (1.0 - xp.asarray(sparsity)) * float(sizes.sum())
    scale = xp.max(
        (wanted - capped.astype(wanted.dtype)) / _suffix_sums(slopes).astype(wanted.dtype)
    )
    densities = {
        shape: xp.asarray(xp.clip(scale * xp.asarray(r, wanted.dtype), 0, 1))
        for shape, r in dict(zip(shapes, raw)).items()
    }
    return {shape: 1 - density for shape, density in densities.items()}


def _suffix_sums(x: np.ndarray) -> np.ndarray:
    return np.cumsum(x[::-1])[::-1]
