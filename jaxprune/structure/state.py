"""Arguments that are state of the parameters: statistics and caches, which keep their sizes.

They freeze every channel that they stand beside, unless they are a part of params. Nothing says of
an argument that it is state: it lies in a tree, and below a module of params, or beside a vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxprune.ir import axes
from jaxprune.ir.tape import Value
from jaxprune.typing import ending_in

MARK = "state, which belongs into params"
ADVICE = (
    "state that is an argument keeps its size, and so do all dimensions beside it: give it with "
    "the parameters, as Flax variables with batch_stats, or params = nnx.split(model)[1], in "
    "fn(variables, x)"
)


def reason(path: str, value: Value, modules: set[str], vectors: set[axes.Axis]) -> str:
    """Why the axes of an argument are frozen, with a hint where it is state.

    Args:
      path: the argument's, ``0/bn/mean``.
      value: the argument.
      modules: those of params, as :func:`modules_of` gives them.
      vectors: the dimensions of params of rank 1, as :func:`vectors_of` gives them.
    """
    plain = f"input {path} of the function"
    beside = len(value.axes) == 1 and not vectors.isdisjoint(axes.leaves(value.axes[0]))
    below = ending_in(_module(path.partition("/")[2]), modules) is not None
    return f"{plain} ({MARK})" if "/" in path and (beside or below) else plain


def modules_of(paths: Iterable[str]) -> set[str]:
    """The modules that leaves belong to."""
    return {_module(path) for path in paths} - {""}


def vectors_of(values: Sequence[Value]) -> set[axes.Axis]:
    """The dimensions of all vectors among the values."""
    return set(axes.distinct_leaves(v.axes[0] for v in values if len(v.axes) == 1))


def _module(path: str) -> str:
    return path.removesuffix("/value").rpartition("/")[0]
