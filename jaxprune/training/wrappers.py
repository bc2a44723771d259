"""What undoes the zeros of a method that lands on them: told at ``init``, as far as it can be seen.

A transformation is not told what wraps it. But it is called by it: the frames that ``init`` is
called from say which function of optax each belongs to, and, in a chain, which links come after.
What can't be recognised is passed over in silence, and nothing depends on it: zeros are restored by
:func:`jp.training.masked_params`, which reads the state. docs/wrappers.md has the table.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from jaxprune.training.states import averages

# Functions of optax around a method -> what they do to its zeros.
AROUND = {
    "schedule_free": "trains at a mixture of two sequences and evaluates their average, and "
    "neither has zeros where masks are False",
    "lookahead": "evaluates slow params, which move towards the zeros by a fraction at each "
    "synchronisation",
    "mechanize": "multiplies all updates by a scale that it learns, so that pruned entries miss 0",
    "conditionally_transform": "passes updates on as they are where its condition fails, and "
    "pruned entries then move away from 0",
}
# Links of optax after a method in a chain that leave its zeros alone. All others change updates.
HARMLESS = {"keep_params_nonnegative", "zero_nans", "monitor", "measure_with_ema", "snapshot"}
INSTEAD = "evaluate, save and serve jp.training.masked_params(params, opt_state)"


def warn_of_wrappers(name: str, inner_state: Any = None) -> None:
    """Warns of what is around a method, or inside of it, that undoes its zeros."""
    frames = list(_frames())
    if averages(inner_state):
        _warn(
            f"{name} wraps optax.contrib.schedule_free: params are sparse, but the average at "
            f"which it evaluates is not; {INSTEAD}",
            frames,
        )
    for frame in frames:
        head = _head(frame)
        if head in AROUND:
            _warn(f"optax's {head} is around {name}: it {AROUND[head]}; {INSTEAD}", frames)
        later = [link for link in _later_links(frame) if not _is_harmless(link)]
        if later:
            _warn(
                f"{name} stands before {_named(later[0])} in optax.chain, which changes the "
                f"updates that land pruned entries on 0; let {name} be the last link, or {INSTEAD}",
                frames,
            )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]


def _head(frame: FrameType) -> str:
    """The function of optax that a frame belongs to: chain, of chain.<locals>.init_fn."""
    return frame.f_code.co_qualname.split(".")[0] if _root(frame) == "optax" else ""


def _later_links(frame: FrameType) -> Sequence[Callable[..., Any]]:
    """The ``init`` functions of the links after the one that a chain's frame is calling."""
    if _head(frame) not in ("chain", "named_chain"):
        return ()  # of no other frame locals are read: Python would keep what they hold
    here, outer = frame.f_locals, frame.f_back
    if "fn" in here and outer is not None and _head(outer) == "chain":
        links, now = outer.f_locals.get("init_fns", ()), here["fn"]
    elif "tx" in here and "transforms" in here:
        links, now = [tx.init for _, tx in here["transforms"]], here["tx"].init
    else:
        return ()
    return [*links][[*links].index(now) + 1 :] if now in links else ()


def _is_harmless(init: Callable[..., Any]) -> bool:
    head = _qualname(init).split(".")[0]
    if str(getattr(init, "__module__", "")).split(".")[0] != "optax":
        return True  # a method of this package, or a link that isn't known
    if head in ("chain", "masked"):
        inside = _enclosed(init)
        links = inside["init_fns"] if "init_fns" in inside else [inside["inner"].init]
        return all(map(_is_harmless, links))
    return head in HARMLESS


def _enclosed(function: Any) -> dict[str, Any]:
    """The variables of outer functions that a function uses."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _qualname(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _named(init: Callable[..., Any]) -> str:
    head = _qualname(init).split(".")[0]
    if head == "init_empty_state":
        return "a link without state (unless that is optax.identity)"
    return f"optax's {head}"


def _warn(text: str, frames: Sequence[FrameType]) -> None:
    """Points at the line outside of optax and this package that called ``init``."""
    outside = [_root(frame) not in ("optax", "jaxprune", "jax") for frame in frames]
    level = outside.index(True) if True in outside else 0
    warnings.warn(text, UserWarning, stacklevel=level + 3)
