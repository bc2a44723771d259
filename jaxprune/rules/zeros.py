"""What is known to be zero: for each axis of a value, which slices are zero whatever the input.

The vectors are plain, one boolean per position, so that any layout operation acts on them as it
acts on the data, and a unit of a dimension is zero when all its positions are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Zeros(NamedTuple):
    """``axes[k][i]``: the slice ``i`` along axis ``k`` is zero. ``all``: the whole value is."""

    all: bool
    axes: tuple[np.ndarray, ...]

    def along(self, k: int) -> np.ndarray:
        """Zero slices along axis ``k``, everything when the whole value is zero."""
        return np.ones_like(self.axes[k]) if self.all else self.axes[k]


def unknown(shape: Sequence[int]) -> Zeros:
    return Zeros(False, tuple(np.zeros(n, bool) for n in shape))


def everywhere(shape: Sequence[int]) -> Zeros:
    return Zeros(True, tuple(np.ones(n, bool) for n in shape))


def of_array(nonzero: np.ndarray) -> Zeros:
    """Reads zeros off an array, or off the mask of what may be nonzero."""
    nonzero = np.asarray(nonzero, bool)
    if not nonzero.any():
        return everywhere(nonzero.shape)
    ranks = range(nonzero.ndim)
    vectors = [nonzero.any(tuple(r for r in ranks if r != k)) for k in ranks]
    return Zeros(False, tuple(~np.asarray(v) for v in vectors))


def of_axes(vectors: Sequence[np.ndarray]) -> Zeros:
    """From vectors; an axis whose slices are all zero makes the whole value zero."""
    return Zeros(any(v.size and v.all() for v in vectors), tuple(vectors))


def both(a: Zeros, b: Zeros) -> Zeros:
    """Zero in both of two values of one shape."""
    vectors = [a.along(k) & b.along(k) for k in range(len(a.axes))]
    return Zeros(a.all and b.all, tuple(vectors))
