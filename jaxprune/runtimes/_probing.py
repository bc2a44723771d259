"""Which operations a converter that names none can't write: each is converted alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxprune.ir import compat, views
from jaxprune.runtimes.freezing import Frozen


def converted(name: str, frozen: Frozen, convert: Callable[[Frozen], Any]) -> Any:
    """What a converter makes of a program.

    Raises:
      NotImplementedError: for operations that it can't write, with their source lines.
    """
    try:
        return convert(frozen)
    except ImportError:
        raise
    except Exception as error:
        told = _unsupported(frozen, convert, error)
        raise NotImplementedError(f"the runtime {name} can't do {told}") from error


def zeros(frozen: Frozen) -> list[np.ndarray]:
    """Arguments of a program to try it on; names of sizes are 2."""
    found = []
    for x in jax.tree.leaves(frozen.args):
        names = {name: 2 for size in x.shape for name in compat.names_in(size)}
        found.append(np.zeros([compat.size_at(size, names) for size in x.shape], x.dtype))
    return found


def _unsupported(frozen: Frozen, convert: Callable[[Frozen], Any], error: Exception) -> str:
    """The operations that fail alone, with their source lines, and what the converter says."""
    jaxpr, consts = compat.open_jaxpr(frozen.closed)
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    found: dict[Any, str] = {}
    tried: set[Any] = set()
    for eqn in jaxpr.eqns:
        kind = _kind(eqn)
        if kind not in tried and _fails(eqn, known, convert):
            found[kind] = f"{eqn.primitive.name} at {compat.source_line(eqn)}"
        tried.add(kind)
    what = ", ".join(dict.fromkeys(found.values())) or "this function"
    return f"{what}: {type(error).__name__}: {_first_line(error)}"


def _kind(eqn: Any) -> tuple[Any, ...]:
    return eqn.primitive.name, str(views.every(eqn)), *(str(v.aval) for v in eqn.invars)


def _alone(eqn: Any, known: dict[Any, Any]) -> Frozen:
    """The program of one equation; what is constant in the whole program is so in this one."""
    given = [v for v in eqn.invars if not isinstance(v, core.Literal) and v not in known]

    def run(*xs: Any) -> list[Any]:
        values = known | dict(zip(given, xs, strict=True))
        return compat.bind(
            eqn, [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
        )

    args = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in given)
    closed, out = jax.make_jaxpr(run, return_shape=True)(*args)
    return Frozen(closed, args, jax.tree.structure(args), jax.tree.structure(out))


def _fails(eqn: Any, known: dict[Any, Any], convert: Callable[[Frozen], Any]) -> bool:
    try:
        convert(_alone(eqn, known))
    except Exception:
        return True
    return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""
