"""Scores that need a gradient of the loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.scores.weights import is_float
from jaxprune.types import Params, Scores


def _product(params: Params, grad: Any, name: str) -> Scores:
    want: Any = jax.tree.structure(params)
    got: Any = jax.tree.structure(grad)
    if want != got:
        raise ValueError(
            f"{name} got a gradient of structure {got}, params have {want}; pass "
            "grad=jax.grad(loss)(params)"
        )
    return jax.tree.map(lambda w, g: w * g if is_float(w) else w, params, grad)


def saliency(params: Params, *, grad: Any, **evidence: Any) -> Scores:
    r"""Returns :math:`|w \cdot \partial L / \partial w|`, the first-order change of the loss.

    Args:
      params: any pytree of arrays.
      grad: the gradient of the loss, a tree like params.

    References:
      Mozer and Smolensky, Skeletonization, 1988; as connection sensitivity in Lee et al.,
      [SNIP](https://arxiv.org/abs/1810.02340), 2019, eq. 5 (there normalised to sum 1).

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.saliency({"w": jnp.array([2.0])}, grad={"w": jnp.array([-3.0])})
      {'w': Array([6.], dtype=float32)}
    """
    return jax.tree.map(
        lambda s: jnp.abs(s) if is_float(s) else s, _product(params, grad, "saliency")
    )


def taylor(params: Params, *, grad: Any, **evidence: Any) -> Scores:
    r"""Returns the signed :math:`w \cdot \partial L / \partial w`, to be summed over a unit.

    ``jp.structured(structure, reduce="taylor")`` sums the entries of each unit first and squares
    the sum: cancelling entries of one unit then count as what they are, no change of the loss.

    References:
      Molchanov et al., [Importance Estimation](https://arxiv.org/abs/1906.10771), 2019, eq. 8;
      here over all slots of a dimension, there over one filter or gate.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.taylor({"w": jnp.array([2.0])}, grad={"w": jnp.array([-3.0])})
      {'w': Array([-6.], dtype=float32)}
    """
    return _product(params, grad, "taylor")
