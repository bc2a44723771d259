"""Checks on the numbers that several methods take."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxprune._leaf import is_number
from jaxprune.selection import known


def check_damping(method: str, damping: Any) -> None:
    """Raises ValueError unless a known damping is a number from 0 on."""
    if known(damping) and not (is_number(damping) and 0 <= float(damping) < np.inf):
        raise ValueError(
            f"{method}: damping={damping!r}; wanted a number from 0 on such as 0.01, a part of the "
            "mean diagonal of X^T X"
        )


def check_size(method: str, name: str, value: Any, least: int) -> None:
    """Raises ValueError unless ``value`` is an integer from ``least`` on."""
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{method}: {name}={value!r}; wanted an integer from {least} on")
