"""What a program does with each dimension: the facts that a person would name it by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jaxprune.ir import axes, compat, primitives, views
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import CONTROL, CUSTOM, Kind, Passes
from jaxprune.ir.tape import Step, Tape, Value

# The facts. A kernel is an operand that depends on parameters only.
READ = "contracted with a kernel"
MADE = "a result of a kernel"
STACKED = "batch axis of kernels"
DENSE = "a result of a matrix"
CHANNEL = "feature of a convolution"
WINDOW = "spatial axis of a kernel"
PLACE = "spatial axis of an image"
HEADS = "batch axis of two activations' contraction"
MATCHED = "contracted there"
PAIRED = "twice in one axis there"
SHARING = "free there, beside another free axis"
CARRIED = "free there"
ROW = "indexed"
LOOKED_UP = "a window of what is indexed"
CHOSEN = "chosen from by value"
EXPERT = "an axis of kernels that hold matrices"
LAYER = "scanned over"
RESIDUAL = "added to a stream"

Facts = dict[Axis, set[str]]

_BRANCH = 1000  # The way from a stream into its branch and back is sought for so many steps.
# A loop counts, for what it holds may contract.
_CONTRACTS = {Kind.CONTRACTION, Kind.CONVOLUTION, Kind.REMAT, *CONTROL}


@dataclass
class _Reader:
    """Walks a program once; ``moving`` are values that depend on more than parameters."""

    facts: Facts
    moving: set[Value]
    made_by: dict[Value, tuple[int, Step]] = field(default_factory=dict)

    def note(self, fact: str, *axs: Axis) -> None:
        for leaf in axes.distinct_leaves(axs):
            if leaf in self.facts:
                self.facts[leaf].add(fact)

    def has(self, axis: Axis, *facts: str) -> bool:
        found = [self.facts.get(leaf, set()) for leaf in axes.distinct_leaves([axis])]
        return any(not of_leaf.isdisjoint(facts) for of_leaf in found)

    def made(self, axis: Axis) -> bool:
        return self.has(axis, MADE)


def facts_of(tape: Tape, num_params: int, leaves: Iterable[Axis]) -> Facts:
    """The facts of the given leaves in one program."""
    found = {leaf: {CHOSEN} if leaf.chosen else set[str]() for leaf in leaves}
    reader = _Reader(found, set(tape.inputs[num_params:]))
    _walk(reader, tape)
    return reader.facts


def _walk(reader: _Reader, tape: Tape) -> None:
    for i, step in enumerate(tape.steps):
        for sub in step.subs[:1] if primitives.kind(step) in CUSTOM else step.subs:
            pairs = zip(reversed(step.ins), reversed(sub.inputs))  # what cond drops comes first
            reader.moving.update(inner for outer, inner in pairs if outer in reader.moving)
            _walk(reader, sub)
        if any(v in reader.moving for v in step.ins):
            reader.moving.update(step.outs)
        for value in step.outs:
            reader.made_by[value] = (i, step)
        look = _LOOK.get(primitives.kind(step))
        if look is not None:
            look(reader, step)


def _dot(reader: _Reader, step: Step) -> None:
    dims = views.contraction(step)
    sides = list(zip(step.ins, dims.contract, dims.batch))
    contracted = [v.axes[k] for v, cs, _ in sides for k in cs]
    batch = [v.axes[k] for v, _, bs in sides for k in bs]
    free = [
        [a for k, a in enumerate(v.axes) if k not in (*cs, *bs) and a.size > 1]
        for v, cs, bs in sides
    ]
    moving = [v in reader.moving for v in step.ins]
    if all(moving) and batch:
        _attend(reader, batch, contracted, free)
        return
    if not any(moving):  # learned queries meet their kernel, and are data from here on
        moving = [True, False]
        reader.moving.update(step.outs)
    reader.note(STACKED, *batch)
    reader.note(READ, *contracted)
    for value, data in zip(step.ins, moving):
        if not data:
            _note_matrices(reader, value)
    for axs, data in zip(free, moving):
        if not data:
            reader.note(MADE, *axs)
            reader.note(DENSE, *axs)


def _attend(
    reader: _Reader, batch: list[Axis], contracted: list[Axis], free: list[list[Axis]]
) -> None:
    """Queries with keys, or weights with values: both sides have an axis of their own.

    Positions take part, too; heads and their sizes are told from them by coming from kernels.
    """
    if not all(free):
        return
    reader.note(HEADS, *filter(reader.made, batch))
    reader.note(MATCHED, *filter(reader.made, contracted))
    for axis in contracted:
        reader.note(PAIRED, *(a for a, n in Counter(axes.leaves(axis)).items() if n > 1))
    fact = SHARING if any(map(reader.made, contracted)) else CARRIED
    for axs in free:
        reader.note(fact, *filter(reader.made, axs))


def _convolve(reader: _Reader, step: Step) -> None:
    conv, (image, kernel) = views.convolution(step), step.ins
    features = [image.axes[conv.lhs[1]], kernel.axes[conv.rhs[1]]]
    made = kernel.axes[conv.rhs[0]]
    reader.note(CHANNEL, *features, made)
    reader.note(READ, *features)
    reader.note(MADE, made)
    reader.note(WINDOW, *(kernel.axes[k] for k in conv.rhs[2:]))
    reader.note(PLACE, *(image.axes[k] for k in conv.lhs[2:]))
    reader.note(PLACE, *(step.outs[0].axes[k] for k in conv.out[2:]))


def _pool(reader: _Reader, step: Step) -> None:
    for k, size in enumerate(views.window(step)):
        if size > 1:
            reader.note(PLACE, step.ins[0].axes[k], step.outs[0].axes[k])


def _gather(reader: _Reader, step: Step) -> None:
    table = step.ins[0]
    if table not in reader.moving:
        _note_matrices(reader, table)
        chosen = [reader.has(table.axes[k], CHOSEN) for k in views.indexed(step)]
        if len(table.shape) > 2 and all(chosen):  # experts' matrices are kernels still
            reader.moving.difference_update(step.outs)
            return
        for axis, size in zip(table.axes, views.window_sizes(step)):
            reader.note(LOOKED_UP if axis.size == size else ROW, axis)


def _ragged(reader: _Reader, step: Step) -> None:
    kernel, numbers = step.ins[1], views.ragged(step)
    if kernel in reader.moving:
        return
    _note_matrices(reader, kernel)
    reader.note(READ, *(kernel.axes[k] for k in numbers.dims.rhs_contract))
    free = set(numbers.dims.free(1, len(kernel.shape))) - set(numbers.rhs_group)
    reader.note(MADE, *(kernel.axes[k] for k in free))


def _note_matrices(reader: _Reader, kernel: Value) -> None:
    if len(kernel.shape) > 2:
        reader.note(EXPERT, *kernel.axes)


def _scan(reader: _Reader, step: Step) -> None:
    for value in compat.scanned(step.eqn, step.ins):
        reader.note(LAYER, value.axes[0])


def _add(reader: _Reader, step: Step) -> None:
    """``x + f(x)`` where f contracts: the axes of x are those of a residual stream."""
    if primitives.of(step).combine != "sum":
        return
    a, b = (_origin(reader, v) for v in step.ins)
    both = a in reader.moving and b in reader.moving and step.ins[0].shape == step.ins[1].shape
    if both and (_feeds(reader, a, b) or _feeds(reader, b, a)):
        features = [a for a in step.outs[0].axes if reader.has(a, MADE, LOOKED_UP)]
        reader.note(RESIDUAL, *features)


def _origin(reader: _Reader, value: Value) -> Value:
    while value in reader.made_by:
        step = reader.made_by[value][1]
        if Passes.STREAM not in primitives.of(step).passes:
            break
        value = step.ins[0]
    return value


def _feeds(reader: _Reader, source: Value, result: Value) -> bool:
    """Whether ``result`` depends on ``source`` through a contraction."""
    start = reader.made_by[source][0] if source in reader.made_by else -1
    todo: list[tuple[Value, bool]] = [(result, False)]
    seen: set[tuple[Value, bool]] = set()
    while todo and len(seen) < _BRANCH:
        value, crossed = todo.pop()
        if value is source and crossed:
            return True
        index, step = reader.made_by.get(value, (-1, None))
        if step is None or index <= start or (value, crossed) in seen:
            continue
        seen.add((value, crossed))
        crossed = crossed or primitives.kind(step) in _CONTRACTS
        todo += [(v, crossed) for v in step.ins if v in reader.moving]
    return False


_LOOK: dict[Kind, Callable[[_Reader, Step], None]] = {
    Kind.CONTRACTION: _dot,
    Kind.CONVOLUTION: _convolve,
    Kind.POOL: _pool,
    Kind.GATHER: _gather,
    Kind.RAGGED: _ragged,
    Kind.LOOP: _scan,
    Kind.ELEMENTWISE: _add,
}
