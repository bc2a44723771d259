"""The statement of why a compact model equals the masked one, or where units had to stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.compaction.blocks import View
from jaxprune.compaction.plan import KEPT_ONLY, Decision, Plan
from jaxprune.ir import axes
from jaxprune.rules.registry import KEPT
from jaxprune.rules.zero_flow import IN_GRADIENT
from jaxprune.sharding import declared_layout, host, parts, put
from jaxprune.structure.structure import Structure

NOT_COMPARABLE = (
    'a model compacted with semantics="kept" is not the masked model: compare it with a module '
    'written at the small size, or compact with semantics="masked"'
)

WAYS_OUT = 'compact with semantics="kept", or fold the norm into the weights first'

LITTLE, FAR_LESS = 1 / 8, 1 / 4  # of a dimension; of the mean share over dimensions


@dataclass(frozen=True)
class Entry:
    """One dimension: how many of its masked units are gone, and why others stay."""

    name: str
    size: int
    masked: int
    removed: int
    status: str  # "exact", "corrected" (removed units are carried where they count) or "kept"
    reason: str
    carried: int = 0  # removed units that are evaluated beside the kept ones
    evaluations: int = 0  # equations that are evaluated for them

    @property
    def left(self) -> int:
        return self.size - self.removed


@dataclass(frozen=True, eq=False)
class Certificate:
    """Per dimension exact or kept with a reason; ``print`` it to see the table.

    Attributes:
      entries: one per dimension that the masks touch.
      exact: whether every masked unit could be removed.
      hazards: where the masked model divides by what the masks make zero, or takes its root or
        logarithm. It may be infinite or NaN there, or its gradient, and the compact one finite.
        There are two ways out: ``semantics="kept"``, for which removed units are not there,
        whatever their values; or another function, without the division: v / |v| of weights is
        folded into one kernel first. A unit's own 0 / 0 is not taken for zero with the semantics
        "masked": 0 x NaN is NaN, so that no finite function equals the masked model.
      replicated: the cut axes of parameters that lie whole on each device now, since the mesh does
        not divide what is left of them.
    """

    entries: tuple[Entry, ...]
    hazards: tuple[str, ...]
    _compare: Callable[[int, int], float] = field(repr=False)
    _overhead: Callable[[], float] = field(repr=False)
    replicated: tuple[str, ...] = ()

    @property
    def overhead(self) -> float:
        """FLOPs of the compact program over those without its carried parts; 1.0 for none."""
        return self._overhead() if any(e.carried for e in self.entries) else 1.0

    @property
    def exact(self) -> bool:
        return all(e.removed == e.masked for e in self.entries)

    @property
    def thin(self) -> tuple[Entry, ...]:
        """Dimensions that are nearly emptied: a single unit is left, or far less than of others."""
        mean = sum(e.left for e in self.entries) / max(sum(e.size for e in self.entries), 1)
        little = [e for e in self.entries if e.left < LITTLE * e.size]
        return tuple(e for e in little if e.left <= 1 or e.left < FAR_LESS * mean * e.size)

    def check(self, n: int = 1, seed: int = 0) -> float:
        """Largest relative error against the masked model on ``n`` random inputs in float64.

        A function that can't be traced in float64 is compared in the given types, with a warning.

        Each floating argument is drawn from a normal distribution, others are taken as they were
        given to ``compact``. The error is max|compact - masked| / max|masked|; NaN where the
        masked model is NaN itself, so that it passes no ``check() < tolerance``; infinite where
        only one of both is a number, or their infinities differ.
        """
        if n < 1:
            raise ValueError(f"check wants n >= 1 random inputs, got {n}")
        return float(np.max([self._compare(seed, i) for i in range(n)]))  # NaN wins

    def __str__(self) -> str:
        if not self.entries:
            return "nothing to remove: the masks cover no whole unit of any dimension"
        width = max([len(e.name) for e in self.entries] + [9])
        lines = [f"{'dimension':<{width}}  {'size':>6}  {'masked':>6}  {'removed':>7}  status"]
        for e in self.entries:
            lines.append(
                f"{e.name:<{width}}  {e.size:>6}  {e.masked:>6}  {e.removed:>7}  {_why(e)}"
            )
        if any(e.carried for e in self.entries):
            lines.append(f"carried units make the FLOPs {self.overhead:.3g} x")
        for e in self.thin:
            lines.append(f"nearly emptied: {e.left} of {e.size} units are left of {e.name}")
        for place in self.hazards:
            whose = "model's gradient" if place.endswith(IN_GRADIENT) else "model"
            place = place.removesuffix(IN_GRADIENT)
            lines.append(
                f"the masked {whose} may not be finite: {place} meets masked zeros; {WAYS_OUT}"
            )
        lines += [f"no longer cut over devices: {place}" for place in self.replicated]
        return "\n".join(lines)


def _why(e: Entry) -> str:
    carried = f"{e.carried} units carried through {e.evaluations} operations" if e.carried else ""
    return ": ".join(filter(None, [e.status, "; ".join(filter(None, [carried, e.reason]))]))


def replicated(structure: Structure, view: View) -> tuple[str, ...]:
    """Which cut axes a mesh divided at full size and does not divide now."""
    found = []
    for path, axs, layout in zip(structure.paths, structure.param_axes, structure.layouts):
        pairs = parts(layout, len(axs)) if layout is not None else ()
        for k, (names, count) in enumerate(pairs):
            size = view.size(axs[k])
            if size != axs[k].size and size % count:
                name = "x".join([names] if isinstance(names, str) else names)
                found.append(
                    f"axis {k} of {path}, which keeps {size} of {axs[k].size}: the mesh axis "
                    f"{name} of {count} does not divide it"
                )
    return tuple(found)


def of_plan(plan: Plan, structure: Structure, compare: Any, overhead: Any) -> Certificate:
    """Reads the entries off the decisions."""
    entries = [_entry(plan, name, d) for name, d in plan.decisions.items()]
    alone = {name: apart for name, apart in plan.apart.items() if name not in plan.decisions}
    entries += [
        Entry(name, structure.dims[name].size, apart.masked, 0, "kept", apart.reason)
        for name, apart in alone.items()
    ]
    whole = replicated(structure, plan.split.view(KEPT))
    hazards = () if plan.semantics == KEPT_ONLY else plan.demand.flow.hazards
    return Certificate(tuple(entries), tuple(hazards), compare, overhead, whole)


def _entry(plan: Plan, name: str, d: Decision) -> Entry:
    removed, masked, reasons = int((~d.kept).sum()), int(d.candidates.sum()), d.reasons
    if name in plan.apart:
        masked = max(masked, plan.apart[name].masked)
        reasons = [*reasons, plan.apart[name].reason]
    carried = int((d.carried & ~d.kept).sum())
    status = "kept" if removed < masked else "corrected" if carried else "exact"
    count = plan.demand.evaluations(axes.find(d.dim.axis)) if carried else 0
    return Entry(name, d.dim.size, masked, removed, status, "; ".join(reasons), carried, count)


def compare(fn: Any, masked: Any, small: Any, args: Any, seed: int, i: int) -> float:
    """One random input in float64 through both models."""
    key = jax.random.fold_in(jax.random.key(seed), i)
    try:
        with jax.enable_x64(True):
            wide = jax.tree.map(_widen, masked), jax.tree.map(_widen, small.params)
            return difference(fn, *wide, small, draw(key, args, jnp.float64))
    except (
        TypeError,
        ValueError,
        jax.errors.JaxRuntimeError,
    ) as error:  # a function that fixes its types, say a loop's carry
        warnings.warn(f"compared in the given types, for float64 fails: {error}", stacklevel=4)
        return difference(fn, masked, small.params, small, draw(key, args, None))


def difference(fn: Any, masked: Any, params: Any, small: Any, args: Any) -> float:
    """The largest relative error of any output."""
    expected = jax.tree.leaves(small.restrict_outputs(fn(masked, *args)))
    got = jax.tree.leaves(small.fn(params, *args))
    return float(np.max([0.0, *map(error, expected, got)]))  # NaN wins


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
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


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
