"""Progress of calls that last: bars in a terminal or a notebook, a line now and then in a log.

Nothing is drawn before something has lasted :data:`DELAY` seconds, so quick calls are silent. What
runs within something that is drawn gets a row of its own below it. In several processes the first
one draws.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

T = TypeVar("T")
Wrap = Callable[[Iterable[Any]], Iterable[Any]]  # It passes items on, as tqdm.tqdm does.
Progress = Wrap | bool | None

DELAY = 2.0  # Seconds of silence at first.
REFRESH = 0.5  # Seconds between two drawings.
PERIOD = 10.0  # Seconds between two lines in a log.
BAR = 24  # Columns of a bar.


def track(
    items: Iterable[T],
    what: str,
    progress: Progress = None,
    total: int | None = None,
    label: Callable[[T], object] | None = None,
) -> Iterable[T]:
    """Passes items on, and shows how many have come, which one is at work, and the time left.

    Args:
      items: any iterable.
      what: what is done with them, "timing operations".
      progress: None or True for a bar, False for silence, a function that wraps the iterable in
        place of all this, such as ``tqdm.tqdm``.
      total: how many items there are, where ``len(items)`` doesn't say it.
      label: what to call an item while it is at work.

    Raises:
      TypeError: for a progress of another kind.

    Example:
      >>> from jaxprune._progress import track
      >>> list(track([1, 2, 3], "counting"))
      [1, 2, 3]
      >>> list(track([1, 2, 3], "counting", progress=reversed))
      [3, 2, 1]
    """
    if check(progress) and callable(progress):
        return progress(items)
    if progress is False:
        return items
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _tracked(items, Row(what, total), label)


def _tracked(items: Iterable[T], row: Row, label: Callable[[T], object] | None) -> Iterator[T]:
    with _shown(row):
        for item in items:
            row.now = "" if label is None else str(label(item))
            yield item
            row.done += 1


@contextlib.contextmanager
def working(what: str, progress: Progress = None) -> Iterator[Row]:
    """Shows what is at work, of which nothing can be counted; ``row.now`` says more.

    Raises:
      TypeError: for a progress of another kind.
    """
    row = Row(what)
    check(progress)
    with contextlib.nullcontext() if progress is False or callable(progress) else _shown(row):
        yield row


def inner(progress: Progress) -> bool | None:
    """What to hand on to a call within: it is silent unless this one shows a bar."""
    return False if progress is False or callable(progress) else None


def check(progress: Any) -> bool:
    """True, unless ``progress`` is of a kind that nothing can be done with."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(
            f"progress is {progress!r}; wanted None or True for a bar, False for silence, or a "
            "function that wraps an iterable, such as progress=tqdm.tqdm"
        )
    return True


# ---------------------------------------------------------------------------------------- rows


@dataclass(eq=False)
class Row:
    """One thing that is at work.

    Attributes:
      what: what it is.
      total: how many items it has, or None.
      done: how many are done.
      now: which one is at work.
      began: when it began, on the clock of :func:`time.monotonic`.
    """

    what: str
    total: int | None = None
    done: int = 0
    now: str = ""
    began: float = field(default_factory=time.monotonic)

    def count(self) -> str:
        return f"{self.done} of {self.total}" if self.total is not None else f"{self.done or ''}"

    def times(self) -> str:
        """The time that went by, and the time left if all items last equally long."""
        took = time.monotonic() - self.began
        if not self.done or self.total is None:
            return _clock(took)
        return f"{_clock(took)}, {_clock(took / self.done * (self.total - self.done))} left"

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.count(), self.times(), self.now) if part)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ------------------------------------------------------------------------------------- display


@dataclass(eq=False)
class _Display:
    """Draws rows from a thread of its own, from when the first has lasted a while to its end."""

    rows: list[Row]
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="jaxprune progress", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        if self.ended.wait(DELAY) or jax.process_index():
            return
        draw = _way()
        with draw(self) as (period, refresh):
            while True:
                refresh()
                if self.ended.wait(period):
                    return

    def text(self) -> str:
        return " | ".join(map(str, list(self.rows)))

    def end(self) -> None:
        self.ended.set()
        self.thread.join()


_display: _Display | None = None
Drawing = contextlib.AbstractContextManager[tuple[float, Callable[[], Any]]]


@contextlib.contextmanager
def _shown(row: Row) -> Iterator[None]:
    """The row is among those that are drawn; the outermost one begins and ends the display."""
    global _display
    outermost = _display is None
    display = _display = _display or _Display([])
    row.began = time.monotonic()
    display.rows.append(row)
    try:
        yield
    finally:
        display.rows.remove(row)
        if outermost:
            _display = None
            display.end()


def _way() -> Callable[[_Display], Drawing]:
    """How to draw where this process prints."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        return _notebook
    return _terminal if console.is_terminal else _log


@contextlib.contextmanager
def _log(display: _Display) -> Iterator[tuple[float, Callable[[], Any]]]:
    yield PERIOD, lambda: print(f"jaxprune: {display.text()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _notebook(display: _Display) -> Iterator[tuple[float, Callable[[], Any]]]:
    from IPython.display import display as show

    handle = show(_Text(""), display_id=True)
    yield REFRESH, lambda: handle.update(_Text("\n".join(map(str, list(display.rows)))))
    handle.update(_Text(""))


class _Text(str):
    """A text that a notebook shows as it is."""

    def __repr__(self) -> str:
        return str(self)


@contextlib.contextmanager
def _terminal(display: _Display) -> Iterator[tuple[float, Callable[[], Any]]]:
    from rich.console import Console
    from rich.live import Live

    live = Live(
        console=Console(stderr=True), transient=True, auto_refresh=False, redirect_stdout=False,
        redirect_stderr=False, get_renderable=lambda: _table(list(display.rows)),
    )  # fmt: skip
    with live:
        yield REFRESH, live.refresh


def _table(rows: list[Row]) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for row in rows:
        bar = ProgressBar(total=row.total, completed=row.done, width=BAR, pulse=row.total is None)
        table.add_row(row.what, bar, row.count(), row.times(), row.now)
    return table
