"""Calibration: statistics of the inputs that each weight multiplies, for any function.

They are read off the jaxpr, so that no framework needs hooks. All that one-shot methods need of
the data is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._calls import calls_fn, tracing
from jaxprune._leaf import is_float
from jaxprune._progress import Progress, track
from jaxprune._tables import Part, Shown
from jaxprune.calibration import table
from jaxprune.calibration.origins import Layout
from jaxprune.calibration.reader import UNREAD, Moments, Wish, merge, read, summed
from jaxprune.typing import Params, PyTree, Where, named_leaves, path_str


@dataclass(frozen=True, repr=False)
class Stats(Shown):
    """Statistics of the inputs of each weight; ``print`` them. Trees like params, None for none.

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
      reasons: path -> why a leaf has no statistics; of a leaf that has some, which of its uses are
        not counted in them.
    """

    norms: PyTree
    means: PyTree
    variances: PyTree
    grams: PyTree
    count: PyTree
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def _parts(self) -> Iterator[Part]:
        return table.parts(self)

    __repr__ = Shown.__str__

    def check_params(self, method: str, params: Params) -> None:
        """Raises ValueError unless these are statistics of params like the given ones.

        Args:
          method: what asks, for the message.
          params: a tree of arrays.
        """
        self._check_paths(method, params)
        flat = jax.tree_util.tree_leaves_with_path(params)
        treedef: Any = jax.tree.structure(params)
        for (path, leaf), mean in zip(flat, treedef.flatten_up_to(self.means), strict=True):
            layout, shape = self.layouts.get(path_str(path)), np.shape(leaf)
            if layout is not None and np.shape(mean) != statistic_shape(layout, shape):
                raise ValueError(
                    f"{method}: the statistics of {path_str(path)}, shape {shape}, have the shape "
                    f"{np.shape(mean)}: they are of other params; write "
                    "stats = jp.calibrate(fn, params, batches) with these"
                )

    def _check_paths(self, method: str, params: Params) -> None:
        ours, theirs = (
            [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)]
            for tree in (params, self.means)
        )
        if ours != theirs:
            odd = [p for p in ours if p not in theirs] + [p for p in theirs if p not in ours]
            raise ValueError(
                f"{method}: stats are of another tree than params, they differ in "
                f"{(odd or ours)[0]!r}; write stats = jp.calibrate(fn, params, batches) with these"
            )


def _is_none(x: Any) -> bool:
    return x is None


def _flatten(stats: Stats) -> tuple[Any, Any]:
    trees = stats.norms, stats.means, stats.variances, stats.grams, stats.count
    return trees, (tuple(stats.layouts.items()), tuple(stats.reasons.items()))


def _unflatten(told: Any, trees: Any) -> Stats:
    return Stats(*trees, *map(dict, told))


jax.tree_util.register_pytree_node(Stats, _flatten, _unflatten)


@calls_fn("jp.calibrate")
def calibrate(
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    where: Where | None = None,
    grams: bool | Where = True,
    dtype: Any = jnp.float32,
    axis_name: Any = None,
    progress: Progress = None,
) -> Stats:
    r"""Returns statistics of the input of each weight that a contraction or convolution consumes.

    One jitted pass per batch, compiled once per call; sums stay on the device, and sharded batches
    stay sharded. A weight may be reshaped, transposed, negated, cast or indexed on its way. Of a
    weight that is used several times the tokens of all uses are counted together; uses that can't
    be followed are told in ``stats.reasons``. Batches may use different leaves.

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
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        batches, such as ``tqdm.tqdm``.

    Raises:
      ValueError: without batches; for one array in place of batches, a list as a batch, or shapes
        without data; for a NaN or infinite input, or a leaf whose inputs lie along other axes in
        another batch, naming the leaf; for float64 where it is not enabled.
      TypeError: for another dtype, or progress of another kind.

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
    return Calibrator(fn, where, grams, dtype, axis_name, progress)(params, batches)


class Calibrator:
    """Calibrates a function for one tree of parameters after another.

    Its passes are compiled once for all calls, and go when it goes.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        where: Where | None = None,
        grams: bool | Where = True,
        dtype: Any = jnp.float32,
        axis_name: Any = None,
        progress: Progress = None,
    ):
        self.where, self.grams, self.dtype, self.axis_name = where, grams, dtype, axis_name
        self.progress, self._fn = progress, fn

        def one(wish: Wish, params: Params, args: tuple[Any, ...]) -> Any:
            moments, layouts, lost = read(fn, wish, params, args)
            return moments, _Told(tuple(layouts.items())), _Told(tuple(lost.items()))

        self._pass = jax.jit(one, static_argnums=0)

    def __call__(self, params: Params, batches: Iterable[Any]) -> Stats:
        named = named_leaves(params)
        wish = wish_for(named, self.where, self.grams, self.dtype)
        seen: _Seen | None = None
        total = len(batches) if isinstance(batches, Sized) else None
        for args in track(_each_batch(batches), "calibrating on batches", self.progress, total):
            jax.block_until_ready(seen and seen.moments)  # One batch is ahead at most.
            with tracing(self._fn, params, args):
                moments, layouts, lost = self._pass(wish, params, args)
            new = _Seen(moments, layouts.value, lost.value)
            seen = new if seen is None else _together(named, seen, new)
        if seen is None:
            raise ValueError(
                "calibrate: batches is empty; pass at least one batch of what follows params, such "
                "as [x] or [(tokens, positions)]; an iterator that has been read once is empty, too"
            )
        if self.axis_name is not None:
            every = {leaf: summed(m, self.axis_name) for leaf, m in seen.moments.items()}
            seen = seen._replace(moments=every)
        _check_finite(named, seen.moments)
        return _stats(jax.tree.structure(params), named, seen, wish)


def _each_batch(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Each batch as a tuple of arguments, checked."""
    if isinstance(batches, jax.Array | np.ndarray | Mapping):
        raise ValueError(
            f"calibrate: batches is one {type(batches).__name__}; wanted an iterable of batches: "
            "batches=[x]"
        )
    for batch in batches:
        if isinstance(batch, list):
            raise ValueError(
                f"calibrate: a batch is a list of {len(batch)}; pass a tuple of what follows "
                "params: batches=[(x, y)], or [([x, y],)] where fn takes a list"
            )
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch)):
            raise ValueError(
                f"calibrate needs data, and a batch holds shapes alone: {batch}; pass arrays: "
                "batches=[x]"
            )
        yield tuple(batch) if isinstance(batch, tuple) else (batch,)


def wish_for(named: list[tuple[str, Any]], where: Any, grams: Any, dtype: Any) -> Wish:
    """What is asked of which leaves; real float leaves of rank 2 or more can have statistics."""
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise TypeError(
            f"calibrate: dtype={dtype}; wanted what sums stay exact in, jnp.float32 or jnp.float64"
        )
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


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Told:
    """What a traced pass found that is no array; jit carries it as static data."""

    items: tuple[tuple[int, Any], ...]

    @property
    def value(self) -> dict[int, Any]:
        return dict(self.items)


class _Seen(NamedTuple):
    """What batches have told, by the number of a leaf."""

    moments: dict[int, Moments]
    layouts: dict[int, Layout]
    lost: dict[int, tuple[str, ...]]


def _together(named: list[tuple[str, Any]], a: _Seen, b: _Seen) -> _Seen:
    """Both; a leaf may be used in one alone."""
    for leaf in a.layouts.keys() & b.layouts.keys():
        if a.layouts[leaf] != b.layouts[leaf]:
            path, w = named[leaf]
            raise ValueError(
                f"calibrate: {path}, shape {np.shape(w)}, is multiplied along its axes "
                f"{a.layouts[leaf].ins} in one batch and {b.layouts[leaf].ins} in another; "
                "calibrate with one kind of batch, or without the leaf: "
                f"where=lambda path, leaf: path != {path!r}"
            )
    common = a.moments.keys() & b.moments.keys()
    both = _merge(*({leaf: s.moments[leaf] for leaf in common} for s in (a, b)))
    why = {
        leaf: tuple(dict.fromkeys(a.lost.get(leaf, ()) + b.lost.get(leaf, ())))
        for leaf in {**a.lost, **b.lost}
    }
    return _Seen({**a.moments, **b.moments, **both}, {**a.layouts, **b.layouts}, why)


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
    seen: _Seen,
    wish: Wish,
) -> Stats:
    sums, layouts, lost = seen

    def tree(of: Callable[[int, Moments], Any]) -> PyTree:
        return jax.tree.unflatten(
            treedef, [of(k, sums[k]) if k in sums else None for k in range(len(named))]
        )

    def shaped(k: int, x: jax.Array) -> jax.Array:
        return along_inputs(x, layouts[k], np.shape(named[k][1]))

    def count(m: Moments) -> jax.Array:
        return m.tokens[..., None]

    wanted = [(k, path) for k, (path, _) in enumerate(named) if wish.shapes[k] is not None]
    why = {path: _reason(k in sums, lost.get(k, ())) for k, path in wanted}
    return Stats(
        tree(lambda k, m: shaped(k, jnp.sqrt(m.spread + count(m) * jnp.square(m.mean)))),
        tree(lambda k, m: shaped(k, m.mean)),
        tree(lambda k, m: shaped(k, m.spread / jnp.maximum(count(m), 1))),
        tree(lambda k, m: m.gram),
        tree(lambda k, m: m.tokens),
        {named[k][0]: layout for k, layout in layouts.items()},
        {path: reason for path, reason in why.items() if reason is not None},
    )


def _reason(found: bool, why: Sequence[str]) -> str | None:
    """Why a leaf has no statistics, or not of all of its uses; None: it has all."""
    of_weights = [reason for reason in why if UNREAD not in reason]
    if not found:
        return next(iter([*of_weights, *why]), UNREAD)
    return f"uses that are not counted: {'; '.join(of_weights)}" if of_weights else None


def along_inputs(x: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """A statistic (batch..., in) in the leaf's rank; a vector for a plain kernel (in, out)."""
    thin = statistic_shape(layout, shape)
    if len(thin) < len(shape):
        return x
    order = [*layout.batch, *layout.ins, *layout.outs]
    spread = x.reshape([thin[k] for k in order])
    return spread.transpose([order.index(k) for k in range(len(shape))])


def statistic_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of norms, means and variances of a leaf of this shape."""
    if len(shape) == 2 and layout.ins == (0,) and not layout.batch:
        return shape[:1]
    return tuple(1 if k in layout.outs else n for k, n in enumerate(shape))
