"""The backward walk that finds which blocks of which values the kept results need.

The kept block of a contraction over a dimension needs the removed block of its operands, unless
that is known to be zero; then the same equation is evaluated twice, at kept and at removed
positions, and the two are added. Blocks that nobody needs are never evaluated: that includes whole
branches which add zero.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.compaction.blocks import Split, subsets
from jaxprune.ir import primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import ANY
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.rules import registry, zeros
from jaxprune.rules.registry import KEPT, Block, Mix, Nested, Wire
from jaxprune.rules.zero_flow import ZeroFlow
from jaxprune.rules.zeros import Zeros

MOST_PARTS = 16  # A result of more parts costs more to carry than staying dense does.


class Part(NamedTuple):
    """One evaluation of an equation: the block, and positions to pick from operand axes first."""

    block: Block
    picks: tuple[tuple[int, int, np.ndarray], ...] = ()  # (operand, axis, positions)


class Refusal(NamedTuple):
    """Units that can't be removed."""

    dimension: Axis
    units: np.ndarray  # positions
    why: str


class Demand:
    """What has to be evaluated, step by step.

    Attributes:
      needed: value -> blocks that something reads.
      parts: step -> {block of the results: the evaluations that are combined into it}.
      passed: step -> {block: the operand that is the result, unchanged}.
      wires: nested step -> (operand wires, result wires).
      refusals: units that must stay, with the reason.
      carried: dimension -> which of its units contribute somewhere although removed.
    """

    def __init__(self, split: Split, flow: ZeroFlow, absent: bool = False):
        self.split, self.flow = split, flow
        self.absent = absent  # removed units count as not there at all, whatever their values
        self.needed: dict[Value, set[Block]] = {}
        self.parts: dict[Step, dict[Block, list[Part]]] = {}
        self.passed: dict[Step, dict[Block, Value]] = {}
        self.wires: dict[Step, tuple[list[Wire], list[Wire]]] = {}
        self.refusals: list[Refusal] = []
        self.carried: dict[Axis, np.ndarray] = {}
        self.sites: dict[Axis, str] = {}  # where a carried dimension is mixed
        self.doubted: set[Step] = set()
        self.constants: Any = (
            None  # blocks that depend on nothing, see jaxprune.compaction.constants
        )
        self._zero: dict[Value, dict[Block, bool]] = {}

    # ------------------------------------------------------------------------- the walk

    def through(self, tape: Tape, wanted: Sequence[set[Block]]) -> list[set[Block]]:
        for value, blocks in zip(tape.outputs, wanted, strict=True):
            for block in blocks:
                self.want(value, block)
        for step in reversed(tape.steps):
            results = [self.needed.get(v, set()) for v in step.outs]
            if any(results) or step.eqn.effects:
                self._step(step, results)
        return [self.needed.get(v, set()) for v in tape.inputs]

    def want(self, value: Value, block: Block) -> None:
        if value.const is None and not self.is_zero(value, block):
            self.needed.setdefault(value, set()).add(block)

    def _step(self, step: Step, results: list[set[Block]]) -> None:
        rule = registry.rule_of(step)
        if isinstance(rule, Nested) and self.touches(step):
            for value, blocks in zip(step.ins, rule.demand(self, step, results), strict=True):
                for block in blocks:
                    self.want(value, block)
            return
        plan = self.parts.setdefault(step, {})
        for block in set().union(*results) or {KEPT}:
            source = self._passed(step, block)
            if source is not None:
                self.passed.setdefault(step, {})[block] = source
                self.want(source, block)
            elif block not in plan:
                plan[block] = self._parts(step, block)
                for part in plan[block]:
                    for v in step.ins:
                        self.want(v, part.block & self.split.dims(v))

    def evaluates(self, dimension: Axis) -> bool:
        """Whether some equation is evaluated at the kept units of a dimension."""
        return dimension in self._evaluated

    @functools.cached_property
    def _evaluated(self) -> set[Axis]:
        found = set[Axis]()
        for step, plan in self.parts.items():
            blocks = [part.block for parts in plan.values() for part in parts]
            if blocks:
                touching = KEPT.union(*(self.split.dims(v) for v in [*step.ins, *step.outs]))
                found |= touching - blocks[0].intersection(*blocks)
        for step in self.wires:
            for value in [*step.ins, *step.outs]:
                blocks = list(self.needed.get(value, ()))
                if blocks:
                    found |= self.split.dims(value) - blocks[0].intersection(*blocks)
        return found

    def evaluations(self, dimension: Axis) -> int:
        """How many equations are evaluated at the removed units of a dimension."""
        return self._evaluations[dimension]

    @functools.cached_property
    def _evaluations(self) -> Counter[Axis]:
        parts = (part for plan in self.parts.values() for ps in plan.values() for part in ps)
        return Counter(dimension for part in parts for dimension in part.block)

    def remember(self, step: Step, ins: list[set[Block]], outs: list[set[Block]]) -> None:
        """Keeps the operand and result wires of a nested step, in a fixed order."""
        self.wires[step] = wires(ins), wires(outs)

    def touches(self, step: Step) -> bool:
        """Whether a step has anything to do with a pruned dimension."""
        return any(self.split.dims(v) for v in [*step.ins, *step.outs])

    def _passed(self, step: Step, block: Block) -> Value | None:
        """The operand that is the result because the others are zero in this block."""
        neutral = primitives.of(step).neutral
        if neutral is None or len(step.ins) == 1:
            return None
        result = step.outs[0].aval
        for i, v in enumerate(step.ins):
            fits = v.aval.shape == result.shape and v.aval.dtype == result.dtype
            others = [u for j, u in enumerate(step.ins) if j != i]
            if fits and neutral in (ANY, i) and all(self._adds_zero(u, block) for u in others):
                return v
        return None

    def _adds_zero(self, value: Value, block: Block) -> bool:
        return self.is_zero(value, block & self.split.dims(value))

    # --------------------------------------------------------------- one equation, one block

    def _parts(self, step: Step, block: Block) -> list[Part]:
        """The base evaluation, then one for each set of mixed dimensions that contributes."""
        mixes = [m for m in self.flow.mixes.get(step, ()) if self.split.pruned(m.axis)]
        if not mixes or self.absent:
            return [Part(block)]
        options = self._options(step, mixes, block)
        parts = [Part(block)]
        for combination in itertools.product(*options):
            extra = frozenset().union(*combination)
            if extra and self._contributes(step, mixes, combination, block | extra):
                picks = self._picks(step, mixes, block | extra, combination)
                if picks is not None:
                    parts.append(Part(block | extra, picks))
        if len(parts) > MOST_PARTS:
            dims = frozenset().union(*(p.block for p in parts))
            self._refuse_all(dims, f"{step.name} at {step.where} would need {len(parts)} parts")
        return parts

    def _options(self, step: Step, mixes: list[Mix], block: Block) -> list[list[Block]]:
        """Per mixed axis the sets of dimensions whose removed units may contribute."""
        outside = frozenset().union(*(self.split.dims(v) for v in step.outs))
        options = []
        for i, mix in enumerate(mixes):
            branches, twice = self.split.branches(mix.axis)
            elsewhere = [self.split.pruned(m.axis) for j, m in enumerate(mixes) if j != i]
            blocked = twice | self.split.pruned(mix.axis) & outside.union(*elsewhere)
            self._refuse_dirty(step, mix, blocked, block)
            if mix.combine == "none":
                self._refuse_dirty(step, mix, self.split.pruned(mix.axis), block)
                branches = set()
            free = self.split.not_kept(mix.axis, ~mix.zero) - blocked
            sets = {s for b in branches if free & b for s in subsets(free & b)} | {KEPT}
            options.append(sorted(sets, key=len))
        return options

    def _contributes(
        self, step: Step, mixes: list[Mix], combination: Sequence[Block], block: Block
    ) -> bool:
        """Whether this part can be anything but zero; notes the units that it carries."""
        for mix, extra in zip(mixes, combination, strict=True):
            if extra and mix.zero[self._own(mix.axis, block, extra)].all():
                return False
        linear = mixes[0].combine == "sum"
        places = {operand for mix in mixes for operand, _ in mix.places}
        if linear and any(
            self.is_zero(step.ins[i], block & self.split.dims(step.ins[i])) for i in places
        ):
            return False
        for mix, extra in zip(mixes, combination, strict=True):
            for dimension in extra:
                self._carry(dimension, self._dirty(mix, dimension))
                self.sites.setdefault(dimension, f"{step.name} at {step.where}")
        return True

    def _own(self, axis: Axis, block: Block, own_by: Block) -> np.ndarray:
        index, own = self.split.positions(axis, block, own_by)
        return index[own]

    def _dirty(self, mix: Mix, dimension: Axis) -> np.ndarray:
        """Units of a dimension with a position that contributes to the mix."""
        dirty = np.zeros(dimension.size, bool)
        for units in self.split.numbers.units(mix.axis, dimension):
            dirty[units[(units >= 0) & ~mix.zero]] = True
        return dirty

    def _carry(self, dimension: Axis, units: np.ndarray) -> None:
        before = self.carried.get(dimension, np.zeros(dimension.size, bool))
        self.carried[dimension] = before | units

    def _picks(
        self, step: Step, mixes: list[Mix], block: Block, combination: Sequence[Block]
    ) -> tuple[tuple[int, int, np.ndarray], ...] | None:
        """Where a mixed axis also shows other blocks, the positions of this one."""
        picks = []
        for mix, extra in zip(mixes, combination, strict=True):
            own = self.split.positions(mix.axis, block, extra)[1]
            if own.all():
                continue
            if not mix.places:
                self._refuse_all(extra, f"{step.name} at {step.where} mixes it with others")
                return None
            picks += [
                (operand, k, np.flatnonzero(own).astype(np.int32)) for operand, k in mix.places
            ]
        return tuple(picks)

    # -------------------------------------------------------------------------- refusing

    def removed(self, dimension: Axis) -> np.ndarray:
        """Positions of the units that are to go."""
        gone = np.ones(dimension.size, bool)
        gone[self.split.kept.get(dimension, slice(None))] = False
        return np.flatnonzero(gone)

    def known(self, value: Value) -> Zeros:
        return self.flow.of(value)

    def alive(self, value: Value) -> set[Block]:
        """The blocks that are not zero."""
        return {b for b in subsets(self.split.dims(value)) if not self.is_zero(value, b)}

    def read_only(self, value: Value, blocks: set[Block]) -> Zeros:
        """What is zero in the cotangent of a value of which only these blocks are read.

        What is not read although it may be nonzero has no effect; what is zero itself may have.
        """
        known = self.flow.of(value)
        unread = self.split.dims(value) - frozenset().union(*blocks)
        if not blocks and not known.all:
            return zeros.everywhere(value.shape)
        vectors = [np.zeros_like(z) for z in known.axes]
        for vector, axis, zero in zip(vectors, value.axes, known.axes, strict=True):
            for dimension in unread & self.split.pruned(axis):
                for units in self.split.numbers.units(axis, dimension):
                    vector |= np.isin(units, self.removed(dimension)) & ~zero
        return Zeros(False, tuple(vectors))

    def doubt(self, step: Step) -> None:
        """Asks for another walk in which the step's results don't count as zero."""
        self.doubted.add(step)

    def restart(self, tape: Tape, known: Sequence[Zeros]) -> None:
        """Forgets what was found about a program and starts from other facts."""
        self._forget(tape)
        self.flow.run(tape, known)

    def _forget(self, tape: Tape) -> None:
        for step in tape.steps:
            for found in (self.parts, self.wires, self.passed):
                found.pop(step, None)
            for sub in step.subs:
                self._forget(sub)
        for value in [*tape.inputs, *(v for step in tape.steps for v in step.outs)]:
            self.needed.pop(value, None)
            self._zero.pop(value, None)

    def refuse(self, dimension: Axis, why: str, units: np.ndarray | None = None) -> None:
        """Says that units of a dimension, all without a list, can't be removed."""
        units = self.removed(dimension) if units is None else units
        if len(units):
            self.refusals.append(Refusal(dimension, units, why))

    def _refuse_all(self, dimensions: Block, why: str) -> None:
        for dimension in dimensions:
            self.refuse(dimension, why)

    def _refuse_dirty(self, step: Step, mix: Mix, dimensions: Block, block: Block) -> None:
        """Units whose contribution can't be told apart from others: they may not contribute."""
        why = f"its masked value is not zero where {step.name} at {step.where} reads it"
        for dimension in dimensions & (block | self.split.not_kept(mix.axis, ~mix.zero)):
            dirty, kept = self._dirty(mix, dimension), self.split.kept[dimension]
            if dimension in block:
                if dirty[kept].any() or self._shows_others(mix, block, dimension):
                    self.refuse(dimension, why)
                continue
            dirty[kept] = False
            if dirty.any():
                self.refuse(dimension, why, np.flatnonzero(dirty))

    def _shows_others(self, mix: Mix, block: Block, dimension: Axis) -> bool:
        """Whether positions of other dimensions contribute beside the removed units.

        An operand that is zero at the removed units counts as zero in this block, so that what a
        concatenation holds beside them would be lost.
        """
        index, own = self.split.positions(mix.axis, block, frozenset([dimension]))
        return not mix.zero[index[~own]].all()

    # ----------------------------------------------------------------------------- zeros

    def is_zero(self, value: Value, block: Block) -> bool:
        """Whether a block of a value is zero whatever the inputs are, or has no entries."""
        known = self._zero.setdefault(value, {})
        if block not in known:
            known[block] = bool(self.absent and block) or self._find_zero(value, block)
        return known[block]

    def _find_zero(self, value: Value, block: Block) -> bool:
        known = self.flow.of(value)
        if known.all:
            return True
        pairs = list(zip(value.axes, known.axes, strict=True))
        for k, (axis, zero) in enumerate(pairs):
            if (block or zero.any()) and self.split.pruned(axis):
                # What another axis may pass too, an entry of the block need not pass here.
                others = [self.split.pruned(a) for j, a in enumerate(value.axes) if j != k]
                own_by = (block & self.split.pruned(axis)).difference(*others)
                if zero[self._own(axis, block, own_by)].all():
                    return True
        inside = block & self.split.dims(value)
        return any(self._zero_through(pairs, block, dimension) for dimension in inside)

    def _zero_through(
        self, pairs: list[tuple[Axis, np.ndarray]], block: Block, dimension: Axis
    ) -> bool:
        """Each entry passes the dimension on some axis: are the slices there zero on all axes?"""
        return all(
            zero[self._own(axis, block, frozenset([dimension]))].all()
            for axis, zero in pairs
            if dimension in self.split.pruned(axis)
        )


def wires(blocks: list[set[Block]]) -> list[Wire]:
    def order(block: Block) -> list[int]:
        return sorted(d.order for d in block)

    return [(i, block) for i, group in enumerate(blocks) for block in sorted(group, key=order)]
