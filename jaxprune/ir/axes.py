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

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from math import prod as _product
from typing import Any

import numpy as np

LEAF, PROD, SUM, PERM = "leaf", "prod", "sum", "perm"
UNLIKE_ORDERS = "its units meet one another in another order"
_MAX_REASONS = 4
_order = itertools.count()


class Axis:
    """A node of the algebra. Build with :func:`leaf`, :func:`prod`, :func:`sum_`, :func:`perm`."""

    __slots__ = ("index", "kids", "kind", "link", "order", "reasons", "size")

    def __init__(
        self, kind: str, size: int, kids: tuple[Axis, ...] = (), index: np.ndarray | None = None
    ):
        self.kind, self.size, self.kids = kind, size, kids
        self.index: Any = index  # of a perm: the position of its kid at each of its own
        self.link: Axis | None = None  # set once this node has become another one
        self.reasons: list[Any] = []  # why a leaf may not change its size; empty = free
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
    axis = find(axis)
    if axis.kind is not kind:
        yield axis
        return
    for kid in axis.kids:
        yield from _flat(kid, kind)


def factors(axis: Axis) -> list[Axis]:
    """The factors of a product, nested products flattened; a non-product is its one factor."""
    return list(_flat(axis, PROD))


def parts(axis: Axis) -> list[Axis]:
    """The parts of a sum, nested sums flattened; a non-sum is its one part."""
    return list(_flat(axis, SUM))


def leaves(axis: Axis) -> Iterator[Axis]:
    """The leaves in order, with repetitions."""
    axis = find(axis)
    if axis.kind is LEAF:
        yield axis
    for kid in axis.kids:
        yield from leaves(kid)


def leaves_of(axs: list[Axis]) -> list[Axis]:
    """The leaves of several axes, in no order and with repetitions."""
    found, rest = [], axs
    while rest:
        axis = rest.pop()
        if axis.link is not None:
            axis = find(axis)
        if axis.kind is LEAF:
            found.append(axis)
        rest.extend(axis.kids)
    return found


def freeze(axis: Axis, reason: Any) -> None:
    """Forbids every leaf of ``axis`` to change its size, and remembers why."""
    for node in leaves(axis):
        if len(node.reasons) < _MAX_REASONS and reason not in node.reasons:
            node.reasons.append(reason)


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
    pa, pb = parts(a), parts(b)
    ends = [list(itertools.accumulate(p.size for p in ps)) for ps in (pa, pb)]
    cuts = sorted({0, *ends[0], *ends[1]})

    def pieces(ps: list[Axis], stops: list[int]) -> list[Axis]:
        out: list[Axis] = []
        for part, stop in zip(ps, stops, strict=True):
            inside = [c for c in cuts if stop - part.size <= c <= stop]
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


def size_of(axis: Axis, sizes: dict[Axis, int]) -> int:
    """The size of ``axis`` when the leaves in ``sizes`` have those sizes, numbers or arrays."""
    axis = find(axis)
    if axis.kind is LEAF:
        return sizes.get(axis, axis.size)
    of_kids = [size_of(kid, sizes) for kid in axis.kids]
    if all(n is find(kid).size for n, kid in zip(of_kids, axis.kids)):
        return axis.size  # untouched; may be a name, where those of its parts are numbers
    return _product(of_kids) if axis.kind is PROD else sum(of_kids)


def index_of(axis: Axis, indices: dict[Axis, np.ndarray]) -> np.ndarray:
    """The flat positions along ``axis`` when its leaves are restricted to ``indices``."""
    axis = find(axis)
    if axis.kind is LEAF:
        chosen = indices.get(axis)
        return np.arange(axis.size) if chosen is None else chosen
    if axis.kind is PERM:
        return np.flatnonzero(_marked(index_of(axis.kids[0], indices), axis.size)[axis.index])
    flat = np.zeros(1, np.int64)
    if axis.kind is PROD:
        for kid in axis.kids:
            flat = (flat[:, None] * kid.size + index_of(kid, indices)).reshape(-1)
        return flat
    starts = itertools.accumulate((kid.size for kid in axis.kids), initial=0)
    return np.concatenate([s + index_of(k, indices) for s, k in zip(starts, axis.kids)])


def _marked(positions: np.ndarray, size: int) -> np.ndarray:
    marks = np.zeros(size, bool)
    marks[positions] = True
    return marks


def units_along(axis: Axis, dimension: Axis) -> list[np.ndarray]:
    """For each position along ``axis``, its unit of leaf ``dimension``; -1 where it has none.

    One vector per occurrence within a product: ``d x d`` gives two.
    """
    axis = find(axis)
    if axis.kind is LEAF:
        return [np.arange(axis.size)] if axis is find(dimension) else []
    if axis.kind is PERM:
        return [units[axis.index] for units in units_along(axis.kids[0], dimension)]
    if axis.kind is SUM:
        rows = [units_along(kid, dimension) for kid in axis.kids]
        depth = max(map(len, rows))
        blank = [np.full(kid.size, -1) for kid in axis.kids]
        return [
            np.concatenate([r[i] if i < len(r) else e for r, e in zip(rows, blank, strict=True)])
            for i in range(depth)
        ]
    out, before = [], 1
    for kid in axis.kids:
        after = axis.size // (before * kid.size)
        out += [np.tile(np.repeat(u, after), before) for u in units_along(kid, dimension)]
        before *= kid.size
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
