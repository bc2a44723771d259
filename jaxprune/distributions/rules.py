"""Sparsities by rules over paths and depths, and those that masks have."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.distributions.shapes import uniform
from jaxprune.selection import known
from jaxprune.sharding import host
from jaxprune.typing import Distribution, Masks, Scores, Sparsities, named_leaves, path_str

Rule = float | Callable[[Any], Any]  # a sparsity, or a function of the global one


def without_ends(
    distribution: Distribution | Mapping[str, Rule] = uniform,
    *,
    first: int = 1,
    last: int = 1,
    order: Callable[[str], Any] | None = None,
) -> Distribution:
    """Returns a distribution that leaves the first and the last layer dense.

    The sparsity is that of the leaves in between, as if ``where`` had left the ends out; their
    masks keep everything, and count in ``jp.density``. Of the leaves that a pattern prunes the
    first and last in order of their paths are meant, see ``order``; where names don't tell the
    order, say what stays dense: ``jp.unstructured({"stem*": 0, "head*": 0})``.

    Args:
      distribution: what holds for the leaves in between.
      first, last: how many leaves stay dense at either end.
      order: sort key for paths, as in :func:`by_depth`.

    Raises:
      ValueError: for a negative number; on use, when nothing is left in between.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> rule = jp.distributions.without_ends(jp.erk)
      >>> leaves = {f"Dense_{i}": jnp.ones((10, 10)) for i in (0, 1, 2, 10)}
      >>> {path: round(float(s), 2) for path, s in rule(leaves, 0.9).items()}
      {'Dense_0': 0.0, 'Dense_1': 0.9, 'Dense_10': 0.0, 'Dense_2': 0.9}
      >>> pattern = jp.unstructured(rule)
    """
    if first < 0 or last < 0:
        raise ValueError(f"without_ends has first={first}, last={last}; wanted 0 or more leaves")
    between = as_distribution(distribution)

    def without(scores: Scores, sparsity: Any) -> Sparsities:
        treedef, leaves = jax.tree.structure(scores), dict(named_leaves(scores))
        ranked = sorted(leaves, key=order or _natural)
        middle = set(ranked[first : len(ranked) - last])
        if not middle:
            raise ValueError(
                f"without_ends leaves nothing to prune: {len(ranked)} leaves {ranked[:8]} with "
                f"first={first}, last={last}; make these smaller"
            )
        inner = between({path: x for path, x in leaves.items() if path in middle}, sparsity)
        return jax.tree.unflatten(treedef, [inner.get(path, np.zeros(())) for path in leaves])

    return without


def like(masks: Masks) -> Distribution:
    """Returns the distribution of given masks: each leaf's own sparsity, whatever is asked for.

    For the control that keeps the densities and changes the entries: ``jp.random``, or another
    score, at the densities that SNIP chose.

    Raises:
      ValueError: on use, for a leaf that masks do not have.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> masks = {"a": jnp.array([True, False]), "b": jnp.array([True, True])}
      >>> rule = jp.distributions.like(masks)
      >>> {path: float(s) for path, s in rule({"a": jnp.ones(2), "b": jnp.ones(2)}, 0.9).items()}
      {'a': 0.5, 'b': 0.0}
    """
    table = {path: _sparsity(mask) for path, mask in named_leaves(masks)}

    def distribution(scores: Scores, sparsity: Any) -> Sparsities:
        treedef, paths = jax.tree.structure(scores), [path for path, _ in named_leaves(scores)]
        missing = [path for path in paths if path not in table]
        if missing:
            raise ValueError(
                f"like: the masks have no leaf {missing[0]!r}, only {list(table)[:8]}; pass masks "
                "that were made for the same params"
            )
        return jax.tree.unflatten(treedef, [table[path] for path in paths])

    return distribution


def _sparsity(mask: Any) -> Any:
    if known(mask):  # in float64: the count of a large leaf is recovered exactly
        return np.asarray(1 - np.mean(host(mask).astype(bool))) if np.size(mask) else np.zeros(())
    return 1 - jnp.mean(jnp.asarray(mask, jnp.float32))


def by_path(table: Mapping[str, Rule], default: Distribution = uniform) -> Distribution:
    """Returns a distribution with a sparsity per path pattern, the first that matches.

    A mapping may also be given to a pattern directly: ``jp.unstructured({"*/Conv_*": 0.5})``.

    Args:
      table: from patterns of :mod:`fnmatch` to a sparsity. A number holds at every step of a
        schedule; a function of the global sparsity follows it: ``{"*/Conv_*": lambda s: s / 2}``.
      default: what holds for the leaves that no pattern matches, at the global sparsity.

    Raises:
      ValueError: for a number outside [0, 1]; on use, for a pattern that is no leaf's first match.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> rule = jp.distributions.by_path({"conv*": 0.5})
      >>> sparsities = rule({"conv": jnp.ones(4), "dense": jnp.ones(4)}, 0.9)
      >>> {path: float(s) for path, s in sparsities.items()}
      {'conv': 0.5, 'dense': 0.9}
    """
    for pattern, rule in table.items():
        if not callable(rule) and not 0 <= rule <= 1:
            raise ValueError(
                f"by_path: {pattern!r} has sparsity {rule}; wanted a fraction in [0, 1], or a "
                "function of the global sparsity"
            )

    return ByPath(table, default)


@dataclass(frozen=True, eq=False)
class ByPath:
    """What :func:`by_path` returns: the distribution, with its table to be read."""

    table: Mapping[str, Rule]
    default: Distribution

    def __call__(self, scores: Scores, sparsity: Any) -> Sparsities:
        table = self.table
        flat, treedef = jax.tree_util.tree_flatten_with_path(scores)
        paths = [path_str(path) for path, _ in flat]
        first = [next((p for p in table if fnmatch.fnmatchcase(x, p)), None) for x in paths]
        for pattern in table:
            if pattern not in first:
                raise ValueError(
                    f"by_path: {pattern!r} is the first match of none of the pruned leaves "
                    f"{paths[:8]}; correct it, move it up, or leave it out"
                )
        rest = dict(zip(paths, flat, strict=True))
        rest = {x: leaf for (x, (_, leaf)), p in zip(rest.items(), first) if p is None}
        sparsities = self.default(rest, sparsity) if rest else {}
        for path, match in zip(paths, first, strict=True):
            if match is not None:
                sparsities[path] = _ruled(table[match], sparsity)
        return jax.tree.unflatten(treedef, [sparsities[path] for path in paths])


def _ruled(rule: Rule, sparsity: Any) -> Any:
    value = rule(sparsity) if callable(rule) else rule
    return np.asarray(value) if known(value) else value


def by_depth(
    rule: Callable[[float, Any], Any], *, order: Callable[[str], Any] | None = None
) -> Distribution:
    """Returns a distribution with a sparsity per depth.

    Args:
      rule: (depth, global sparsity) -> sparsity; the first of the pruned leaves has depth 0.0,
        the last 1.0.
      order: sort key for paths. A tree doesn't know in which order its layers run; by default
        paths are compared piece by piece, numbers as numbers: ``Conv_2`` before ``Conv_10``,
        ``Conv_0`` before ``Dense_0``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> rule = jp.distributions.by_depth(lambda depth, s: s * (0.5 + 0.5 * depth))
      >>> sparsities = rule({"l2": jnp.ones(1), "l10": jnp.ones(1), "l1": jnp.ones(1)}, 0.8)
      >>> {path: round(float(s), 2) for path, s in sparsities.items()}
      {'l1': 0.4, 'l10': 0.8, 'l2': 0.6}
    """

    def distribution(scores: Scores, sparsity: Any) -> Sparsities:
        treedef, paths = jax.tree.structure(scores), [path for path, _ in named_leaves(scores)]
        rank = {path: i for i, path in enumerate(sorted(paths, key=order or _natural))}
        last = max(len(paths) - 1, 1)
        values = [rule(rank[path] / last, sparsity) for path in paths]
        return jax.tree.unflatten(treedef, [np.asarray(v) if known(v) else v for v in values])

    return distribution


def _natural(path: str) -> list[tuple[int, str]]:
    pieces = re.findall(r"\d+|\D+", path)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in pieces]


def as_distribution(distribution: Distribution | Mapping[str, Rule]) -> Distribution:
    """A mapping becomes :func:`by_path`; what is neither that nor a function is a TypeError.

    Example:
      >>> import jaxprune as jp
      >>> jp.distributions.as_distribution(jp.erk) is jp.erk
      True
    """
    if isinstance(distribution, Mapping):
        return by_path(distribution)
    if not callable(distribution):
        raise TypeError(
            f"distribution is {distribution!r}; wanted a function such as jp.erk or "
            'jp.global_threshold, or sparsities by pattern: {"*/kernel": 0.9}'
        )
    return distribution
