"""Scores that need the gradient of the loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.masks import check_structure
from jaxprune.scores.weights import is_float, widen
from jaxprune.types import Params, Scores, path_str


def saliency(params: Params, *, grad: Any, **evidence: Any) -> Scores:
    r"""Returns :math:`|w \cdot \partial L / \partial w|`, the first-order change of the loss.

    Half precision is multiplied in float32: small products would underflow to ties.

    Args:
      params: any pytree of arrays.
      grad: the gradient of the loss, a tree like params.

    Raises:
      TypeError: without ``grad``.
      ValueError: for a gradient of another structure or shape.

    References:
      Mozer and Smolensky, Skeletonization, 1988; per entry as connection sensitivity in Lee et
      al., [SNIP](https://arxiv.org/abs/1810.02340), 2019, eq. 5, there normalised to sum 1.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.saliency({"w": jnp.array([2.0])}, grad={"w": jnp.array([-3.0])})
      {'w': Array([6.], dtype=float32)}
    """
    signed = taylor(params, grad=grad)
    return jax.tree.map(lambda s: jnp.abs(s) if is_float(s) else s, signed)


def taylor(params: Params, *, grad: Any, **evidence: Any) -> Scores:
    r"""Returns the signed :math:`w \cdot \partial L / \partial w`, to be summed over a unit.

    ``jp.structured(structure, reduce="taylor")`` sums the entries of each unit first and squares
    the sum: entries that cancel within a unit then count as what they are, no change of the loss.
    To rank single entries use :func:`saliency`.

    Args:
      params: any pytree of arrays.
      grad: the gradient of the loss, a tree like params.

    Raises:
      TypeError: without ``grad``.
      ValueError: for a gradient of another structure or shape.

    References:
      Molchanov et al., [Importance Estimation](https://arxiv.org/abs/1906.10771), 2019, eq. 8;
      there over the weights of one filter, here over all slots of a unit.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.taylor({"w": jnp.array([2.0])}, grad={"w": jnp.array([-3.0])})
      {'w': Array([-6.], dtype=float32)}
    """
    check_structure("grad", grad, params, "pass grad=jax.grad(loss)(params)")

    def product(path: Any, w: Any, g: Any) -> Any:
        if not is_float(w):
            return w
        if np.shape(g) != np.shape(w):
            raise ValueError(
                f"the gradient of {path_str(path)} has shape {np.shape(g)}, the leaf "
                f"{np.shape(w)}; pass grad=jax.grad(loss)(params)"
            )
        wide = widen(w)
        return jnp.real(wide * jnp.asarray(g, wide.dtype))

    return jax.tree_util.tree_map_with_path(product, params, grad)
