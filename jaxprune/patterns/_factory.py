"""What makes a pattern is not the pattern: an error says how to call one after the other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np

from jaxprune._renamed import KEPT, Fn


def factory(call: str) -> Callable[[Fn], Fn]:
    """A decorator of a factory of patterns, which is not to be called with scores.

    Args:
      call: how users call it.

    Raises:
      TypeError: when it is given scores, or more than it takes by position.

    Example:
      >>> import jaxprune as jp
      >>> jp.unstructured({"w": 1.0}, 0.5)
      Traceback (most recent call last):
      TypeError: jp.unstructured is a factory of patterns and got 2 arguments; call what it makes: \
jp.unstructured()(scores, 0.5)
    """

    def decorate(make: Fn) -> Fn:
        given = inspect.signature(make).parameters.values()
        most = sum(p.kind == p.POSITIONAL_OR_KEYWORD for p in given)

        @functools.wraps(make, assigned=KEPT)
        def checked(*args: Any, **options: Any) -> Any:
            if len(args) > most or (len(args) > 1 and _holds_arrays(args[0])):
                raise TypeError(
                    f"jp.{make.__name__} is a factory of patterns and got {len(args)} arguments; "
                    f"call what it makes: {call}(scores, 0.5)"
                )
            return make(*args, **options)

        return cast(Fn, checked)

    return decorate


def _holds_arrays(value: Any) -> bool:
    """Whether it is a tree such as scores, and no size, name or structure."""
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))
