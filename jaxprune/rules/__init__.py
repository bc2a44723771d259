"""One file per primitive family; importing this package fills the table."""

from jaxprune.rules import (
    attention,
    calls,
    collective,
    contraction,
    indexing,
    layout,
    linalg,
    pointwise,
    random,
    reduction,
    window,
)

__all__ = [
    "attention",
    "calls",
    "collective",
    "contraction",
    "indexing",
    "layout",
    "linalg",
    "pointwise",
    "random",
    "reduction",
    "window",
]
