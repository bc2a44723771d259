"""Sparsities that spare layers with many outliers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import widen
from jaxprune.typing import Scores, Sparsities, path_str


def owl(
    scores: Scores,
    sparsity: Any,
    *,
    outlier: float = 5.0,
    spread: float = 0.08,
    layer: Callable[[str], str] | None = None,
) -> Sparsities:
    r"""Returns sparsities that spare layers with many outliers.

    An outlier is an entry whose score exceeds ``outlier`` times the mean of its layer. With
    :math:`D_l` the fraction of outliers of a layer, scaled over all layers to the range [0, 1],

    .. math:: 1 - s_l = \min(1, \max(0, 2 \lambda D_l + c))

    with the one c for which the mean over all entries is the target. Made for
    ``jp.scores.wanda``.

    Args:
      scores: not negative; entries that are not finite count as 0.
      sparsity: global, in [0, 1].
      outlier: the multiple of the mean, M in the paper.
      spread: lambda: sparsities differ by at most twice that.
      layer: path -> name of the layer that a leaf belongs to, such as
        ``lambda path: path.split("/")[1]``; its leaves get one sparsity. By default each leaf is
        its own.

    Raises:
      ValueError: for a negative spread.

    References:
      Yin et al., `OWL <https://arxiv.org/abs/2310.05175>`__, 2023. There layers are blocks of a
      transformer, all of one size, and the mean is over blocks; here it is over entries, so that
      the total is the target for leaves of any size. M = 5 and lambda = 0.08 are used there, too.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> scores = {"calm": jnp.ones(100), "wild": jnp.ones(100).at[0].set(50.0)}
      >>> sparsities = jp.distributions.owl(scores, 0.7)
      >>> {path: round(float(s), 2) for path, s in sparsities.items()}
      {'calm': 0.78, 'wild': 0.62}
    """
    if not spread >= 0:
        raise ValueError(f"spread is {spread}; wanted a number >= 0 such as 0.08")
    flat, treedef = jax.tree_util.tree_flatten_with_path(scores)
    if not flat:
        return scores
    names = [layer(path_str(path)) if layer else str(i) for i, (path, _) in enumerate(flat)]
    members: dict[str, list[jax.Array]] = {}
    for name, (_, leaf) in zip(names, flat, strict=True):
        members.setdefault(name, []).append(leaf)
    part = jnp.stack([_outliers(leaves, outlier) for leaves in members.values()])
    width = jnp.max(part) - jnp.min(part)
    wanted = 2 * spread * (part - jnp.min(part)) / jnp.where(width > 0, width, 1)
    sizes = np.array([sum(x.size for x in leaves) for leaves in members.values()], np.float64)
    density = _shifted(wanted, sizes / max(sizes.sum(), 1), 1 - jnp.asarray(sparsity, wanted.dtype))
    of = dict(zip(members, 1 - density))
    return jax.tree.unflatten(treedef, [of[name] for name in names])


def _outliers(leaves: Sequence[jax.Array], multiple: float) -> jax.Array:
    """The fraction of entries above a multiple of their mean; a scale does no matter."""
    wide = [jnp.where(jnp.isfinite(x), widen(x), 0) for x in leaves]
    largest = jnp.stack([jnp.max(x, initial=0) for x in wide]).max()
    wide = [x / jnp.where(largest > 0, largest, 1) for x in wide]
    size = max(sum(x.size for x in wide), 1)
    mean = jnp.stack([jnp.sum(x) for x in wide]).sum() / size
    above = [jnp.sum(x > multiple * mean).astype(jnp.float32) for x in wide]
    return jnp.stack(above).sum() / size


def _shifted(x: jax.Array, weights: np.ndarray, mean: Any) -> jax.Array:
    """clip(x + c, 0, 1) with the c for which the weighted mean is as given, by bisection."""
    share = jnp.asarray(weights, x.dtype)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        c = (low + high) / 2
        enough = jnp.sum(share * jnp.clip(x + c, 0, 1)) >= mean
        return jnp.where(enough, low, c), jnp.where(enough, c, high)

    ends = -jnp.max(x), 1 - jnp.min(x)  # all 0, all 1
    low, high = jax.lax.fori_loop(0, 2 * jnp.finfo(x.dtype).bits, halve, ends)
    return jnp.clip(x + (low + high) / 2, 0, 1)
