"""The axis algebra: what an array axis is made of, and which axes must be one.

An :class:`Axis` is a tree. A *leaf* is a logical dimension; a *prod* is the row-major product of
its factors (born when a reshape merges axes); a *sum* is the concatenation of its parts (born from
concatenate, split, slice and pad); a *perm* is another axis in an order of its own (born from flips
and from indexing by constants). Nodes live in a union-find with substitution: ``unify`` states
that two axes index the same thing, and a leaf that meets a compound axis becomes that compound
everywhere at once, so that a reshape in layer 40 can still refine a kernel of layer 1.

This module knows nothing of programs, arrays or masks.
"""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod as _product
from typing import Any

import numpy as np

LEAF, PROD, SUM, PERM = "leaf", "prod", "sum", "perm"
UNLIKE_ORDERS = "its units meet one another in another order"
_MAX_REASONS = 4
_order = itertools.count()


class Axis:
    """A node of the algebra. Build with :func:`leaf`, :func:`prod`, :func:`sum_`, :func:`perm`."""

    __slots__ = ("chosen", "index", "kids", "kind", "link", "order", "reasons", "size")

    def __init__(
        self, kind: str, size: int, kids: tuple[Axis, ...] = (), index: np.ndarray | None = None
    ):
        self.kind, self.size, self.kids = kind, size, kids
        self.index: Any = index  # of a perm: the position of its kid at each of its own
        self.link: Axis | None = None  # set once this node has become another one
        self.reasons: list[Any] = []  # why a leaf may not change its size; empty = free
        self.chosen: list[tuple[str, int]] = []  # (what chooses units by value, how many at least)
        self.order = next(_order)

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        """Restores a pickled node; kinds are compared by identity."""
        for name, value in state[1].items():
            setattr(self, name, value)
        self.kind = sys.intern(self.kind)

    def __repr__(self) -> str:
        return show(self)


def leaf(size: int) -> Axis:
    """A new logical dimension of ``size`` units."""
    return Axis(LEAF, size)


def prod(factors: Iterable[Axis]) -> Axis:
    """The row-major product of axes; units vanish, a single factor is itself."""
    kept = tuple(f for f in factors if f.size != 1)
    if not kept:
        return leaf(1)
    return kept[0] if len(kept) == 1 else Axis(PROD, _product(f.size for f in kept), kept)


def sum_(parts: Iterable[Axis]) -> Axis:
    """The concatenation of axes; empty parts vanish, a single part is itself."""
    kept = tuple(p for p in parts if p.size != 0)
    if not kept:
        return leaf(0)
    return kept[0] if len(kept) == 1 else Axis(SUM, sum(p.size for p in kept), kept)


def perm(axis: Axis, index: np.ndarray) -> Axis:
    """``axis`` in another order: position ``j`` is its position ``index[j]``, each occurs once."""
    base, inner = _unordered(axis)
    index = np.asarray(index) if inner is None else inner[index]
    if np.array_equal(index, np.arange(len(index))):
        return base
    return Axis(PERM, base.size, (base,), index)


def _unordered(axis: Axis) -> tuple[Axis, np.ndarray | None]:
    """What lies below perms, and the order in which it is shown; None: in its own."""
    axis, index = find(axis), None
    while axis.kind is PERM:
        index = axis.index if index is None else axis.index[index]
        axis = find(axis.kids[0])
    return axis, index


def find(axis: Axis) -> Axis:
    """The node that stands for ``axis`` now."""
    root = axis
    while root.link is not None:
        root = root.link
    while axis.link is not None:  # path compression
        axis.link, axis = root, axis.link
    return root


def _flat(axis: Axis, kind: str) -> Iterator[Axis]:
    rest = [axis]
    while rest:
        node = find(rest.pop())
        if node.kind is kind:
            rest += reversed(node.kids)
        else:
            yield node


def factors(axis: Axis) -> list[Axis]:
    """The factors of a product, nested products flattened; a non-product is its one factor."""
    return list(_flat(axis, PROD))


def parts(axis: Axis) -> list[Axis]:
    """The parts of a sum, nested sums flattened; a non-sum is its one part."""
    return list(_flat(axis, SUM))


def leaves(axis: Axis) -> Iterator[Axis]:
    """The leaves in order, with repetitions."""
    rest = [axis]
    while rest:
        node = find(rest.pop())
        if node.kind is LEAF:
            yield node
        rest += reversed(node.kids)


def holds(axs: Iterable[Axis], leaf: Axis) -> bool:
    """Whether a leaf stands anywhere within several axes."""
    return any(leaf is found for axis in axs for found in leaves(axis))


def distinct_leaves(axs: Iterable[Axis]) -> list[Axis]:
    """The leaves of several axes, each once, in the order in which they come first."""
    found, seen, rest = [], set[Axis](), list(axs)[::-1]
    while rest:
        axis = rest.pop()
        node = find(axis) if axis.link is not None else axis
        if node in seen:
            continue
        seen.add(node)
        if node.kind is LEAF:
            found.append(node)
        rest += reversed(node.kids)
    return found


def freeze(axis: Axis, reason: Any) -> None:
    """Forbids every leaf of ``axis`` to change its size, and remembers why."""
    for node in leaves(axis):
        if len(node.reasons) < _MAX_REASONS and reason not in node.reasons:
            node.reasons.append(reason)


def choose(axis: Axis, where: str, least: int) -> None:
    """Says that an equation chooses units of ``axis`` by their values, so many at least."""
    axis = find(axis)
    for node in leaves(axis):  # the other factors of a product may all stay
        own = 1 if axis.kind is SUM else -(-least * node.size // axis.size)
        if len(node.chosen) < _MAX_REASONS and (where, own) not in node.chosen:
            node.chosen.append((where, own))
        elif (where, own) not in node.chosen:
            node.chosen[-1] = (node.chosen[-1][0], max(own, node.chosen[-1][1]))


def unify(a: Axis, b: Axis, reason: Any = "layouts that do not nest") -> None:
    """States that ``a`` and ``b`` index the same thing.

    Where the two trees can't be reconciled both are frozen with ``reason``: their sizes are equal,
    so leaving them unlinked is sound as long as neither changes. A reason may be a function; it is
    called only then.
    """
    a, b = find(a), find(b)
    if a is b or (a.size == b.size and a.size in (0, 1)):
        return
    if a.size != b.size:
        raise ValueError(f"can't unify axes of sizes {a.size} and {b.size}")
    if PERM in (a.kind, b.kind):
        _unify_perm(a, b, reason)
    elif a.kind is LEAF and b.kind is LEAF:
        old, new = (a, b) if a.order < b.order else (b, a)
        _become(new, old)  # the older stays: a name given early remains valid
    elif a.kind is LEAF:
        _become(a, b)
    elif b.kind is LEAF:
        _become(b, a)
    else:
        _UNIFY_COMPOUND[a.kind, b.kind](a, b, reason)


def _unify_perm(a: Axis, b: Axis, reason: Any) -> None:
    """``p(x) ~ q(y)``: a leaf x becomes y in the order ``q p^-1``; x itself in another can't be."""
    (x, p), (y, q) = _unordered(a), _unordered(b)
    whole = np.arange(x.size)
    p, q = (whole if index is None else index for index in (p, q))
    if np.array_equal(p, q):
        unify(x, y, reason)
    elif x is y:
        return _conflict(a, b, lambda: f"{UNLIKE_ORDERS}: {_text(reason)}")
    elif x.kind is LEAF and (y.kind is not LEAF or y.order < x.order):  # the older stays
        _become(x, perm(y, q[np.argsort(p)]))
    elif y.kind is LEAF:
        _become(y, perm(x, p[np.argsort(q)]))
    else:
        return _conflict(a, b, reason)
    _link_compound(a, b) if a.kind is PERM else _link_compound(b, a)


def _become(node: Axis, target: Axis) -> None:
    node.link = target
    for reason in node.reasons:
        freeze(target, reason)
    for where, least in node.chosen:
        choose(target, where, least)


def _text(reason: Any) -> Any:
    return reason() if callable(reason) else reason


def _conflict(a: Axis, b: Axis, reason: Any) -> None:
    reason = _text(reason)
    freeze(a, reason)
    freeze(b, reason)


def _cut(axis: Axis, sizes: Sequence[int], build: Any, reason: Any) -> list[Axis]:
    """Splits one axis into fresh pieces of ``sizes`` under ``build`` (prod or sum_)."""
    if len(sizes) == 1:
        return [axis]
    pieces = [leaf(size) for size in sizes]
    unify(axis, build(pieces), reason)
    return pieces


def _strides(fs: Sequence[Axis]) -> list[int]:
    """Cumulative products from the right, 1 first and the total last."""
    return [1, *itertools.accumulate((f.size for f in reversed(fs)), lambda x, y: x * y)]


def _unify_prods(a: Axis, b: Axis, reason: Any) -> None:
    fa, fb = factors(a), factors(b)
    cuts = sorted({*_strides(fa), *_strides(fb)})
    if any(high % low for low, high in itertools.pairwise(cuts)):
        return _conflict(a, b, reason)

    def pieces(fs: list[Axis]) -> list[Axis]:
        out: list[Axis] = []
        strides = _strides(fs)[::-1]
        for factor, (high, low) in zip(fs, itertools.pairwise(strides), strict=True):
            inside = [c for c in cuts if low <= c <= high][::-1]
            sizes = [x // y for x, y in itertools.pairwise(inside)]
            out += _cut(factor, sizes, prod, reason)
        return out

    for x, y in zip(pieces(fa), pieces(fb), strict=True):
        unify(x, y, reason)
    _link_compound(a, b)


def _unify_sums(a: Axis, b: Axis, reason: Any) -> None:
    """Part by part where both are cut at the same places, as far as they differ."""
    rest, alike = [(a, b)], []
    while rest:
        x, y = map(find, rest.pop())
        if x is y or not x.kind is y.kind is SUM:
            unify(x, y, reason)
        elif [kid.size for kid in x.kids] == [kid.size for kid in y.kids]:
            alike.append((x, y))
            rest += zip(reversed(x.kids), reversed(y.kids))
        else:
            _unify_parts(x, y, reason)
    for x, y in reversed(alike):
        _link_compound(x, y)


def _unify_parts(a: Axis, b: Axis, reason: Any) -> None:
    pa, pb = parts(a), parts(b)
    ends = [list(itertools.accumulate(p.size for p in ps)) for ps in (pa, pb)]
    cuts = sorted({0, *ends[0], *ends[1]})

    def pieces(ps: list[Axis], stops: list[int]) -> list[Axis]:
        out: list[Axis] = []
        for part, stop in zip(ps, stops, strict=True):
            first, last = (bisect.bisect_left(cuts, c) for c in (stop - part.size, stop))
            inside = cuts[first : last + 1]
            out += _cut(part, [y - x for x, y in itertools.pairwise(inside)], sum_, reason)
        return out

    for x, y in zip(pieces(pa, ends[0]), pieces(pb, ends[1]), strict=True):
        unify(x, y, reason)
    _link_compound(a, b)


def _unify_prod_sum(a: Axis, b: Axis, reason: Any) -> None:
    """``Prod(f, q...) ~ Sum(c_i)``: if all ``c_i`` are multiples of ``q``, cut f instead.

    Some ``c_i`` may make one ``q`` together: an axis of that size that was cut before.
    """
    fs, ps = factors(a), parts(b)
    for k in range(1, len(fs)):
        q = prod(fs[k:])
        runs = _runs(ps, q.size)
        whole = [sum_(run) for run in runs]
        fits = [p.size == q.size or len(run) == 1 for p, run in zip(whole, runs, strict=True)]
        if all(fits) and all(p.size % q.size == 0 for p in whole):
            heads = [leaf(p.size // q.size) for p in whole]
            for p, head in zip(whole, heads, strict=True):
                unify(p, prod([head, q]), reason)
            unify(prod(fs[:k]), sum_(heads), reason)
            return _link_compound(b, a)
    _conflict(a, b, reason)


def _runs(ps: Sequence[Axis], size: int) -> list[list[Axis]]:
    """Neighbouring parts, together as soon as they are a multiple of ``size``."""
    runs: list[list[Axis]] = [[]]
    for part in ps:
        if runs[-1] and sum(p.size for p in runs[-1]) % size == 0:
            runs.append([])
        runs[-1].append(part)
    return runs


def _link_compound(a: Axis, b: Axis) -> None:
    a, b = find(a), find(b)
    if a is not b:  # the pieces may already have led one to the other
        a.link = b


_UNIFY_COMPOUND = {
    (PROD, PROD): _unify_prods,
    (SUM, SUM): _unify_sums,
    (PROD, SUM): _unify_prod_sum,
    (SUM, PROD): lambda a, b, reason: _unify_prod_sum(b, a, reason),
}


# ---------------------------------------------------------------------------- reading an axis


def fold(axis: Axis, of: Callable[[Axis, list[Any]], Any], known: dict[Axis, Any]) -> Any:
    """What ``of(node, results of its kids)`` gives at ``axis``, each node once.

    ``known`` keeps the results, for axes that share nodes: a concatenation and a longer one.
    """
    root = find(axis)
    rest = [] if root in known else [root]
    while rest:
        node = rest[-1]
        kids = [find(kid) for kid in node.kids]
        missing = [kid for kid in kids if kid not in known]
        if missing:
            rest += missing
            continue
        rest.pop()
        if node not in known:
            known[node] = of(node, [known[kid] for kid in kids])
    return known[root]


def size_of(axis: Axis, sizes: Mapping[Axis, Any], known: dict[Axis, Any] | None = None) -> Any:
    """The size of ``axis`` when the leaves in ``sizes`` have those sizes, numbers or arrays.

    ``known`` keeps what was found for the same ``sizes``, as in :func:`fold`.
    """

    def size(node: Axis, of_kids: list[Any]) -> Any:
        if node.kind is LEAF:
            return sizes.get(node, node.size)
        if all(n is find(kid).size for n, kid in zip(of_kids, node.kids)):
            return node.size  # untouched; may be a name, where those of its parts are numbers
        return _product(of_kids) if node.kind is PROD else sum(of_kids)

    axis = find(axis)
    return size(axis, []) if axis.kind is LEAF else fold(axis, size, {} if known is None else known)


def index_of(
    axis: Axis, indices: Mapping[Axis, np.ndarray], known: dict[Axis, Any] | None = None
) -> np.ndarray:
    """The flat positions along ``axis`` when its leaves are restricted to ``indices``.

    ``known`` keeps what was found for the same ``indices``, as in :func:`fold`.
    """

    def index(node: Axis, of_kids: list[np.ndarray]) -> np.ndarray:
        if node.kind is LEAF:
            chosen = indices.get(node)
            return np.arange(node.size) if chosen is None else chosen
        if node.kind is PERM:
            return np.flatnonzero(_marked(of_kids[0], node.size)[node.index])
        flat = np.zeros(1, np.int64)
        if node.kind is PROD:
            for kid, own in zip(node.kids, of_kids):
                flat = (flat[:, None] * kid.size + own).reshape(-1)
            return flat
        starts = itertools.accumulate((kid.size for kid in node.kids), initial=0)
        return np.concatenate([s + own for s, own in zip(starts, of_kids)])

    found: np.ndarray = fold(axis, index, {} if known is None else known)
    return found


def _marked(positions: np.ndarray, size: int) -> np.ndarray:
    marks = np.zeros(size, bool)
    marks[positions] = True
    return marks


def units_along(axis: Axis, dimension: Axis) -> list[np.ndarray]:
    """For each position along ``axis``, its unit of leaf ``dimension``; -1 where it has none.

    One vector per occurrence within a product: ``d x d`` gives two.
    """
    return rows_along(axis, {find(dimension): 0}, {})


def rows_along(
    axis: Axis, first: Mapping[Axis, int], known: dict[Axis, list[np.ndarray]]
) -> list[np.ndarray]:
    """For each position along ``axis`` its units, of all leaves in ``first`` at once; else -1.

    The units of each leaf count on from its ``first``. A product has a vector for each factor, for
    its positions have a unit of each. ``known`` keeps what was found for the same ``first``.
    """

    def rows(node: Axis, of_kids: list[list[np.ndarray]]) -> list[np.ndarray]:
        if node.kind is LEAF:
            return [np.arange(node.size) + first[node]] if node in first else []
        if node.kind is PERM:
            return [row[node.index] for row in of_kids[0]]
        join = _end_to_end if node.kind is SUM else _crossed
        return join([kid.size for kid in node.kids], of_kids)

    return fold(axis, rows, known)


def _end_to_end(sizes: list[int], of_kids: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [
        np.concatenate([np.full(n, -1) if r is None else r for n, r in zip(sizes, row)])
        for row in itertools.zip_longest(*of_kids)
    ]


def _crossed(sizes: list[int], of_kids: list[list[np.ndarray]]) -> list[np.ndarray]:
    out, before, size = [], 1, _product(sizes)
    for n, rows in zip(sizes, of_kids):
        after = size // (before * n)
        out += [np.tile(np.repeat(row, after), before) for row in rows]
        before *= n
    return out


def show(axis: Axis, names: dict[Axis, str] | None = None) -> str:
    """The tree in one line, ``(K*G*D) + K``; a frozen leaf carries ``!``."""
    axis = find(axis)
    if axis.kind is LEAF:
        named = (names or {}).get(axis)
        return named or f"{axis.size}{'!' if axis.reasons else ''}"
    if axis.kind is PERM:
        return f"perm({show(axis.kids[0], names)})"
    mark = "*" if axis.kind is PROD else "+"
    return "(" + mark.join(show(kid, names) for kid in axis.kids) + ")"
