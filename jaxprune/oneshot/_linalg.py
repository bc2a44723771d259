"""Linear algebra of one matrix (in, out) and the Gram matrix (in, in) of its inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in full precision, which an accelerator gives only where it is asked for."""
    return jnp.matmul(a, b, precision="highest")


def without_dead(w: jax.Array, gram: jax.Array) -> jax.Array:
    """Weights (in, out) with zeros where an input is never anything but zero.

    Where all are dead (an expert that no token reached) nothing is known of them: they stay, and
    the Gram matrix is the identity once it is damped, so that methods go by magnitude.
    """
    live = jnp.diagonal(gram)[:, None] > 0
    return jnp.where(live | ~jnp.any(live), w, 0)


def damped(gram: jax.Array, damping: float | jax.Array) -> jax.Array:
    """The Gram matrix with ``damping`` times the mean of its diagonal added to the diagonal.

    Dead inputs (zero on the diagonal) count neither for the mean nor for the output: their
    diagonal becomes that mean.
    """
    diagonal = jnp.diagonal(gram)
    live = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(live), 1)
    mean = jnp.where(mean > 0, mean, 1)
    return gram + jnp.diag(jnp.where(live, damping * mean, mean))


def factor(gram: jax.Array, damping: float, attempts: int = 4) -> jax.Array:
    """The Cholesky factor of the damped Gram matrix; ten times the damping where it fails.

    It fails, too, where what is left of an input beside those before it is but rounding.
    """
    least = 4 * jnp.finfo(gram.dtype).eps

    def matrix(k: jax.Array) -> jax.Array:  # made anew rather than carried along: less memory
        more = jnp.maximum(damping, 1e-6) * 10.0**k
        return damped(gram, jnp.where(k > 0, more, damping))

    def failed(state: Any) -> jax.Array:
        k, lower = state
        left = jnp.square(jnp.diagonal(lower)) > least * jnp.diagonal(matrix(k))  # False for NaN
        return (k < attempts) & ~jnp.all(left)

    def more(state: Any) -> Any:
        k = state[0] + 1
        return k, jnp.linalg.cholesky(matrix(k))

    begin = jnp.zeros((), gram.dtype)
    return jax.lax.while_loop(failed, more, (begin, jnp.linalg.cholesky(matrix(begin))))[1]


def inverse_factor(gram: jax.Array, damping: Any) -> jax.Array:
    """The upper triangular C with C^T C the inverse of the damped Gram matrix.

    From the factor of the matrix with its inputs in reverse order: one Cholesky factorisation and
    one triangular solve, instead of an inverse that is factorised again.
    """
    lower = factor(gram[::-1, ::-1], damping)
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]


def conjugate_gradients(
    w: jax.Array, v: jax.Array, kept: jax.Array, h: jax.Array, steps: int
) -> jax.Array:
    """Steps from v toward the best masked matrix (in, out), each output on its own."""
    scale = 1 / jnp.diagonal(h)[:, None]

    def step(_: Any, state: Any) -> Any:
        v, r, p, rz = state
        hp = jnp.where(kept, matmul(h, p), 0)
        alpha = _ratio(rz, jnp.sum(p * hp, 0))
        v, r = v + alpha * p, r - alpha * hp
        z = scale * r
        new = jnp.sum(r * z, 0)
        return v, r, z + _ratio(new, rz) * p, new

    v = jnp.where(kept, v, 0)
    r = jnp.where(kept, matmul(h, w - v), 0)
    z = scale * r
    return jax.lax.fori_loop(0, steps, step, (v, r, z, jnp.sum(r * z, 0)))[0]


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, 0 where an output has converged."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
