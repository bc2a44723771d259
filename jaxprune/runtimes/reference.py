"""What a program in an engine must equal: the masked model, or what is left of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.compaction.checking import draw, error
from jaxprune.compaction.model import Compact
from jaxprune.compaction.plan import KEPT_ONLY
from jaxprune.runtimes._runtime import parts
from jaxprune.runtimes.state import Stateful

MASKED, SMALL, DENSE = "the masked model", "the compact model", "the function"


class Reference(NamedTuple):
    """A function of the arguments after params, in this process.

    Attributes:
      name: "the masked model"; "the compact model" where that is tuned, compacted with
        ``semantics="kept"``, or its full params are gone; "the function", which was not pruned.
      call: the function.
      params: those of the program, or None.
      small: what was pruned, if anything.
      dense: the full params before masks, or None where they are gone.
    """

    name: str
    call: Callable[..., Any]
    params: Any
    small: Compact | None = None
    dense: Any = None

    @classmethod
    def of(cls, fn: Any, args: tuple[Any, ...]) -> Reference:
        """The reference of what is exported."""
        held = fn if isinstance(fn, Stateful) else None
        small = held.small if held else fn
        if isinstance(small, Compact):
            return cls._of_small(small, held)
        params, _, bare = parts(fn, args)
        full = held.params if held else params[0] if params else None
        return cls(DENSE, jax.jit(bare), full)

    @classmethod
    def _of_small(cls, fn: Compact, held: Stateful | None) -> Reference:
        checker = fn.certificate._checker
        cut, full = checker.cut, checker.source.params(checker.cut.structure)
        call = jax.jit(held or (lambda *xs: fn.fn(fn.params, *xs)))
        small = cls(SMALL, call, fn.params, fn, full)
        if cut.plan.semantics == KEPT_ONLY or not checker.source.is_there:
            return small
        dense, masked = checker.function.fn, checker.source.masked(cut, full)
        if _is_tuned(fn, masked):
            return small

        def whole(*xs: Any) -> Any:
            params, rest = (masked, xs) if held is None else (_grown(cut, masked, xs[0]), xs[1:])
            return cut.outputs(dense(params, *rest))

        return small._replace(name=MASKED, call=jax.jit(whole))

    def difference(self, fn: Callable[..., Any], args: Any, n: int, seed: int) -> float:
        """The largest relative difference of any result on ``n`` random inputs; NaN wins."""
        keys = (jax.random.fold_in(jax.random.key(seed), i) for i in range(n))
        return float(np.max([self._once(fn, draw(key, args, None)) for key in keys]))

    def _once(self, fn: Callable[..., Any], args: Any) -> float:
        wanted, got = jax.tree.leaves(self.call(*args)), jax.tree.leaves(fn(*args))
        return float(np.max([0.0, *map(error, wanted, got)]))

    def is_nan(self, args: Any) -> bool:
        """Whether the reference itself gives NaN, which nothing equals."""
        found = jax.tree.leaves(self.call(*draw(jax.random.key(0), args, None)))
        return any(np.isnan(x).any() for x in found if np.issubdtype(x.dtype, np.inexact))

    def model(self) -> dict[str, Any]:
        """What was removed and why that equals the masked model; digests of params and masks."""
        text: dict[str, Any] = {"params sha256": _digest(self.params)}
        if self.small is None:
            return text
        certificate = self.small.certificate
        return text | {
            "dense params sha256": _digest(self.dense),
            "masks sha256": _digest(self.small.masks),
            "semantics": certificate.semantics,
            "exact": certificate.exact,
            "dimensions": [dataclasses.asdict(entry) for entry in certificate.entries],
            "hazards": list(certificate.hazards),
        }


def _grown(cut: Any, masked: Any, state: Any) -> Any:
    """The masked parameters with a small state at its full size."""
    small = jax.tree.unflatten(cut.structure.treedef, cut.structure.paths)  # paths as leaves
    index = {path: i for i, path in enumerate(cut.structure.paths)}
    grown = {
        key: jax.tree.map(lambda path, x: cut.grow(x, index[path]), small[key], given)
        for key, given in state.items()
    }
    return {**masked, **grown}


def _is_tuned(small: Compact, masked: Any) -> bool:
    """Whether params were replaced since the model was cut."""
    cut = small.certificate._checker.cut
    pairs = zip(jax.tree.leaves(masked), jax.tree.leaves(small.params), strict=True)
    return not all(np.array_equal(cut.slice(x, i), y) for i, (x, y) in enumerate(pairs))


def _digest(tree: Any) -> str | None:
    """Of the paths, types and values of all leaves; None of params that are gone."""
    if tree is None:
        return None
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf, order="C")
        what = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(what.encode() + array.tobytes())
    return digest.hexdigest()
