"""Scores of second order: the change of the loss where its gradient is zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_float, widen
from jaxprune.masks import check_structure
from jaxprune.scores.required import required, required_tree
from jaxprune.typing import Params, Scores, path_str

_EIGH_AT_ONCE = 256  # So many blocks are factorized together.


def obd(params: Params, *, hessian: Any = None, **evidence: Any) -> Scores:
    r"""Returns :math:`h_{kk} w_k^2 / 2`, the change of the loss in Optimal Brain Damage.

    Args:
      params: any pytree of arrays.
      hessian: the diagonal of the Hessian, a tree like params, by
        :func:`jaxprune.scores.evidence.hessian_diagonal` or a method of your own. Entries may be
        negative: their removal is expected to lower the loss, and they go first.

    Raises:
      TypeError: without ``hessian``.
      ValueError: for a ``hessian`` of another structure or shape.

    References:
      LeCun et al., Optimal Brain Damage, 1989.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.obd({"w": jnp.array([2.0])}, hessian={"w": jnp.array([3.0])})
      {'w': Array([6.], dtype=float32)}
    """
    how = "hessian=jp.scores.evidence.hessian_diagonal(loss, params, batches, key=key)"
    required_tree("obd", "hessian", hessian, params, how)
    return _half_square(params, hessian)


def fisher(params: Params, *, fisher: Any = None, **evidence: Any) -> Scores:
    r"""Returns :math:`F_{kk} w_k^2 / 2`: :func:`obd` with the Fisher information, never negative.

    Args:
      params: any pytree of arrays.
      fisher: the mean of squared gradients of single examples, a tree like params, by
        :func:`jaxprune.scores.evidence.fisher_diagonal`.

    Raises:
      TypeError: without ``fisher``.
      ValueError: for a ``fisher`` of another structure or shape.

    References:
      Theis et al., `Fisher pruning <https://arxiv.org/abs/1801.05787>`__, 2018, there for whole
      feature maps; here per entry.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.fisher({"w": jnp.array([2.0])}, fisher={"w": jnp.array([3.0])})
      {'w': Array([6.], dtype=float32)}
    """
    how = "fisher=jp.scores.evidence.fisher_diagonal(loss, params, batches)"
    required_tree("fisher", "fisher", fisher, params, how)
    return _half_square(params, fisher)


def adam_fisher(params: Params, *, nu: Any = None, **evidence: Any) -> Scores:
    r"""Returns :math:`\nu_k w_k^2 / 2`: :func:`fisher` with Adam's second moment, which is there.

    The moment averages squares of *batch* gradients. Its bias correction is one number for all
    entries and changes no rank.

    Args:
      params: any pytree of arrays.
      nu: the second moment, a tree like params: ``optax.tree_utils.tree_get(state, "nu")``. Inside
        ``jp.prune`` it may be passed to ``update(grads, state, params, nu=nu)``.

    Raises:
      TypeError: without ``nu``.
      ValueError: for a ``nu`` of another structure or shape.

    References:
      Lee et al., `JaxPruner <https://arxiv.org/abs/2304.14082>`__, 2023, has it as an extension,
      without the factor 1/2.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> params = {"w": jnp.array([2.0])}
      >>> state = optax.adam(1e-3, b2=0.5).init(params)
      >>> jp.scores.adam_fisher(params, nu=optax.tree_utils.tree_get(state, "nu"))
      {'w': Array([0.], dtype=float32)}
    """
    how = 'nu=optax.tree_utils.tree_get(opt_state, "nu")'
    required_tree("adam_fisher", "nu", nu, params, how)
    return _half_square(params, nu)


def _half_square(params: Params, curvature: Any) -> Scores:
    def score(w: Any, h: Any) -> Any:
        if not is_float(w):
            return w
        size = jnp.abs(widen(w))  # w (h w): w^2 alone could underflow
        return size * (jnp.asarray(h, size.dtype) * size) / 2

    return jax.tree.map(score, params, curvature)


def woodfisher(
    params: Params, *, grads: Any = None, block: int = 64, damping: float = 1e-3, **evidence: Any
) -> Scores:
    r"""Returns the change of the loss when an entry goes and its block makes up for it.

    .. math:: \frac{w_q^2}{2 [F^{-1}]_{qq}}, \quad F = \frac{1}{n} \sum_i g_i g_i^T + \lambda I

    with F of blocks of neighbouring entries of a leaf in memory order, and :math:`\lambda` =
    ``damping`` times the mean of the diagonal of F over all leaves, so that scores don't depend on
    the scale of the loss. Takes ``block`` times the memory of params, and gathers leaves that are
    sharded, because blocks are cut in memory order; :func:`fisher` does neither.

    Args:
      params: any pytree of real arrays.
      grads: gradients of n examples, leaves (n, *shape), by
        :func:`jaxprune.scores.evidence.example_gradients`.
      block: entries per block; 1 is :func:`fisher`, up to the damping.
      damping: a positive number. Blocks larger than n are singular without it.

    Raises:
      TypeError: without ``grads``.
      ValueError: for ``grads`` of another structure or shape, a block below 1, or damping <= 0.

    References:
      Singh and Alistarh, `WoodFisher <https://arxiv.org/abs/2004.14340>`__, 2020, after
      Hassibi and Stork, Optimal Brain Surgeon, 1992. There :math:`\lambda` is absolute and the
      inverse is built up by rank-one updates; here each block is factorised. The update of the
      other weights, :math:`-w_q F^{-1} e_q / [F^{-1}]_{qq}`, is not applied.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> independent = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> jp.scores.woodfisher(params, grads=independent)["w"].round(2)
      Array([0.25, 0.25], dtype=float32)
      >>> same = {"w": jnp.array([[1.0, 1.0], [1.0, 1.0]])}  # each makes up for the other
      >>> jp.scores.woodfisher(params, grads=same)["w"].round(2)
      Array([0., 0.], dtype=float32)
    """
    how = "grads=jp.scores.evidence.example_gradients(loss, params, batch)"
    required("woodfisher", "grads", grads, how)
    check_structure("grads", grads, params, f"pass {how}")
    if not block >= 1 or not damping > 0:
        raise ValueError(
            f"woodfisher has block={block}, damping={damping}; wanted at least one entry a block, "
            "and a positive damping such as 1e-3"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pairs = [(p, w, g) for (p, w), g in zip(leaves, jax.tree.leaves(grads)) if is_float(w)]
    wide = [_checked(path_str(path), w, g, how) for path, w, g in pairs]
    entries = sum(w.size for _, w, _ in pairs)
    mean = sum(jnp.sum(jnp.mean(jnp.square(g), 0)) for g in wide) / max(entries, 1)
    floor = damping * jnp.where(mean > 0, mean, 1)
    scores = iter(
        [
            jnp.square(widen(w)) / (2 * _inverse(g, block, floor))
            for (_, w, _), g in zip(pairs, wide)
        ]
    )
    return jax.tree.map(lambda w: next(scores) if is_float(w) else w, params)


def _checked(path: str, w: Any, g: Any, how: str) -> jax.Array:
    if np.shape(g)[1:] != np.shape(w) or np.ndim(g) != np.ndim(w) + 1 or not len(g):
        raise ValueError(
            f"woodfisher: grads has shape {np.shape(g)} at {path}; wanted (n, *{np.shape(w)}), one "
            f"gradient per example; pass {how}"
        )
    return widen(g)


def _inverse(grads: jax.Array, block: int, floor: jax.Array) -> jax.Array:
    """The diagonal of the inverse of the damped Fisher, in blocks."""
    n, size = len(grads), grads[0].size
    block = max(min(block, size), 1)
    flat = jnp.pad(grads.reshape(n, size), ((0, 0), (0, -size % block)))
    blocks = flat.reshape(n, -1, block).transpose(1, 0, 2)

    def diagonal(g: jax.Array) -> jax.Array:
        # Eigenvalues of a singular block may come out below zero by a rounding.
        values, vectors = jnp.linalg.eigh(g.T @ g / n)
        return jnp.square(vectors) @ (1 / (jnp.maximum(values, 0) + floor))

    inverse = jax.lax.map(diagonal, blocks, batch_size=_EIGH_AT_ONCE)
    return inverse.ravel()[:size].reshape(grads.shape[1:])
