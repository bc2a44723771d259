"""A threshold: entries whose score reaches it are kept, whatever sparsity follows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxprune._leaf import is_number, widen
from jaxprune.patterns._factory import factory
from jaxprune.patterns.choose import choose, is_kernel
from jaxprune.selection import known
from jaxprune.typing import Masks, Pattern, Scores, Where


@factory("jp.threshold(0.1)")
def threshold(tau: float | Callable[[str], float], *, where: Where = is_kernel) -> Pattern:
    """Returns the pattern that keeps the entries whose score is at least ``tau``.

    Args:
      tau: a number, or a function of the leaf's path: one value for convolutions, another for
        dense layers.
      where: (path, leaf) -> whether the leaf is pruned.

    Returns:
      ``(scores, sparsity=None) -> masks``; the sparsity follows from tau and is not read. A
      UserWarning names the leaves that would be emptied, where scores are known.

    Raises:
      ValueError: (on use) for a tau that isn't a number.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.threshold(2.0)({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])})["w"].astype(int)
      Array([[0, 1],
             [1, 1]], dtype=int32)
      >>> rule = jp.threshold(lambda path: 0.1 if "Conv" in path else 0.01)
    """

    def masks(scores: Scores, sparsity: Any) -> Masks:
        chosen = choose(scores, where)
        kept = {path: widen(leaf) >= _tau(tau, path) for path, leaf in chosen.leaves.items()}
        full = {path: mask for path, mask in kept.items() if mask.size and known(mask)}
        empty = [path for path, mask in full.items() if not bool(jnp.any(mask))]
        if empty:
            warnings.warn(
                f"threshold empties {', '.join(empty[:8])}: no score there reaches tau; pass a "
                "smaller tau for these paths",
                stacklevel=3,
            )
        return chosen.masks(kept)

    return Pattern(masks, "jp.threshold(...)", where)


def _tau(tau: Any, path: str) -> Any:
    value = tau(path) if callable(tau) else tau
    if not is_number(value) or (known(value) and math.isnan(value)):
        raise ValueError(
            f"threshold: tau for {path} is {value!r}; wanted a number, or a function of the path "
            "that returns one"
        )
    return value
