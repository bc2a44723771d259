"""The parameters of equations, read once and under one name for each.

A view takes a step of a tape or an equation of a jaxpr. Files outside ``jaxprune/ir`` and
``jaxprune/rules`` read no parameter by its name in JAX. What changes between versions of JAX is
read by ``jaxprune/ir/compat.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxprune.ir import compat, primitives
from jaxprune.ir.primitives import Kind

Axes = tuple[int, ...]


def _tuple(xs: Any) -> Axes:
    return tuple(int(x) for x in xs)


# -------------------------------------------------------------------------------- contractions


class Contraction(NamedTuple):
    """The axes of a product that are summed over, and those that both operands share."""

    lhs_contract: Axes
    rhs_contract: Axes
    lhs_batch: Axes
    rhs_batch: Axes

    @property
    def contract(self) -> tuple[Axes, Axes]:
        """The contracted axes of both operands."""
        return self.lhs_contract, self.rhs_contract

    @property
    def batch(self) -> tuple[Axes, Axes]:
        """The batch axes of both operands."""
        return self.lhs_batch, self.rhs_batch

    def free(self, side: int, rank: int) -> list[int]:
        """The axes of one operand of this rank that are neither contracted nor batched."""
        used = {*self.contract[side], *self.batch[side]}
        return [k for k in range(rank) if k not in used]


def contraction(step: Any) -> Contraction:
    """The axes of a ``dot_general``."""
    (lc, rc), (lb, rb) = step.params["dimension_numbers"]
    return Contraction(_tuple(lc), _tuple(rc), _tuple(lb), _tuple(rb))


class Ragged(NamedTuple):
    """A product in which each row of the left side meets one group of the right side."""

    dims: Contraction
    lhs_ragged: Axes
    rhs_group: Axes


def ragged(step: Any) -> Ragged:
    """The axes of a ``ragged_dot_general``."""
    numbers = step.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    dims = Contraction(_tuple(lc), _tuple(rc), _tuple(lb), _tuple(rb))
    return Ragged(dims, _tuple(numbers.lhs_ragged_dimensions), _tuple(numbers.rhs_group_dimensions))


class Convolution(NamedTuple):
    """The axes of a convolution, as (batch or out, feature or in, spatial...), and its groups."""

    lhs: Axes
    rhs: Axes
    out: Axes
    groups: int
    batch_groups: int


def convolution(step: Any) -> Convolution:
    """The axes and groups of a ``conv_general_dilated``."""
    p, numbers = step.params, step.params["dimension_numbers"]
    specs = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    return Convolution(*specs, p["feature_group_count"], p["batch_group_count"])


class Taps(NamedTuple):
    """Where a convolution's window stands, per spatial axis."""

    strides: Axes
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Axes
    rhs_dilation: Axes


def taps(step: Any) -> Taps:
    """The places of the window of a ``conv_general_dilated``."""
    p = step.params
    return Taps(p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])


def window(step: Any) -> Axes:
    """The sizes of the windows of a pooling, or of its gradient."""
    return step.params["window_dimensions"]


# ------------------------------------------------------------------------- reductions and sorting


class Reduction(NamedTuple):
    """A reduction: the axes that go, in order, and the operation that combines them."""

    axes: Axes
    combine: str | None


def reduction(step: Any) -> Reduction:
    """The axes of a reduction of kind ``REDUCTION`` or ``POSITION``."""
    return Reduction(tuple(sorted(step.params["axes"])), primitives.of(step).combine)


def sorted_axis(step: Any, rank: int) -> int:
    """The axis along which a sort or a top_k moves entries."""
    names = [n for n in ("dimension", "axis", "reduction_dimension") if n in step.params]
    return (step.params[names[0]] if names else rank - 1) % rank


# -------------------------------------------------------------------------------------- layout


def permutation(step: Any) -> Axes:
    """For each axis of a transpose's result the operand's axis."""
    return step.params["permutation"]


def squeezed(step: Any, rank: int) -> list[int]:
    """The axes of an operand of this rank that a squeeze leaves."""
    gone = {k % rank for k in step.params["dimensions"]}
    return [k for k in range(rank) if k not in gone]


class Broadcast(NamedTuple):
    """A broadcast: for each axis of the operand that of the result, and the result's shape."""

    places: Axes
    shape: tuple[Any, ...]


def broadcast(step: Any) -> Broadcast:
    """The layout of a ``broadcast_in_dim``."""
    return Broadcast(step.params["broadcast_dimensions"], step.params["shape"])


def reshape_order(step: Any) -> Axes | None:
    """The order in which a reshape reads its operand's axes, None for their own."""
    return step.params.get("dimensions")


def concatenated(step: Any) -> int:
    """The axis along which operands follow each other."""
    return step.params["dimension"]


def split_axis(step: Any) -> int:
    """The axis that a split cuts."""
    return step.params["axis"]


class Slice(NamedTuple):
    """A slice: per axis where it starts, where it stops, and its stride."""

    starts: tuple[Any, ...]
    stops: tuple[Any, ...]
    strides: tuple[Any, ...]


def slices(step: Any) -> Slice:
    """The positions that a ``slice`` takes."""
    p = step.params
    return Slice(
        p["start_indices"], p["limit_indices"], p["strides"] or (1,) * len(p["start_indices"])
    )


def padding(step: Any) -> tuple[tuple[int, int, int], ...]:
    """Per axis how much a pad adds before, after and between entries."""
    return step.params["padding_config"]


def window_sizes(step: Any) -> tuple[Any, ...]:
    """The sizes of the windows that a gather or a dynamic slice reads."""
    return step.params["slice_sizes"]


def windows(step: Any) -> Axes:
    """The axes of a gather's result that lie within its windows."""
    return _tuple(step.params["dimension_numbers"].offset_dims)


def indexed(step: Any) -> Axes:
    """The axes of the operand that the indices of a gather or a scatter point into."""
    numbers = step.params["dimension_numbers"]
    names = [n for n in ("start_index_map", "scatter_dims_to_operand_dims") if hasattr(numbers, n)]
    return _tuple(getattr(numbers, names[0]))


# ------------------------------------------------------------------------- other numbers


def fft_lengths(step: Any) -> Axes:
    """The sizes of the axes that an FFT transforms."""
    return step.params["fft_lengths"]


def estimated_flops(step: Any) -> int | None:
    """What a Pallas kernel says that it takes, None where it says nothing."""
    estimate = step.params["cost_estimate"]
    return None if estimate is None else int(estimate.flops)


def size(step: Any) -> Any:
    """The symbolic size that an equation of kind ``SIZE`` makes a number of."""
    return step.params["dim"]


def every(step: Any) -> list[tuple[str, Any]]:
    """All parameters by name, for what tells equations apart; no name has a meaning there."""
    return sorted(step.params.items())


# ------------------------------------------------------------------------------------ programs


class While(NamedTuple):
    """A while loop: its two programs, each with a number of constant operands before the carry."""

    test: Any
    body: Any
    test_consts: int
    body_consts: int


def while_loop(step: Any) -> While:
    """The parts of a ``while``; its operands are the test's constants, the body's, the carry."""
    p = step.params
    return While(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])


def branches(step: Any) -> Sequence[Any]:
    """The programs of a ``cond``; its first operand says which, the others are theirs."""
    return step.params["branches"]


def devices(step: Any) -> int:
    """How many devices run the program of a ``shard_map``."""
    return compat.shard_map_parts(getattr(step, "eqn", step)).devices


class Entered(NamedTuple):
    """A program inside a step.

    Attributes:
      jaxpr: the program.
      operands: what its inputs are as it starts, position by position.
      carried: the positions that change as it runs.
    """

    jaxpr: Any
    operands: Sequence[Any]
    carried: range = range(0)

    @property
    def fixed(self) -> list[Any]:
        """The operands as long as it runs, None for what changes."""
        return [None if i in self.carried else v for i, v in enumerate(self.operands)]


def _of_loop(eqn: Any, ins: Sequence[Any]) -> list[Entered]:
    p = compat.scan_parts(eqn)
    return [Entered(p.jaxpr, ins, range(p.num_consts, p.num_consts + p.num_carry))]


def _of_while(eqn: Any, ins: Sequence[Any]) -> list[Entered]:
    p = while_loop(eqn)
    carry = ins[p.test_consts + p.body_consts :]
    held = ins[: p.test_consts], ins[p.test_consts : p.test_consts + p.body_consts]
    return [
        Entered(jaxpr, [*consts, *carry], range(len(consts), len(consts) + len(carry)))
        for jaxpr, consts in zip((p.test, p.body), held)
    ]


def _of_branch(eqn: Any, ins: Sequence[Any]) -> list[Entered]:
    return [Entered(jaxpr, ins[1:]) for jaxpr in branches(eqn)]


def _of_call(eqn: Any, ins: Sequence[Any]) -> list[Entered]:
    return [Entered(compat.sub_jaxprs(eqn)[0], ins)]


_ENTERED: dict[Kind, Callable[[Any, Sequence[Any]], list[Entered]]] = {
    Kind.LOOP: _of_loop,
    Kind.WHILE: _of_while,
    Kind.BRANCH: _of_branch,
    **dict.fromkeys([*primitives.CALLS, Kind.SHARDS], _of_call),
}


def entered(eqn: Any, ins: Sequence[Any]) -> list[Entered]:
    """The programs that an equation runs, each with what it gets of the operands ``ins``."""
    return _ENTERED.get(primitives.kind(eqn), lambda eqn, ins: [])(eqn, ins)
