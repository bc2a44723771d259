"""What a function costs: FLOPs, bytes, parameters and memory, by the equations of its jaxpr.

Compilers' own estimates don't see inside library calls (on a GPU, XLA's doesn't change when a
convolution shrinks), so the jaxpr is counted. Nothing is computed and nothing is compiled.

What one equation costs is said in ``jaxprune/costs/flops.py``, which of them run and what they read
in ``jaxprune/costs/operations.py``. A program costs the sum of its live equations; dead code costs
nothing. ``scan``: its body times its length. ``cond``: the dearest branch. ``while``: one turn.
``jit``, ``checkpoint``, custom derivatives: what they call. ``shard_map``: all devices together.

What can't be known is never hidden: it is said in ``Cost.notes``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import _tables as tables
from jaxprune._calls import FLAG, PARTITION, bound, calls_fn
from jaxprune.costs import memory, routing
from jaxprune.costs.operations import Operation, nbytes, read, separate
from jaxprune.ir import compat, tape
from jaxprune.ir.tape import Value
from jaxprune.structure import infer
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
class Cost(tables.Shown):
    """What one call of a function costs, by :func:`cost`; ``print`` it to see a table.

    Attributes:
      flops: operations, multiplications and additions apart; what is counted is said on top of
        ``jaxprune/costs/flops.py``.
      bytes: the memory traffic of an ideally merged program, in bytes. Each contraction,
        convolution, pooling, gather, sort or unknown operation reads its operands and writes its
        results once; everything else is merged into these and moves nothing. Each input that none
        of them reads, and each output that depends on none of them, moves once.
      params: entries in the float leaves of the first argument.
      active_params: those of them that one token uses: of matrices of experts, as ``top_k`` and
        ``argmax`` choose them, the share that is chosen (``jaxprune/costs/routing.py``); all of
        them where nothing is chosen. An embedding counts whole.
      kv_cache: bytes of the leaves of the arguments, scalars apart, that the call hands back anew
        under the same path, as a decode step does with its cache; 0 where it hands back none.
      peak_memory: bytes of the arrays that are there at once, at most, arguments and results among
        them; an estimate, by the model on top of ``jaxprune/costs/memory.py``.
      notes: what isn't exact, a line each; empty when all is.
      equations: one :class:`EquationCost` per equation that computes or moves anything.
    """

    flops: int
    bytes: int
    params: int
    active_params: int = 0
    kv_cache: int = 0
    peak_memory: int = 0
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
        return tables.text(self._dearest(limit))

    def _dearest(self, limit: int) -> Iterator[tables.Part]:
        dearest = sorted(self.equations, key=lambda e: (e.flops, e.bytes), reverse=True)
        rows = [self._row(e) for e in dearest[:limit]]
        yield tables.Table(("FLOPs", "share", "bytes", "equation"), rows, (0, 1, 2))
        if len(dearest) > limit:
            yield f"... and {len(dearest) - limit} more"

    def _row(self, e: EquationCost) -> tuple[str, ...]:
        share = f"{e.flops / self.flops:.1%}" if self.flops else "-"
        times = f"{e.times} x " if e.times > 1 else ""
        line = f"{times}{e.primitive} {e.shapes}{'  at ' + e.where if e.where else ''}"
        return si(e.flops), share, si(e.bytes), line

    def _parts(self) -> Iterator[tables.Part]:
        yield f"{si(self.flops)} FLOPs, {si(self.bytes)} bytes, {si(self.params)} parameters"
        if self.active_params != self.params:
            yield f"{si(self.active_params)} parameters are active for one token"
        cache = f", {si(self.kv_cache)} bytes of cache" if self.kv_cache else ""
        yield f"about {si(self.peak_memory)} bytes of memory at the peak{cache}"
        yield from self._dearest(20)
        yield from (f"note: {note}" for note in self.notes)


@calls_fn("jp.cost")
def cost(fn: Callable[..., Any], *args: Any) -> Cost:
    r"""Returns the FLOPs, bytes, parameters and memory of one call ``fn(*args)``, from its jaxpr.

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
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, _ = compat.open_jaxpr(closed)
    inputs = [Value(v.aval) for v in jaxpr.invars]
    program = tape.build(closed, inputs, separate)
    found = read(program)
    count = len(jax.tree.leaves(args[0]))
    position = {v: k for k, v in enumerate(inputs)}
    rows = [_row(op, position) for op in found.operations if op.anchor or op.flops({})]
    rows += _ends(found.alone)
    return Cost(
        flops=sum(r.flops for r in rows),
        bytes=sum(r.bytes for r in rows),
        params=sum(v.aval.size for v in inputs[:count] if _is_float(v)),
        active_params=_active(program, closed, out_shape, args, count),
        kv_cache=sum(int(nbytes(v, {})) for v in handed_back(program, args, out_shape)),
        peak_memory=memory.peak(program),
        notes=found.notes,
        equations=tuple(rows),
    )


def _active(program: tape.Tape, closed: Any, out_shape: Any, args: Any, count: int) -> int:
    """The parameters that one token uses; axes are only coupled where something is chosen."""
    chosen = routing.Routing({}, frozenset())
    if routing.chooses(program):
        program = infer.couple(closed, out_shape, args[0], args[1:]).tape
        chosen = routing.routing(program)
    return sum(int(chosen.active(v, {})) for v in program.inputs[:count] if _is_float(v))


def handed_back(program: tape.Tape, args: Sequence[Any], out_shape: Any) -> list[Value]:
    """The arguments that a call hands back anew under the same path: a decoder's cache.

    Args:
      program: the tape of the call.
      args: what it is called with, parameters first.
      out_shape: the tree of its results.
    """
    outs = program.outputs
    shapes = [(path, v.shape) for path, v in zip(infer.paths_of(out_shape), outs, strict=True)]
    found: dict[Value, None] = {}
    start = 0
    for arg in args:
        paths = infer.paths_of(arg)
        own = dict(zip(paths, program.inputs[start:]))
        names = infer.followed(shapes, [(path, v.shape) for path, v in own.items()])
        pairs = [(own[name], v) for name, v in zip(names, outs) if name]
        found |= {value: None for value, out in pairs if value is not out and value.shape}
        start += len(paths)
    return list(found)


def _row(op: Operation, position: Mapping[Value, int]) -> EquationCost:
    """One operation at full size; ``position``: the function's inputs -> leaves of arguments."""
    step = op.step
    moving = op.sources if op.anchor else ()
    read = [position[s] for s in moving if s is not None and s in position]
    return EquationCost(
        step.name,
        step.where,
        f"{_describe(step.ins)} -> {_describe(step.outs)}",
        int(op.times({})),
        int(op.flops({})),
        int(op.bytes({})),
        tuple(dict.fromkeys(read)),
    )


def _ends(alone: Sequence[Value]) -> list[EquationCost]:
    """The inputs and outputs that no operation moves, as one row."""
    moved = sum(int(nbytes(v, {})) for v in alone)
    row = EquationCost("inputs and outputs", "", _describe(alone), 1, 0, moved, ())
    return [row] if moved else []


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
                f"{who} wants arrays, argument {path_str(path)} holds {_brief(leaf)}; "
                f"{_way_out(path, leaf, len(args))}"
            )


def _way_out(path: Sequence[Any], leaf: Any, count: int) -> str:
    """What to write where a leaf of the arguments is no array."""
    if path[0].idx == 0 and count > 1:
        return PARTITION
    if isinstance(leaf, bool):
        return f"bind what is static: {bound({FLAG: leaf})}"
    return f"close over what is static: lambda params, x: fn(params, x, {leaf!r:.40})"


def _brief(x: Any) -> str:
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def _is_float(value: Value) -> bool:
    return jax.dtypes.issubdtype(value.aval.dtype, np.inexact)


def _describe(values: Iterable[Value]) -> str:
    return " ".join(f"{v.aval.dtype}[{','.join(map(str, v.shape))}]" for v in values if v.shape)


def si(number: float) -> str:
    """A count with a decimal prefix and three digits, ``1.23 G``; exact below 1000."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:g}"
