"""Leaves of one shape and type in one call, so that compile time follows shapes, not leaves.

XLA compiles what each leaf runs, also where it is the same: a function that is called for each is
inlined. Small leaves that are alike are therefore stacked, and go through the function together.
A large leaf runs alone, for a stack is a copy; and so does one that lies on a mesh, for what is
stacked would have to lie alike, and within ``jax.jit`` nothing says how it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.sharding import varying

LARGE = 1 << 18  # A leaf of so many entries runs alone.
MOST = 1 << 20  # A stack holds at most so many entries: 4 MB of float32,
ROWS = 64  # and leaves: taking each out is a kernel, which stacks of one shape have in common.


def map_alike(fn: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
    """Returns ``[fn(*row) for row in zip(*columns)]``, bit for bit.

    Args:
      fn: of arrays; traceable. It gives one array.
      *columns: the arguments of each call, of one length; the first are the leaves. Numbers may
        stand in the others.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> half = jax.jit(lambda leaves, ns: map_alike(lambda x, n: x / n, leaves, ns))
      >>> [x.tolist() for x in half([jnp.ones(2), jnp.ones(3), jnp.ones(2)], [2, 2, 4])]
      [[0.5, 0.5], [0.5, 0.5, 0.5], [0.25, 0.25]]
    """
    rows = list(zip(*columns, strict=True))
    found: list[Any] = [None] * len(rows)
    for members in _groups(rows):
        if len(members) == 1:
            found[members[0]] = fn(*rows[members[0]])
            continue
        stacks = [
            jnp.stack([jnp.asarray(x) for x in xs]) for xs in zip(*(rows[i] for i in members))
        ]
        results = jax.lax.map(lambda row: fn(*row), stacks)
        for at, i in enumerate(members):
            found[i] = jax.lax.index_in_dim(results, at, keepdims=False)
    return found


def _groups(rows: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """The positions of rows that are stacked; most in one group, and others alone."""
    alike: dict[Any, list[list[int]]] = {}
    for i, row in enumerate(rows):
        size = max(np.size(x) for x in row)
        key = tuple(map(_type, row)) if size and size < LARGE and _may_stack(row[0]) else i
        groups = alike.setdefault(key, [[]])
        if len(groups[-1]) >= max(1, min(ROWS, MOST // max(size, 1))):
            groups.append([])
        groups[-1].append(i)
    return [group for groups in alike.values() for group in groups]


def _type(x: Any) -> Any:
    aval = jax.typeof(x)
    return aval.shape, aval.dtype, varying(aval)


def _may_stack(leaf: Any) -> bool:
    """Whether a leaf is traced, on one device: what is at hand runs a program that is cached."""
    return isinstance(leaf, jax.core.Tracer) and jax.typeof(leaf).sharding.mesh.size <= 1
