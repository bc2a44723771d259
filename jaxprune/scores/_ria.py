"""Relative importance and activations: a score that rows and columns share in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._leaf import is_float, widen
from jaxprune.scores.activations import NORMS, by_input
from jaxprune.scores.required import required
from jaxprune.typing import Params, Scores


def ria(params: Params, *, input_norms: Any = None, power: float = 0.5, **evidence: Any) -> Scores:
    r"""Returns RIA, a weight relative to its input's and its output's weights, times its input.

    .. math::
       \Big( \frac{|w_{ij}|}{\sum_j |w_{ij}|} + \frac{|w_{ij}|}{\sum_i |w_{ij}|} \Big)
       \, \lVert x_i \rVert_2^{\,a}

    Args:
      params: any pytree of arrays; kernels are (..., in, out).
      input_norms: as :func:`wanda` takes it; where it is None the norms count as 1.
      power: a, 0.5 in the paper.

    Raises:
      TypeError: without ``input_norms``.
      ValueError: for another structure, or norms that do not fit.

    References:
      Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
      Models, ICLR 2024, for kernels that are the transposes of the
      paper's.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, norms = {"w": jnp.array([[1.0, 3.0], [1.0, 1.0]])}, {"w": jnp.array([1.0, 4.0])}
      >>> jp.scores.ria(params, input_norms=norms)
      {'w': Array([[0.75, 1.5 ],
             [2.  , 1.5 ]], dtype=float32)}
    """
    required("ria", "input_norms", input_norms, NORMS)
    relative = jax.tree.map(_relative, params)
    return by_input("ria", input_norms, relative, lambda size, norms: size * norms**power)


def _relative(w: Any) -> Any:
    if not is_float(w) or w.ndim < 2:
        return w
    size = jnp.abs(widen(w))
    return sum(_share(size, axis) for axis in (-1, -2))


def _share(size: jax.Array, axis: int) -> jax.Array:
    whole = jnp.sum(size, axis, keepdims=True)
    return jnp.where(whole == 0, 0, size / jnp.where(whole == 0, 1, whole))  # NaN stays
