"""Running statistics among the parameters: by a mean and a variance that data is normalized.

They are told by what the program does with them, whatever their names are: a parameter is
subtracted, and the difference is scaled by the root of another one, to which at most a constant
was added. That is how BatchNorm and its like evaluate in every framework.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxprune.ir import primitives
from jaxprune.ir.primitives import CUSTOM, WEIGHT, Kind
from jaxprune.ir.tape import Step, Tape, Value

_LAYOUT = {
    Kind.TYPE, Kind.RESHARDING, Kind.TRANSPOSE, Kind.SQUEEZE, Kind.BROADCAST, Kind.RESHAPE,
    Kind.SLICE, Kind.DYNAMIC_SLICE,
}  # fmt: skip


class Form(enum.Enum):
    """What has become of parameters."""

    ITSELF = "the parameter, in some layout"
    SHIFTED = "its sum with a constant, or the larger of both"
    ROOT = "the root of that, maybe scaled by others"
    CENTERED = "data from which it is subtracted"


class Tag(NamedTuple):
    """A value that is made of parameters in a known form."""

    form: Form
    params: frozenset[int]


@dataclass
class _Reader:
    """Walks a program once."""

    tags: dict[Value, Tag] = field(default_factory=dict)
    found: set[int] = field(default_factory=set)

    def walk(self, tape: Tape) -> None:
        tags = self.tags
        for step in tape.steps:
            if step.subs:
                for sub in step.subs[:1] if primitives.kind(step) in CUSTOM else step.subs:
                    self._through(step, sub)
            if [v for v in step.ins if v in tags]:
                tag = self._of(step)
                if tag is not None:
                    tags[step.outs[0]] = tag

    def _through(self, step: Step, sub: Tape) -> None:
        """Tags go into a sub-program, and come out where it has as many results."""
        self._rename(reversed(step.ins), reversed(sub.inputs))  # What cond drops comes first.
        self.walk(sub)
        if len(sub.outputs) == len(step.outs):
            self._rename(sub.outputs, step.outs)

    def _rename(self, old: Iterable[Value], new: Iterable[Value]) -> None:
        for a, b in zip(old, new):
            if a in self.tags:
                self.tags[b] = self.tags[a]

    def _of(self, step: Step) -> Tag | None:
        """The form of a step's result."""
        row, tags = primitives.of(step), [self.tags.get(v) for v in step.ins]
        if row.kind in _LAYOUT or WEIGHT in row.passes:
            return tags[0]
        if row.combine == "difference" and _is(tags[1], Form.ITSELF) and not _constant(step.ins[0]):
            return Tag(Form.CENTERED, tags[1].params)  # type: ignore[union-attr]
        if row.combine in ("prod", "quotient"):
            return self._scaled(*tags)
        return _of_one(step, row, tags)

    def _scaled(self, a: Tag | None, b: Tag | None) -> Tag | None:
        """Data that was centered meets a root: both are statistics."""
        root = next((t for t in (a, b) if _is(t, Form.ROOT)), None)
        other = b if root is a else a
        if root is None:
            return None
        if other is not None and other.form is Form.CENTERED:
            self.found |= root.params | other.params
            return None
        return root if other is None or other.form is Form.ITSELF else None


def _of_one(step: Step, row: primitives.Row, tags: Sequence[Tag | None]) -> Tag | None:
    """The form of a function of one parameter and constants."""
    tagged = [tag for tag in tags if tag is not None]
    rest = [v for v, tag in zip(step.ins, tags) if tag is None]
    if len(tagged) != 1 or row.kind is not Kind.ELEMENTWISE or not all(map(_constant, rest)):
        return None
    if tagged[0].form not in (Form.ITSELF, Form.SHIFTED):
        return None
    return Tag(Form.ROOT if row.root else Form.SHIFTED, tagged[0].params)


def _is(tag: Tag | None, form: Form) -> bool:
    return tag is not None and tag.form is form


def _constant(value: Value) -> bool:
    return value.const is not None or value.maker is not None


def statistics(tape: Tape, params: Sequence[Value]) -> set[int]:
    """The positions of the parameters that are running statistics."""
    reader = _Reader({value: Tag(Form.ITSELF, frozenset({i})) for i, value in enumerate(params)})
    reader.walk(tape)
    return reader.found
