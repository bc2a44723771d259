"""Comparing a compact model with what it is to equal, on random inputs in float64.

That is the masked model. Where removed units count as not there, it is the function itself at the
small params, as far as it reads its sizes from them.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._progress import Progress, track
from jaxprune.compaction.cut import Cut
from jaxprune.compaction.masked import Masked, is_shape
from jaxprune.compaction.plan import KEPT_ONLY
from jaxprune.compaction.small_function import SmallFunction
from jaxprune.costs.api import cost
from jaxprune.sharding import declared_layout, host, put
from jaxprune.structure.dimensions import Structure

FIXED_SIZES = (
    'a model compacted with semantics="kept" is not the masked model, and the function does not '
    "run at the small params, for it fixes its sizes ({error}): compare it with a module written "
    'at the small size, or compact with semantics="masked"'
)


class Source:
    """What the masked model is made of: masks, packed, and params as long as others hold them."""

    def __init__(self, params: Sequence[Any], masks: Sequence[np.ndarray] | None):
        self._params = [_weakly(leaf) for leaf in params] if masks is not None else list(params)
        self._masks = None if masks is None else [(m.shape, np.packbits(m)) for m in masks]

    @classmethod
    def of(cls, masked: Masked) -> Source:
        return cls(masked.params, masked.masks)

    @classmethod
    def of_small(cls, params: Any) -> Source:
        """The masked model is what small params expand to, as after loading."""
        return cls(jax.tree.leaves(params), None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy on disk holds no full params."""
        gone = self._params if self._masks is None else [_gone for _ in self._params]
        return {"_params": gone, "_masks": self._masks}

    @property
    def is_there(self) -> bool:
        """Whether the masked model can be had without being given params."""
        return self._masks is None or all(leaf() is not None for leaf in self._params)

    def params(self, structure: Structure) -> Any:
        """The full params before masks, None where they are gone."""
        if self._masks is None or not self.is_there:
            return None
        return jax.tree.unflatten(structure.treedef, [leaf() for leaf in self._params])

    def masked(self, cut: Cut, params: Any) -> Any:
        """The masked params, a tree of the full shapes."""
        structure = cut.structure
        if self._masks is None:
            leaves = [cut.grow(leaf, i) for i, leaf in enumerate(self._params)]
            return jax.tree.unflatten(structure.treedef, leaves)
        if params is not None:
            structure.check_params(params)
        full = jax.tree.leaves(params) if params is not None else self._alive(structure)
        masks = [np.unpackbits(bits, count=int(np.prod(s))).reshape(s) for s, bits in self._masks]
        values = Masked(structure, full, [mask.astype(bool) for mask in masks]).values()
        return jax.tree.unflatten(structure.treedef, values)

    def _alive(self, structure: Structure) -> list[Any]:
        leaves = [leaf() for leaf in self._params]
        for path, shape, leaf in zip(structure.paths, structure.shapes, leaves, strict=True):
            if leaf is None:
                raise ValueError(
                    f"check compares with the full params, and {path} of shape {shape} is gone: a "
                    "certificate keeps none of them alive; write "
                    "small.certificate.check(params=params)"
                )
        return leaves


def _gone() -> None:
    """Stands for a leaf that nobody holds any more."""


def _weakly(leaf: Any) -> Callable[[], Any]:
    """Gives the leaf as long as someone else holds it; single numbers for good, no shapes."""
    if is_shape(leaf):
        return _gone
    try:
        return weakref.ref(leaf)
    except TypeError:
        return lambda: leaf


@dataclass(frozen=True, eq=False)
class Checker:
    """Both models, and the arguments to draw inputs like."""

    function: SmallFunction
    cut: Cut
    args: Any
    source: Source

    def error(self, n: int, seed: int, params: Any, progress: Progress = None) -> float:
        """The largest relative error on ``n`` random inputs; NaN wins."""
        masked = self.source.masked(self.cut, params)
        leaves = [self.cut.slice(leaf, i) for i, leaf in enumerate(jax.tree.leaves(masked))]
        small = jax.tree.unflatten(self.cut.structure.treedef, leaves)
        if self.cut.plan.semantics == KEPT_ONLY:
            self._check_runs(small)
        keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(n)]
        inputs = track(keys, "comparing on random inputs", progress)
        return float(np.max([self._compare(masked, small, key) for key in inputs]))

    def _compare(self, masked: Any, small: Any, key: Any) -> float:
        """One random input in float64 through both models."""
        try:
            with jax.enable_x64(True):
                masked_wide, small_wide = jax.tree.map(_widen, (masked, small))
                return self._difference(masked_wide, small_wide, draw(key, self.args, jnp.float64))
        except (
            TypeError,
            ValueError,
            jax.errors.JaxRuntimeError,
        ) as error:  # a function that fixes its types, say a loop's carry
            warnings.warn(f"compared in the given types, for float64 fails: {error}", stacklevel=5)
            return self._difference(masked, small, draw(key, self.args, None))

    def _check_runs(self, small: Any) -> None:
        """Raises ValueError unless the function takes small params, with the same results."""
        try:
            itself = jax.eval_shape(self.function.fn, small, *self.args)
        except Exception as error:  # of whatever kind its framework raises
            raise ValueError(FIXED_SIZES.format(error=str(error).split("\n")[0])) from error
        cut = jax.eval_shape(self.function, small, *self.args)
        shapes, wanted = ([x.shape for x in jax.tree.leaves(tree)] for tree in (itself, cut))
        if shapes != wanted:
            raise ValueError(FIXED_SIZES.format(error=f"it gives {shapes}, not {wanted}"))

    def _difference(self, masked: Any, small: Any, args: Any) -> float:
        """The largest relative error of any output."""
        if self.cut.plan.semantics == KEPT_ONLY:
            wanted = self.function.fn(small, *args)
        else:
            wanted = self.cut.outputs(self.function.fn(masked, *args))
        expected, got = jax.tree.leaves(wanted), jax.tree.leaves(self.function(small, *args))
        return float(np.max([0.0, *map(error, expected, got)]))

    def overhead(self) -> float:
        """FLOPs of the compact program over those of one without carried parts."""
        without = dataclasses.replace(self.cut.plan, semantics=KEPT_ONLY)
        structure = self.cut.structure
        bare = SmallFunction(self.function.fn, structure, without)
        shapes = [
            jax.ShapeDtypeStruct(self.cut.view.shape(axs), x.dtype)
            for axs, x in zip(structure.param_axes, jax.tree.leaves(self.function.traced_for[0]))
        ]
        small = jax.tree.unflatten(structure.treedef, shapes)
        ours, least = (cost(f, small, *self.args).flops for f in (self.function, bare))
        return ours / max(least, 1)


def draw(key: Any, args: Any, dtype: Any) -> Any:
    """Random floats, each array from a key of its own; other arrays as they are."""
    leaves, treedef = jax.tree.flatten(args)
    keys = jax.random.split(key, max(len(leaves), 1))
    return jax.tree.unflatten(treedef, [_draw(k, a, dtype) for k, a in zip(keys, leaves)])


def _draw(key: Any, a: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.zeros(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a
    drawn, found = jax.random.normal(key, a.shape, dtype or a.dtype), declared_layout(a)
    return drawn if found is None else put(drawn, found)


def _widen(leaf: Any) -> Any:
    return (
        jnp.asarray(leaf, jnp.float64)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        else leaf
    )


def error(expected: Any, got: Any) -> float:
    """max|got - expected| / max|expected|; NaN where NaN is expected, infinite where it is not."""
    a, b = host(_numbers(expected)), host(_numbers(got))
    if not np.issubdtype(a.dtype, np.inexact):
        return float(np.any(a != b))
    if np.isnan(a).any():
        return float("nan")
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite]):
        return float("inf")
    scale = float(np.max(np.abs(a[finite]), initial=0.0)) or 1.0
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0.0)) / scale


def _numbers(x: Any) -> Any:
    """The bits of a random key; other arrays as they are."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
