"""SynFlow: what flows through an entry when all weights and inputs are positive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._leaf import is_float, widen
from jaxprune.scores.evidence import split
from jaxprune.scores.required import required
from jaxprune.scores.weights import map_floats
from jaxprune.typing import Params, Scores


def synflow(
    params: Params,
    *,
    fn: Any = None,
    args: tuple[Any, ...] = (),
    **evidence: Any,
) -> Scores:
    r"""Returns the synaptic flow through each entry; needs a function and shapes, but no data.

    .. math:: |w| \, \frac{\partial R}{\partial |w|}, \quad R = \sum f_{|w|}(\mathbf{1})

    In networks of linear maps and ReLUs without biases the flow is conserved: each layer's scores
    sum to R, so that a layer is emptied only when all others are. That holds under iteration, at
    an exponential schedule: ``jp.scores.in_rounds``, or ``jp.prune`` with
    ``jp.schedules.exponential``. One threshold ranks all leaves as they are:
    ``functools.partial(jp.global_threshold, normalize=False, floor=0)``.

    Args:
      params: any pytree of arrays.
      fn: ``fn(params, *args)``: the network, or any of its outputs, in evaluation mode.
      args: arrays or ``jax.ShapeDtypeStruct``; floats are replaced by ones, others used as given.

    Raises:
      TypeError: without ``fn``.

    References:
      Tanaka et al., `SynFlow <https://arxiv.org/abs/2006.05467>`__, 2020, algorithm 1. As there,
      absolute values are taken of biases and batch statistics, too; other activations
      than ReLU are used as they are. R grows with depth: where it leaves the range of float32, cast
      params to float64 (as the authors do).

    Example:
      >>> import functools, jax.numpy as jnp, jaxprune as jp
      >>> fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> params = {"up": jnp.array([[1.0, -2.0]]), "down": jnp.array([[3.0], [0.5]])}
      >>> jp.scores.synflow(params, fn=fn, args=(jnp.zeros((1, 1)),))
      {'down': Array([[3.],
             [1.]], dtype=float32), 'up': Array([[3., 1.]], dtype=float32)}
      >>> score = functools.partial(jp.scores.synflow, fn=fn, args=(jnp.zeros((1, 1)),))
    """
    how = "functools.partial(jp.scores.synflow, fn=model.apply, args=(x,))"
    required("synflow", "fn", fn, how)
    sizes, join = split(map_floats(lambda w: jnp.abs(widen(w)), params))
    grad = jax.grad(lambda sizes: total_flow(fn, join(sizes), args))(sizes)
    return join([w * g for w, g in zip(sizes, grad)])


def total_flow(fn: Callable[..., Any], params: Params, args: tuple[Any, ...]) -> jax.Array:
    """R: the sum of all outputs for inputs of ones."""
    outputs = [y for y in jax.tree.leaves(fn(params, *jax.tree.map(_one, args))) if is_float(y)]
    return sum((jnp.sum(jnp.real(y), dtype=float) for y in outputs), jnp.zeros((), float))


def _one(x: Any) -> Any:
    if is_float(x):
        return jnp.ones(x.shape, jnp.promote_types(x.dtype, jnp.float32))  # as params are
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
