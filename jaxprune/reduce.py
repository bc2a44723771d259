"""How the entry scores of a unit become its one score: ``reduce=`` of ``jp.structured``.

A reduction is a function ``(sums, counts) -> scores``. Its arguments are vectors over the units of
one dimension: the sum of the entry scores in all slots of each unit, and how many entries there
are. It must be traceable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Reduction = Callable[[jax.Array, np.ndarray], jax.Array]


def mean(sums: jax.Array, counts: np.ndarray) -> jax.Array:
    """Returns the mean entry score of each unit, (units,); 0 for a unit without entries.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> jp.reduce.mean(jnp.array([6.0, 0.0]), np.array([3, 0]))
      Array([2., 0.], dtype=float32)
    """
    return sums / np.maximum(counts, 1)


def sum(sums: jax.Array, counts: np.ndarray) -> jax.Array:
    """Returns the sum of each unit's entry scores, (units,): of squares, a squared L2 norm.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> jp.reduce.sum(jnp.array([6.0, 0.0]), np.array([3, 0]))
      Array([6., 0.], dtype=float32)
    """
    return sums


def taylor(sums: jax.Array, counts: np.ndarray) -> jax.Array:
    """Returns the squared sum of each unit's entry scores, (units,): for ``jp.scores.taylor``.

    Its entries are signed: those that cancel within a unit change the loss by nothing.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> jp.reduce.taylor(jnp.array([-3.0, 0.0]), np.array([3, 2]))
      Array([9., 0.], dtype=float32)
    """
    return jnp.square(sums)


NAMED = {function.__name__: function for function in (mean, sum, taylor)}


def check_reduce(reduce: Any) -> None:
    """Raises ValueError unless a reduction is a function; for an old name it says which one."""
    if callable(reduce):
        return
    instead = f"jp.reduce.{reduce}" if reduce in tuple(NAMED) else "jp.reduce.mean"
    raise ValueError(
        f"reduce is {reduce!r}; wanted a function (sums, counts) -> scores of units: pass "
        f"reduce={instead}"
    )
