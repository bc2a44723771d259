"""One file per primitive family; importing this package fills the table."""

from jaxprune.rules import (
    attention,
    collective,
    contraction,
    control,
    derivatives,
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
    "collective",
    "contraction",
    "control",
    "derivatives",
    "indexing",
    "layout",
    "linalg",
    "pointwise",
    "random",
    "reduction",
    "window",
]
