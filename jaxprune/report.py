"""What was pruned, leaf by leaf, and what that is worth in FLOPs."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune._tables import Table, html
from jaxprune.costs.api import cost, si
from jaxprune.masks import check_masks, filled
from jaxprune.sharding import host
from jaxprune.typing import Masks, Params, named_leaves

_THEORETICAL = (
    "Theoretical FLOPs: those of the contractions that read a leaf, times its density. "
    "Masks alone save no time."
)


_HEADS = ("leaf", "shape", "density", "kept", "entries", "bytes")
_FLOPS = ("FLOPs", "theoretical\nFLOPs")  # with a function
THIN = 1 / 8  # A leaf that keeps less than this share of the mean density is nearly emptied.


class Flops(NamedTuple):
    """FLOPs of one call before and after pruning."""

    before: int
    after: int


@dataclass(frozen=True)
class Row:
    """One leaf, or the sum of all.

    Attributes:
      path: "params/Dense_0/kernel".
      size, kept: entries, and those that the mask keeps.
      bytes: as stored; a mask alone makes no leaf smaller.
      flops: FLOPs of the contractions that read the leaf; after: theoretical, times density. None
        when
        :func:`summary` got no function.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    kept: int
    bytes: int
    flops: Flops | None = None

    @property
    def density(self) -> float:
        return self.kept / max(self.size, 1)


@dataclass(frozen=True)
class Summary:
    """One row per leaf, by :func:`summary`; ``print`` it, or let a notebook show it.

    Attributes:
      rows: a :class:`Row` per leaf.
      flops: FLOPs of the whole function, as :class:`Flops`; None when they aren't known.
      others: FLOPs of equations that read no leaf, None without a function: activations, norms,
        products of activations. Masks don't change them.
      notes: leaves that are nearly emptied, and what the count of FLOPs couldn't know.
    """

    rows: tuple[Row, ...]
    flops: Flops | None = None
    others: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Kept entries over all entries, dense leaves included."""
        return self.total.density

    @property
    def total(self) -> Row:
        """The sum of all rows, and the FLOPs of the whole function."""
        rows = self.rows
        size, kept = sum(r.size for r in rows), sum(r.kept for r in rows)
        return Row("total", (), "", size, kept, sum(r.bytes for r in rows), self.flops)

    def table(self) -> Any:
        """The same as a ``rich.table.Table``.

        Raises:
          ImportError: when rich isn't installed.
        """
        per_leaf = self.others is not None
        table = _rich("table").Table(
            box=_rich("box").SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, highlight=False,
            caption=self._caption() or None, caption_justify="left",
        )  # fmt: skip
        for head in _HEADS[:2]:  # folded, never cut, where the screen is narrow
            table.add_column(head, overflow="fold", min_width=9)
        for head in (*_HEADS[2:], *(_FLOPS if per_leaf else ())):
            table.add_column(head, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row, per_leaf))
        table.add_section()
        if self.others is not None:
            table.add_row("everything else", *[""] * 5, *[si(self.others)] * 2)
        table.add_row(*_cells(self.total, per_leaf), style="bold")
        return table

    def _caption(self) -> str:
        lines = [_THEORETICAL] if self.others is not None else []
        if self.flops:
            before, after = self.flops
            lines.append(f"FLOPs {before:,} -> {after:,} ({before / max(after, 1):.2f} x fewer)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __rich__(self) -> Any:
        return self.table()

    def __str__(self) -> str:
        console = _rich("console").Console(file=io.StringIO(), width=160)
        console.print(self.table())
        return str(console.file.getvalue())

    def _repr_html_(self) -> str:
        per_leaf = self.others is not None
        rows = [_cells(row, per_leaf) for row in self.rows]
        if self.others is not None:
            rows.append(["everything else", *[""] * 5, *[si(self.others)] * 2])
        rows.append(_cells(self.total, per_leaf))
        heads = (*_HEADS, *_FLOPS) if per_leaf else _HEADS
        shown = Table(heads, rows, range(2, len(heads)))
        return html([shown, *self._caption().splitlines()])


def summary(
    params: Params,
    masks: Masks | None = None,
    *,
    fn: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    flops: tuple[int, int] | None = None,
) -> Summary:
    """Returns a table per leaf: shape, dtype, density, entries and bytes; with ``fn`` FLOPs, too.

    Args:
      params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
      masks: a tree like params, True = kept; None counts everything as kept.
      fn: the function whose FLOPs are counted at ``fn(params, *args)``, see :func:`jp.cost`. Then
        each leaf shows those of the contractions that read it, and *theoretical* ones: these
        times its density. No device runs in theoretical time; a compact model's own FLOPs are
        ``jp.cost(small.fn, small.params, *args).flops``.
      args: what follows params, as a tuple: arrays or ``jax.ShapeDtypeStruct``.
      flops: instead of fn, (before, after) as already counted.

    Raises:
      TypeError: when args isn't a tuple.
      ValueError: for an empty tree, masks that do not fit params, fn without args or args without
        fn, and fn together with flops.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
      >>> masks = {"w": jnp.eye(4, 2, dtype=bool), "b": jnp.asarray(True)}
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> s = jp.summary(params, masks, fn=fn, args=(jnp.ones((1, 4)),))
      >>> s.density, s.flops
      (0.4, Flops(before=18, after=6))
    """
    flat = named_leaves(params)
    if not flat:
        raise ValueError("summary got an empty tree; pass the parameters: jp.summary(params)")
    if masks is not None:
        masks = filled(masks, params, True)
        check_masks(params, masks)
    _check_function(fn, args, flops)
    kept = [True] * len(flat) if masks is None else jax.tree.leaves(masks)
    rows = [_row(path, leaf, mask) for (path, leaf), mask in zip(flat, kept, strict=True)]
    notes = _thin(rows)
    if fn is None:
        return Summary(tuple(rows), Flops(*flops) if flops else None, notes=notes)
    found = _with_flops(rows, cost(fn, params, *args))
    return dataclasses.replace(found, notes=notes + found.notes)


def _thin(rows: Sequence[Row]) -> tuple[str, ...]:
    """Leaves of which nothing is left, or far less than of the others."""
    pruned = [row for row in rows if row.kept < row.size]
    mean = sum(row.kept for row in pruned) / max(sum(row.size for row in pruned), 1)
    notes = []
    for row in pruned:
        if not row.kept:
            notes.append(f"nothing is kept of {row.path}")
        elif row.density < THIN * mean:
            notes.append(
                f"{row.path} keeps {row.kept:,} of {row.size:,} entries, less than an eighth of "
                f"the mean density of pruned leaves, {mean:.3f}"
            )
    return tuple(notes)


def _with_flops(rows: Sequence[Row], counted: Any) -> Summary:
    """Each equation's FLOPs belong to the leaves that it reads, and shrink with their densities."""
    before, after = [0] * len(rows), [0] * len(rows)
    whole, others = [0, 0], 0
    for equation in counted.equations:
        leaves = [k for k in equation.inputs if k < len(rows)]
        left = round(equation.flops * math.prod(rows[k].density for k in leaves))
        whole = [whole[0] + equation.flops, whole[1] + left]
        others += 0 if leaves else equation.flops
        for k in leaves:
            before[k] += equation.flops
            after[k] += left
    found = tuple(
        Row(**{**vars(row), "flops": Flops(*pair)})
        for row, *pair in zip(rows, before, after, strict=True)
    )
    return Summary(found, Flops(*whole), others, counted.notes)


def _row(path: str, leaf: Any, mask: Any) -> Row:
    shape = np.shape(leaf)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    mask, size = host(mask), math.prod(shape)
    kept = int(np.count_nonzero(mask)) * size // mask.size if size else 0
    return Row(path, shape, str(dtype), size, kept, size * dtype.itemsize)


def _cells(row: Row, per_leaf: bool) -> list[str]:
    counts = (f"{count:,}" for count in (row.kept, row.size, row.bytes))
    shape = f"{row.dtype}[{','.join(map(str, row.shape))}]" if row.dtype else ""
    flops = [si(count) if count else "-" for count in row.flops or ()] if per_leaf else []
    return [row.path, shape, f"{row.density:.3f}", *counts, *flops]


def _check_function(fn: Any, args: Any, flops: Any) -> None:
    if not isinstance(args, tuple):
        raise TypeError(
            f"summary wants args as a tuple, args=(x,), what follows params in fn(params, x); "
            f"got {type(args).__name__}"
        )
    if (fn is None) != (not args):
        got = "args without fn" if fn is None else "fn without args"
        raise ValueError(f"summary got {got}; write jp.summary(params, masks, fn=fn, args=(x,))")
    if fn is not None and flops is not None:
        raise ValueError("summary got both fn and flops; fn counts them: leave flops out")


def _rich(module: str) -> Any:
    """A module of rich, imported when a table is first drawn."""
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError as error:
        raise ImportError(
            "jp.summary draws its table with rich: pip install rich; the numbers are in .rows"
        ) from error
    return getattr(rich, module)
