"""Drops compiled programs before the process runs out of memory maps.

Linux allows a process 65,530 memory maps unless told otherwise, and XLA makes about a dozen for
each program that it compiles. A process that meets the limit dies of a segmentation fault.
"""

from __future__ import annotations

import gc
from pathlib import Path

import jax

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
EVERY = 10  # tests between two looks
SHARE = 0.3  # of the limit, from which on programs are dropped


def limit() -> int:
    """Returns the maps that this process may have; 0 where the system does not say."""
    return int(LIMIT.read_text()) if LIMIT.exists() else 0


def count() -> int:
    """Returns the maps that this process has; 0 where the system does not say."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


class Watch:
    """A pytest plugin that looks now and then, and says at the end how near the limit came."""

    def __init__(self, most: float) -> None:
        self.most = most  # maps from which on programs are dropped
        self.tests = self.peak = self.drops = 0

    def pytest_runtest_teardown(self, item, nextitem) -> None:
        self.tests += 1
        if self.tests % EVERY == 0 or nextitem is None or nextitem.path != item.path:
            self.look()

    def look(self) -> None:
        """Drops JAX's compiled programs where there are too many maps."""
        now = count()
        self.peak = max(self.peak, now)
        if now > self.most:
            jax.clear_caches()
            gc.collect()
            self.drops += 1

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.write_line(
            f"memory maps: at most {self.peak} of {limit()}; programs dropped {self.drops} times"
        )
