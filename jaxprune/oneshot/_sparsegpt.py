"""SparseGPT: one pass over the inputs; each removal is repaired by the inputs after it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._progress import Progress
from jaxprune.calibration.api import Stats
from jaxprune.oneshot._checks import check_size
from jaxprune.oneshot._linalg import inverse_factor, matmul, without_dead
from jaxprune.oneshot._run import Pruned, in_matrix, per_matrix
from jaxprune.patterns import UNSTRUCTURED
from jaxprune.typing import ChooseInMatrix, Params, PatternFn

STEP = 16  # At most so many inputs go with only each other's errors at hand: they fit a cache.


def sparsegpt(
    params: Params,
    stats: Stats,
    sparsity: Any,
    *,
    pattern: PatternFn = UNSTRUCTURED,
    block: int = 128,
    damping: float = 0.01,
    progress: Progress = None,
) -> Pruned:
    r"""Returns pruned params and their masks, by SparseGPT.

    With :math:`H = X^T X + \lambda I` and the upper triangular C of :math:`H^{-1} = C^T C`, inputs
    are gone through in order. Where entry w of input j goes, the inputs k > j of its output change:

    .. math:: w_k \leftarrow w_k - (w_j / C_{jj}) \, C_{jk}

    Which entries go is decided for ``block`` inputs at a time, those of least
    :math:`w_j^2 / C_{jj}^2`, with the weights as they are by then; for N:M at each group.

    Args:
      params: the dense ones.
      stats: of :func:`jaxprune.calibrate`, with Gram matrices.
      sparsity: as the pattern takes it, traced too.
      pattern: ``jp.unstructured(...)``, ``jp.n_m(n, m)`` or ``jp.block(...)``; its ``where`` says
        which leaves, its distribution how much of each; by default those that ``calibrate`` found
        no inputs of, such as embeddings, stay dense, and a warning names them. Within a leaf it
        chooses among the inputs (rows) of a block of the matrix (in, out), whatever the leaf's
        layout. N:M groups run along the pattern's axis, which must be an input axis of the leaf:
        ``jp.n_m(2, 4, axis=-1)`` for (out, in). Blocks are followed on the last two axes of
        (..., in, out).
      block: inputs whose masks are chosen together; a rest of less than half of it is added to the
        last block.
      damping: :math:`\lambda` over the mean diagonal of :math:`X^T X`; ten times as much where the
        matrix is not positive definite. Weights of dead inputs (all zero) become zero, and go
        first. Where all inputs are dead, as of an expert that no token reached, nothing is known,
        and weights go by magnitude.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        leaves, such as ``tqdm.tqdm``.

    Raises:
      ValueError: for a leaf that ``where`` chose without Gram matrix, naming it and why; for
        statistics of other params, a negative damping, or an axis of N:M that is no input; what
        the pattern raises.
      TypeError: for a pattern that couples leaves (``jp.structured``).
      FloatingPointError: where no damping makes the solution finite.

    References:
      Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`__, 2023, algorithm 1, for
      kernels that are the transposes of the paper's.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> x = jax.random.normal(jax.random.key(0), (64, 8))
      >>> params = {"w": jax.random.normal(jax.random.key(1), (8, 4))}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> pruned, masks = jp.oneshot.sparsegpt(params, stats, 0.5, pattern=jp.n_m(2, 4))
      >>> int(jnp.sum(pruned["w"] == 0)), int(jnp.sum(masks["w"]))
      (16, 16)
    """
    check_size("sparsegpt", "block", block, 1)
    how = in_matrix("sparsegpt", pattern)
    whole = how.group or how.rows or 1  # inputs that can't stand in two blocks
    return per_matrix(
        "sparsegpt", _matrix, params, stats, sparsity,
        pattern=how, damping=damping, group=how.group, block=-(-block // whole) * whole,
        progress=progress,
    )  # fmt: skip


def _matrix(
    w: jax.Array,
    gram: jax.Array,
    sparsity: Any,
    damping: Any,
    *,
    within: ChooseInMatrix,
    group: int | None,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """One matrix (in, out): equal blocks in a loop, then the last one.

    It takes a small rest along: where a few inputs choose on their own, they keep too many.
    """
    c = inverse_factor(gram, damping)
    w = without_dead(w, gram)
    n = len(w)
    block = min(block, n)
    count = (n + block // 2) // block
    rest = n - (count - 1) * block
    equal = count if rest == block else count - 1

    def one(start: Any, state: Any, size: int) -> Any:
        return _block(c, sparsity, within, group or size, start, state, size)

    state = (w, jnp.zeros(w.shape, bool))
    state = jax.lax.fori_loop(0, equal, lambda b, s: one(b * block, s, block), state)
    w, mask = one(equal * block, state, rest) if equal < count else state
    return jnp.where(mask, w, 0), mask


def _block(
    c: jax.Array, sparsity: Any, within: Any, group: int, start: Any, state: Any, size: int
) -> tuple[jax.Array, jax.Array]:
    """Prunes ``size`` inputs from ``start`` on, and repairs all that follow."""
    w, mask = state
    rows = jax.lax.dynamic_slice_in_dim(w, start, size)
    ahead = jax.lax.dynamic_slice_in_dim(c, start, size)  # (size, in)
    own = jax.lax.dynamic_slice_in_dim(ahead, start, size, axis=1)

    step = max(k for k in range(1, STEP + 1) if group % k == 0)

    def prune(g: Any, state: Any) -> Any:
        """The weights of a group: chosen together, removed one input after the other."""
        rows, errors, kept = state
        first = g * group
        pivots = jax.lax.dynamic_slice_in_dim(jnp.diagonal(own), first, group)
        now = _repaired(own, rows, errors, first, group)
        keep = within(jnp.square(now / pivots[:, None]), sparsity)
        kept = jax.lax.dynamic_update_slice_in_dim(kept, keep, first, 0)

        def remove(k: Any, state: Any) -> Any:
            rows, errors = state
            at = first + k * step
            now = _repaired(own, rows, errors, at, step)
            among = jax.lax.dynamic_slice(own, (at, at), (step, step))
            now, found = _removed(among, now, jax.lax.dynamic_slice_in_dim(kept, at, step))
            update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
            return update(rows, now), update(errors, found)

        rows, errors = jax.lax.fori_loop(0, group // step, remove, (rows, errors))
        return rows, errors, kept

    begin = (rows, jnp.zeros_like(rows), jnp.zeros(rows.shape, bool))
    rows, errors, kept = jax.lax.fori_loop(0, size // group, prune, begin)
    after = jnp.arange(len(w)) >= start + size
    w = w - matmul(jnp.where(after, ahead, 0).T, errors)
    w = jax.lax.dynamic_update_slice_in_dim(w, rows, start, 0)
    return w, jax.lax.dynamic_update_slice_in_dim(mask, kept, start, 0)


def _repaired(own: jax.Array, rows: jax.Array, errors: jax.Array, at: Any, size: int) -> jax.Array:
    """Rows ``at`` to ``at + size`` after what has gone before them; errors from there on are 0."""
    columns = jax.lax.dynamic_slice_in_dim(own, at, size, axis=1)
    return jax.lax.dynamic_slice_in_dim(rows, at, size) - matmul(columns.T, errors)


def _removed(c: jax.Array, rows: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A few rows after those of them that go, one after another; and their errors."""

    def remove(i: Any, state: Any) -> Any:
        rows, errors = state
        row = rows[i] - matmul(c[:, i], errors)
        error = jnp.where(kept[i], 0, row / c[i, i])
        return rows.at[i].set(jnp.where(kept[i], row, 0)), errors.at[i].set(error)

    return jax.lax.fori_loop(0, len(rows), remove, (rows, jnp.zeros_like(rows)))
