"""Bias compensation: the mean of what was removed goes into a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_float
from jaxprune.calibration.api import Stats
from jaxprune.masks import check_masks, check_structure
from jaxprune.scores.inputs import column
from jaxprune.scores.required import check_stats
from jaxprune.sharding import on_meshes
from jaxprune.typing import Masks, Params, path_str


@on_meshes(1)
def compensate(
    params: Params, pruned: Params, masks: Masks, stats: Stats, *, biases: Mapping[str, str]
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
      An et al., `FLAP <https://arxiv.org/abs/2312.11983>`__, 2024, baseline bias compensation.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1)}
      >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"] + p["b"], params, [x])
      >>> masks = {"w": jnp.array([[True], [False]]), "b": jnp.asarray(True)}
      >>> pruned = jp.apply_masks(params, masks)
      >>> jp.oneshot.compensate(params, pruned, masks, stats, biases={"w": "b"})["b"]
      Array([5.], dtype=float32)
    """
    check_masks(params, masks)
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
