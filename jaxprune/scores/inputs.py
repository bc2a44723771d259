"""Scores from all statistics of the inputs that each weight multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_float, widen
from jaxprune.scores.required import check_stats, required
from jaxprune.sharding import on_meshes
from jaxprune.typing import Params, Scores

STATS = "stats=jp.calibrate(fn, params, batches)"  # Error messages quote this call.


@on_meshes(1)
def flap(params: Params, *, stats: Any = None, **evidence: Any) -> Scores:
    r"""Returns :math:`w_{ij}^2 \, \mathrm{Var}[x_i]`: summed over a unit, how much it fluctuates.

    What doesn't vary can be made up for by a bias (:func:`jp.oneshot.compensate`), so its variance
    is what a unit's removal costs. Leaves without statistics score 0. For
    ``jp.structured(structure, reduce=jp.reduce.sum)``; over several layers with a distribution that
    makes scores of layers comparable, or uniform: sums of different layers are not.

    Args:
      params: any pytree of arrays.
      stats: of :func:`jp.calibrate`; Gram matrices are not needed.

    Raises:
      TypeError: without ``stats``.
      ValueError: for statistics of other params.

    References:
      An et al., `FLAP <https://arxiv.org/abs/2312.11983>`__, 2024: the metric WIFV; its z-scores
      over layers are not built in here.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.array([[1.0], [2.0]])}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 5], [3.0, 5]])])
      >>> jp.scores.flap(params, stats=stats)
      {'w': Array([[1.],
             [0.]], dtype=float32)}
    """
    required("flap", "stats", stats, STATS)
    check_stats("flap", params, stats)
    return _per_input(params, lambda size, v: jnp.square(size) * v, stats.variances)


@on_meshes(1)
def activation_energy(params: Params, *, stats: Any = None, **evidence: Any) -> Scores:
    r"""Returns the mean square :math:`E[x_i^2]` of the input that an entry multiplies.

    The importance of hidden units by their activations alone; leaves without statistics score 0.

    Args:
      params: any pytree of arrays.
      stats: of :func:`jp.calibrate`; Gram matrices are not needed.

    Raises:
      TypeError: without ``stats``.
      ValueError: for statistics of other params.

    References:
      Muralidharan et al., `Minitron <https://arxiv.org/abs/2407.14679>`__, 2024, section 2; there
      the L2 norm over batches of means of absolute values.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 1))}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 2.0]])])
      >>> jp.scores.activation_energy(params, stats=stats)["w"][:, 0]
      Array([1., 4.], dtype=float32)
    """
    required("activation_energy", "stats", stats, STATS)
    check_stats("activation_energy", params, stats)
    return _per_input(
        params, lambda size, m, v: jnp.zeros_like(size) + (m**2 + v), stats.means, stats.variances
    )


def _per_input(params: Params, score: Callable[..., jax.Array], *statistics: Any) -> Scores:
    """``score(|w|, *statistics)`` in shapes that broadcast; 0 for a leaf that has none."""
    treedef: Any = jax.tree.structure(params)

    def one(w: Any, *own: Any) -> Any:
        if not is_float(w):
            return w
        size = jnp.abs(widen(w))
        if any(s is None for s in own):
            return jnp.zeros_like(size)
        return score(size, *(column(s, w).astype(size.dtype) for s in own))

    columns = (treedef.flatten_up_to(tree) for tree in (params, *statistics))
    return treedef.unflatten([one(*row) for row in zip(*columns)])


def column(statistic: jax.Array, leaf: Any) -> jax.Array:
    """Returns one number per input, in a shape that broadcasts to the leaf."""
    return statistic[:, None] if statistic.ndim < np.ndim(leaf) else statistic
