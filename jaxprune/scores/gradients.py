"""Scores that need the gradient of the loss, or its product with the Hessian."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._leaf import is_float, widen
from jaxprune.scores.required import required_tree
from jaxprune.scores.weights import map_floats
from jaxprune.typing import Params, Scores

GRAD = "grad=jax.grad(loss)(params)"


def saliency(params: Params, *, grad: Any = None, **evidence: Any) -> Scores:
    r"""Returns :math:`|w \cdot \partial L / \partial w|`, the first-order change of the loss.

    Half precision is multiplied in float32: small products would underflow to ties.

    Args:
      params: any pytree of arrays.
      grad: the gradient of the loss, a tree like params.

    Raises:
      TypeError: without ``grad``.
      ValueError: for a gradient of another structure or shape.

    References:
      Mozer and Smolensky, Skeletonization, 1988. Normalised to sum 1 it is :func:`snip`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.saliency({"w": jnp.array([2.0])}, grad={"w": jnp.array([-3.0])})
      {'w': Array([6.], dtype=float32)}
    """
    required_tree("saliency", "grad", grad, params, GRAD)
    return map_floats(jnp.abs, _products(params, grad))


def snip(params: Params, *, grad: Any = None, **evidence: Any) -> Scores:
    r"""Returns the connection sensitivity: :func:`saliency`, divided by its sum over all leaves.

    .. math:: |g_j| / \sum_k |g_k|, \quad g_j = w_j \, \partial L / \partial w_j

    Within one call it ranks as saliency does. To prune before training, rank all leaves by one
    threshold as they are: ``functools.partial(jp.global_threshold, normalize=False, floor=0)``.

    Args:
      params: any pytree of arrays.
      grad: the gradient of the loss over one batch or more, a tree like params.

    Raises:
      TypeError: without ``grad``.
      ValueError: for a gradient of another structure or shape.

    References:
      Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`__, 2019. There only the leaves to be
      pruned count in the sum; here all do.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.snip({"w": jnp.array([2.0, 1.0])}, grad={"w": jnp.array([-3.0, 2.0])})
      {'w': Array([0.75, 0.25], dtype=float32)}
    """
    required_tree("snip", "grad", grad, params, GRAD)
    scores = map_floats(jnp.abs, _products(params, grad))
    floats = [s for s in jax.tree.leaves(scores) if is_float(s)]
    # Divided twice, so that no sum overflows.
    largest = _positive(jnp.stack([jnp.max(s, initial=0) for s in floats]).max(initial=0))
    total = _positive(jnp.stack([jnp.sum(s / largest) for s in floats]).sum())
    return map_floats(lambda s: s / largest / total, scores)


def _positive(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)


def taylor(params: Params, *, grad: Any = None, **evidence: Any) -> Scores:
    r"""Returns the signed :math:`w \cdot \partial L / \partial w`, to be summed over a unit.

    ``jp.structured(structure, reduce=jp.reduce.taylor)`` sums the entries of each unit first and
    squares the sum: entries that cancel within a unit then count as what they are, no change of the
    loss. To rank single entries use :func:`saliency`.

    Args:
      params: any pytree of arrays.
      grad: the gradient of the loss, a tree like params.

    Raises:
      TypeError: without ``grad``.
      ValueError: for a gradient of another structure or shape.

    References:
      Molchanov et al., `Importance Estimation <https://arxiv.org/abs/1906.10771>`__, 2019, eq. 8;
      there over the weights of one filter, here over all slots of a unit.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.taylor({"w": jnp.array([2.0])}, grad={"w": jnp.array([-3.0])})
      {'w': Array([-6.], dtype=float32)}
    """
    required_tree("taylor", "grad", grad, params, GRAD)
    return _products(params, grad)


def movement(
    params: Params, *, grad: Any = None, previous: Scores | None = None, **evidence: Any
) -> Scores:
    r"""Returns :math:`-w \cdot \partial L / \partial w`: positive where a step grows the weight.

    .. math:: S_T = -\sum_{t \le T} w_t \, \partial L / \partial w_t

    is the sum along training, one term a call: pass what the last step returned as ``previous``.

    Args:
      params: any pytree of arrays.
      grad: the gradient of the loss, a tree like params.
      previous: the sum of the steps before, a tree of scores; None at the first one.

    Raises:
      TypeError: without ``grad``.
      ValueError: for a gradient or previous scores of another structure or shape.

    References:
      Sanh et al., `Movement Pruning <https://arxiv.org/abs/2005.07683>`__, 2020. There the masks'
      gradient passes straight through to the scores and is scaled by a learning rate, and
      pruned weights are trained on; here the sum alone.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, grad = {"w": jnp.array([2.0, 2.0])}, {"w": jnp.array([-3.0, 1.0])}
      >>> scores = jp.scores.movement(params, grad=grad)
      >>> jp.scores.movement(params, grad=grad, previous=scores)
      {'w': Array([12., -4.], dtype=float32)}
    """
    required_tree("movement", "grad", grad, params, GRAD)
    scores = map_floats(jnp.negative, _products(params, grad))
    if previous is None:
        return scores
    required_tree("movement", "previous", previous, params, "previous=the last step's scores")
    return jax.tree.map(lambda s, old: s + old if is_float(s) else s, scores, previous)


def grasp(params: Params, *, hvp: Any = None, **evidence: Any) -> Scores:
    r"""Returns :math:`w \cdot (H g)`, by how much an entry's removal lowers the gradient's norm.

    With :math:`g` the gradient and :math:`H` the Hessian of the loss. Signed: entries of negative
    score hinder the gradient, and go first.

    Args:
      params: any pytree of arrays.
      hvp: H g, a tree like params, by :func:`jaxprune.scores.evidence.gradient_flow`.

    Raises:
      TypeError: without ``hvp``.
      ValueError: for an ``hvp`` of another structure or shape.

    References:
      Wang et al., `GraSP <https://arxiv.org/abs/2002.07376>`__, 2020. The
      paper's score is -w H g and its largest are removed; here the sign is turned, larger = keep.
      The softmax temperature of the authors' code belongs into the loss.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(x * p["w"] ** 2) / 2  # g = x w, H g = x^2 w
      >>> params, x = {"w": jnp.array([2.0, 1.0])}, jnp.array([1.0, 3.0])
      >>> hvp = jp.scores.evidence.gradient_flow(loss, params, [(x,)])
      >>> jp.scores.grasp(params, hvp=hvp)
      {'w': Array([4., 9.], dtype=float32)}
    """
    how = "hvp=jp.scores.evidence.gradient_flow(loss, params, batches)"
    required_tree("grasp", "hvp", hvp, params, how)
    return _products(params, hvp)


def _products(params: Params, tree: Any) -> Scores:
    def product(w: Any, g: Any) -> Any:
        if not is_float(w):
            return w
        wide = widen(w)
        return jnp.real(wide * jnp.asarray(g, wide.dtype))

    return jax.tree.map(product, params, tree)
