"""How busy the machine is, and how far samples of a time scatter: whether a time can be trusted."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

BUSY = 1.25  # So many processes per core want to run at once: this one alone makes at most 1.


def load() -> float:
    """Processes per core that wanted to run during the last minute; NaN where it isn't known.

    Example:
      >>> from jaxprune._load import load
      >>> not load() < 0
      True
    """
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return math.nan


def spread(samples: Sequence[float]) -> float:
    """The distance of the quartiles over the median.

    Example:
      >>> from jaxprune._load import spread
      >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
      0.6666666666666666
    """
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float((high - low) / middle) if middle else 0.0
