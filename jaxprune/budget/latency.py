"""Measured times of groups of operations at candidate widths, kept on disk.

A machine is slower for seconds at a time (other processes, other guests of the same processor). So
nothing is timed to the end at once: all that is missing is compiled, and then timed in several
passes over everything, of which the least counts. A time is kept with when it was taken, how busy
the machine was and how far its samples scatter; one that can't be trusted is taken again once the
machine is quieter.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune._load import BUSY, load, spread
from jaxprune._progress import Progress, inner, track
from jaxprune.budget import clock
from jaxprune.budget.clock import Timer, compile_all
from jaxprune.budget.groups import Group, name_of
from jaxprune.ir.axes import Axis
from jaxprune.measuring import environment

PASSES = (3, 5)  # Each group is timed so many times at least, at most; the least counts.
TIGHT = 0.1  # A time whose samples scatter by less is not taken any further.
NOISY = 0.3  # One whose samples scatter by more can't be trusted.
STALE = datetime.timedelta(days=180)  # Nor can an older one: drivers and clocks change.
BATCH = 400  # So many programs are timed, then kept; an interrupted run loses one batch.
ATONCE = 8  # So many are compiled side by side.
IDENTITY = ("device", "platform", "cpu_count", "jax", "jaxlib")  # A time holds where these are.


class Entry(NamedTuple):
    """One time, and how it was taken.

    Attributes:
      seconds: the least of its samples: noise only ever adds.
      at: when it was taken, UTC, ISO 8601.
      load: processes per core, before or after, whichever is more; NaN where it isn't known.
      spread: the distance of its samples' quartiles over their median.
    """

    seconds: float
    at: str
    load: float
    spread: float

    @property
    def noisy(self) -> bool:
        """Whether the machine was busy, or the samples scatter."""
        return self.load > BUSY or self.spread > NOISY

    @property
    def stale(self) -> bool:
        """Whether it was taken long ago."""
        return now() - datetime.datetime.fromisoformat(self.at) > STALE


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


class LatencyTable:
    """How long operations take on this device: measured once, then read from a file.

    The file belongs to one device and one pair of jax and jaxlib versions. It is written while
    measuring, so that an interrupted run goes on where it was. Times that were taken on a busy
    machine, that scatter or that are half a year old are taken again once the machine is quieter.

    Args:
      path: a JSON file; None for one named by device and versions under ``$JAXPRUNE_CACHE`` or
        ``~/.cache/jaxprune``; False keeps the times in memory only.
      runtime: where they are taken, ``jp.runtimes.onnx()``; None is XLA. The file then belongs to
        this engine, its versions, bits and threads, too.

    Attributes:
      entries: name -> the time, when it was taken, at which load and with which spread.

    Raises:
      ValueError: for a file of another device or other versions, or one that can't be read.

    Warns:
      UserWarning: for a file of an older version of this package, which is measured anew.

    Example:
      >>> import jaxprune as jp
      >>> table = jp.budget.LatencyTable(False)
      >>> len(table)
      0
    """

    def __init__(self, path: str | Path | None | bool = None, runtime: Any = None):
        self.runtime = runtime if runtime is not None and runtime.engine is not None else None
        self.identity = identity_of(self.runtime)
        named = default_path(self.identity) if path is None else str(path)
        self.path = None if path is False else Path(named)
        self.entries: dict[str, Entry] = {}
        self._tried: set[str] = set()  # what this process has timed
        if self.path is not None and self.path.exists():
            self.entries = self._read(self.path)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def seconds(self) -> dict[str, float]:
        """name -> seconds of one run."""
        return {name: entry.seconds for name, entry in self.entries.items()}

    def timed(self, group: Group, counts: Mapping[Axis, int]) -> tuple[str, Callable[[], Timer]]:
        """The name of a group's time at some counts, and what makes it ready to be timed."""
        name = name_of(group, counts)
        if self.runtime is None:
            return name, functools.partial(clock.time_group, group, counts)
        from jaxprune.budget import calls

        fixed = "".join(str(int(v in group.weights)) for v in group.ins)
        return f"{name} {fixed}", functools.partial(calls.time_group, self.runtime, group, counts)

    def _read(self, path: Path) -> dict[str, Entry]:
        try:
            content = json.loads(path.read_text())
            identity, old = dict(content["identity"]), "seconds" in content
            entries = {n: _entry(e) for n, e in content["seconds" if old else "entries"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"the latency table {path} can't be read ({type(error).__name__}: {error}); delete "
                "it to measure again"
            ) from error
        differing = [
            f"{name}: {identity.get(name)!r} there, {value!r} here"
            for name, value in self.identity.items()
            if identity.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the latency table {path} was measured elsewhere ({'; '.join(differing)}); "
                "write jp.budget.LatencyTable() for a table of this device, or name a new file"
            )
        if old:
            warnings.warn(
                f"the latency table {path} doesn't say at which load its {len(entries)} times were "
                "taken: they are taken again, and the file is written anew",
                stacklevel=4,
            )
        return {} if old else entries

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = {name: _written(entry) for name, entry in self.entries.items()}
        text = json.dumps({"identity": self.identity, "entries": entries}, indent=0)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text)
        part.replace(self.path)

    def measure(
        self, wanted: Mapping[str, Callable[[], Timer]], progress: Progress = False
    ) -> None:
        """Compiles and times what isn't known yet, or not well; ``wanted`` compiles, by name."""
        missing = [name for name in wanted if name not in self.entries]
        again = [name for name in wanted if name in self.entries and self._again(name)]
        names = iter(track(missing + again, "timing operations", progress, label=_short))
        while self._take(wanted, itertools.islice(names, BATCH), inner(progress)):
            self.save()

    def doubtful(self, names: Iterable[str]) -> list[str]:
        """Those of some names whose times can't be trusted, the worst first."""
        found = [n for n in names if n in self.entries and self.entries[n].noisy]
        return sorted(found, key=lambda n: self.entries[n].spread, reverse=True)

    def _again(self, name: str) -> bool:
        entry = self.entries[name]
        return name not in self._tried and (entry.stale or (entry.noisy and not load() > BUSY))

    def _take(
        self, wanted: Mapping[str, Callable[[], Timer]], names: Iterator[str], progress: Progress
    ) -> bool:
        """Times all in passes, some of them further than others; False when there are none."""
        before = load()
        timers: dict[str, Timer] = {}
        samples: dict[str, list[float]] = {}
        while some := {name: wanted[name]() for name in itertools.islice(names, ATONCE)}:
            compile_all(some.values())
            timers |= some
            samples |= {name: [timer()] for name, timer in some.items()}
        for turn in range(1, PASSES[1]):
            loose = [n for n, s in samples.items() if turn < PASSES[0] or spread(s) > TIGHT]
            for name in track(loose, f"timing them again, pass {turn + 1}", progress, label=_short):
                samples[name].append(timers[name]())
        at, busy = now().isoformat(), max(before, load())
        for name, found in samples.items():
            self.entries[name] = Entry(min(found), at, busy, spread(found))
        self._tried |= timers.keys()
        return bool(timers)


def _short(name: str) -> str:
    return name[:40]


def _entry(read: Any) -> Entry:
    """An entry as JSON has it: null for an unknown load; of an older file a number."""
    seconds, at, busy, scatter = read if isinstance(read, list) else (read, "", None, 0.0)
    return Entry(float(seconds), str(at), math.nan if busy is None else busy, scatter)


def _written(entry: Entry) -> list[Any]:
    busy = None if math.isnan(entry.load) else round(entry.load, 2)
    return [entry.seconds, entry.at, busy, entry.spread]


def identity_of(runtime: Any) -> dict[str, Any]:
    """Where times hold: this device, these versions, and the engine, if it isn't XLA."""
    here = environment()
    engine = {} if runtime is None else {"runtime": runtime.key}
    return {name: here[name] for name in IDENTITY} | engine


def default_path(identity: Mapping[str, Any]) -> str:
    """Where the table of this device is kept."""
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(map(str, identity.values())).lower()).strip("-")
    root = os.environ.get("JAXPRUNE_CACHE") or Path.home() / ".cache" / "jaxprune"
    return str(Path(root) / "latency" / f"{name}.json")
