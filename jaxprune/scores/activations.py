"""Scores from what a network computes on data.

Their evidence is a tree like params that holds None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._calls import calls_fn
from jaxprune._leaf import is_float, widen
from jaxprune._progress import Progress
from jaxprune._trees import difference
from jaxprune.scores.evidence import Batches, watched
from jaxprune.scores.required import required
from jaxprune.typing import Params, PyTree, Scores, path_str


class Activity(NamedTuple):
    """Statistics of activations, each a tree like what the function returned; float32, (channels,).

    Attributes:
      zeros: the fraction of values that are 0.
      means: the mean of absolute values.
      norms: the L2 norm over all examples and positions.
    """

    zeros: PyTree
    means: PyTree
    norms: PyTree


@calls_fn("jp.scores.activity")
def activity(
    fn: Callable[..., Any], params: Params, batches: Batches, *, progress: Progress = None
) -> Activity:
    """Returns statistics per channel of the activations that a function returns.

    Args:
      fn: ``fn(params, *batch)`` -> a tree of arrays (..., channels). Of the structure of params,
        None where there is none, it fits the scores: at each kernel its outputs for
        :func:`apoz` and :func:`mean_activation` (``.zeros``, ``.means``), its inputs for
        :func:`wanda` (``.norms``).
      params: any pytree.
      batches: a list of tuples of what follows params.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        batches, such as ``tqdm.tqdm``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> fn = lambda p, x: {"up": jax.nn.relu(x @ p["up"]), "down": None}
      >>> params = {"up": jnp.array([[1.0, -1.0]]), "down": jnp.ones((2, 1))}
      >>> batches = [(jnp.array([[3.0], [-4.0], [4.0], [0.0]]),)]
      >>> seen = jp.scores.activity(fn, params, batches)
      >>> seen.zeros["up"], seen.means["up"], seen.norms["up"]
      (Array([0.5 , 0.75], dtype=float32), Array([1.75, 1.  ], dtype=float32), Array([5., 4.], dtype=float32))
    """  # noqa: E501
    one = jax.jit(lambda params, batch: jax.tree.map(_sums, fn(params, *batch)))
    sums: Any = None
    for batch in watched(batches, progress):
        jax.block_until_ready(sums)  # One batch is ahead at most, so that what is shown is true.
        new = one(params, batch)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)

    def each(what: Callable[[_Sums], jax.Array]) -> PyTree:
        return jax.tree.map(what, sums, is_leaf=lambda x: isinstance(x, _Sums))

    return Activity(
        each(lambda s: s.zeros / s.places),
        each(lambda s: s.sizes / s.places),
        each(lambda s: jnp.sqrt(s.squares)),
    )


class _Sums(NamedTuple):
    places: jax.Array  # float32, (): examples and positions
    zeros: jax.Array  # float32, (channels,), as the others
    sizes: jax.Array
    squares: jax.Array


def _sums(x: jax.Array) -> _Sums:
    size = jnp.abs(widen(x)).reshape(-1, x.shape[-1])
    return _Sums(
        jnp.asarray(len(size), size.dtype),
        jnp.sum(size == 0, 0, dtype=size.dtype),
        jnp.sum(size, 0),
        jnp.sum(jnp.square(size), 0),
    )


_HOW = "=jp.scores.activity(fn, params, batches)."


def apoz(params: Params, *, zeros: Any = None, **evidence: Any) -> Scores:
    """Returns 1 - the average percentage of zeros (APoZ) of the channel that an entry computes.

    Args:
      params: any pytree of arrays.
      zeros: a tree like params with the fraction of zeros of each kernel's outputs, (channels,)
        along its last axis; None where there is none: these leaves score 0, and have no vote in
        ``jp.structured(structure)``. In a pattern of single leaves leave them out by ``where``.

    Raises:
      TypeError: without ``zeros``.
      ValueError: for another structure, or vectors that do not fit.

    References:
      Hu et al., `Network Trimming <https://arxiv.org/abs/1607.03250>`__, 2016.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((1, 2)), "down": jnp.ones((2, 1))}
      >>> jp.scores.apoz(params, zeros={"up": jnp.array([0.25, 1.0]), "down": None})["up"]
      Array([[0.75, 0.  ]], dtype=float32)
    """
    required("apoz", "zeros", zeros, f"zeros{_HOW}zeros")
    return _by_output("apoz", "zeros", zeros, params, lambda z: 1 - z)


def mean_activation(params: Params, *, means: Any = None, **evidence: Any) -> Scores:
    """Returns the mean absolute activation of the channel that an entry computes.

    Args:
      params: any pytree of arrays.
      means: a tree like params with the mean activation of each kernel's outputs, as ``zeros`` of
        :func:`apoz`.

    Raises:
      TypeError: without ``means``.
      ValueError: for another structure, or vectors that do not fit.

    References:
      Molchanov et al., `Pruning CNNs <https://arxiv.org/abs/1611.06440>`__, 2017, after a
      ReLU; of absolute values, it is meant for other activations, too.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.mean_activation({"w": jnp.ones((1, 2))}, means={"w": jnp.array([0.5, 2.0])})
      {'w': Array([[0.5, 2. ]], dtype=float32)}
    """
    required("mean_activation", "means", means, f"means{_HOW}means")
    return _by_output("mean_activation", "means", means, params, lambda m: m)


def wanda(params: Params, *, input_norms: Any = None, **evidence: Any) -> Scores:
    r"""Returns :math:`|w_{ij}| \, \lVert x_i \rVert_2`, a weight times the norm of its input.

    Compared among the inputs of one output: ``jp.unstructured(per_output=True)``.

    Args:
      params: any pytree of arrays; kernels are (..., in, out).
      input_norms: a tree like params. A vector goes along axis -2, the inputs; an array of the
        leaf's rank broadcasts to it; where it is None the score is :math:`|w|`.

    Raises:
      TypeError: without ``input_norms``.
      ValueError: for another structure, or norms that do not fit.

    References:
      Sun et al., `Wanda <https://arxiv.org/abs/2306.11695>`__, 2023, for
      kernels that are the transposes of the paper's.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> norms = {"w": jnp.array([1.0, 10.0])}
      >>> jp.scores.wanda({"w": jnp.array([[2.0], [-1.0]])}, input_norms=norms)
      {'w': Array([[ 2.],
             [10.]], dtype=float32)}
    """
    required("wanda", "input_norms", input_norms, NORMS)
    return by_input("wanda", input_norms, params, lambda size, norms: size * norms)


NORMS = "input_norms=jp.calibrate(fn, params, batches).norms"  # Error messages quote this call.


def by_input(
    name: str, tree: Any, params: Params, turn: Callable[[jax.Array, jax.Array], Any]
) -> Scores:
    """``turn(|w|, norms)`` with norms in a shape that broadcasts; |w| where there are none."""

    def score(path: str, w: Any, norms: Any) -> Any:
        size = jnp.abs(widen(w))
        if norms is None:
            return size
        column = np.ndim(norms) == 1 < np.ndim(w)
        shape = (*np.shape(norms), 1) if column else np.shape(norms)
        fits = column or len(shape) == np.ndim(w)
        _check_shape(name, "input_norms", path, norms, shape if fits else None, w)
        return turn(size, jnp.asarray(norms, size.dtype).reshape(shape))

    return _with_partial(name, "input_norms", tree, params, score)


def _by_output(
    name: str, evidence: str, tree: Any, params: Params, turn: Callable[[Any], Any]
) -> Scores:
    def score(path: str, w: Any, vector: Any) -> Any:
        zero = jnp.zeros_like(jnp.abs(widen(w)))
        if vector is None:
            return zero
        fits = np.ndim(vector) == 1 and np.shape(w)[-1:] == np.shape(vector)
        _check_shape(name, evidence, path, vector, np.shape(vector) if fits else None, w)
        return zero + turn(jnp.asarray(vector, zero.dtype))

    return _with_partial(name, evidence, tree, params, score)


def _with_partial(
    name: str, evidence: str, tree: Any, params: Params, score: Callable[[str, Any, Any], Any]
) -> Scores:
    """Scores with evidence that may be None in places."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    treedef: Any = jax.tree.structure(params)
    if hasattr(tree, "norms"):  # all statistics
        field = {"input_norms": "norms"}.get(evidence, evidence)
        raise ValueError(
            f"{name}: {evidence} is a {type(tree).__name__} of several trees; write "
            f"{evidence}=stats.{field}"
        )
    try:
        given = treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name}: the tree of {evidence} does not match params: it "
            f"{difference(_whole(tree), _whole(params))}; wanted params' structure, with None "
            "where there is nothing to say"
        ) from error
    pairs = zip(flat, given, strict=True)
    scores = [score(path_str(p), w, x) if is_float(w) else w for (p, w), x in pairs]
    return jax.tree.unflatten(treedef, scores)


def _whole(tree: Any) -> Any:
    """A tree in which None is a leaf like others."""
    return jax.tree.map(lambda _: 0, tree, is_leaf=lambda x: x is None)


def _check_shape(
    name: str, evidence: str, path: str, given: Any, shape: tuple[int, ...] | None, w: Any
) -> None:
    """Raises ValueError unless ``shape`` broadcasts to the leaf's."""
    try:
        if shape is not None and np.broadcast_shapes(shape, np.shape(w)) == np.shape(w):
            return
    except ValueError:
        pass
    side = "inputs, its axis -2" if evidence == "input_norms" else "outputs, its last axis"
    raise ValueError(
        f"{name}: {evidence} has shape {np.shape(given)} at {path}, the leaf {np.shape(w)}; wanted "
        f"one number for each of its {side}"
    )
