"""What had another name: using the old one is an error that says the new one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Fn = TypeVar("Fn", bound=Callable[..., Any])

KEPT = (*functools.WRAPPER_ASSIGNMENTS, "__kwdefaults__")  # A wrapper shows what it wraps.

# The key is a name that ``jaxprune`` had at its top, the value is what to write in its place.
RENAMED = {
    "Family": "jp.ParetoFront",
    "MetricPlan": "jp.MetricResult",
    "SearchPlan": "jp.SearchResult",
}


def no_attribute(module: str, name: str) -> AttributeError:
    """The error for a name that ``module`` lacks; it says the new name where there is one.

    Example:
      >>> from jaxprune._renamed import no_attribute
      >>> print(no_attribute("jaxprune", "Family"))
      jp.Family is now jp.ParetoFront
    """
    if name in RENAMED:
        return AttributeError(f"jp.{name} is now {RENAMED[name]}", name=name)
    return AttributeError(f"module {module!r} has no attribute {name!r}", name=name)


def renamed(who: str, **new: str) -> Callable[[Fn], Fn]:
    """A decorator after which an old keyword of a function raises an error with the new one.

    Args:
      who: the function as users write it, for the error.
      **new: old keyword = new keyword.

    Returns:
      A decorator; it leaves the function's signature, defaults included, as it is.

    Raises:
      TypeError: when the decorated function is called with an old keyword.

    Example:
      >>> from jaxprune._renamed import renamed
      >>> @renamed("wait", rounds="repeats")
      ... def wait(repeats=3):
      ...     return repeats
      >>> wait(rounds=5)
      Traceback (most recent call last):
      TypeError: rounds= of wait is now repeats=; write repeats=5
    """

    def decorate(fn: Fn) -> Fn:
        @functools.wraps(fn, assigned=KEPT)
        def call(*args: Any, **options: Any) -> Any:
            for old in new.keys() & options.keys():
                raise TypeError(
                    f"{old}= of {who} is now {new[old]}=; write {new[old]}={options[old]!r}"
                )
            return fn(*args, **options)

        return cast(Fn, call)

    return decorate
