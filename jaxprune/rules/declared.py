"""Ready-made rules for primitives of one's own: functions of entries, functions of named axes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step
from jaxprune.rules import registry
from jaxprune.rules.registry import Mix, Rule
from jaxprune.rules.zeros import Zeros, everywhere, unknown

refused: weakref.WeakSet[Step] = weakref.WeakSet()  # steps that their rule doesn't fit


def refuse(step: Step, why: str) -> list[list[Axis]]:
    """As without a rule: one use that doesn't fit must not stop the whole network."""
    refused.add(getattr(step, "itself", step))
    return registry.couple_opaque(step, f"{registry.NO_RULE} here: {why}")


def elementwise(*, zero_if: str | None = None) -> Rule:
    """Returns the rule of a function of entries: operands broadcast as in NumPy, axes pass.

    Args:
      zero_if: "all" if the result is zero where all operands are (gelu(x + bias)), "any" if one
        suffices (silu(gate) * up), None if that isn't known.

    Raises:
      ValueError: for another zero_if.

    Example:
      >>> import jaxprune as jp
      >>> type(jp.rules.elementwise(zero_if="any")).__name__
      'Rule'
    """
    if zero_if not in ("all", "any", None):
        raise ValueError(f"elementwise wants zero_if 'all', 'any' or None, got {zero_if!r}")
    found = registry.nothing_known if zero_if is None else _zeros_of_entries(zero_if)
    return Rule(couple=_couple_entries, zeros=found)


def _couple_entries(step: Step) -> list[list[Axis]]:
    shape = step.eqn.outvars[0].aval.shape
    shapes = [v.shape for v in step.ins]
    if any(v.aval.shape != shape for v in step.eqn.outvars) or not _broadcast(shapes, shape):
        return refuse(step, f"operands {shapes} do not broadcast to the results")
    result = []
    for k, size in enumerate(shape):
        back = k - len(shape)
        same = [v.axes[back] for v in step.ins if len(v.shape) >= -back and v.shape[back] == size]
        for other in same[1:]:
            step.unify(same[0], other)
        result.append(same[0] if same else axes.leaf(size))
    return [result] * len(step.eqn.outvars)


def _broadcast(shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(*shapes) == shape
    except ValueError:
        return False


def _zeros_of_entries(zero_if: str) -> Callable[[Step, list[Zeros]], list[Zeros]]:
    one, many = (np.logical_and, all) if zero_if == "all" else (np.logical_or, any)

    def find(step: Step, known: list[Zeros]) -> list[Zeros]:
        shape = step.eqn.outvars[0].aval.shape
        if not shape:
            return registry.nothing_known(step, known)
        rows = [[_along(z, k - len(shape), n) for z in known] for k, n in enumerate(shape)]
        found = Zeros(many(z.all for z in known), tuple(one.reduce(row) for row in rows))
        return [found] * len(step.eqn.outvars)

    return find


def _along(known: Zeros, back: int, size: int) -> np.ndarray:
    """Zero slices along an axis, counted from the last, of an operand broadcast to ``size``."""
    if known.all or len(known.axes) < -back:
        return np.full(size, known.all)
    return np.broadcast_to(known.axes[back], size)


def named_axes(
    subscripts: str, *, sums: str = "", frozen: str = "", zeros: str = "", linear: bool = False
) -> Rule:
    """Returns the rule of a function whose axes are named by letters, as ``einsum`` does it.

    Axes of one letter are one dimension, in operands and results alike. A letter that some
    result lacks must be in ``sums``, or it is frozen.

    Args:
      subscripts: "...i, io, o -> ...o": a term per operand, a term per result. ``...`` stands for
        leading axes, which broadcast and pass.
      sums: letters that are summed over, where a position adds nothing as soon as one operand that
        has the letter is zero there.
      frozen: letters whose axes must stay whole, as the one that a norm averages over.
      zeros: letters along which the results are zero where all operands with the letter are.
      linear: whether each result is nothing but a sum of products with one factor from each
        operand. Then parts of the sum may be evaluated apart, and zero factors make zero results.

    Raises:
      TypeError: for subscripts that aren't text.
      ValueError: for subscripts that can't be read, or letters that they don't have.

    Example:
      >>> import jaxprune as jp
      >>> rule = jp.rules.named_axes("...i, io, o -> ...o", sums="i", zeros="o")
    """
    named = _parse(subscripts, sums, frozen, zeros, linear)
    return Rule(named.couple, named.find_zeros, named.mixes)


def _parse(subscripts: str, sums: str, frozen: str, zeros: str, linear: bool) -> _Named:
    if not isinstance(subscripts, str):
        raise TypeError(f"named_axes wants text, '...i, io -> ...o', got {subscripts!r:.60}")
    sides = subscripts.replace(" ", "").split("->")
    terms = [side.split(",") for side in sides]
    if len(sides) != 2 or not all(_readable(term) for side in terms for term in side):
        raise ValueError(
            f"named_axes can't read {subscripts!r}; wanted terms of different letters, with at "
            "most a leading '...', as in '...i, io -> ...o'"
        )
    ins, outs = (set("".join(side)) - {"."} for side in terms)
    lost = {letter for letter in ins for term in terms[1] if letter not in term}
    for what, letters, among in (
        ("sums", sums, lost), ("frozen", frozen, ins), ("zeros", zeros, ins & outs),
    ):  # fmt: skip
        if set(letters) - among:
            raise ValueError(
                f"{what}={letters!r} does not fit {subscripts!r}; possible are {sorted(among)}"
            )
    return _Named(tuple(terms[0]), tuple(terms[1]), sums, frozen, zeros, linear)


def _readable(term: str) -> bool:
    letters = term.removeprefix("...")
    return letters == "" or (letters.isalpha() and len(set(letters)) == len(letters))


@dataclass(frozen=True)
class _Named:
    """Terms per operand and result, and what is said of their letters."""

    ins: tuple[str, ...]
    outs: tuple[str, ...]
    sums: str
    frozen: str
    zeros: str
    linear: bool

    def _misfit(self, step: Step) -> str:
        """Why an equation isn't of this form, '' if it is."""
        shapes = [v.shape for v in step.ins], [v.aval.shape for v in step.eqn.outvars]
        sizes: dict[str, int] = {}
        for terms, given in zip((self.ins, self.outs), shapes):
            if len(terms) != len(given):
                return f"{len(given)} arrays of shapes {given} where the rule names {len(terms)}"
            for term, shape in zip(terms, given):
                letters = term.removeprefix("...")
                if len(shape) < len(letters) or (term == letters and len(shape) > len(letters)):
                    return f"shape {shape} where the rule names {term!r}"
                for letter, size in self._named(term, shape):
                    if size != sizes.setdefault(letter, size):
                        return f"axis {letter!r} has sizes {sizes[letter]} and {size}"
        leads = [s[: len(s) - len(t.removeprefix("..."))] for t, s in zip(self.ins, shapes[0])]
        for term, shape in zip(self.outs, shapes[1]):
            lead = shape[: len(shape) - len(term.removeprefix("..."))]
            if lead and not _broadcast(leads, lead):
                return f"leading axes {leads} do not broadcast to {lead}"
        return ""

    @staticmethod
    def _named(term: str, row: Iterable[Any]) -> list[tuple[str, Any]]:
        """The letters of a term with what belongs to their axes."""
        letters, row = term.removeprefix("..."), list(row)
        return list(zip(letters, row[len(row) - len(letters) :]))

    def _carriers(self, step: Step, letter: str) -> list[tuple[int, int]]:
        """(operand, axis) of each operand with the letter."""
        return [
            (i, len(v.shape) - len(term) + term.index(letter))
            for i, (term, v) in enumerate(zip(self.ins, step.ins))
            if letter in term
        ]

    def couple(self, step: Step) -> list[list[Axis]]:
        why = self._misfit(step)
        if why:
            return refuse(step, why)
        named: dict[str, Axis] = {}
        for term, v in zip(self.ins, step.ins):
            for letter, axis in self._named(term, v.axes):
                step.unify(named.setdefault(letter, axis), axis)
        self._freeze(step, named)
        return [self._result(step, named, *of) for of in zip(self.outs, step.eqn.outvars)]

    def _freeze(self, step: Step, named: dict[str, Axis]) -> None:
        """What the rule says must stay, and what it says nothing of."""
        for letter, axis in named.items():
            if letter in self.frozen:
                step.freeze(axis, f"its rule freezes axis {letter!r}")
            elif letter not in self.sums and not all(letter in term for term in self.outs):
                step.freeze(axis, f"its rule doesn't say how axis {letter!r} is reduced")
        if not all(term.startswith("...") for term in self.outs):
            for term, v in zip(self.ins, step.ins):
                for axis in v.axes[: len(v.axes) - len(term.removeprefix("..."))]:
                    step.freeze(axis, "its rule doesn't say how leading axes are reduced")

    def _result(self, step: Step, named: dict[str, Axis], term: str, var: Any) -> list[Axis]:
        letters, shape = term.removeprefix("..."), var.aval.shape
        lead = []
        for back in range(len(letters) - len(shape), 0):  # -1 is the last of the leading axes
            size = shape[back - len(letters)]
            same = [a for v, t in zip(step.ins, self.ins) for a in self._lead(v, t, back, size)]
            for other in same[1:]:
                step.unify(same[0], other)
            lead.append(same[0] if same else axes.leaf(size))
        return [*lead, *(self._axis(step, named, *of) for of in self._named(term, shape))]

    def _axis(self, step: Step, named: dict[str, Axis], letter: str, size: int) -> Axis:
        if letter not in named:
            named[letter] = axes.leaf(size)
            step.freeze(named[letter], "it makes this axis")
        return named[letter]

    def _lead(self, value: Any, term: str, back: int, size: int) -> list[Axis]:
        lead = value.axes[: len(value.axes) - len(term.removeprefix("..."))]
        return [lead[back]] if len(lead) >= -back and lead[back].size == size else []

    def mixes(self, step: Step, known: list[Zeros]) -> list[Mix]:
        return [self._mix(step, known, self._carriers(step, letter)) for letter in self.sums]

    def _mix(self, step: Step, known: list[Zeros], places: list[tuple[int, int]]) -> Mix:
        zero = np.logical_or.reduce([known[i].along(k) for i, k in places])
        axis = step.ins[places[0][0]].axes[places[0][1]]
        return Mix(axis, zero, "sum" if self.linear else "none", tuple(places))

    def find_zeros(self, step: Step, known: list[Zeros]) -> list[Zeros]:
        if self.linear and (
            any(z.all for z in known) or any(m.zero.all() for m in self.mixes(step, known))
        ):
            return [everywhere(v.aval.shape) for v in step.eqn.outvars]
        return [self._zeros_of(step, known, *of) for of in zip(self.outs, step.eqn.outvars)]

    def _zeros_of(self, step: Step, known: list[Zeros], term: str, var: Any) -> Zeros:
        found = unknown(var.aval.shape)
        for letter, vector in self._named(term, found.axes):
            along = [known[i].along(k) for i, k in self._carriers(step, letter)]
            if along and self.linear:
                vector |= np.logical_or.reduce(along)
            elif along and letter in self.zeros:
                vector |= np.logical_and.reduce(along)
        return found
