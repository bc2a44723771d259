"""ALPS: support and weights found together, by ADMM on the layer's outputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._progress import Progress
from jaxprune.calibration.api import Stats
from jaxprune.oneshot._checks import check_size
from jaxprune.oneshot._linalg import conjugate_gradients, damped, matmul, without_dead
from jaxprune.oneshot._run import Pruned, in_matrix, per_matrix
from jaxprune.patterns import UNSTRUCTURED
from jaxprune.typing import ChooseInMatrix, Params, PatternFn


def alps(
    params: Params,
    stats: Stats,
    sparsity: Any,
    *,
    pattern: PatternFn = UNSTRUCTURED,
    damping: float = 0.01,
    steps: int = 300,
    refit_steps: int = 10,
    progress: Progress = None,
) -> Pruned:
    r"""Returns pruned params and their masks, by ALPS.

    Minimises :math:`\lVert X(W - B) \rVert^2` with B = D, D sparse, by ADMM:

    .. math::
       B = (H + \rho I)^{-1} (H W - V + \rho D), \quad
       D = P(B + V / \rho), \quad V \leftarrow V + \rho (B - D)

    P keeps the largest entries as the pattern says. H is scaled to a unit diagonal, so that P
    ranks as Wanda does, and decomposed once into eigenvectors, after which a step is four matrix
    products. :math:`\rho` begins at 0.1 and grows every third step by 1.3, 1.2 or 1.1 while the
    support changes by 10 %, by 0.5 %, or at all; it ends when it doesn't. Then the kept weights
    take ``refit_steps`` of :func:`refit`.

    Args:
      params, stats, sparsity, pattern, damping, progress: as in :func:`sparsegpt`; unstructured
        masks are chosen within the whole leaf, as the pattern says.
      steps: of ADMM, at most.
      refit_steps: of conjugate gradients.

    Raises:
      ValueError, TypeError, FloatingPointError: as :func:`sparsegpt`.

    References:
      Meng et al., `ALPS <https://arxiv.org/abs/2406.07831>`__, 2024, algorithm 1 and its scheme for
      rho.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> x = jax.random.normal(jax.random.key(0), (64, 8))
      >>> params = {"w": jax.random.normal(jax.random.key(1), (8, 4))}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> pruned, masks = jp.oneshot.alps(params, stats, 0.75)
      >>> int(jnp.sum(pruned["w"] != 0))
      8
    """
    check_size("alps", "steps", steps, 0)
    check_size("alps", "refit_steps", refit_steps, 0)
    return per_matrix(
        "alps", _matrix, params, stats, sparsity,
        pattern=in_matrix("alps", pattern), damping=damping, steps=steps, refit_steps=refit_steps,
        progress=progress,
    )  # fmt: skip


def _matrix(
    w: jax.Array,
    gram: jax.Array,
    sparsity: Any,
    damping: Any,
    *,
    within: ChooseInMatrix,
    steps: int,
    refit_steps: int,
) -> tuple[jax.Array, jax.Array]:
    w = without_dead(w, gram)
    h = damped(gram, damping)
    scale = jnp.sqrt(jnp.diagonal(h))
    scaled = w * scale[:, None]
    unit = h / jnp.outer(scale, scale)
    mask = _support(unit, scaled, lambda x: within(jnp.abs(x), sparsity), steps)
    return conjugate_gradients(w, w, mask, h, refit_steps), mask


def _support(h: jax.Array, w: jax.Array, keep: Any, steps: int) -> jax.Array:
    """The support that ADMM ends with."""
    values, vectors = jnp.linalg.eigh(h)
    target = matmul(h, w)

    def improve(state: Any) -> Any:
        d, v, rho = state
        rotated = matmul(vectors.T, target - v + rho * d)
        b = matmul(vectors, rotated / (jnp.maximum(values, 0) + rho)[:, None])
        moved = b + v / rho
        d = jnp.where(keep(moved), moved, 0)
        return d, v + rho * (b - d), rho

    def thrice(state: Any) -> Any:
        k, d, v, rho, before, _ = state
        d, v, rho = jax.lax.fori_loop(0, 3, lambda _, s: improve(s), (d, v, rho))
        now = d != 0
        changed = jnp.sum(now != before)
        return k + 3, d, v, rho * _growth(changed, jnp.sum(now)), now, changed

    def goes_on(state: Any) -> jax.Array:
        return (state[0] < steps) & (state[-1] > 0)

    rho = jnp.asarray(0.1, w.dtype)
    begin = (0, w, jnp.zeros_like(w), rho, jnp.zeros(w.shape, bool), jnp.asarray(1))
    d = jax.lax.while_loop(goes_on, thrice, begin)[1]
    return keep(jnp.abs(d))


def _growth(changed: jax.Array, kept: jax.Array) -> jax.Array:
    part = changed / jnp.maximum(kept, 1)
    return jnp.where(
        part >= 0.1, 1.3, jnp.where(part >= 0.005, 1.2, jnp.where(changed > 0, 1.1, 1))
    )
