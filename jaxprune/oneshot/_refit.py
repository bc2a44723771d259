"""Refit: the kept weights that reproduce a layer's dense outputs best, for any mask."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._progress import Progress
from jaxprune._renamed import renamed
from jaxprune.calibration.api import Stats
from jaxprune.masks import check_masks, check_structure
from jaxprune.oneshot._checks import check_damping, check_size
from jaxprune.oneshot._leaves import Layer, layer_of, map_layers, repairable
from jaxprune.oneshot._linalg import conjugate_gradients, damped, matmul
from jaxprune.scores.required import check_stats
from jaxprune.sharding import on_meshes
from jaxprune.typing import Masks, Params, PyTree, path_str


@renamed("jp.oneshot.refit", steps="cg_steps")
@on_meshes(1)
def refit(
    params: Params,
    masks: Masks,
    stats: Stats,
    *,
    start: Params | None = None,
    cg_steps: int = 10,
    damping: float = 0.01,
    progress: Progress = None,
) -> Params:
    r"""Returns params whose kept weights are refit to the dense outputs, others zero.

    Minimises for each leaf whose mask is not a scalar

    .. math:: \lVert X (W - V) \rVert^2 + \lambda \lVert W - V \rVert^2,
              \quad V = V \odot M

    by ``cg_steps`` of conjugate gradients on the kept entries, preconditioned with the diagonal of
    :math:`H = X^T X + \lambda I`, all outputs at once. Matrix products only. Ten steps recover
    nearly all that :func:`least_squares` does. Where a mask takes no input away there is nothing to
    repair, and the leaf is just masked: biases, embeddings, kernels cut in whole outputs. So are
    leaves that were left out of the calibration by its ``where``.

    Args:
      params: the dense ones.
      masks: of any pattern or method.
      stats: of :func:`jaxprune.calibrate`, with Gram matrices.
      start: pruned params to start from, such as :func:`sparsegpt` gives; default: the masked
        dense ones.
      cg_steps: of conjugate gradients.
      damping: :math:`\lambda` over the mean diagonal of :math:`X^T X`. It holds the weights near
        the dense ones: more of it for few calibration tokens.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        leaves, such as ``tqdm.tqdm``.

    Raises:
      ValueError: for masks that do not fit, statistics of other params, or a leaf whose inputs are
        cut without a Gram matrix of them, naming it.
      FloatingPointError: where the solution is not finite.

    References:
      Hestenes and Stiefel, Methods of conjugate gradients, 1952, with Jacobi preconditioning; for
      pruned layers Meng et al., `ALPS <https://arxiv.org/abs/2406.07831>`__, 2024, algorithm 2,
      which projects residuals to the support as here.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0]])  # two equal inputs: one can stand for both
      >>> params, masks = {"w": jnp.ones((2, 1))}, {"w": jnp.array([[True], [False]])}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> jp.oneshot.refit(params, masks, stats, damping=0.0)["w"]
      Array([[2.],
             [0.]], dtype=float32)
    """
    check_masks(params, masks)
    check_damping("refit", damping)
    check_size("refit", "cg_steps", cg_steps, 0)
    found = repairable("refit", params, stats, masks)
    begin = _by_path("refit", "start", params if start is None else start, params)

    def solve(layer: Layer, mask: Any) -> tuple[jax.Array, jax.Array]:
        dtype = layer.gram.dtype
        kept = layer.matrices(mask)
        first = layer.matrices(begin[layer.path]).astype(dtype)
        dense = layer.matrices(layer.leaf).astype(dtype)
        return _stack(dense, first, kept, layer.gram, damping, cg_steps), kept

    return map_layers(found, params, masks, solve, progress)[0]


def _by_path(method: str, what: str, tree: Params, params: Params) -> dict[str, Any]:
    """The leaves of a tree like params; raises ValueError where one has another shape."""
    check_structure(what, tree, params, f"pass {method} a tree like params as {what}")
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True)
    found = {}
    for (path, w), x in pairs:
        if np.shape(x) != np.shape(w):
            raise ValueError(
                f"{method}: {what} has shape {np.shape(x)} at {path_str(path)}, the leaf "
                f"{np.shape(w)}; wanted params of the same shapes, such as jp.apply_masks gives"
            )
        found[path_str(path)] = x
    return found


@functools.partial(jax.jit, static_argnames="steps")
def _stack(
    dense: jax.Array, first: jax.Array, kept: jax.Array, grams: jax.Array, damping: Any, steps: int
) -> jax.Array:
    def one(args: Any) -> jax.Array:
        w, v, m, gram = args
        return conjugate_gradients(w, v, m, damped(gram, damping), steps)

    return jax.lax.map(one, (dense, first, kept, grams))


@on_meshes(1)
def least_squares(
    params: Params,
    masks: Masks,
    stats: Stats,
    *,
    damping: float = 0.01,
    progress: Progress = None,
) -> Params:
    """Returns params whose kept weights solve the problem of :func:`refit` exactly.

    One linear system for each output, O(out in^3): for small layers, and to judge others by. The
    arguments are those of :func:`refit`.

    Raises:
      ValueError, FloatingPointError: as :func:`refit`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, masks = {"w": jnp.ones((2, 1))}, {"w": jnp.array([[True], [False]])}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 1.0]])])
      >>> jp.oneshot.least_squares(params, masks, stats, damping=0.0)["w"]
      Array([[2.],
             [0.]], dtype=float32)
    """
    check_masks(params, masks)
    check_damping("least_squares", damping)
    found = repairable("least_squares", params, stats, masks)

    def solve(layer: Layer, mask: Any) -> tuple[jax.Array, jax.Array]:
        kept = layer.matrices(mask)
        return _exact(
            layer.matrices(layer.leaf).astype(layer.gram.dtype), kept, layer.gram, damping
        ), kept

    return map_layers(found, params, masks, solve, progress)[0]


@jax.jit
def _exact(dense: jax.Array, kept: jax.Array, grams: jax.Array, damping: Any) -> jax.Array:
    def one(args: Any) -> jax.Array:
        w, m, gram = args
        h = damped(gram, damping)
        target = matmul(h, w)

        def output(column: Any) -> jax.Array:
            m, t = column
            inside = m[:, None] & m[None, :]
            a = jnp.where(inside, h, 0) + jnp.diag(jnp.where(m, 0, 1).astype(h.dtype))
            return jax.scipy.linalg.solve(a, jnp.where(m, t, 0), assume_a="pos")

        return jax.lax.map(output, (m.T, target.T), batch_size=8).T

    return jax.lax.map(one, (dense, kept, grams))


@on_meshes(0)
def output_error(params: Params, pruned: Params, stats: Stats) -> PyTree:
    r"""Returns each leaf's relative output error :math:`\lVert X(W-V)\rVert^2/\lVert XW\rVert^2`.

    On the tokens that ``stats`` saw; a number per leaf, None where there is no Gram matrix, 0 where
    dense outputs are 0 and stay so.

    Raises:
      ValueError: for a pruned tree or statistics that are not of params.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, pruned = {"w": jnp.ones((2, 1))}, {"w": jnp.array([[1.0], [0.0]])}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 1.0]])])
      >>> jp.oneshot.output_error(params, pruned, stats)
      {'w': Array(0.25, dtype=float32)}
    """
    check_stats("output_error", params, stats)
    after = _by_path("output_error", "pruned", pruned, params)
    flat = jax.tree_util.tree_leaves_with_path(params)
    treedef: Any = jax.tree.structure(params)

    def error(path: str, w: Any, gram: Any) -> jax.Array | None:
        if gram is None:
            return None
        layer = layer_of("output_error", path, w, gram, stats)
        lost, whole = (_energy(layer.matrices(x), layer.gram) for x in (w - after[path], w))
        return jnp.where(lost == 0, 0, lost / jnp.where(lost == 0, 1, whole))

    grams = treedef.flatten_up_to(stats.grams)
    return jax.tree.unflatten(
        treedef, [error(path_str(p), w, g) for (p, w), g in zip(flat, grams, strict=True)]
    )


@jax.jit
def _energy(w: jax.Array, grams: jax.Array) -> jax.Array:
    w = w.astype(grams.dtype)
    return jnp.sum(w * matmul(grams, w))
