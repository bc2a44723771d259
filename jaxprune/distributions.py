"""Distributions: one global sparsity -> one sparsity per leaf.

Each takes a tree of scores and a sparsity, a number or traced, and returns a scalar per leaf.
Patterns pass a dict {path: scores} of the leaves that they prune, with one score per unit that
lives or dies as a whole: an entry, a block, a channel.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import widen
from jaxprune.scores.weights import lamp_of_sorted, root_mean_square
from jaxprune.selection import apportion, keep_counts, kept_total, known
from jaxprune.sharding import host
from jaxprune.typing import Distribution, Masks, Scores, Sparsities, named_leaves, path_str

Rule = float | Callable[[Any], Any]  # a sparsity, or a function of the global one


def uniform(scores: Scores, sparsity: Any) -> Sparsities:
    """Returns the same sparsity for every leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> sparsities = jp.uniform({"a": jnp.ones(4), "b": jnp.ones(9)}, 0.5)
      >>> {path: float(s) for path, s in sparsities.items()}
      {'a': 0.5, 'b': 0.5}
    """
    same = np.asarray(sparsity) if known(sparsity) else sparsity  # 0.9 as is, not as a float32
    return jax.tree.map(lambda _: same, scores)


def erk(scores: Scores, sparsity: Any, *, power: float = 1.0) -> Sparsities:
    r"""Returns Erdős–Rényi-Kernel sparsities: large leaves become sparser than small ones.

    .. math:: 1 - s_l = \min(1, \lambda (\sum_i d_{l,i} / \prod_i d_{l,i})^p)

    for a leaf of shape :math:`(d_{l,1}, d_{l,2}, \dots)`, with the one :math:`\lambda` for which
    the mean over all entries is the target. Capped leaves are dense and the others make up for it.

    Args:
      scores: only the shapes of its leaves matter.
      sparsity: global, in [0, 1].
      power: 0 is uniform; ``functools.partial(jp.erk, power=0.5)`` lies half-way.

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`__, 2020, section 3(1), after Mocanu et
      al., `SET <https://arxiv.org/abs/1707.04780>`__, 2018. Their code caps one leaf a round and
      solves again; this is the same solution in closed form.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> sparsities = jp.erk({"a": jnp.ones((10, 10)), "b": jnp.ones((100, 100))}, 0.9)
      >>> {path: round(float(s), 3) for path, s in sparsities.items()}
      {'a': 0.082, 'b': 0.908}
    """
    leaves, treedef = jax.tree.flatten(scores)
    shapes = [np.shape(leaf) for leaf in leaves if np.size(leaf)]
    if not shapes:
        return uniform(scores, sparsity)
    of = _erk_sparsities(shapes, sparsity, power)
    return jax.tree.unflatten(treedef, [of.get(np.shape(x), np.zeros(())) for x in leaves])


def _erk_sparsities(
    shapes: Sequence[tuple[int, ...]], sparsity: Any, power: float
) -> dict[tuple[int, ...], Any]:
    """One for each shape of leaves that have entries."""
    sizes = np.array([np.prod(shape) for shape in shapes], np.float64)
    raw = (np.array([max(sum(shape), 1) for shape in shapes]) / sizes) ** power
    # With the leaves in order of raw, the first j of them capped, lambda solves a line; the mean
    # density is the lower envelope of these lines, so the largest of the solutions is the one.
    order = np.argsort(-raw)
    entries, slopes = sizes[order], (sizes * raw)[order]
    capped = np.cumsum(entries) - entries
    xp = np if known(sparsity) else jnp
    wanted = (1.0 - xp.asarray(sparsity)) * float(sizes.sum())
    scale = xp.max(
        (wanted - capped.astype(wanted.dtype)) / _suffix_sums(slopes).astype(wanted.dtype)
    )
    densities = {
        shape: xp.asarray(xp.clip(scale * xp.asarray(r, wanted.dtype), 0, 1))
        for shape, r in dict(zip(shapes, raw)).items()
    }
    return {shape: 1 - density for shape, density in densities.items()}


def _suffix_sums(x: np.ndarray) -> np.ndarray:
    return np.cumsum(x[::-1])[::-1]


def global_threshold(
    scores: Scores, sparsity: Any, *, normalize: bool = True, floor: float = 0.05
) -> Sparsities:
    """Returns the sparsities that one threshold over all leaves gives.

    Each leaf is divided by its root mean square first, which doesn't depend on its size: two
    leaves of one distribution keep the same fraction. No leaf is emptied: each keeps at least
    ``floor`` of its share of the total, and at least one entry; the others then keep as much less.
    Of all n entries n - round(sparsity * n) are kept, or one of each leaf where those are more.

    Args:
      scores: floats of any size. Entries of infinite score count as zeros in the mean.
      sparsity: global, in [0, 1].
      normalize: False compares scores across leaves as they are.
      floor: a fraction in [0, 1]; 1 is uniform, 0 leaves one entry. Shares are in proportion to
        the sizes of leaves.

    Raises:
      ValueError: for a floor outside [0, 1], and for 2**31 entries or more without 64-bit types.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxprune as jp
      >>> w = {"a": jax.random.normal(jax.random.key(0), (50, 50))}
      >>> round(float(jp.global_threshold(jp.magnitude(w), 0.9)["a"]), 2)
      0.9
      >>> raw = functools.partial(jp.global_threshold, normalize=False)
      >>> pattern = jp.unstructured(raw)
    """
    return _removed(scores, _kept_by_threshold(scores, sparsity, normalize=normalize, floor=floor))


def _kept_by_threshold(
    scores: Scores, sparsity: Any, *, normalize: bool = True, floor: float = 0.05
) -> Any:
    """How many entries of each leaf :func:`global_threshold` keeps."""
    if not 0 <= floor <= 1:
        raise ValueError(
            f"floor is {floor}; wanted the fraction in [0, 1] of its uniform share that a leaf "
            "keeps at least, such as 0.05"
        )
    leaves, treedef = jax.tree.flatten(scores)
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    wide = [jnp.asarray(leaf, jnp.float64 if double else jnp.float32) for leaf in leaves]
    if normalize:
        wide = [x / root_mean_square(x) for x in wide]
    sizes = tuple(x.size for x in wide)
    shares = apportion(kept_total(sizes, sparsity), sizes)
    least = jnp.ceil(floor * shares.astype(jnp.float32)).astype(shares.dtype)
    least = jnp.clip(least, jnp.minimum(shares, 1), shares)
    return jax.tree.unflatten(treedef, keep_counts(wide, shares, least))


def _removed(scores: Scores, kept: Any) -> Sparsities:
    """The sparsity of each leaf of which so many entries are kept."""

    def fraction(x: Any, n: jax.Array) -> Any:
        removed = (x.size - n) if not known(n) else x.size - np.asarray(n, np.float64)
        return removed / max(x.size, 1)

    return jax.tree.map(fraction, scores, kept)


def lamp(scores: Scores, sparsity: Any) -> Sparsities:
    """Returns the sparsities that one threshold over the LAMP scores of all leaves gives.

    For scores that are magnitudes. Free of the scale of each leaf, and no leaf is emptied. Within
    a leaf the LAMP score ranks as the score itself does. Each leaf is sorted, which stores it
    several times over and gathers it where it is sharded; :func:`global_threshold` does neither.

    Args:
      scores: not negative, such as ``jp.magnitude``; other entries count as 0.
      sparsity: global, in [0, 1].

    References:
      Lee et al., `Layer-adaptive sparsity <https://arxiv.org/abs/2010.07611>`__, 2021, see
      :func:`jaxprune.scores.lamp`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> w = {"flat": jnp.ones(4), "peaked": jnp.array([8.0, 4.0, 0.2, 0.1])}
      >>> sparsities = jp.distributions.lamp(jp.magnitude(w), 0.5)
      >>> {path: float(s) for path, s in sparsities.items()}
      {'flat': 0.25, 'peaked': 0.75}
    """

    return _removed(scores, _kept_by_lamp(scores, sparsity))


def _kept_by_lamp(scores: Scores, sparsity: Any) -> Any:
    """How many entries of each leaf :func:`lamp` keeps."""

    def ranked(x: jax.Array) -> jax.Array:
        finite = jnp.where(jnp.isfinite(x), jnp.maximum(widen(x), 0), 0)
        return lamp_of_sorted(jnp.sort(finite.ravel(), descending=True))  # only counts matter

    lamps = jax.tree.map(ranked, scores)
    return _kept_by_threshold(lamps, sparsity, normalize=False, floor=0)


# Distributions that rank all leaves together -> how many entries of each they keep. A float32 holds
# no fraction of 2**24 entries exactly, and so patterns ask for these counts.
_COUNTS: dict[Any, Callable[..., Any]] = {
    global_threshold: _kept_by_threshold,
    lamp: _kept_by_lamp,
}


def counts_of(distribution: Any) -> Callable[..., Any] | None:
    """``(scores, sparsity) ->`` entries kept per leaf, of a distribution that has exact ones."""
    if isinstance(distribution, functools.partial):
        counts = counts_of(distribution.func)
        bound = distribution.args, distribution.keywords
        return counts and functools.partial(counts, *bound[0], **bound[1])
    try:
        return _COUNTS.get(distribution)
    except TypeError:  # not hashable
        return None


def owl(
    scores: Scores,
    sparsity: Any,
    *,
    outlier: float = 5.0,
    spread: float = 0.08,
    layer: Callable[[str], str] | None = None,
) -> Sparsities:
    r"""Returns sparsities that spare layers with many outliers.

    An outlier is an entry whose score exceeds ``outlier`` times the mean of its layer. With
    :math:`D_l` the fraction of outliers of a layer, scaled over all layers to the range [0, 1],

    .. math:: 1 - s_l = \min(1, \max(0, 2 \lambda D_l + c))

    with the one c for which the mean over all entries is the target. Made for
    ``jp.scores.wanda``.

    Args:
      scores: not negative; entries that are not finite count as 0.
      sparsity: global, in [0, 1].
      outlier: the multiple of the mean, M in the paper.
      spread: lambda: sparsities differ by at most twice that.
      layer: path -> name of the layer that a leaf belongs to, such as
        ``lambda path: path.split("/")[1]``; its leaves get one sparsity. By default each leaf is
        its own.

    Raises:
      ValueError: for a negative spread.

    References:
      Yin et al., `OWL <https://arxiv.org/abs/2310.05175>`__, 2023. There layers are blocks of a
      transformer, all of one size, and the mean is over blocks; here it is over entries, so that
      the total is the target for leaves of any size. M = 5 and lambda = 0.08 are used there, too.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> scores = {"calm": jnp.ones(100), "wild": jnp.ones(100).at[0].set(50.0)}
      >>> sparsities = jp.distributions.owl(scores, 0.7)
      >>> {path: round(float(s), 2) for path, s in sparsities.items()}
      {'calm': 0.78, 'wild': 0.62}
    """
    if not spread >= 0:
        raise ValueError(f"spread is {spread}; wanted a number >= 0 such as 0.08")
    flat, treedef = jax.tree_util.tree_flatten_with_path(scores)
    if not flat:
        return scores
    names = [layer(path_str(path)) if layer else str(i) for i, (path, _) in enumerate(flat)]
    members: dict[str, list[jax.Array]] = {}
    for name, (_, leaf) in zip(names, flat, strict=True):
        members.setdefault(name, []).append(leaf)
    part = jnp.stack([_outliers(leaves, outlier) for leaves in members.values()])
    width = jnp.max(part) - jnp.min(part)
    wanted = 2 * spread * (part - jnp.min(part)) / jnp.where(width > 0, width, 1)
    sizes = np.array([sum(x.size for x in leaves) for leaves in members.values()], np.float64)
    density = _shifted(wanted, sizes / max(sizes.sum(), 1), 1 - jnp.asarray(sparsity, wanted.dtype))
    of = dict(zip(members, 1 - density))
    return jax.tree.unflatten(treedef, [of[name] for name in names])


def _outliers(leaves: Sequence[jax.Array], multiple: float) -> jax.Array:
    """The fraction of entries above a multiple of their mean; a scale does no matter."""
    wide = [jnp.where(jnp.isfinite(x), widen(x), 0) for x in leaves]
    largest = jnp.stack([jnp.max(x, initial=0) for x in wide]).max()
    wide = [x / jnp.where(largest > 0, largest, 1) for x in wide]
    size = max(sum(x.size for x in wide), 1)
    mean = jnp.stack([jnp.sum(x) for x in wide]).sum() / size
    above = [jnp.sum(x > multiple * mean).astype(jnp.float32) for x in wide]
    return jnp.stack(above).sum() / size


def _shifted(x: jax.Array, weights: np.ndarray, mean: Any) -> jax.Array:
    """clip(x + c, 0, 1) with the c for which the weighted mean is as given, by bisection."""
    share = jnp.asarray(weights, x.dtype)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        c = (low + high) / 2
        enough = jnp.sum(share * jnp.clip(x + c, 0, 1)) >= mean
        return jnp.where(enough, low, c), jnp.where(enough, c, high)

    ends = -jnp.max(x), 1 - jnp.min(x)  # all 0, all 1
    low, high = jax.lax.fori_loop(0, 2 * jnp.finfo(x.dtype).bits, halve, ends)
    return jnp.clip(x + (low + high) / 2, 0, 1)


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
