"""Layers for random programs, by family. Importing this fills the catalogue."""

from benchmarks.layers import channels, contractions, images, nested, sequences

__all__ = ["channels", "contractions", "images", "nested", "sequences"]
