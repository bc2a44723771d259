"""Sparsities that one ranking of the entries of all leaves gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import widen
from jaxprune.scores.weights import lamp_of_sorted, root_mean_square
from jaxprune.selection import apportion, keep_counts, kept_total, known
from jaxprune.typing import Scores, Sparsities


def global_threshold(
    scores: Scores, sparsity: Any, *, normalize: bool = True, floor: float = 0.05
) -> Sparsities:
    """Returns the sparsities that one threshold over all leaves gives.

    Each leaf is divided by its root mean square first, which doesn't depend on its size: two
    leaves of one distribution keep the same fraction. No leaf is emptied: each keeps at least
    ``floor`` of its share of the total, and at least one entry; the others then keep as much less.
    Of all n entries n - round(sparsity * n) are kept, or one of each leaf where those are more.

    Args:
      scores: floats of any size. Entries of infinite score count as zeros in the mean.
      sparsity: global, in [0, 1].
      normalize: False compares scores across leaves as they are.
      floor: a fraction in [0, 1]; 1 is uniform, 0 leaves one entry. Shares are in proportion to
        the sizes of leaves.

    Raises:
      ValueError: for a floor outside [0, 1], and for 2**31 entries or more without 64-bit types.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxprune as jp
      >>> w = {"a": jax.random.normal(jax.random.key(0), (50, 50))}
      >>> round(float(jp.global_threshold(jp.magnitude(w), 0.9)["a"]), 2)
      0.9
      >>> raw = functools.partial(jp.global_threshold, normalize=False)
      >>> pattern = jp.unstructured(raw)
    """
    return _removed(scores, _kept_by_threshold(scores, sparsity, normalize=normalize, floor=floor))


def _kept_by_threshold(
    scores: Scores, sparsity: Any, *, normalize: bool = True, floor: float = 0.05
) -> Any:
    """How many entries of each leaf :func:`global_threshold` keeps."""
    if not 0 <= floor <= 1:
        raise ValueError(
            f"floor is {floor}; wanted the fraction in [0, 1] of its uniform share that a leaf "
            "keeps at least, such as 0.05"
        )
    leaves, treedef = jax.tree.flatten(scores)
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    wide = [jnp.asarray(leaf, jnp.float64 if double else jnp.float32) for leaf in leaves]
    if normalize:
        wide = [x / root_mean_square(x) for x in wide]
    sizes = tuple(x.size for x in wide)
    shares = apportion(kept_total(sizes, sparsity), sizes)
    least = jnp.ceil(floor * shares.astype(jnp.float32)).astype(shares.dtype)
    least = jnp.clip(least, jnp.minimum(shares, 1), shares)
    return jax.tree.unflatten(treedef, keep_counts(wide, shares, least))


def _removed(scores: Scores, kept: Any) -> Sparsities:
    """The sparsity of each leaf of which so many entries are kept."""

    def fraction(x: Any, n: jax.Array) -> Any:
        removed = (x.size - n) if not known(n) else x.size - np.asarray(n, np.float64)
        return removed / max(x.size, 1)

    return jax.tree.map(fraction, scores, kept)


def lamp(scores: Scores, sparsity: Any) -> Sparsities:
    """Returns the sparsities that one threshold over the LAMP scores of all leaves gives.

    For scores that are magnitudes. Free of the scale of each leaf, and no leaf is emptied. Within
    a leaf the LAMP score ranks as the score itself does. Each leaf is sorted, which stores it
    several times over and gathers it where it is sharded; :func:`global_threshold` does neither.

    Args:
      scores: not negative, such as ``jp.magnitude``; other entries count as 0.
      sparsity: global, in [0, 1].

    References:
      Lee et al., `Layer-adaptive sparsity <https://arxiv.org/abs/2010.07611>`__, 2021, see
      :func:`jaxprune.scores.lamp`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> w = {"flat": jnp.ones(4), "peaked": jnp.array([8.0, 4.0, 0.2, 0.1])}
      >>> sparsities = jp.distributions.lamp(jp.magnitude(w), 0.5)
      >>> {path: float(s) for path, s in sparsities.items()}
      {'flat': 0.25, 'peaked': 0.75}
    """

    return _removed(scores, _kept_by_lamp(scores, sparsity))


def _kept_by_lamp(scores: Scores, sparsity: Any) -> Any:
    """How many entries of each leaf :func:`lamp` keeps."""

    def ranked(x: jax.Array) -> jax.Array:
        finite = jnp.where(jnp.isfinite(x), jnp.maximum(widen(x), 0), 0)
        return lamp_of_sorted(jnp.sort(finite.ravel(), descending=True))  # only counts matter

    lamps = jax.tree.map(ranked, scores)
    return _kept_by_threshold(lamps, sparsity, normalize=False, floor=0)


# Distributions that rank all leaves together -> how many entries of each they keep. A float32 holds
# no fraction of 2**24 entries exactly, and so patterns ask for these counts.
_COUNTS: dict[Any, Callable[..., Any]] = {
    global_threshold: _kept_by_threshold,
    lamp: _kept_by_lamp,
}


def counts_of(distribution: Any) -> Callable[..., Any] | None:
    """``(scores, sparsity) ->`` entries kept per leaf, of a distribution that has exact ones."""
    if isinstance(distribution, functools.partial):
        counts = counts_of(distribution.func)
        bound = distribution.args, distribution.keywords
        return counts and functools.partial(counts, *bound[0], **bound[1])
    try:
        return _COUNTS.get(distribution)
    except TypeError:  # not hashable
        return None
