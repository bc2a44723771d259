"""The statement of why a compact model equals the masked one, or where units had to stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxprune import _tables as tables
from jaxprune._progress import Progress
from jaxprune.compaction.blocks import View
from jaxprune.compaction.checking import Checker
from jaxprune.compaction.plan import KEPT_ONLY, MASKED, Decision, Plan
from jaxprune.rules.registry import KEPT
from jaxprune.rules.zero_flow import IN_GRADIENT
from jaxprune.sharding import parts
from jaxprune.structure.dimensions import Structure

WAYS_OUT = 'compact with semantics="kept", or fold the norm into the weights first'

_MEANINGS = {
    MASKED: "the small model equals the masked one",
    KEPT_ONLY: "removed units count as not there; the small model need not equal the masked one",
}

LITTLE = 1 / 8  # A dimension is thin when less than this share of it is left
FAR_LESS = 1 / 4  # and less than this share of what the other dimensions keep on average.


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
class Certificate(tables.Shown):
    """Per dimension exact or kept with a reason; ``print`` it to see the table.

    Attributes:
      entries: one per dimension that the masks touch.
      exact: whether every masked unit could be removed.
      hazards: where the masked model divides by what the masks make zero, or takes its root or
        logarithm. It may be infinite or NaN there, or its gradient, and the compact one finite.
        There are two ways out: ``semantics="kept"``, for which removed units are not there,
        whatever their values; or another function, without the division: ``v / |v|`` of weights is
        folded into one kernel first. A unit's own 0 / 0 is not taken for zero with the semantics
        "masked": 0 x NaN is NaN, so that no finite function equals the masked model.
      replicated: the cut axes of parameters that lie whole on each device now, since the mesh does
        not divide what is left of them.
    """

    entries: tuple[Entry, ...]
    hazards: tuple[str, ...]
    _checker: Checker = field(repr=False)
    replicated: tuple[str, ...] = ()

    @property
    def overhead(self) -> float:
        """FLOPs of the compact program over those without its carried parts; 1.0 for none."""
        return self._checker.overhead() if any(e.carried for e in self.entries) else 1.0

    @property
    def semantics(self) -> str:
        """What ``jp.compact`` was asked for, "masked" or "kept"."""
        return self._checker.cut.plan.semantics

    @property
    def exact(self) -> bool:
        return all(e.removed == e.masked for e in self.entries)

    @property
    def thin(self) -> tuple[Entry, ...]:
        """Dimensions that are nearly emptied: a single unit is left, or far less than of others."""
        mean = sum(e.left for e in self.entries) / max(sum(e.size for e in self.entries), 1)
        little = [e for e in self.entries if e.left < LITTLE * e.size]
        return tuple(e for e in little if e.left <= 1 or e.left < FAR_LESS * mean * e.size)

    def check(
        self, n: int = 1, seed: int = 0, *, params: Any = None, progress: Progress = None
    ) -> float:
        """Largest relative error against the masked model on ``n`` random inputs in float64.

        With ``semantics="kept"`` it is that against the function itself at the small params, in
        which removed units are not there. Numbers of chosen units among the results (positions of
        ``top_k``) are others there.

        Each floating argument is drawn from a normal distribution, others are taken as they were
        given to ``compact``. A function that can't be traced in float64 is compared in the given
        types, with a warning.

        Args:
          n: number of random inputs.
          seed: the seed of the inputs.
          params: the full params that ``compact`` was given. They are needed only when they are
            gone: the certificate keeps none of them alive.
          progress: None or True for a bar once it takes long, False for silence, or what wraps the
            inputs, such as ``tqdm.tqdm``.

        Returns:
          max|compact - wanted| / max|wanted|; NaN where what is wanted is NaN itself, so that it
          passes no ``check() < tolerance``; infinite where only one of both is a number, or their
          infinities differ.

        Raises:
          ValueError: for n < 1, params that are gone or of other shapes, and for a model
            compacted with ``semantics="kept"`` whose function fixes its sizes.
        """
        if n < 1:
            raise ValueError(f"check wants n >= 1 random inputs, got {n}")
        return self._checker.error(n, seed, params, progress)

    def _parts(self) -> Iterator[tables.Part]:
        if not self.entries:
            yield "nothing to remove: the masks cover no whole unit of any dimension"
            return
        yield f"semantics {self.semantics!r}: {_MEANINGS[self.semantics]}"
        rows = [(e.name, f"{e.size}", f"{e.masked}", f"{e.removed}", _why(e)) for e in self.entries]
        yield tables.Table(("dimension", "size", "masked", "removed", "status"), rows, (1, 2, 3))
        yield from self._notes()

    def _notes(self) -> list[str]:
        lines = []
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
        return lines + [f"no longer cut over devices: {place}" for place in self.replicated]


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


def of_plan(plan: Plan, structure: Structure, checker: Checker) -> Certificate:
    """Reads the entries off the decisions."""
    entries = [_entry(plan, name, d) for name, d in plan.decisions.items()]
    alone = {name: apart for name, apart in plan.apart.items() if name not in plan.decisions}
    entries += [
        Entry(name, structure.dims[name].size, apart.masked, 0, "kept", apart.reason)
        for name, apart in alone.items()
    ]
    whole = replicated(structure, plan.split.view(KEPT))
    return Certificate(tuple(entries), plan.hazards, checker, whole)


def _entry(plan: Plan, name: str, d: Decision) -> Entry:
    removed, masked, reasons = int((~d.kept).sum()), int(d.candidates.sum()), d.reasons
    if name in plan.apart:
        masked = max(masked, plan.apart[name].masked)
        reasons = (*reasons, plan.apart[name].reason)
    carried = int((d.carried & ~d.kept).sum())
    status = "kept" if removed < masked else "corrected" if carried else "exact"
    why = "; ".join(reasons)
    return Entry(name, d.dim.size, masked, removed, status, why, carried, d.evaluations)
