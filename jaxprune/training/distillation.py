"""Distillation: losses that teach a pruned network what another one knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Outputs = Any  # what networks return: logits, or any pytree with hidden states and attention


def distill(
    student: Callable[..., Outputs],
    teacher: Callable[..., Outputs],
    loss: Callable[[Outputs, Outputs], jax.Array],
) -> Callable[..., jax.Array]:
    """Returns ``(params, *args) -> loss(student(params, *args), teacher(*args))``.

    No gradient flows into the teacher, which may be any function: a dense network closed over its
    params, an average of several, a table of saved logits.

    Args:
      student: ``(params, *args) -> outputs``.
      teacher: ``(*args) -> outputs``.
      loss: ``(student's outputs, teacher's outputs) ->`` a number or one per example; their mean is
        taken.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> fn = lambda params, x: x @ params
      >>> dense = jnp.eye(2)
      >>> loss = jp.training.distill(fn, lambda x: fn(dense, x), jp.training.logit_loss)
      >>> float(loss(dense, jnp.ones((3, 2))))
      0.0
      >>> grads = jax.grad(loss)(jnp.zeros((2, 2)), jnp.ones((3, 2)))
    """

    def total(params: Any, *args: Any) -> jax.Array:
        taught = jax.lax.stop_gradient(teacher(*args))
        return jnp.mean(loss(student(params, *args), taught))

    return total


def logit_loss(student: jax.Array, teacher: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    r"""Returns :math:`T^2 \, \mathrm{KL}(\sigma(z^t / T) \,\|\, \sigma(z^s / T))` per example.

    Args:
      student, teacher: logits, classes on the last axis.
      temperature: T; the factor :math:`T^2` keeps gradients of one size.

    Returns:
      Shape of the logits without their last axis, in at least float32.

    Raises:
      ValueError: for shapes that differ, or a temperature that isn't positive.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = jp.training.logit_loss(jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0]), temperature=2)
      >>> round(float(loss), 4)
      0.4438

    References:
      Hinton et al., `Distilling the Knowledge <https://arxiv.org/abs/1503.02531>`__, 2015, section
      2; there the cross-entropy, which differs by a constant.
    """
    _check_rank("logits", 1, "(..., classes)", student, teacher)
    _check_shapes("logits", student, teacher)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; wanted a positive number such as 2.0")
    s, t = (jax.nn.log_softmax(_wide(x) / temperature) for x in (student, teacher))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(s, t)


def hidden_loss(
    student: jax.Array, teacher: jax.Array, projection: jax.Array | None = None
) -> jax.Array:
    r"""Returns :math:`\|h^s P - h^t\|^2 / d` per position, for hidden states of d features.

    Args:
      student: shape (..., student's width).
      teacher: shape (..., d).
      projection: P of shape (student's width, d), learned with the student's params; see
        :func:`projection`. None where widths agree.

    Raises:
      ValueError: for shapes that don't fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"net": ..., "projection": jp.training.projection(jax.random.key(0), 3, 5)}
      >>> jp.training.hidden_loss(jnp.ones((2, 3)), jnp.ones((2, 5)), params["projection"]).shape
      (2,)

    References:
      Romero et al., `FitNets <https://arxiv.org/abs/1412.6550>`__, 2015, eq. 3; with a projection
      matrix Jiao et al., `TinyBERT <https://arxiv.org/abs/1909.10351>`__, 2020, eq. 8.
    """
    _check_rank("hidden states", 1, "(..., features)", student, teacher)
    if projection is not None:
        if projection.shape != (student.shape[-1], teacher.shape[-1]):
            raise ValueError(
                f"projection has the shape {projection.shape}; wanted "
                f"{(student.shape[-1], teacher.shape[-1])}, from the student's width to the "
                "teacher's: jp.training.projection(key, student's, teacher's)"
            )
        student = student @ projection.astype(student.dtype)
    _check_shapes("hidden states", student, teacher)
    return jnp.mean(optax.losses.squared_error(_wide(student), _wide(teacher)), axis=-1)


def projection(key: jax.Array, student: int, teacher: int) -> jax.Array:
    """Returns a float32 matrix (student's width, teacher's width) with orthonormal rows or columns.

    Example:
      >>> import jax, jaxprune as jp
      >>> jp.training.projection(jax.random.key(0), 3, 5).shape
      (3, 5)
    """
    return jax.nn.initializers.orthogonal()(key, (student, teacher), jnp.float32)


def attention_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    r"""Returns :math:`\mathrm{KL}(a^t \| a^s)` per row of attention, after a mean over heads.

    The mean makes heads comparable where the student has lost some.

    Args:
      student, teacher: attention probabilities of shape (..., heads, queries, keys); the number of
        heads may differ.

    Returns:
      Shape (..., queries).

    Raises:
      ValueError: for shapes that differ elsewhere.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> a = jnp.full((2, 4, 3, 3), 1 / 3)
      >>> jp.training.attention_loss(a[:, :2], a).shape
      (2, 3)

    References:
      Wang et al., `MiniLM <https://arxiv.org/abs/2002.10957>`__, 2020, eq. 6, there head by head.
    """
    _check_rank("attention maps", 3, "(..., heads, queries, keys)", student, teacher)
    s, t = (jnp.mean(_wide(x), axis=-3) for x in (student, teacher))
    _check_shapes("attention maps, without heads,", s, t)
    tiny = float(jnp.finfo(s.dtype).tiny)  # a masked key has probability 0 in both
    return optax.losses.kl_divergence(jnp.log(jnp.maximum(s, tiny)), t)


def activation_map_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    r"""Returns :math:`\| q^s / \|q^s\| - q^t / \|q^t\| \|_2` for maps :math:`q = \sum_c h_c^2`.

    Args:
      student, teacher: activations of a convolution, shape (batch, ..., channels); the number of
        channels may differ.

    Returns:
      Shape (batch,).

    Raises:
      ValueError: for shapes that differ elsewhere.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.training.activation_map_loss(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4, 8))).tolist()
      [0.0, 0.0]

    References:
      Zagoruyko and Komodakis, `Attention Transfer <https://arxiv.org/abs/1612.03928>`__, 2017, eq.
      2.
    """
    _check_rank("activation maps", 2, "(batch, ..., channels)", student, teacher)
    maps = [jnp.sum(jnp.square(_wide(x)), axis=-1) for x in (student, teacher)]
    _check_shapes("activation maps, without channels,", *maps)
    rows = [m.reshape(m.shape[0], -1) for m in maps]
    s, t = (row / jnp.maximum(_norm(row)[:, None], 1e-12) for row in rows)
    return _norm(s - t)


def _norm(x: jax.Array) -> jax.Array:
    """L2 along the last axis, with gradient 0 at 0."""
    square = jnp.sum(jnp.square(x), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _check_rank(what: str, rank: int, wanted: str, *outputs: Any) -> None:
    for x in outputs:
        if np.ndim(x) < rank:
            raise ValueError(f"{what} have the shape {np.shape(x)}; wanted {wanted}")


def _check_shapes(what: str, student: Any, teacher: Any) -> None:
    if np.shape(student) != np.shape(teacher):
        raise ValueError(
            f"{what} have the shape {np.shape(student)} in the student and {np.shape(teacher)} in "
            "the teacher; pass outputs that belong together"
        )
