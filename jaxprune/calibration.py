"""Calibration: statistics of the inputs that each weight multiplies, for any function.

They are read off the jaxpr, so that no framework needs hooks. All that one-shot methods need of
the data is in them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.jaxpr.inputs import Moments, Wish, merge, read, summed
from jaxprune.jaxpr.origins import Layout
from jaxprune.scores.weights import is_float
from jaxprune.types import Params, PyTree, Where, path_str


@dataclass(frozen=True)
class Stats:
    """Statistics of the inputs of each weight; trees like params, None where there are none.

    A weight's inputs are the axes that its contraction sums over: axis 0 of (in, out), axis 1 of
    (out, in), the first three of a convolution's (height, width, in, out). A stack of weights that
    a loop scans, or that is multiplied in batches, has a statistic for each.

    Attributes:
      norms: the L2 norm of each input over all tokens, float32, (in,) for a kernel (in, out);
        otherwise of the leaf's rank with size 1 at its outputs: what ``jp.wanda(input_norms=)``
        takes.
      means, variances: likewise, per token.
      grams: :math:`X^T X`, (in, in) or (batch..., in, in); inputs row-major in the leaf's order.
      count: tokens that the weight has multiplied, () or (batch...).
      layouts: path -> which axes of the leaf are its batch, its inputs, its outputs.
      reasons: path -> why a leaf has no statistics.
    """

    norms: PyTree
    means: PyTree
    variances: PyTree
    grams: PyTree
    count: PyTree
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def calibrate(
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    where: Where | None = None,
    grams: bool | Where = True,
    dtype: Any = jnp.float32,
    axis_name: Any = None,
) -> Stats:
    r"""Returns statistics of the input of each weight that a contraction or convolution consumes.

    One jitted pass per batch; sums stay on the device, and sharded batches stay sharded. A weight
    may be reshaped, transposed, cast or indexed on its way. Of a weight that is used several times
    the tokens of all uses are counted together.

    Args:
      fn: ``fn(params, *batch)``; what it returns is not read, nor computed where no weight needs
        it.
      params: any pytree.
      batches: an iterable of what follows params: an array, or a tuple of arguments.
      where: (path, leaf) -> whether statistics are wanted; all float leaves of rank 2 or more
        by default.
      grams: whether Gram matrices are wanted, or (path, leaf) -> bool: a weight of n inputs takes
        4 n^2 bytes. To stay within memory, calibrate for a part of the leaves at a time.
      dtype: what is summed in; float64 needs ``jax.enable_x64(True)``.
      axis_name: a mapped axis (``jax.shard_map``, ``jax.pmap``) to sum over when this is called
        within it; ``batches`` holds this device's part.

    Raises:
      ValueError: without batches; for a NaN or infinite input, naming the leaf; for float64 where
        it is not enabled.

    References:
      Means and variances of several batches are joined as in Chan, Golub and LeVeque, 1979.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1)}
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"] + p["b"], params,
      ...                      [jnp.array([[3.0, 1.0], [4.0, 1.0]])])
      >>> stats.norms["w"], stats.grams["w"], stats.norms["b"]
      (Array([5.       , 1.4142135], dtype=float32), Array([[25.,  7.],
             [ 7.,  2.]], dtype=float32), None)
    """
    named = [(path_str(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(params)]
    wish = _wish(named, where, grams, dtype)
    sums: dict[int, Moments] | None = None
    about: dict[str, Any] = {}
    for batch in batches:
        args = tuple(batch) if isinstance(batch, tuple) else (batch,)
        new, layouts, lost = _pass(_Function(fn), wish, params, args)
        about = {"layouts": layouts.value, "lost": lost.value}
        sums = new if sums is None else _merge(sums, new)
    if sums is None:
        raise ValueError(
            "calibrate: batches is empty; pass at least one batch of what follows params, such as "
            "[x] or [(tokens, positions)]; an iterator that has been read once is empty, too"
        )
    if axis_name is not None:
        sums = {leaf: summed(m, axis_name) for leaf, m in sums.items()}
    _check_finite(named, sums)
    return _stats(jax.tree.structure(params), named, sums, about, wish)


def _wish(named: list[tuple[str, Any]], where: Any, grams: Any, dtype: Any) -> Wish:
    dtype = np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"calibrate: dtype={dtype} is not enabled; write with jax.enable_x64(True): ... around "
            "the call"
        )

    def wanted(path: str, leaf: Any) -> bool:
        real = is_float(leaf) and not jnp.iscomplexobj(leaf) and np.ndim(leaf) >= 2
        return real and (where is None or bool(where(path, leaf)))

    chosen = [wanted(path, leaf) for path, leaf in named]
    shapes = tuple(np.shape(leaf) if ok else None for ok, (_, leaf) in zip(chosen, named))
    squares = tuple(
        ok and bool(grams(path, leaf) if callable(grams) else grams)
        for ok, (path, leaf) in zip(chosen, named)
    )
    return Wish(shapes, squares, dtype)


class _Function:
    """A function that jit may take as a constant, equal to itself in the next call, too."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn

    def __hash__(self) -> int:
        try:
            return hash(self.fn)
        except TypeError:
            return id(self.fn)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Function) and self.fn is other.fn


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Told:
    """What a trace tells beside its arrays."""

    items: tuple[tuple[int, Any], ...]

    @property
    def value(self) -> dict[int, Any]:
        return dict(self.items)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pass(fn: _Function, wish: Wish, params: Params, args: tuple[Any, ...]) -> Any:
    moments, layouts, lost = read(fn.fn, wish, params, args)
    return moments, _Told(tuple(layouts.items())), _Told(tuple(lost.items()))


@jax.jit
def _merge(a: dict[int, Moments], b: dict[int, Moments]) -> dict[int, Moments]:
    return {leaf: merge(m, b[leaf]) for leaf, m in a.items()}


def _check_finite(named: list[tuple[str, Any]], sums: dict[int, Moments]) -> None:
    known = {k: m for k, m in sums.items() if not isinstance(m.mean, jax.core.Tracer)}
    finite = jax.device_get({k: jnp.all(jnp.isfinite(m.mean + m.spread)) for k, m in known.items()})
    for leaf, ok in finite.items():
        if not ok:
            path, w = named[leaf]
            raise ValueError(
                f"calibrate: an input of {path}, shape {np.shape(w)}, is NaN or infinite; look for "
                "it in the batches and params, or leave bad batches out: "
                "[b for b in batches if np.isfinite(b).all()]"
            )


def _stats(
    treedef: Any,
    named: list[tuple[str, Any]],
    sums: dict[int, Moments],
    about: dict[str, Any],
    wish: Wish,
) -> Stats:
    def tree(of: Callable[[int, Moments], Any]) -> PyTree:
        return jax.tree.unflatten(
            treedef, [of(k, sums[k]) if k in sums else None for k in range(len(named))]
        )

    layouts = about["layouts"]

    def shaped(k: int, x: jax.Array) -> jax.Array:
        return along_inputs(x, layouts[k], np.shape(named[k][1]))

    def count(m: Moments) -> jax.Array:
        return m.tokens[..., None]

    why = {
        path: about["lost"].get(k, "no contraction consumes it")
        for k, (path, _) in enumerate(named)
        if k not in sums and wish.shapes[k] is not None
    }
    return Stats(
        tree(lambda k, m: shaped(k, jnp.sqrt(m.spread + count(m) * jnp.square(m.mean)))),
        tree(lambda k, m: shaped(k, m.mean)),
        tree(lambda k, m: shaped(k, m.spread / jnp.maximum(count(m), 1))),
        tree(lambda k, m: m.gram),
        tree(lambda k, m: m.tokens),
        {named[k][0]: layout for k, layout in layouts.items()},
        why,
    )


def along_inputs(x: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """A statistic (batch..., in) in the leaf's rank; a vector for a plain kernel (in, out)."""
    if len(shape) == 2 and layout.ins == (0,) and not layout.batch:
        return x
    thin = [1 if k in layout.outs else n for k, n in enumerate(shape)]
    order = [*layout.batch, *layout.ins, *layout.outs]
    spread = x.reshape([thin[k] for k in order])
    return spread.transpose([order.index(k) for k in range(len(shape))])
