"""In which order a block's weights are used, read off its jaxpr.

What a weight multiplies depends on the weights before it: pruned before it, they change what it is
calibrated on. Weights whose inputs depend on none of each other, such as a query's, a key's and a
value's, make one group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxprune.calibration.api import wish_for
from jaxprune.calibration.reader import Wish, read, read_rows
from jaxprune.typing import Params, Where, named_leaves


def of_use(block: Callable[..., Any], p: Params, x: Any, where: Where | None) -> list[Where]:
    """Groups of the leaves that ``block(p, x)`` contracts, by what their inputs depend on."""
    named = named_leaves(p)
    wish = wish_for(named, where, False, np.float32)
    levels = _levels(_needed(block, wish, p, x))
    _check(named, wish, levels, block, p, x)
    groups = [
        frozenset(named[leaf][0] for leaf, own in levels.items() if own == level)
        for level in range(max(levels.values()) + 1)
    ]
    return [_among(paths) for paths in groups]


def _among(paths: frozenset[str]) -> Where:
    return lambda path, leaf: path in paths


def _needed(block: Any, wish: Wish, p: Params, x: Any) -> dict[int, frozenset[int]]:
    """For each leaf, in the order of first use, the leaves that its first inputs depend on."""
    used: list[int] = []

    def first_inputs(p: Params) -> list[jax.Array]:
        rows = read_rows(block, wish, p, (x,))
        used[:] = rows
        return [uses[0] for uses in rows.values()]

    jaxpr = jax.make_jaxpr(first_inputs)(p).jaxpr
    chosen = [frozenset([k]) if s is not None else frozenset() for k, s in enumerate(wish.shapes)]
    behind: dict[Any, frozenset[int]] = dict(zip(jaxpr.invars, chosen, strict=True))

    def of(atoms: Any) -> frozenset[int]:
        known = [behind.get(a) for a in atoms if not isinstance(a, core.Literal)]
        return frozenset().union(*(leaves for leaves in known if leaves))

    for eqn in jaxpr.eqns:
        behind.update(dict.fromkeys(eqn.outvars, of(eqn.invars)))
    return {leaf: of([out]) for leaf, out in zip(used, jaxpr.outvars, strict=True)}


def _levels(needed: dict[int, frozenset[int]]) -> dict[int, int]:
    """One above the highest that a leaf needs; the first use of a leaf counts."""
    levels: dict[int, int] = {}
    for leaf, others in needed.items():
        levels[leaf] = max((levels[k] + 1 for k in others if k in levels), default=0)
    return levels


def _check(named: Any, wish: Wish, levels: dict[int, int], block: Any, p: Params, x: Any) -> None:
    found = jax.eval_shape(lambda p: read(block, wish, p, (x,))[0], p)
    looped = [named[leaf] for leaf in found if leaf not in levels]
    if looped:
        path, leaf = looped[0]
        raise ValueError(
            f"sequential: {path}, shape {np.shape(leaf)}, is used within a loop of the block, "
            'where order="use" and error_propagation= can\'t tell its place: unroll the loop, or '
            "pass order= as functions of (path, leaf), and error_propagation=0"
        )
    if not levels:
        raise ValueError(
            f'sequential: order="use" finds no weight that the block contracts, of leaves '
            f"{', '.join(path for path, _ in named)}; pass where= that selects some"
        )
