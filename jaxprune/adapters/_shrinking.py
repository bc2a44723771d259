"""A module at the small sizes, whatever its framework: what the adapters share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxprune.adapters import _checking, _heads, _refusing, _sizes
from jaxprune.adapters._sizes import Leaf, Read, Rows, Size, Table
from jaxprune.typing import Compact

UNKNOWN = "it isn't known what becomes of"
Modules = Iterable[tuple[str, Any]]  # each with its path; "" is the whole


@dataclass(frozen=True)
class Framework:
    """What an adapter knows of its framework.

    Attributes:
      name: the file, for the call that an error tells to write.
      table: the rows of its layers, and of those that users have registered.
      graft: (module, tree like params) -> a copy of the module with these leaves.
      modules: all modules in a module, each once.
      leaves: the stand-ins in a module.
      assign: sets an attribute of a module.
      bare: (call, module) -> a pure function of (arrays, *args), and the arrays.
      calls: how functions usually call a module, the first that fits is taken; in words.
      native: (call, module, wide, *args) -> what the module gives where it runs, in float64 if
        ``wide``; None: JAX runs it.
    """

    name: str
    table: Table
    graft: Callable[[Any, Any], Any]
    modules: Callable[[Any], Modules]
    leaves: Callable[[Any], list[Leaf]]
    assign: Callable[[Any, str, Any], None]
    bare: Callable[[Any, Any], tuple[Callable[..., Any], Any]]
    calls: dict[str, Callable[..., Any]]
    native: Callable[..., Any] | None = None

    def runner(self, call: Any, module: Any) -> Callable[..., Any]:
        """``(wide, *args) -> outputs`` of the module, for a reference to measure."""
        if self.native is not None:
            return functools.partial(self.native, call, module)
        pure, arrays = self.bare(call, module)
        return lambda wide, *args: _checking.jit(pure)(
            _checking.widened(arrays) if wide else arrays, *args
        )


class Built(NamedTuple):
    """A module with small parameters and sizes.

    Attributes:
      guessed: whether layers without rows had sizes to set.
      unsure: sizes that may stand for several axes, which differ now.
    """

    module: Any
    guessed: bool
    unsure: list[str]


def built(frame: Framework, module: Any, small: Compact, params: Any, guess: bool) -> Built:
    """The module with the small parameters and the sizes that its rows read.

    Sizes of layers without rows are set with ``guess``: those that are the size of an axis below.
    """
    of_leaves, new = (frame.graft(module, t) for t in (_sizes.leaves(small), params))
    stand_ins, layers = (dict(frame.modules(m)) for m in (of_leaves, new))
    unsure: list[str] = []
    guessed = False
    for path, layer in layers.items():
        rows, stand_in = frame.table.rows(type(layer)), stand_ins[path]
        outer = [stand_ins[p] for p in _outwards(path) if p in stand_ins]
        found = [*_read(frame, rows, stand_in, outer, path)] if rows else []
        if rows is None and guess:
            found = [*_guessed(frame, stand_in, outer)]
            guessed = guessed or bool(found)
        for name, new_size in found:
            if new_size is None:
                unsure.append(f"{path or 'the module'}: {type(layer).__name__}.{name}")
            else:
                frame.assign(layer, name, new_size)
        if rows and rows.scale:
            _fold(frame, rows.scale, stand_in, layer, rows)
    return Built(new, guessed, unsure)


def _outwards(path: str) -> list[str]:
    keys = path.split("/") if path else []
    return ["/".join(keys[:k]) for k in range(len(keys), -1, -1)]


Found = Iterator[tuple[str, Any]]  # attributes and their new values; None: it can't be told


def _read(frame: Framework, rows: Rows, module: Any, outer: list[Any], path: str) -> Found:
    """What the rows of a layer say has changed."""
    for name, reader in rows.sizes.items():
        stored = getattr(module, name, None)
        if not _is_size(stored):
            continue
        read = reader(module, stored)
        if read is None:
            yield from _matching(frame, name, stored, outer)
            continue
        _check(read, stored, f"{type(module).__name__}.{name}", path)
        if (new := _like(stored, read)) != stored:
            yield name, new


def _guessed(frame: Framework, module: Any, outer: list[Any]) -> Found:
    """Numbers in a module without rows that are the size of an axis below and have changed."""
    for name, stored in getattr(module, "__dict__", {}).items():
        if _is_size(stored):
            yield from _matching(frame, name, stored, outer)


def _is_size(stored: Any) -> bool:
    """Whether it is a number, some in a tuple, or a mapping to numbers."""
    many = _held(stored)
    return bool(many) and all(isinstance(n, int) and not isinstance(n, bool) for n in many)


def _held(stored: Any) -> tuple[Any, ...]:
    if isinstance(stored, Mapping):
        return tuple(stored.values())
    return stored if isinstance(stored, tuple) else (stored,)


def _check(read: Read, stored: Any, what: str, path: str) -> None:
    full = tuple(s.full for s in _many(read))
    if full != _held(stored):
        raise _refusing.Unequal(
            f"{what} at {path or 'the module'} is {stored}, and its row reads {full} off the "
            "parameters: an axis that is stacked where the row does not look, or one that is "
            "cut otherwise; leave the layer's dimensions out of the masks, or register rows"
        )


def _many(read: Read) -> tuple[Size, ...]:
    return read if isinstance(read, tuple) and not isinstance(read, Size) else (read,)  # type: ignore


def _like(stored: Any, read: Read) -> Any:
    """The small sizes, as they are stored: a number, a tuple, or a mapping to numbers."""
    new = [s.small for s in _many(read)]
    if isinstance(stored, Mapping):
        return type(stored)(zip(stored, new, strict=True))  # type: ignore[call-arg]
    return tuple(new) if isinstance(stored, tuple) else new[0]


def _matching(frame: Framework, name: str, stored: Any, outer: list[Any]) -> Found:
    """A size that no row reads: what axes of that size become, in the module or around it."""
    around = next((found for m in outer if (found := frame.leaves(m))), [])
    axes = [axis for leaf in around for axis in leaf.factors]
    known = _small_of(size for axis in axes for size in (*axis, _sizes.times(axis)))
    known = _small_of(map(_sizes.times, _runs(axes))) | known
    many = _held(stored)
    options = [known.get(n, {n}) for n in many]
    if any(len(option) > 1 for option in options):
        yield name, None
        return
    new = [n for option in options for n in option]
    if tuple(new) != tuple(many):
        yield name, tuple(new) if isinstance(stored, tuple) else new[0]


def _small_of(sizes: Iterable[Size]) -> dict[int, set[int]]:
    known: dict[int, set[int]] = {}
    for size in sizes:
        known.setdefault(size.full, set()).add(size.small)
    return known


def _runs(axes: Iterable[tuple[Size, ...]]) -> Iterator[tuple[Size, ...]]:
    """Factors side by side: the heads of groups x queries x head size."""
    for axis in axes:
        for begin in range(len(axis)):
            yield from (axis[begin:end] for end in range(begin + 2, len(axis) + 1))


def _fold(frame: Framework, scale: _sizes.Scale, stand_in: Any, layer: Any, rows: Rows) -> None:
    """Multiplies by sqrt(small / full): the layer divides by the root of the small size now."""
    read = rows.sizes[scale.size](stand_in, getattr(stand_in, scale.size))
    if not isinstance(read, Size) or read.full == read.small:
        return
    group = next((g for g in scale.into if _sizes.inside(layer, g[0]) is not None), ())
    for path in group:
        *owner, name = path.split(".")
        holder = _sizes.inside(layer, ".".join(owner)) if owner else layer
        value = getattr(holder, name, None)
        if value is not None:
            frame.assign(holder, name, scaled(value, math.sqrt(read.small / read.full)))


def scaled(value: Any, factor: float) -> Any:
    """An array times a number, in its own type."""
    return (value * jnp.asarray(factor, value.dtype)).astype(value.dtype)


def shrink(frame: Framework, module: Any, small: Compact, call: Any) -> Any:
    """The module at the small sizes, once it has been held against the compact function."""
    frame.graft(module, small.params)  # raises for params of another module
    types = {path: type(m).__name__ for path, m in frame.modules(module)}
    refused = _refusing.carried(small, types)
    if refused:
        raise refused
    call = call or _checking.fitting(tuple(frame.calls.values()), frame.bare, module, small)
    if call is None:
        raise ValueError(_NO_CALL.format(calls=" or ".join(frame.calls), file=frame.name))
    whys: list[str] = []
    new = tried(frame, module, small, call, whys)
    if new is not None:
        return new
    _check_call(frame, module, small, call)
    raise _refusing.counted(small, types) or _blamed(frame, module, small, call, types, whys)


def tried(frame: Framework, module: Any, small: Compact, call: Any, whys: list[str]) -> Any:
    """The module that equals the compact function, by rows alone or by guesses; else None."""
    reference = _checking.Reference(small.fn, small.params, small.certificate._checker.args)
    tolerance = _checking.tolerance(small.params)
    for new, _, unsure in _attempts(frame, module, small):
        whys += [f"{UNKNOWN} {text}" for text in unsure]
        try:
            error = reference.error(frame.runner(call, new))
        except _checking.NotNumbers:
            raise
        except Exception as raised:  # whatever a module raises that is not told its sizes
            whys.append(f"it raises {type(raised).__name__}: {str(raised)[:300]}")
            continue
        if error <= tolerance:
            return new
        whys.append(f"its outputs differ by {error:.1e}, relative to the largest")
    return None


def _attempts(frame: Framework, module: Any, small: Compact) -> Iterator[Built]:
    """By rows; with guesses, where there is something to guess; with scales of the user's code."""
    yield built(frame, module, small, small.params, False)
    guessed = built(frame, module, small, small.params, True)
    if guessed.guessed:
        yield guessed
    scaling = [p for p, m in frame.modules(module) if (r := frame.table.rows(type(m))) and r.scale]
    params = _heads.folded(small, scaling)
    if params is not None:
        yield built(frame, module, small, params, True)


def _check_call(frame: Framework, module: Any, small: Compact, call: Any) -> None:
    """Raises where the module isn't what the function computes even at full size."""
    function: Any = small.fn
    full = small.expand(small.params)
    reference = _checking.Reference(function.fn, full, small.certificate._checker.args)
    error = reference.error(frame.runner(call, frame.graft(module, full)))
    if not error <= _checking.tolerance(small.params):
        raise ValueError(_NOT_CALLED.format(error=error, file=frame.name))


def _blamed(
    frame: Framework, module: Any, small: Compact, call: Any, types: Any, whys: list[str]
) -> Exception:
    """The first dimension that can't be had by itself, by trying."""
    for name, one in _refusing.alone(small):
        its: list[str] = []
        if tried(frame, module, one, call, its) is None:
            unknown = [f", and {text}" for text in whys if text.startswith(UNKNOWN)]
            why = f"shrunk alone, {its[-1]}{''.join(unknown[:1])}"
            return _refusing.refusal(small, name, types, why, _INSTEAD.format(file=frame.name))
    return _refusing.Unequal(f"no plain module equals small.fn: {'; '.join(whys)}")


_NO_CALL = (
    "called as {calls}, the module gives other shapes or types than the compacted function for "
    "its example arguments; pass how that calls it: jaxprune.adapters.{file}.shrink(module, small, "
    "call=lambda module, *args: ...), with train or eval mode, keys and updated statistics as there"
)
_NOT_CALLED = (
    "the module, called with the example arguments, isn't what the compacted function computes, "
    "even at full size (relative error {error:.1e}); pass the module in the mode (train, eval) "
    "that was compacted, or how the function calls it: jaxprune.adapters.{file}.shrink(module, "
    "small, call=lambda module, *args: ...)"
)
_INSTEAD = (
    "leave the dimension out of the masks (dims=), or tell which sizes the layer stores and what "
    "they scale: jaxprune.adapters.{file}.register(Layer, ...)"
)
