"""Layers for random programs, by family. Importing this fills the catalogue."""

from tests.fuzz.layers import (
    channels,
    contractions,
    empties,
    images,
    indexing,
    loops,
    nested,
    number_types,
    odd_axes,
    sequences,
    weights,
)

__all__ = [
    "channels", "contractions", "empties", "images", "indexing", "loops", "nested",
    "number_types", "odd_axes", "sequences", "weights",
]  # fmt: skip
