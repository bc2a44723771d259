"""Holding a small module against the compact function, and saying what keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction import checking
from jaxprune.compaction.small_function import SmallFunction
from jaxprune.typing import Compact

TOLERANCE = 1e-5  # the largest relative error of any output
ROUNDINGS = 8  # or so many units of rounding, where parameters are in fewer bits


def tolerance(params: Any) -> float:
    """What a folded scale may round."""
    types = [x.dtype for x in jax.tree.leaves(params) if _floating(x)]
    return max([TOLERANCE, *(ROUNDINGS * float(jnp.finfo(t).eps) for t in types)])


def error(pure: Callable[..., Any], arrays: Any, small: Compact) -> float:
    """The largest relative error of a module's outputs on random arguments, in float64 if it can.

    Raises what the module raises.
    """
    args = small.certificate._checker.args
    try:
        with jax.enable_x64(True):
            wide = jax.tree.map(_widen, (arrays, small.params))
            return _error(pure, *wide, small, _drawn(args, jnp.float64))
    except (TypeError, ValueError, jax.errors.JaxRuntimeError):  # a function that fixes its types
        return _error(pure, arrays, small.params, small, _drawn(args, None))


def _error(pure: Callable[..., Any], arrays: Any, params: Any, small: Compact, args: Any) -> float:
    got = jax.tree.leaves(jax.jit(pure)(arrays, *args))
    expected = jax.tree.leaves(jax.jit(small.fn)(params, *args))
    if [np.shape(x) for x in got] != [np.shape(x) for x in expected]:
        return float("inf")
    return float(np.max([0.0, *map(checking.error, expected, got)]))


def _drawn(args: Any, dtype: Any) -> Any:
    return checking.draw(jax.random.key(0), args, dtype)


def fitting(
    calls: tuple[Callable[..., Any], ...], bare: Any, module: Any, small: Compact
) -> Callable[..., Any] | None:
    """The first call that gives what the function does, by shapes at full size."""
    function: SmallFunction = small.fn  # type: ignore[assignment]
    params, args = function.traced_for
    wanted = _shapes(jax.eval_shape(function.fn, params, *args))
    for call in calls:
        pure, arrays = bare(call, module)
        try:
            if _shapes(jax.eval_shape(pure, arrays, *args)) == wanted:
                return call
        except Exception:  # whatever a call that is not meant raises
            continue
    return None


def _shapes(tree: Any) -> Any:
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _floating(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def _widen(x: Any) -> Any:
    return jnp.asarray(x, jnp.float64) if _floating(x) else x
