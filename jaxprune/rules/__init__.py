"""One file per primitive family; importing this package fills the table."""

from jaxprune.rules import calls, contraction, indexing, layout, pointwise, reduction

__all__ = ["calls", "contraction", "indexing", "layout", "pointwise", "reduction"]
