"""Leaves of one shape and type in one call, so that compile time follows shapes, not leaves.

XLA inlines a function that is called for each leaf, and its passes take their time for each. Small
leaves that are alike are therefore stacked, and go through the function together. Compiling kernels
takes longest, and XLA compiles equal ones once. So all stacks of one type have one shape, for which
the last is filled up with repeated leaves, and the place from which a leaf is taken out of a stack
is an argument, see :func:`_places`.

A large leaf runs alone, for a stack is a copy; and so does one that lies on a mesh, for what is
stacked would have to lie alike, and within ``jax.jit`` nothing says how it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.sharding import varying

LARGE = 1 << 18  # A leaf of so many entries runs alone.
MOST = 1 << 20  # A stack holds at most so many entries: 4 MB of float32,
ROWS = 64  # and leaves.


def map_alike(
    fn: Callable[..., Any], *columns: Iterable[Any], any_shape: bool = False
) -> list[Any]:
    """Returns ``[fn(*row) for row in zip(*columns)]``, bit for bit.

    Args:
      fn: of arrays; traceable, and mapped by ``jax.lax.map``. It gives one array.
      *columns: the arguments of each call, of one length; the first are the leaves. Numbers may
        stand in the others.
      any_shape: ``fn`` is given leaves as vectors, and the vectors that it gives have the leaves'
        shapes again: then leaves of one size are alike.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> half = jax.jit(lambda leaves, ns: map_alike(lambda x, n: x / n, leaves, ns))
      >>> [x.tolist() for x in half([jnp.ones(2), jnp.ones(3), jnp.ones(2)], [2, 2, 4])]
      [[0.5, 0.5], [0.5, 0.5, 0.5], [0.25, 0.25]]
    """
    rows = list(zip(*columns, strict=True))
    found: list[Any] = [None] * len(rows)
    groups = _groups(rows, any_shape)
    places = _places(max([count for _, count in groups], default=1))
    for members, count in groups:
        if count == 1:
            found[members[0]] = fn(*rows[members[0]])
            continue
        filled = [*members, *members[-1:] * (count - len(members))]
        results = _mapped(fn, list(zip(*(rows[i] for i in filled))), any_shape)
        for i, place in zip(members, places):
            shape = np.shape(rows[i][0]) if any_shape else results.shape[1:]
            found[i] = jax.lax.reshape(_taken(results, place), shape)
    return found


def _taken(stack: jax.Array, place: Any) -> jax.Array:
    """The row at a place, as a stack of one."""
    start = [place, *[np.uint32(0)] * (stack.ndim - 1)]
    return jax.lax.dynamic_slice(stack, start, (1, *stack.shape[1:]))


def _places(count: int) -> Sequence[Any]:
    """The numbers 0, 1, ... as XLA does not know them: what comes out of a loop is no constant."""
    if count == 1:
        return [0]
    numbers = np.arange(count, dtype=np.uint32)
    return jax.lax.scan(lambda found, i: ((i, *found[:-1]), None), (*numbers,), numbers[::-1])[0]


def _mapped(fn: Callable[..., Any], columns: Sequence[Sequence[Any]], any_shape: bool) -> Any:
    """The results of all rows in one array; what they have in common is not stacked."""
    own = [i == 0 or any(x is not xs[0] for x in xs) for i, xs in enumerate(columns)]
    stacks = [_stacked(xs, any_shape) for xs, o in zip(columns, own) if o]

    def row(mine: Sequence[Any]) -> Any:
        rest = iter(mine)
        return fn(*(next(rest) if o else xs[0] for xs, o in zip(columns, own)))

    # A loop, whose results are stored: XLA would compute all of them again for each taken out.
    return jax.lax.map(row, stacks)


def _stacked(xs: Sequence[Any], any_shape: bool) -> Any:
    arrays = [jnp.asarray(x) for x in xs]
    shape = (arrays[0].size,) if any_shape and arrays[0].ndim else arrays[0].shape
    return jax.lax.concatenate([jax.lax.reshape(x, (1, *shape)) for x in arrays], 0)


def _groups(rows: Sequence[tuple[Any, ...]], any_shape: bool) -> list[tuple[list[int], int]]:
    """The positions of rows that are stacked, and how many rows their stack has."""
    alike: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(_kind(row, any_shape) or i, []).append(i)
    found = []
    for members in alike.values():
        members.sort(key=lambda i: np.shape(rows[i][0]))  # What fills a stack is one program, too.
        size = max(np.size(x) for x in rows[members[0]])
        stacks = -(-len(members) // max(1, min(ROWS, MOST // max(size, 1))))
        count = -(-len(members) // stacks)
        found += [(members[i : i + count], count) for i in range(0, len(members), count)]
    return found


def _kind(row: tuple[Any, ...], any_shape: bool) -> Any:
    """What rows that are stacked have in common; None: the row runs alone."""
    size = max(np.size(x) for x in row)
    if not 0 < size < LARGE or not _may_stack(row[0]):
        return None
    return tuple(_type(x, any_shape) for x in row)


def _type(x: Any, any_shape: bool) -> Any:
    aval = jax.typeof(x)
    shape = math.prod(aval.shape) if any_shape and aval.shape else aval.shape
    return shape, aval.dtype, varying(aval)


def _may_stack(leaf: Any) -> bool:
    """Whether a leaf is traced, on one device: what is at hand runs a program that is cached."""
    return isinstance(leaf, jax.core.Tracer) and jax.typeof(leaf).sharding.mesh.size <= 1
