"""The dimensions of a network as lanes beside its parameters."""

from __future__ import annotations

import graphlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.plot.curves import COLORS, as_patterns, new_axes
from jaxprune.structure.dimensions import Dimension, Slot, Structure
from jaxprune.structure.table import pattern_of

_LANES = [c for c in COLORS if c != "#000000"]
_COLLECTIONS = {"params", "batch_stats"}
_GREY = "#DADDE0"
_INK = "#30363C"
_LETTER = 0.25  # A letter is so wide, in heights of a row.
_WIDEST = 46  # A label has at most so many letters.
_INCHES = 0.27  # A row is so high.


Before = dict[str, set[str]]  # path -> paths that come before it


@dataclass
class _Row:
    """Parameters of one module whose axes are the same, drawn as one."""

    module: str
    names: list[str]
    axs: tuple[Axis, ...]

    @property
    def name(self) -> str:
        return ", ".join(self.names)


@dataclass
class _Lane:
    """A dimension: a column, and the rows that carry it."""

    dim: Dimension
    rows: list[int]
    column: int = 0
    color: str = ""


def structure(structure: Structure, dims: str | Sequence[str] = "*", *, ax: Any = None) -> Any:
    """Draws which axes of which parameters belong together, and returns the axes.

    A row is a parameter, in order of use, with a box per axis that says its size; ``8·4`` is an
    axis made of two. A dimension that can be pruned is a lane beside the rows: its dots are the
    rows that carry it, in its colour. What is frozen is grey, with the reason below.

    Args:
      structure: what ``jp.infer_structure`` found.
      dims: names or labels of the dimensions to draw, one or several, with wildcards; rows that
        carry none of them are left out. A deep network is best drawn by parts: ``"layer_0*"``.
      ax: matplotlib axes, a new figure of fitting size if None.

    Raises:
      TypeError: for something that isn't a structure.
      ValueError: when a pattern matches no dimension, or for empty dims.
      ImportError: when matplotlib isn't installed.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> ax = jp.plot.structure(jp.infer_structure(fn, params, jnp.ones((1, 3))))
      >>> ax.get_title()
      '1 of 3 dimensions can be pruned, grey is fixed'
    """
    if not isinstance(structure, Structure):
        raise TypeError(
            f"plot.structure wants jp.infer_structure(fn, params, ...), got "
            f"{type(structure).__name__}"
        )
    chosen: dict[Axis, Dimension] = {}
    for pattern in as_patterns(dims):
        matched = [d for d in structure.dims.values() if d.matches(pattern)]
        if not matched:
            raise ValueError(f"no dimension matches {pattern!r}; see print(structure)")
        chosen |= {axes.find(d.axis): d for d in matched}
    rows = [row for row in _rows(structure) if _leaves(row) & chosen.keys()]
    lanes = _lanes(rows, chosen)
    return _Picture(rows, lanes, chosen).draw(ax, structure)


# ------------------------------------------------------------------------------ what is drawn


def _leaves(row: _Row) -> set[Axis]:
    return {leaf for axis in row.axs for leaf in axes.leaves(axis)}


def _rows(structure: Structure) -> list[_Row]:
    """Modules in order of use; a module's parameters with the same axes are one row."""
    rows: dict[Any, _Row] = {}
    param_axes = dict(zip(structure.paths, structure.param_axes))
    for path in _in_order_of_use(structure):
        axs = tuple(map(axes.find, param_axes[path]))
        module, name = _module_and_name(path)
        rows.setdefault((module, axs), _Row(module, [], axs)).names.append(name)
    order = {module: k for k, module in enumerate(dict.fromkeys(r.module for r in rows.values()))}
    return sorted((r for r in rows.values() if r.axs), key=lambda r: (order[r.module], -len(r.axs)))


def _in_order_of_use(structure: Structure) -> list[str]:
    """What slots tell: those of a dimension are in order of use, makers and readers apart.

    Where they tell nothing, a dimension is made before it is read, kernels go first, and paths are
    in their order.
    """
    rank = dict(zip(structure.paths, map(len, structure.shapes)))

    def makes(slot: Slot) -> bool:  # kernels are (..., in, out)
        return rank[slot.path] > 1 and slot.axis == rank[slot.path] - 1

    known: Before = {path: set() for path in structure.paths}
    guessed: Before = {path: set() for path in structure.paths}
    by_dim = [d.slots for d in structure.dims.values()]
    for slots in [[of_dim[0] for of_dim in by_dim], *by_dim]:
        first = list(dict.fromkeys(s.path for s in slots if makes(s)))
        then = list(dict.fromkeys(s.path for s in slots if not makes(s)))
        for a, b in [*itertools.pairwise(first), *itertools.pairwise(then)]:
            known[b].add(a)
        for reader in then:
            guessed[reader].update({*first[:1]} - {reader})
    makers = {s.path for slots in by_dim for s in slots if makes(s)}
    place = {
        path: (path not in makers, *map(_natural, _module_and_name(path)))
        for path in structure.paths
    }
    return _sorted(known, guessed, place)


def _sorted(known: Before, guessed: Before, place: dict[str, Any]) -> list[str]:
    """Keeps what is known, goes by guesses where possible, then by ``place``."""
    sorter = graphlib.TopologicalSorter(known)
    sorter.prepare()
    ready: set[str] = set()
    found: dict[str, None] = {}  # an ordered set
    while sorter.is_active():
        ready.update(sorter.get_ready())
        best = min(ready, key=lambda path: (not guessed[path] <= found.keys(), place[path]))
        ready.remove(best)
        found[best] = None
        sorter.done(best)
    return list(found)


def _natural(path: str) -> list[Any]:
    """layer_2 before layer_10."""
    return [int(t) if k % 2 else t for k, t in enumerate(re.split(r"(\d+)", path))]


def _lanes(rows: Sequence[_Row], chosen: dict[Axis, Dimension]) -> list[_Lane]:
    """The prunable dimensions; lanes that do not overlap share a column."""
    lanes = []
    for leaf, dim in chosen.items():
        at = [k for k, row in enumerate(rows) if leaf in _leaves(row)]
        if at and not dim.frozen:
            lanes.append(_Lane(dim, at))
    lanes.sort(key=lambda lane: (lane.rows[0], -lane.rows[-1]))
    ends: list[int] = []
    for lane in lanes:
        free = [c for c, end in enumerate(ends) if end < lane.rows[0]]
        lane.column = free[0] if free else len(ends)
        ends[lane.column : lane.column + 1] = [lane.rows[-1]]
    _color(lanes)
    return lanes


def _color(lanes: Sequence[_Lane]) -> None:
    """One colour per kind of dimension, another for lanes that overlap, as far as colours go."""
    kinds: dict[str, str] = {}
    for k, lane in enumerate(lanes):
        beside = {o.color for o in lanes[:k] if o.rows[-1] >= lane.rows[0]}
        kind = pattern_of(lane.dim.label)
        unused = [c for c in _LANES if c not in beside | set(kinds.values())]
        free = unused or [c for c in _LANES if c not in beside] or [_LANES[k % len(_LANES)]]
        wanted = kinds.setdefault(kind, free[0])
        lane.color = wanted if wanted not in beside else free[0]


def _short(reason: str) -> str:
    """``spatial axis (conv_general_dilated)``: the first reason without the line of code."""
    head, _, why = reason.split("; ")[0].rpartition(": ")
    text = f"{why} ({head.split(' at ')[0]})" if head else why
    return text if len(text) <= 60 else text[:57] + "..."


def _module_and_name(path: str) -> tuple[str, str]:
    """("Block_0/Conv_0", "kernel") of params/Block_0/Conv_0/kernel; a plain leaf has no module."""
    keys = path.split("/")
    if keys[0] in _COLLECTIONS and len(keys) > 1:
        keys = keys[1:]
    if keys[-1].strip(".") == "value" and len(keys) > 2:  # a variable of NNX
        keys = keys[:-1]
    return "/".join(keys[:-1]), keys[-1]


# ------------------------------------------------------------------------------- the picture


class _Picture:
    """Columns from left to right: module, parameter, its axes, lanes, labels."""

    def __init__(self, rows: list[_Row], lanes: list[_Lane], chosen: dict[Axis, Dimension]):
        self.rows, self.lanes, self.chosen = rows, lanes, chosen
        self.colors = {axes.find(lane.dim.axis): lane.color for lane in lanes}
        self.notes: dict[str, str] = {}  # why -> its letter
        self.names_at: float = 0.9 + _text_width(row.module for row in rows)
        self.boxes_at = self.names_at + 0.8 + _text_width(row.name for row in rows)
        ends = [self.boxes_at + sum(w for *_, w in _cells(row)) for row in rows]
        self.lanes_at = max(ends) + 0.9
        columns = 1 + max((lane.column for lane in lanes), default=-1)
        self.labels_at = self.lanes_at + 0.8 * columns + 0.2
        self.width = self.labels_at + 0.3 + _text_width(map(_label, lanes))

    def draw(self, ax: Any, structure: Structure) -> Any:
        drawn = [leaf for row in self.rows for axis in row.axs for leaf in axes.leaves(axis)]
        fixed = [leaf for leaf in drawn if leaf in self.chosen and leaf not in self.colors]
        why = [self.chosen[leaf].frozen or "" for leaf in fixed]
        self.notes = {w: _mark(k) for k, w in enumerate(dict.fromkeys(_short(r) for r in why))}
        bottom = max([float(len(self.rows)), *(y + 1 for y in self._label_rows())]) + 0.3
        height = bottom + 0.85 * len(self.notes)
        ax = new_axes(ax, _INCHES * self.width, _INCHES * (height + 1.5))
        ax.set(xlim=(-0.4, self.width), ylim=(height, -0.9))
        ax.set_axis_off()
        title = f"{len(self.lanes)} of {len(self.chosen)} dimensions can be pruned"
        ax.set_title(title + (", grey is fixed" if self.notes else ""), fontsize="medium")
        self._bands(ax)
        for y, row in enumerate(self.rows):
            self._row(ax, y, row)
        for lane, at in zip(self.lanes, self._label_rows()):
            self._lane(ax, lane, at)
        for k, (reason, letter) in enumerate(self.notes.items()):
            ax.text(self.boxes_at, bottom + 0.85 * k, f"{letter}  {reason}", va="center",
                    fontsize=7.5, color="0.4")  # fmt: skip
        return ax

    def _bands(self, ax: Any) -> None:
        """Every other module on a light ground."""
        groups = [list(g) for _, g in itertools.groupby(self.rows, key=lambda row: row.module)]
        start = 0
        for k, group in enumerate(groups):
            if k % 2:
                ax.axhspan(start - 0.5, start + len(group) - 0.5, color="0.965", zorder=-2)
            ax.text(0, start, group[0].module, va="center", fontsize=8.5, color=_INK)
            start += len(group)

    def _row(self, ax: Any, y: int, row: _Row) -> None:
        ax.text(self.names_at, y, row.name, va="center", fontsize=8.5, color="0.35")
        x: float = self.boxes_at
        for kind, what, width in _cells(row):
            if kind == "box":
                self._box(ax, x, y, what, width)
            else:
                ax.text(x + width / 2, y, what, ha="center", va="center", fontsize=8, color="0.4")
            x += width
        inside = [lane.column for lane in self.lanes if y in lane.rows]
        if inside:
            ends = [x, self._x(max(inside))]
            ax.plot(ends, [y, y], color="0.8", linewidth=0.8, zorder=-1)

    def _box(self, ax: Any, x: float, y: float, leaf: Axis, width: float) -> None:
        color = self.colors.get(leaf)
        dim = self.chosen.get(leaf)
        fixed = dim is not None and color is None
        face = color or (_GREY if fixed else "white")
        edge = "none" if color or fixed else "0.75"
        box = (x, y - 0.38), width, 0.76
        from matplotlib.patches import Rectangle

        ax.add_patch(Rectangle(*box, facecolor=face, edgecolor=edge, linewidth=0.8))
        letter = self.notes[_short(dim.frozen or "")] if dim is not None and fixed else ""
        above = rf"$^{{\mathregular{{{letter}}}}}$" if letter else ""
        ink = "white" if color in _DARK else "black" if color else "0.35"
        ax.text(x + width / 2, y, f"{leaf.size}{above}", ha="center", va="center_baseline",
                fontsize=8, color=ink)  # fmt: skip

    def _lane(self, ax: Any, lane: _Lane, label_y: float) -> None:
        x, top = self._x(lane.column), lane.rows[0]
        ax.plot([x, x], [top, lane.rows[-1]], color=lane.color, linewidth=2.2, zorder=2)
        ax.plot([x] * len(lane.rows), lane.rows, "o", color=lane.color, markersize=6.5,
                markeredgecolor="white", markeredgewidth=0.8, zorder=3)  # fmt: skip
        ax.plot([x, self.labels_at], [top, label_y], color=lane.color, linewidth=1, zorder=1)
        ax.text(self.labels_at + 0.2, label_y, _label(lane), va="center", fontsize=8.5, color=_INK)

    def _x(self, column: int) -> float:
        return self.lanes_at + 0.8 * column

    def _label_rows(self) -> list[float]:
        """Beside a lane's first row, or below the label before."""
        found: list[float] = []
        for lane in self.lanes:
            found.append(max([float(lane.rows[0]), *(y + 0.9 for y in found[-1:])]))
        return found


_DARK = {"#0072B2", "#D55E00", "#009E73"}  # White text is readable on these.


def _cells(row: _Row) -> Iterator[tuple[str, Any, float]]:
    """Boxes and what stands between them, with their widths."""
    for k, axis in enumerate(row.axs):
        if k:
            yield "gap", "", 0.3
        yield from _pieces(axis)


def _pieces(axis: Axis) -> Iterator[tuple[str, Any, float]]:
    axis = axes.find(axis)
    if axis.kind == axes.LEAF:
        yield "box", axis, 0.6 + _LETTER * max(len(str(axis.size)), 2)
    for k, kid in enumerate(axis.kids):
        if k:
            yield "between", "·" if axis.kind == axes.PROD else "+", 0.35
        yield from _pieces(kid)


def _label(lane: _Lane) -> str:
    text = lane.dim.label  # what it is stands at its end
    text = text if len(text) <= _WIDEST else "..." + text[3 - _WIDEST :]
    return f"{text}: {lane.dim.size:,}"


def _text_width(texts: Any) -> float:
    return _LETTER * max(map(len, texts), default=0)


def _mark(k: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return ("" if k < 26 else _mark(k // 26 - 1)) + "abcdefghijklmnopqrstuvwxyz"[k % 26]
