"""What was pruned, leaf by leaf."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxprune.masks import check_masks
from jaxprune.types import Masks, Params, path_str


@dataclass(frozen=True)
class Row:
    """One leaf."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    kept: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The rows; ``print`` it to see the table.

    Attributes:
      rows: one per leaf.
      flops: of the dense function and of the other one (compact), where they were given.
    """

    rows: tuple[Row, ...]
    flops: tuple[int, int] | None = None

    @property
    def density(self) -> float:
        """Kept entries over all entries, dense leaves included."""
        return sum(r.kept for r in self.rows) / max(sum(r.size for r in self.rows), 1)

    def table(self) -> Any:
        """A ``rich.table.Table``."""
        from rich.table import Table

        table = Table()
        for head in ("leaf", "shape", "dtype", "density", "kept", "of", "bytes"):
            table.add_column(
                head, justify="left" if head in ("leaf", "shape", "dtype") else "right"
            )
        for r in self.rows:
            density = f"{r.kept / max(r.size, 1):.3f}"
            table.add_row(
                r.path,
                str(r.shape),
                r.dtype,
                density,
                *map("{:,}".format, (r.kept, r.size, r.bytes)),
            )
        total = [sum(getattr(r, f) for r in self.rows) for f in ("kept", "size", "bytes")]
        table.add_section()
        table.add_row("total", "", "", f"{self.density:.3f}", *map("{:,}".format, total))
        if self.flops:
            before, after = self.flops
            table.caption = f"FLOPs {before:,} -> {after:,} ({before / max(after, 1):.2f} x fewer)"
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=110).print(self.table())
        return out.getvalue()


def summary(
    params: Params, masks: Masks | None = None, *, flops: tuple[int, int] | None = None
) -> Summary:
    """Returns a table per leaf: shape, dtype, density, entries and bytes.

    Args:
      params: any pytree of arrays.
      masks: a tree like params, True = kept; None counts everything as kept.
      flops: (before, after), for example from ``jp.cost(...).flops``.

    Raises:
      ValueError: for masks that do not fit params, or an empty tree.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((2, 2))}
      >>> jp.summary(params, {"w": jnp.eye(2, dtype=bool)}).density
      0.5
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    if not flat:
        raise ValueError("summary got an empty tree; pass the parameters")
    if masks is not None:
        check_masks(masks, params)
    leaves = [True] * len(flat) if masks is None else jax.tree.leaves(masks)
    return Summary(tuple(_row(p, x, m) for (p, x), m in zip(flat, leaves, strict=True)), flops)


def _row(path: Any, leaf: Any, mask: Any) -> Row:
    size = int(np.prod(np.shape(leaf)))
    kept = int(np.broadcast_to(np.asarray(mask), np.shape(leaf)).sum())
    return Row(
        path_str(path), np.shape(leaf), str(leaf.dtype), size, kept, size * leaf.dtype.itemsize
    )
