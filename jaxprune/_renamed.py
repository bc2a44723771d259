"""Names that have changed: who uses an old one is told the new one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

RENAMED: dict[str, dict[str, str]] = {  # function -> old keyword -> the new one
    "permute": {"rounds": "sweeps", "seed": "key"},
    "refit": {"steps": "cg_steps"},
    "sequential": {"drift": "error_propagation"},
}
MOVED: dict[str, dict[str, str]] = {  # module -> old name -> what to write
    "jp.oneshot": {
        "flap": "jp.scores.flap(params, stats=stats)",
        "activation_energy": "jp.scores.activation_energy(params, stats=stats)",
    },
    "jp.training": {"regularised": "jp.training.regularized"},
}


def renamed(function: F) -> F:
    """Returns the function; an old keyword raises TypeError that says the new one."""
    new_names = RENAMED[function.__name__]

    @functools.wraps(function)
    def wrapper(*args: Any, **named: Any) -> Any:
        for old, new in new_names.items():
            if old in named:
                raise TypeError(f"{function.__name__}: {old}= is {new}= now; write {new}=")
        return function(*args, **named)

    return cast(F, wrapper)


def moved(module: str) -> Callable[[str], Any]:
    """Returns a module's ``__getattr__``: an old name raises AttributeError that says the new."""

    def missing(name: str) -> Any:
        if name in MOVED[module]:
            raise AttributeError(f"{module}.{name} has moved; write {MOVED[module][name]}")
        raise AttributeError(f"{module} has no attribute {name!r}")

    return missing
