"""Swaps after a mask is chosen: regrow what repairs an output's mean, prune what matters least."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._progress import Progress
from jaxprune.calibration.api import Stats
from jaxprune.masks import check_masks
from jaxprune.oneshot._checks import check_size
from jaxprune.oneshot._leaves import Layer, layers, map_layers
from jaxprune.scores.inputs import column
from jaxprune.sharding import on_meshes
from jaxprune.typing import Masks, Params, path_str


@on_meshes(1)
def dsnot(
    params: Params,
    masks: Masks,
    stats: Stats,
    *,
    group: int | None = None,
    axis: int | None = None,
    power: float = 1.0,
    cycles: int = 50,
    threshold: float = 0.1,
    progress: Progress = None,
) -> Masks:
    r"""Returns masks in which entries are swapped while that lowers an output's mean error.

    With :math:`e = \sum_{i\,\text{pruned}} w_i E[x_i]` of an output, a cycle regrows the pruned
    entry of largest :math:`\mathrm{sign}(e)\, w_i E[x_i] / \mathrm{Var}[x_i]^p`, and prunes the
    kept one of least :math:`|w_i| \, \lVert x_i \rVert` among those whose :math:`w_i E[x_i]` has
    the other sign. No weight changes; :func:`refit` may follow.

    Args:
      params: the dense ones.
      masks: masks of any pattern, such as Wanda's; each output keeps as many entries as before.
      stats: of :func:`jaxprune.calibrate`, with Gram matrices.
      group: for N:M masks, m: both entries of a swap are of one group.
      axis: that groups run along, as for :func:`jp.n_m`; by default the last of the input axes.
      power: the exponent of the variance.
      cycles: at most.
      threshold: of :math:`|e|`, below which an output is left alone.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        leaves, such as ``tqdm.tqdm``.

    Raises:
      ValueError: for masks that do not fit, a pruned leaf without statistics, an axis that is no
        input, or a group that doesn't divide the inputs, naming the leaf.

    References:
      Zhang et al., `Dynamic Sparse No Training <https://arxiv.org/abs/2310.08915>`__, 2024, section
      3. Ours does not do a swap that makes :math:`|e|` larger, and ends there.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.array([[1.0], [1.0], [-1.0]])}
      >>> masks = {"w": jnp.array([[False], [True], [True]])}
      >>> x = jnp.array([[1.0, 3.0, 0.8], [3.0, 1.0, 0.9]])
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> jp.oneshot.dsnot(params, masks, stats)["w"][:, 0]
      Array([ True,  True, False], dtype=bool)
    """
    check_masks(params, masks)
    check_size("dsnot", "cycles", cycles, 0)
    found = [
        layer and _in_groups(layer, group, axis) for layer in layers("dsnot", params, stats, masks)
    ]
    paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    treedef: Any = jax.tree.structure(params)
    moments = [
        dict(zip(paths, treedef.flatten_up_to(tree), strict=True))
        for tree in (stats.means, stats.variances, stats.norms)
    ]

    def solve(layer: Layer, mask: Any) -> tuple[jax.Array, jax.Array]:
        seen = [layer.matrices(column(tree[layer.path], layer.leaf)) for tree in moments]
        w, kept = layer.matrices(layer.leaf).astype(seen[0].dtype), layer.matrices(mask)
        swap = functools.partial(_matrix, group=group or w.shape[1], cycles=cycles)
        return w, jax.vmap(swap, (0, 0, 0, 0, 0, None, None))(w, kept, *seen, power, threshold)

    return map_layers(found, params, masks, solve, progress)[1]


def _in_groups(layer: Layer, group: int | None, axis: int | None) -> Layer:
    """The leaf with its inputs in an order in which groups are neighbours."""
    if group is None:
        return layer
    check_size("dsnot", "group", group, 1)
    shape, ins = np.shape(layer.leaf), layer.layout.ins
    last = ins[-1] if axis is None else axis % len(shape)
    if last not in ins or shape[last] % group:
        raise ValueError(
            f"dsnot: {layer.path}, shape {shape}: group={group} does not divide axis={axis}; its "
            f"inputs are its axes {ins}; pass the n_m pattern's m and axis as group= and axis="
        )
    return layer.ordered([*(k for k in ins if k != last), last])


@functools.partial(jax.jit, static_argnames=("group", "cycles"))
def _matrix(
    w: jax.Array,
    mask: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    norm: jax.Array,
    power: Any,
    threshold: Any,
    group: int,
    cycles: int,
) -> jax.Array:
    """A matrix (in, out), each output on its own."""
    owner = jnp.arange(len(w)) // group
    given = w * mean  # what an entry adds to the mean of its output
    gain = given / jnp.where(variance > 0, variance, 1) ** power
    wanda = jnp.abs(w) * norm

    def output(mask: jax.Array, given: jax.Array, gain: jax.Array, wanda: jax.Array) -> jax.Array:
        def cycle(_: Any, mask: jax.Array) -> jax.Array:
            error = jnp.sum(jnp.where(mask, 0, given))
            sign = jnp.sign(error)
            other = mask & (sign * given < 0)
            open_ = jnp.zeros(-(-len(w) // group), bool).at[owner].max(other)[owner]
            back = jnp.argmax(jnp.where(open_ & ~mask, sign * gain, -jnp.inf))
            may_go = other & (owner == owner[back])
            gone = jnp.argmin(jnp.where(may_go, wanda, jnp.inf))
            after = error - given[back] + given[gone]
            good = jnp.any(may_go) & ~mask[back] & (jnp.abs(after) < jnp.abs(error))
            good &= jnp.abs(error) > threshold
            return jnp.where(good, mask.at[back].set(True).at[gone].set(False), mask)

        return jax.lax.fori_loop(0, cycles, cycle, mask)

    return jax.vmap(output, 1, 1)(mask, given, gain, wanda)
