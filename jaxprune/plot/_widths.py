"""How much a search keeps of each dimension."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.budget.result import SearchResult
from jaxprune.plot.curves import COLORS, _style, as_patterns, new_axes


def widths(of: Any, *, dims: str | Sequence[str] = "*", ax: Any = None) -> Any:
    """Draws how many units a search keeps of each dimension, in per cent, and returns the axes.

    Args:
      of: a :class:`jp.budget.SearchResult`, or ``{name: plan}`` to compare several of one
        structure.
      dims: labels of the dimensions to draw, one or several, with wildcards.
      ax: matplotlib axes, a new figure of fitting size if None.

    Raises:
      TypeError: for something that isn't a plan.
      ValueError: for plans of different dimensions, or when no label matches; for empty dims.
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> scores, target = jp.magnitude(params), jp.Target(params=0.5)
      >>> plan = jp.search(fn, params, structure, scores, x, target=target, round_to=1)
      >>> [label.get_text() for label in jp.plot.widths(plan).get_yticklabels()]
      ['hidden: 8']
    """
    several = of if isinstance(of, Mapping) else {"": of}
    if not several or not all(isinstance(plan, SearchResult) for plan in several.values()):
        raise TypeError(
            f"plot.widths wants jp.search(...), or a dict of its plans, got {type(of).__name__}"
        )
    patterns = as_patterns(dims)
    rows = {name: _kept(plan, patterns) for name, plan in several.items()}
    labels = next(iter(rows.values())).keys()
    if any(found.keys() != labels for found in rows.values()):
        raise ValueError("plot.widths got plans of different dimensions; draw them apart")
    if not labels:
        raise ValueError(f"no dimension's label matches {dims!r}; see print(plan)")
    ax = new_axes(ax, height=1.2 + 0.24 * len(labels))
    at = np.arange(len(labels))
    for k, (name, found) in enumerate(rows.items()):
        beside = 0.16 * (k - (len(rows) - 1) / 2)  # equal widths don't hide each other
        ax.hlines(at + beside, 0, list(found.values()), color=COLORS[k % len(COLORS)], alpha=0.4)
        ax.plot(list(found.values()), at + beside, **_style(k), linestyle="", label=name)
    ax.set_yticks(at, labels)
    ax.set(xlabel="units kept [%]", xlim=(0, 103), ylim=(len(labels) - 0.5, -0.5))
    ax.grid(alpha=0.3)
    if isinstance(of, Mapping):  # beside: lines cover all of the inside
        ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _kept(plan: SearchResult, patterns: Sequence[str]) -> dict[str, float]:
    """Per cent of units that stay, by label and size; labels may repeat, names don't."""
    found: dict[str, float] = {}
    for label, kept, size in plan.widths:
        if any(fnmatch.fnmatchcase(label, pattern) for pattern in patterns):
            text = f"{label}: {size:,}"
            found[text + " " * sum(text == other.rstrip() for other in found)] = 100 * kept / size
    return found
