"""The score of each unit: what its entries in all slots come to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.reduce import Reduction


def unit_score(axis: Axis, owned: list[tuple[Any, Any]], reduce: Reduction) -> jax.Array:
    """Reduces the entries of one dimension's units over the (axes, scores) of its leaves."""
    total, count = jnp.zeros(axis.size), np.zeros(axis.size)
    for axs, leaf in owned:
        for k, whole in enumerate(axs):
            for units in axes.units_along(whole, axis):
                others = tuple(i for i in range(len(axs)) if i != k)
                line = jnp.sum(jnp.asarray(leaf, total.dtype), axis=others)
                inside = units >= 0
                total = total.at[units[inside]].add(line[inside])
                np.add.at(count, units[inside], np.prod([axs[i].size for i in others], initial=1))
    return reduce(total, count)
