"""What a function costs: FLOPs, bytes and parameters, counted equation by equation in its jaxpr.

Compilers' own estimates don't see inside library calls (on a GPU, XLA's doesn't change when a
convolution shrinks), so the jaxpr is counted. Nothing is computed and nothing is compiled.

What one equation costs is said in ``jaxprune/costs/flops.py``. A program costs the sum of its live
equations; dead code costs nothing. ``scan``: its body times its length. ``cond``: the dearest
branch. ``while``: one iteration. ``jit``, ``checkpoint``, custom derivatives: what they call.
``shard_map``: all devices together.

What can't be known is never hidden: it is said in ``Cost.notes``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.costs.flops import flops, is_known
from jaxprune.ir import axes, compat, primitives, tape, views
from jaxprune.ir.primitives import CALLS, Kind
from jaxprune.ir.tape import Step, Tape, Value
from jaxprune.typing import path_str


class EquationCost(NamedTuple):
    """One equation of the program, all its repetitions together."""

    primitive: str
    where: str  # the user's source line, or ''
    shapes: str  # "float32[8,4] float32[4,2] -> float32[8,2]"
    times: int  # how often it runs, by the lengths of the scans around it
    flops: int
    bytes: int  # 0 where it is merged into its neighbours
    inputs: tuple[int, ...]  # leaves of the arguments that it reads, by merged equations at most


@dataclass(frozen=True)
class Cost:
    """What one call of a function costs, by :func:`cost`; ``print`` it to see a table.

    Attributes:
      flops: operations, multiplications and additions apart; what is counted is said on top of
        ``jaxprune/costs/flops.py``.
      bytes: the memory traffic of an ideally merged program, in bytes. Each contraction,
        convolution, pooling, gather, sort or unknown operation reads its operands and writes its
        results once; everything else is merged into these and moves nothing. Each input that none
        of them reads, and each output that depends on none of them, moves once.
      params: entries in the float leaves of the first argument.
      notes: what isn't exact, a line each; empty when all is.
      equations: one :class:`EquationCost` per equation that computes or moves anything.
    """

    flops: int
    bytes: int
    params: int
    notes: tuple[str, ...] = ()
    equations: tuple[EquationCost, ...] = field(default=(), repr=False)

    @property
    def by_primitive(self) -> dict[str, int]:
        """``{primitive: FLOPs}``, the dearest first."""
        sums = Counter[str]()
        for e in self.equations:
            sums[e.primitive] += e.flops
        return {name: flops for name, flops in sums.most_common() if flops}

    def table(self, limit: int = 20) -> str:
        """The ``limit`` dearest equations as text, one a line.

        Raises:
          ValueError: when limit is less than 1.
        """
        if limit < 1:
            raise ValueError(f"table wants limit >= 1 equations, got {limit}")
        dearest = sorted(self.equations, key=lambda e: (e.flops, e.bytes), reverse=True)
        lines = [f"{'FLOPs':>10}  {'share':>6}  {'bytes':>10}  equation"]
        for e in dearest[:limit]:
            share = f"{e.flops / self.flops:.1%}" if self.flops else "-"
            times = f"{e.times} x " if e.times > 1 else ""
            line = f"{times}{e.primitive} {e.shapes}{'  at ' + e.where if e.where else ''}"
            lines.append(f"{si(e.flops):>10}  {share:>6}  {si(e.bytes):>10}  {line}")
        if len(dearest) > limit:
            lines.append(f"... and {len(dearest) - limit} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        head = f"{si(self.flops)} FLOPs, {si(self.bytes)} bytes, {si(self.params)} parameters"
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return f"{head}\n{self.table()}{notes}"


def cost(fn: Callable[..., Any], *args: Any) -> Cost:
    r"""Returns the FLOPs, bytes and parameters of one call ``fn(*args)``, from its jaxpr.

    A contraction of an :math:`m \times k` with a :math:`k \times n` matrix costs
    :math:`2 m n k` FLOPs. A convolution costs 2 x result size x kernel window x in-features per
    group, padding included. All else is said on top of ``jaxprune/costs/flops.py``.

    Args:
      fn: a function of arrays, jitted or not; ``fn(params, *inputs)`` where parameters matter.
      *args: arrays or ``jax.ShapeDtypeStruct``; nothing is computed. The float leaves of the first
        one are counted as parameters (batch statistics that travel with them, too).

    Returns:
      A :class:`Cost`.

    Raises:
      TypeError: when fn isn't callable, or an argument holds something that isn't an array.
      ValueError: without arguments.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jax.ShapeDtypeStruct((64, 10), jnp.float32)}
      >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
      >>> c = jp.cost(lambda params, x: x @ params["w"], params, x)
      >>> c.flops == 2 * 8 * 64 * 10, c.bytes == 4 * (8 * 64 + 64 * 10 + 8 * 10), c.params
      (True, True, 640)
    """
    check_call("jp.cost", "jp.cost(fn, params, x)", fn, args)
    closed = jax.make_jaxpr(fn)(*args)
    jaxpr, _ = compat.open_jaxpr(closed)
    inputs = [Value(v.aval) for v in jaxpr.invars]
    facts = _Facts({v: k for k, v in enumerate(inputs)})
    rows = _program(tape.build(closed, inputs, _separate), 1, facts)
    return Cost(
        flops=sum(r.flops for r in rows),
        bytes=sum(r.bytes for r in rows),
        params=sum(v.aval.size for v in inputs[: len(jax.tree.leaves(args[0]))] if _is_float(v)),
        notes=tuple(facts.notes),
        equations=tuple(rows),
    )


def check_call(who: str, write: str, fn: Any, args: Sequence[Any]) -> None:
    """Raises unless ``fn(*args)`` is a function of arrays; ``write`` is the call to write."""
    if not callable(fn):
        raise TypeError(f"{who} wants a function, {write}, got {_brief(fn)}")
    if not args:
        raise ValueError(
            f"{who} got no arguments for the function; what it closes over is a constant that the "
            f"compiler may fold away: pass arrays as arguments, {write}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        number = isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
        if not number and not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"{who} wants arrays, argument {path_str(path)} holds {_brief(leaf)}; close over "
                f"what is static: lambda params, x: fn(params, x, {leaf!r:.40})"
            )


def _brief(x: Any) -> str:
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) < 60 else text[:57] + '...'}"


@dataclass
class _Facts:
    """What the count knows of the program's values."""

    position: dict[Value, int]  # the function's inputs -> which leaf of the arguments
    origin: dict[Value, Value | None] = field(default_factory=dict)  # see _origin
    read: set[Value] = field(default_factory=set)  # origins that moved through memory
    moved: set[Value] = field(default_factory=set)  # values that depend on something that did
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set

    def source(self, value: Value) -> Value | None:
        """What it is made of by merged equations alone; None for constants."""
        return self.origin.get(value, value if value.const is None else None)


def _separate(step: Step) -> list[list[axes.Axis]]:
    """Costs read shapes only: results share no axis with operands."""
    return [[axes.leaf(n) for n in v.aval.shape] for v in step.eqn.outvars]


def _program(program: Tape, times: int, facts: _Facts) -> list[EquationCost]:
    """The rows of a whole function: its steps, then the inputs and outputs that they don't move."""
    rows = _steps(program, times, facts)
    live = {v for step in _live(program) for v in step.ins} | set(program.outputs)
    alone = [v for v in program.inputs if v in live and v not in facts.read]
    alone += [v for v in dict.fromkeys(program.outputs) if v not in facts.moved and v not in alone]
    moved = sum(map(_nbytes, alone))
    if moved:
        rows.append(EquationCost("inputs and outputs", "", _describe(alone), 1, 0, moved, ()))
    return rows


def _steps(program: Tape, times: int, facts: _Facts) -> list[EquationCost]:
    return [row for step in _live(program) for row in _step(step, times, facts)]


def _live(program: Tape) -> list[Step]:
    """The steps that an output or an effect needs, across the calls that the tape inlined."""
    needed, kept = set(program.outputs), []
    for step in reversed(program.steps):
        if step.eqn.effects or not needed.isdisjoint(step.outs):
            kept.append(step)
            needed.update(step.ins)
    return kept[::-1]


def _step(step: Step, times: int, facts: _Facts) -> list[EquationCost]:
    """The rows of one step: its own, or those of what it calls."""
    if any(v in facts.moved for v in step.ins):
        facts.moved.update(step.outs)
    kind = primitives.kind(step)
    if kind in CALLS or kind is Kind.SHARDS:
        return _call(step, times, facts)
    if kind in CONTROL:
        return _moving(step, facts, CONTROL[kind](step, times, facts))
    if primitives.of(step).fused:
        sources = {s for v in step.ins if (s := facts.source(v)) is not None}
        for out in step.outs:
            facts.origin[out] = _origin(out, sources)
        row = _own(step, times, 0, ())
        return [row] if row.flops else []
    return _moving(step, facts, [_anchor(step, times, facts)])


def _origin(out: Value, sources: set[Value]) -> Value | None:
    """The one value that a merged equation's result is made of; itself when there are several."""
    return next(iter(sources), None) if len(sources) < 2 else out


def _moving(step: Step, facts: _Facts, rows: list[EquationCost]) -> list[EquationCost]:
    """Marks what depends on a step that reads and writes memory."""
    if any(row.bytes for row in rows):
        facts.moved.update(step.outs)
    return rows


def _anchor(step: Step, times: int, facts: _Facts) -> EquationCost:
    """A step that reads its operands and writes its results."""
    result = sum(map(_nbytes, step.outs))
    moved, inputs = result, []
    gathers = primitives.kind(step) is Kind.GATHER
    for k, value in enumerate(step.ins):
        source = facts.source(value)
        nbytes = _nbytes(value) if source is None else min(_nbytes(value), _nbytes(source))
        moved += min(nbytes, result) if gathers and k == 0 else nbytes
        if source is not None:
            facts.read.add(source)
            inputs += [facts.position[source]] if source in facts.position else []
    if not is_known(step):
        facts.notes[f"{_at(step)}: counted as 0 FLOPs, there is no rule for it"] = None
    return _own(step, times, moved, tuple(dict.fromkeys(inputs)))


def _own(step: Step, times: int, moved: int, inputs: tuple[int, ...]) -> EquationCost:
    count = flops(step, [v.shape for v in step.ins], [v.shape for v in step.outs])
    shapes = f"{_describe(step.ins)} -> {_describe(step.outs)}"
    return EquationCost(
        step.name, step.where, shapes, times, int(count) * times, moved * times, inputs
    )


# Equations that hold programs. A sub-program's inputs are the values that its equation passes in,
# apart from a loop's carry, which only the first iteration takes from there.


def _enter(jaxpr: Any, passed: Sequence[Value | None], step: Step, facts: _Facts) -> Tape:
    """A sub-program on the values ``passed`` into it; None for one that changes as it runs."""
    variables = compat.open_jaxpr(jaxpr)[0].invars
    inputs = []
    for var, outer in zip(variables, passed, strict=True):
        inputs.append(Value(var.aval, const=None if outer is None else outer.const))
        if outer is not None:
            facts.origin[inputs[-1]] = facts.source(outer)
            facts.moved.update(inputs[-1:] if outer in facts.moved else ())
    return tape.build(jaxpr, inputs, _separate, step.where)


def _call(step: Step, times: int, facts: _Facts) -> list[EquationCost]:
    """What the equation calls; ``shard_map``'s program runs on each device of its manual axes."""
    program = _enter(compat.sub_jaxprs(step.eqn)[0], step.ins, step, facts)
    if primitives.kind(step) is Kind.SHARDS:
        times *= views.devices(step)
    rows = _steps(program, times, facts)
    for out, inner in zip(step.outs, program.outputs, strict=True):
        facts.origin[out] = facts.source(inner)
        facts.moved.update([out] if inner in facts.moved else ())
    return rows


def _scan(step: Step, times: int, facts: _Facts) -> list[EquationCost]:
    parts = compat.scan_parts(step.eqn)
    xs = parts.num_consts + parts.num_carry
    carry: list[Value | None] = [None] * parts.num_carry
    passed = [*step.ins[: parts.num_consts], *carry, *step.ins[xs:]]
    program = _enter(parts.jaxpr, passed, step, facts)
    rows = _steps(program, times * int(parts.length), facts)
    _read_first(program.inputs, step.ins, facts)
    return rows


def _while(step: Step, times: int, facts: _Facts) -> list[EquationCost]:
    facts.notes[f"{_at(step)}: counted as one iteration, their number isn't known"] = None
    p = views.while_loop(step)
    cond, body = p.test_consts, p.body_consts
    carry: list[Value | None] = [None] * (len(step.ins) - cond - body)
    rows = []
    for jaxpr, consts in ((p.test, step.ins[:cond]), (p.body, step.ins[cond : cond + body])):
        program = _enter(jaxpr, [*consts, *carry], step, facts)
        rows += _steps(program, times, facts)
        _read_first(program.inputs, [*consts, *step.ins[cond + body :]], facts)
    return rows


def _read_first(inner: Sequence[Value], outer: Sequence[Value], facts: _Facts) -> None:
    """What a loop's body reads of its carry is in the first iteration the value passed in."""
    for a, b in zip(inner, outer, strict=True):
        if a in facts.read and (source := facts.source(b)) is not None:
            facts.read.add(source)


def _cond(step: Step, times: int, facts: _Facts) -> list[EquationCost]:
    branches = []
    for jaxpr in views.branches(step):
        program = _enter(jaxpr, step.ins[1:], step, facts)
        branches.append(_steps(program, times, facts))
    if len({sum(r.flops for r in rows) for rows in branches}) > 1:
        facts.notes[f"{_at(step)}: counted as its dearest branch"] = None
    return max(branches, key=lambda rows: (sum(r.flops for r in rows), sum(r.bytes for r in rows)))


CONTROL = {Kind.LOOP: _scan, Kind.WHILE: _while, Kind.BRANCH: _cond}


def _at(step: Step) -> str:
    return f"{step.name}{' at ' + step.where if step.where else ''}"


def _is_float(value: Value) -> bool:
    return jax.dtypes.issubdtype(value.aval.dtype, np.inexact)


def _nbytes(value: Value) -> int:
    return math.prod(value.shape) * value.aval.dtype.itemsize


def _describe(values: Iterable[Value]) -> str:
    return " ".join(f"{v.aval.dtype}[{','.join(map(str, v.shape))}]" for v in values if v.shape)


def si(number: float) -> str:
    """A count with a decimal prefix and three digits, ``1.23 G``; exact below 1000."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:g}"
