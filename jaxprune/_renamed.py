"""What had another name: using the old one is an error that says the new one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Fn = TypeVar("Fn", bound=Callable[..., Any])

KEPT = (*functools.WRAPPER_ASSIGNMENTS, "__kwdefaults__")  # A wrapper shows what it wraps.

# For each module: a name that it had, and what to write in its place.
RENAMED = {
    "jp": {
        "Family": "jp.budget.ParetoFront",
        "MetricPlan": "jp.budget.MetricResult",
        "SearchPlan": "jp.budget.SearchResult",
    },
    "jp.oneshot": {
        "flap": "jp.scores.flap(params, stats=stats)",
        "activation_energy": "jp.scores.activation_energy(params, stats=stats)",
    },
    "jp.training": {"regularised": "jp.training.regularized"},
}


def missing(module: str) -> Callable[[str], Any]:
    """Returns a module's ``__getattr__``: an old name raises AttributeError that says the new one.

    Example:
      >>> import jaxprune as jp
      >>> jp.Family
      Traceback (most recent call last):
      AttributeError: jp.Family is now jp.budget.ParetoFront
    """

    def no_attribute(name: str) -> Any:
        new = RENAMED[module].get(name)
        raise AttributeError(
            f"{module}.{name} is now {new}" if new else f"{module} has no attribute {name!r}",
            name=name,
        )

    return no_attribute


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
