"""Digests of what decides a result, functions among it: a resumed call must be given the same."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.artefacts.fingerprint import Digests

OWN = "jaxprune."


def digest(value: Any) -> str:
    """Returns a digest of any value.

    Of a function that is its bytecode, its defaults, what it closes over, and the values and
    functions of its own module that it reads; of a function of this package its name in place of
    its code.

    Example:
      >>> halves = [lambda p, s=s: p * s for s in (0.5, 0.5, 0.6)]
      >>> digest(halves[0]) == digest(halves[1]), digest(halves[0]) == digest(halves[2])
      (True, False)
    """
    found = _Digests()
    found.value(value)
    both = found.program.digest() + found.constants.digest()
    return hashlib.sha256(both).hexdigest()


def digests(told: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digest of each value, and what of the environment changes results."""
    bits = "64" if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else "32"
    return {name: digest(x) for name, x in told.items()} | {
        "version of JAX": jax.__version__,
        "number of bits": bits,
    }


class _Digests(Digests):
    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Any] = {}  # by identity: globals of a module hold each other

    def value(self, x: Any) -> None:
        if isinstance(x, types.FunctionType | list | dict):
            if id(x) in self._known:
                return self.say("again")
            self._known[id(x)] = x
        if isinstance(x, types.FunctionType):
            self._python(x)
        elif isinstance(x, list | dict):
            super().value(x)
            del self._known[id(x)]
        elif hasattr(x, "__wrapped__") and not dataclasses.is_dataclass(x):  # jax.jit
            self.value(x.__wrapped__)
        elif isinstance(call := vars(type(x)).get("__call__"), types.FunctionType):
            self.say(type(x).__qualname__)
            self.value(call)
            self.value(dict(vars(x)))
        else:
            super().value(x)

    def _python(self, f: types.FunctionType) -> None:
        inside = f.__module__ is not None and f"{f.__module__}.".startswith(OWN)
        self.say("function", f.__module__ if inside else "", f.__qualname__)
        self.many(f.__defaults__ or ())
        self.mapping(f.__kwdefaults__ or {})
        self.many([c.cell_contents for c in f.__closure__ or () if _is_filled(c)])
        if not inside:
            self.value(f.__code__)
            read = {n: f.__globals__[n] for n in _names(f.__code__) if n in f.__globals__}
            self.mapping({n: x for n, x in sorted(read.items()) if _is_of(x, f)})


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes that code and the code within it read."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _is_of(x: Any, f: types.FunctionType) -> bool:
    """Is a global a value, or a function of the same module?"""
    if isinstance(x, types.FunctionType):
        return x.__module__ == f.__module__
    return not isinstance(x, types.ModuleType | type | types.BuiltinFunctionType)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
