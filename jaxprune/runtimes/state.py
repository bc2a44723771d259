"""State in a served model: what a call reads and hands back is an input of the engine's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxprune.compaction.model import Compact
from jaxprune.structure.infer import followed, paths_of


@dataclass(frozen=True, eq=False)
class Stateful:
    """A function of ``(state, *args)``, where state is a part of the parameters by its keys.

    Attributes:
      fn: of ``(params, *args)``.
      params: all of them.
      keys: of params, whose values are state.
      small: the compact model that the function is of, if any.
    """

    fn: Callable[..., Any]
    params: Mapping[str, Any]
    keys: tuple[str, ...]
    small: Compact | None = None

    @property
    def state(self) -> dict[str, Any]:
        return {key: self.params[key] for key in self.keys}

    def __call__(self, state: Any, *args: Any) -> Any:
        return self.fn({**self.params, **state}, *args)


def stateful(
    fn: Any, args: tuple[Any, ...], state: str | Sequence[str]
) -> tuple[Stateful, tuple[Any, ...]]:
    """The function whose state is its first argument, and its arguments.

    Raises:
      ValueError: for keys that params don't have.
    """
    small = fn if isinstance(fn, Compact) else None
    params, rest = (small.params, args) if small else (args[0] if args else None, args[1:])
    keys = (state,) if isinstance(state, str) else tuple(state)
    known = list(params) if isinstance(params, Mapping) else []
    missing = [key for key in keys if key not in known]
    if missing or not keys:
        raise ValueError(
            f"state={state!r} names no part of params, whose keys are {known}; pass keys of params "
            'whose values each call hands back anew: state="cache"'
        )
    assert isinstance(params, Mapping)
    taken = Stateful(small.fn if small else fn, params, keys, small)
    return taken, (taken.state, *rest)


def check_constant(params: Any, results: Any) -> None:
    """Refuses parameters that a call updates: in the engine's file they would never change.

    ``results`` are the types of what the call gives.

    Raises:
      ValueError: with the paths, and the call to write.
    """
    given, found = (
        [(p, np.shape(x)) for p, x in zip(paths_of(tree), jax.tree.leaves(tree))]
        for tree in (params, results)
    )
    updated = sorted({name for name in followed(found, given) if name})
    if updated:
        key = updated[0].split("/")[0]
        raise ValueError(
            f"each call hands back {', '.join(updated[:3])} anew, and parameters are constants of "
            f'the file; write jp.export(..., state="{key}"), and call it with the state: '
            f'model.fn(model.params, {{"{key}": ...}}, *args)'
        )
