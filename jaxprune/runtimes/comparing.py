"""Whether an engine gives what JAX does on the arguments that a function was compiled with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxprune.compaction.checking import error
from jaxprune.compaction.model import Compact

SAME = 1e-4  # A float program whose results are further off, relatively, is not what it should be.
ARRAYS = (np.ndarray, np.generic, jax.Array)


def tell_difference(name: str, run: Callable[..., Any], fn: Any, args: tuple[Any, ...]) -> None:
    """Warns where results differ; what is no array, or NaN in JAX, is not compared.

    Args:
      name: of the runtime.
      run: the function in it.
      fn: the function, or a compact model, in JAX.
      args: arguments of both.
    """
    if not all(isinstance(x, ARRAYS) for x in jax.tree.leaves(args)):
        return
    call = partial(fn.fn, fn.params) if isinstance(fn, Compact) else fn
    with jax.default_matmul_precision("highest"):  # Accelerators round inputs unless told not to.
        wanted = jax.tree.leaves(jax.jit(call)(*args))
    found = [error(a, b) for a, b in zip(wanted, jax.tree.leaves(run(*args)), strict=True)]
    furthest = max([0.0, *(x for x in found if not np.isnan(x))])
    if furthest > SAME:
        warnings.warn(
            f"{name} gives other results than JAX on these arguments: they differ by "
            f"{furthest:.2g} of the largest one; jp.export would not write this program",
            stacklevel=3,
        )
