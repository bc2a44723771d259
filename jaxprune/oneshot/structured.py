"""Whole units without training: scores from activations, and what repairs their consumers.

After ``masks = jp.structured(structure)(scores, sparsity)`` there are two repairs:
:func:`jaxprune.oneshot.refit` changes the kept rows of each consumer (least squares), and
:func:`compensate` puts the mean of what was removed into a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.api import Stats
from jaxprune.masks import check_masks, check_structure
from jaxprune.oneshot.layers import check_stats
from jaxprune.scores.weights import is_float, widen
from jaxprune.sharding import on_meshes
from jaxprune.typing import Masks, Params, Scores, path_str


@on_meshes(1)
def flap(params: Params, stats: Stats) -> Scores:
    r"""Returns :math:`w_{ij}^2 \, \mathrm{Var}[x_i]`: summed over a unit, how much it fluctuates.

    What doesn't vary can be made up for by a bias (:func:`compensate`), so its variance is what a
    unit's removal costs. Leaves without statistics score 0. For ``jp.structured(structure,
    reduce="sum")``; over several layers with a distribution that makes scores of layers
    comparable, or uniform: sums of different layers are not.

    References:
      An et al., [FLAP](https://arxiv.org/abs/2312.11983), 2024: the metric WIFV; its z-scores over
      layers are not built in here.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.array([[1.0], [2.0]])}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 5], [3.0, 5]])])
      >>> jp.oneshot.flap(params, stats)
      {'w': Array([[1.],
             [0.]], dtype=float32)}
    """
    check_stats("flap", params, stats)
    return _per_input(params, stats.variances, lambda w, v: jnp.square(w) * v)


@on_meshes(1)
def activation_energy(params: Params, stats: Stats) -> Scores:
    r"""Returns the mean square :math:`E[x_i^2]` of the input that an entry multiplies.

    The importance of hidden units by their activations alone; leaves without statistics score 0.

    References:
      Muralidharan et al., [Minitron](https://arxiv.org/abs/2407.14679), 2024, section 2; there the
      L2 norm over batches of means of absolute values.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 1))}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 2.0]])])
      >>> jp.oneshot.activation_energy(params, stats)["w"][:, 0]
      Array([1., 4.], dtype=float32)
    """
    check_stats("activation_energy", params, stats)
    treedef: Any = jax.tree.structure(params)
    pairs = zip(treedef.flatten_up_to(stats.means), treedef.flatten_up_to(stats.variances))
    energy = treedef.unflatten([None if m is None else m**2 + v for m, v in pairs])
    return _per_input(params, energy, lambda w, e: jnp.zeros_like(w) + e)


def _per_input(params: Params, statistics: Any, score: Any) -> Scores:
    treedef: Any = jax.tree.structure(params)

    def one(w: Any, s: Any) -> Any:
        if not is_float(w):
            return w
        size = jnp.abs(widen(w))
        return jnp.zeros_like(size) if s is None else score(size, column(s, w))

    pairs = zip(treedef.flatten_up_to(params), treedef.flatten_up_to(statistics))
    return treedef.unflatten([one(w, s) for w, s in pairs])


def column(statistic: jax.Array, leaf: Any) -> jax.Array:
    """One number per input, in a shape that broadcasts to the leaf."""
    return statistic[:, None] if statistic.ndim < np.ndim(leaf) else statistic


@on_meshes(1)
def compensate(
    params: Params, pruned: Params, masks: Masks, stats: Stats, biases: Mapping[str, str]
) -> Params:
    r"""Returns ``pruned`` with biases that keep the mean of each output as it was.

    .. math:: b \leftarrow b + \sum_i E[x_i] \, (w_i - v_i)

    For a kernel w of ``params`` and v of ``pruned``; also right after a refit.

    Args:
      params: the dense ones.
      pruned: the same tree, masked or refit.
      masks: an output that its bias's mask removes stays zero.
      stats: of :func:`jaxprune.calibrate`.
      biases: path of a kernel -> path of the float bias that is added to its outputs. It has the
        kernel's axes without its inputs: (out,) for (in, out) and (out, in), (heads, dim) for
        (in, heads, dim), (layers, out) for a stack (layers, in, out).

    Raises:
      ValueError: for a path that is not in params, a kernel without statistics, or a bias of
        another shape than the kernel's outputs, or of integers; for statistics of other params.

    References:
      An et al., [FLAP](https://arxiv.org/abs/2312.11983), 2024, baseline bias compensation.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1)}
      >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"] + p["b"], params, [x])
      >>> masks = {"w": jnp.array([[True], [False]]), "b": jnp.asarray(True)}
      >>> pruned = jp.apply_masks(params, masks)
      >>> jp.oneshot.compensate(params, pruned, masks, stats, {"w": "b"})["b"]
      Array([5.], dtype=float32)
    """
    check_masks(masks, params)
    check_structure("pruned", pruned, params, "pass what refit or jp.apply_masks returned")
    check_stats("compensate", params, stats)
    named = [(path_str(p), w) for p, w in jax.tree_util.tree_leaves_with_path(params)]
    place = {path: k for k, (path, _) in enumerate(named)}
    treedef: Any = jax.tree.structure(params)
    leaves, kept, means = (treedef.flatten_up_to(t) for t in (pruned, masks, stats.means))
    for kernel, bias in biases.items():
        for path in (kernel, bias):
            if path not in place:
                raise ValueError(
                    f"compensate: params has no leaf {path!r}; its leaves are {list(place)[:8]}"
                )
        k, b = place[kernel], place[bias]
        w = named[k][1]
        _check_bias(kernel, bias, w, leaves[b], means[k], stats)
        change = (w - leaves[k]) * column(means[k], w)
        moved = leaves[b] + jnp.sum(change, stats.layouts[kernel].ins)
        leaves[b] = jnp.where(kept[b], moved, leaves[b]).astype(leaves[b].dtype)
    return treedef.unflatten(leaves)


def _check_bias(kernel: str, bias: str, w: Any, b: Any, mean: Any, stats: Stats) -> None:
    """Raises ValueError where the kernel's outputs are not the bias's, or have no statistics."""
    if mean is None:
        raise ValueError(
            f"compensate: {kernel}, shape {np.shape(w)}, has no statistics of its inputs: "
            f"{stats.reasons.get(kernel, 'it was left out of the calibration')}; leave it out of "
            "biases="
        )
    ins = stats.layouts[kernel].ins
    outputs = tuple(n for k, n in enumerate(np.shape(w)) if k not in ins)
    if np.shape(b) != outputs or not is_float(b):
        kind = getattr(b, "dtype", type(b).__name__)
        raise ValueError(
            f"compensate: the outputs of {kernel}, shape {np.shape(w)}, are not those of {bias}, "
            f"{kind} of shape {np.shape(b)}; its inputs are its axes {ins}: wanted a bias of "
            f"floats, shape {outputs}"
        )
