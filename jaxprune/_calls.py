"""Calls with ``fn(params, *args)``: what is meant for ``fn``, and what can't be an argument of it.

``fn`` is traced, so flags, modes and random generators are bound to it before, and params and
arguments hold arrays alone. Each error here says the line to write.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax

from jaxprune._renamed import KEPT, Fn
from jaxprune.typing import path_str

# Options of models and their layers: they are never a slip of the pen for one of ours.
OF_MODELS = {
    "deterministic", "inference", "is_training", "key", "method", "mutable", "rng", "rngs", "state",
    "train", "training", "use_running_average",
}  # fmt: skip
FLAG = "train"  # What a flag is mostly called.
PARTITION = (
    "pass the arrays alone, and close over the rest: params, static = eqx.partition(module, "
    "eqx.is_inexact_array); fn = lambda p, x: eqx.combine(p, static)(x)"
)


def bound(options: Mapping[str, Any], fn: str = "fn") -> str:
    """The line that binds options to a function; what is no plain value stands by its name."""
    told = (f"{name}={repr(v) if _is_plain(v) else name}" for name, v in options.items())
    return f"{fn} = functools.partial({fn}, {', '.join(told)})"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list | None) and len(repr(value)) < 40


def calls_fn(who: str, *handed_on: str) -> Callable[[Fn], Fn]:
    """A decorator after which a keyword that is no option is an error with the line to write.

    Args:
      who: the function as users write it, for the error.
      *handed_on: options that it takes as ``**options``.

    Returns:
      A decorator; it leaves the function's signature, defaults included, as it is.

    Raises:
      TypeError: when the decorated function is called with a keyword that is no option of it.

    Example:
      >>> @calls_fn("run")
      ... def run(fn, params, *args, repeats=3):
      ...     return fn(params, *args)
      >>> run(abs, -1, train=False)
      Traceback (most recent call last):
      TypeError: run has no option 'train'; its options are repeats. What is meant for fn is \
bound to it first: fn = functools.partial(fn, train=False)
    """

    def decorate(call: Fn) -> Fn:
        signature = inspect.signature(call).parameters.values()
        named = [p for p in signature if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        own = [*(p.name for p in named if p.kind == p.KEYWORD_ONLY), *handed_on]
        known = {*own, *(p.name for p in named)}
        fn = next((p.name for p in named if p.name in ("block", "loss")), "fn")

        @functools.wraps(call, assigned=KEPT)
        def checked(*args: Any, **options: Any) -> Any:
            if not options.keys() <= known:
                unknown = {n: value for n, value in options.items() if n not in known}
                raise TypeError(_no_option(who, fn, own, unknown, args))
            return call(*args, **options)

        return cast(Fn, checked)

    return decorate


def _no_option(
    who: str, fn: str, own: Sequence[str], unknown: Mapping[str, Any], args: Sequence[Any]
) -> str:
    has = f"; its options are {', '.join(own)}" if own else ""
    for name in unknown:
        near = difflib.get_close_matches(name, own, 1)
        if near and not any(name in names for names in (OF_MODELS, *map(_names, args))):
            return f"{who} has no option {name!r}, did you mean {near[0]!r}{has}"
    names = ", ".join(map(repr, unknown))
    return (
        f"{who} has no option {names}{has}. What is meant for {fn} is bound to it first: "
        f"{bound(unknown, fn)}"
    )


def _names(fn: Any) -> set[str]:
    """The names of a function's parameters, as far as they are known."""
    try:
        return set(inspect.signature(fn).parameters) if callable(fn) else set()
    except (TypeError, ValueError):
        return set()


@contextlib.contextmanager
def tracing(fn: Any, params: Any, args: Sequence[Any]) -> Iterator[None]:
    """Says what to write where ``fn`` can't be traced for what it was given.

    Raises:
      TypeError: for a leaf of params or args that is no array; for a Python bool among them, where
        ``fn`` turned out to use a traced value as a condition.
    """
    check_arrays(params, args)
    try:
        yield
    except jax.errors.TracerBoolConversionError as error:
        flags = [(path, x) for path, x in _paths(tuple(args)) if isinstance(x, bool)]
        inside = [path_str(path) for path, x in _paths(params) if isinstance(x, bool)]
        if flags:
            where, flag = flags[0]
            raise TypeError(_flag(fn, where, flag, len(args))) from error
        if inside:
            raise TypeError(
                f"params hold a bool at {inside[0]}, which fn uses as a condition, and arrays have "
                f"no truth while they are traced; {PARTITION}"
            ) from error
        raise


def _flag(fn: Any, where: tuple[Any, ...], flag: bool, count: int) -> str:
    """``where``: the way to the flag in the arguments after params."""
    return (
        f"argument {path_str(where)} after params is the bool {flag}, which fn uses as a "
        "condition, and arguments have no truth while they are traced; bind it to fn by its name "
        f"instead: {bound({_parameter(fn, where, count): flag})}"
    )


def _parameter(fn: Any, where: tuple[Any, ...], count: int) -> str:
    """The name of a parameter that is given by its place; what it is mostly called if unknown."""
    with contextlib.suppress(TypeError, ValueError):
        places = range(-1, count)  # of params and what follows
        given = inspect.signature(fn).bind_partial(*places).arguments
        named = (name for name, place in given.items() if place == where[0].idx)
        return next(named, FLAG)
    return FLAG


def check_arrays(params: Any, args: Sequence[Any] = ()) -> None:
    """Raises TypeError, with the way out, for a leaf that is no array.

    Example:
      >>> check_arrays({"kernel": 1.0, "activation": "relu"})
      Traceback (most recent call last):
      TypeError: params hold the str 'relu' at activation, which is no array; pass the arrays \
alone, and close over the rest: params, static = eqx.partition(module, eqx.is_inexact_array); \
fn = lambda p, x: eqx.combine(p, static)(x)
    """
    for path, leaf in _paths(params):
        if not is_array(leaf):
            where = f" at {path_str(path)}" if path else ""
            raise TypeError(f"params hold {_brief(leaf)}{where}, which is no array; {PARTITION}")
    for path, leaf in _paths(tuple(args)):
        if not is_array(leaf):
            raise TypeError(
                f"argument {path_str(path)} after params is {_brief(leaf)}, which is no array; "
                f"bind it to fn by its name instead: {bound({'mode': leaf})}"
            )


def is_array(leaf: Any) -> bool:
    """Can JAX trace it: an array, its type, or a number?"""
    numbers = bool | int | float | complex
    return isinstance(leaf, numbers) or hasattr(leaf, "dtype") or hasattr(leaf, "__jax_array__")


def _paths(tree: Any) -> list[tuple[Any, Any]]:
    return list(jax.tree_util.tree_leaves_with_path(tree))


def _brief(x: Any) -> str:
    text = " ".join(repr(x).split())
    return f"the {type(x).__name__} {text if len(text) < 60 else text[:57] + '...'}"
