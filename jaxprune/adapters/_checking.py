"""Holding a small module against the compact function, and saying what keeps them apart."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction import checking
from jaxprune.typing import Compact

TOLERANCE = 1e-5  # the largest relative error of any output
FIXED_TYPES = (TypeError, ValueError, RuntimeError)  # what functions raise that fix their types
ROUNDINGS = 8  # or so many units of rounding, where parameters are in fewer bits


def tolerance(params: Any) -> float:
    """What a folded scale may round."""
    types = [x.dtype for x in jax.tree.leaves(params) if floating(x)]
    return max([TOLERANCE, *(ROUNDINGS * float(jnp.finfo(t).eps) for t in types)])


@dataclass(eq=False)
class Reference:
    """What a function gives for random arguments, in float64 if that works; computed once."""

    fn: Callable[..., Any]
    params: Any
    args: Any

    def error(self, run: Callable[..., Any]) -> float:
        """The largest relative error of ``run(wide, *args)``. Raises what the module raises."""
        return self.measured(lambda wide, args, expected: _error(run(wide, *args), expected))

    def measured(self, measure: Callable[[bool, Any, Any], float]) -> float:
        """``measure(wide, args, outputs)``, in float64 if that works, else in the given types."""
        if self._wide is not None:
            with contextlib.suppress(*FIXED_TYPES), jax.enable_x64(True):
                return measure(True, *self._wide)
        return measure(False, *self._given)

    @functools.cached_property
    def _wide(self) -> Any:
        with contextlib.suppress(*FIXED_TYPES), jax.enable_x64(True):
            return self._outputs(widened(self.params), jnp.float64)
        return None

    @functools.cached_property
    def _given(self) -> Any:
        return self._outputs(self.params, None)

    def _outputs(self, params: Any, dtype: Any) -> Any:
        """Arguments, drawn or else as given, for which there are numbers, and the outputs."""
        given = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(self.args))
        drawn = checking.draw(jax.random.key(0), self.args, dtype)
        for args in (drawn,) if given else (drawn, self.args):
            outputs = jit(self.fn)(params, *args)
            if not any(np.isnan(x).any() for x in jax.tree.leaves(outputs) if floating(x)):
                return args, outputs
        raise NotNumbers(
            "small.fn gives NaN at random arguments of the example's types, so that no module can "
            "be compared with it; compact with example arguments (arrays) at which it gives numbers"
        )


def jit(fn: Callable[..., Any]) -> Any:
    """Compiled in a hurry: it runs once."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


class NotNumbers(ArithmeticError):
    """A function without numbers to compare."""


def _error(got: Any, expected: Any) -> float:
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(got)))
    if [np.shape(x) for x in jax.tree.leaves(got)] != [np.shape(x) for x, _ in pairs]:
        return float("inf")
    return float(np.max([0.0, *(checking.error(*pair) for pair in pairs)]))


def fitting(
    calls: tuple[Callable[..., Any], ...], bare: Any, module: Any, small: Compact
) -> Callable[..., Any] | None:
    """The first call that gives what the function does, by shapes at full size."""
    function: Any = small.fn
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


def floating(x: Any) -> bool:
    """Is it an array of real floats?"""
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def widened(tree: Any) -> Any:
    """The tree with its floats in float64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if floating(x) else x, tree)
