"""The state of the machine while it measures."""

from __future__ import annotations

import os


def load_average() -> list[float]:
    """Returns how many programs wanted to run, on average over 1, 5 and 15 minutes."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else []
