"""What tells one function from another: a digest of its jaxpr, and one of its constants.

The text that is digested names variables in order and holds no address, no source line, no name
of a called function and nothing about placement, so that the same code has the same digest in
every process. Rules of custom derivatives are part of it. JAX writes the same function otherwise
in other versions.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxprune.artefacts.host import is_key, to_host
from jaxprune.ir import compat, primitives, views
from jaxprune.ir.primitives import Kind

# Parameters of equations that don't change what is computed (labels, where and how it is run), and
# the functions that make rules of derivatives, which are read by ``_rules``.
IGNORED = {
    "bwd", "fwd_jaxpr_thunk", "jvp_jaxpr_fun", "out_trees",
    "compiler_options_kvs", "ctx_mesh", "debug_info", "donated_invars", "in_layouts",
    "in_shardings", "inline", "keep_unused", "layout", "mesh", "name_and_src_info", "out_layouts",
    "out_sharding", "out_shardings", "policy", "prevent_cse", "resource_env", "sharding",
    "unconstrained_dims", "unroll",
}  # fmt: skip
_PLACES = re.compile(r"0x[0-9a-fA-F]+|(?:\S*[\\/])?\S+\.py:\d+(?::\d+)?")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


def fingerprint(fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> dict[str, str]:
    """Two digests of a trace: ``program``, and the ``constants`` that it holds.

    Args:
      fn: a function of ``(params, *args)``.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``.
      args: the other arguments, likewise. Nothing is computed.

    Example:
      >>> import jax.numpy as jnp
      >>> twice, thrice = (lambda p, n=n: jnp.sin(p) * n for n in (2, 3))
      >>> a, b = fingerprint(twice, jnp.ones(3), ()), fingerprint(thrice, jnp.ones(3), ())
      >>> a["program"] == b["program"], a["constants"] == b["constants"]
      (True, False)
    """
    digests = Digests()
    digests.jaxpr(jax.make_jaxpr(fn)(params, *args))
    return {"program": digests.program.hexdigest(), "constants": digests.constants.hexdigest()}


class Digests:
    """One walk over a program; ``program`` and ``constants`` grow with it."""

    def __init__(self) -> None:
        self.program, self.constants = hashlib.sha256(), hashlib.sha256()
        self._seen: list[Any] = []  # functions that are being written, for some hold themselves
        self._inside_rule = False

    def say(self, *words: Any) -> None:
        self.program.update("\x1f".join(map(str, words)).encode(errors="replace") + b"\x1e")

    # --------------------------------------------------------------------------- programs

    def jaxpr(self, closed: Any, consts: Sequence[Any] = ()) -> None:
        jaxpr, own = compat.open_jaxpr(closed)
        names: dict[Any, int] = {}
        self.say("jaxpr", len(jaxpr.constvars), *map(_type, (*jaxpr.constvars, *jaxpr.invars)))
        for array in own or consts:
            self.array(array)
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            names[variable] = len(names)
        for eqn in jaxpr.eqns:
            self.equation(eqn, names)
        self.say("out")
        self.atoms(jaxpr.outvars, names)

    def equation(self, eqn: Any, names: dict[Any, int]) -> None:
        self.say("eqn", eqn.primitive.name, *map(_type, eqn.outvars))
        self.atoms(eqn.invars, names)
        for variable in eqn.outvars:
            names[variable] = len(names)
        label = {"name"} if compat.sub_jaxprs(eqn) else set()
        for key, value in views.every(eqn):
            if key not in IGNORED | label:
                self.say("param", key)
                self.value(value)
        if not self._inside_rule:
            self.rules(eqn)

    def atoms(self, atoms: Iterable[Any], names: dict[Any, int]) -> None:
        for atom in atoms:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                self.array(np.asarray(atom.val, aval.dtype) if _plain(atom) else atom.val)
            else:
                self.say("var", names[atom])

    def rules(self, eqn: Any) -> None:
        """Rules of custom derivatives; inside of them the functions that they call are plain."""
        self._inside_rule = True
        try:
            for closed, consts in _rules(eqn):
                self.jaxpr(closed, consts)
        except Exception:  # what JAX keeps private has moved
            self.say("a rule that can't be read")
        finally:
            self._inside_rule = False

    # ---------------------------------------------------------------- what equations hold

    def array(self, x: Any) -> None:
        x = x if isinstance(x, (np.ndarray, np.generic, jax.Array)) else np.asarray(x)
        host = to_host(x)
        self.say("array", str(x.dtype) if is_key(x) else host.dtype.name, host.shape)
        self.constants.update(np.asarray(host, order="C").reshape(-1).view(np.uint8).data)

    def value(self, x: Any) -> None:
        """Anything that stands in an equation's parameters."""
        for kind, write in _WRITERS:
            if isinstance(x, kind):
                return write(self, x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return self.fields(x)
        return self.say(type(x).__name__, _PLACES.sub("", str(x)))

    def many(self, xs: Any) -> None:
        self.say("many", len(xs))
        for x in xs:
            self.value(x)

    def unordered(self, xs: Any) -> None:
        self.say("set", *sorted(_PLACES.sub("", repr(x)) for x in xs))

    def mapping(self, xs: Any) -> None:
        self.many(sorted(((str(k), v) for k, v in xs.items()), key=lambda item: item[0]))

    def fields(self, x: Any) -> None:
        names = [f.name for f in dataclasses.fields(x) if f.name not in IGNORED]
        self.say(type(x).__name__, *names)
        self.many([getattr(x, name, None) for name in names])

    def function(self, f: Any) -> None:
        """A Python function that a program holds (a callback, a kernel's index map)."""
        if any(f is other for other in self._seen):
            return self.say("again")
        self._seen.append(f)
        self.say("function", f.__qualname__)
        self.value(f.__code__)
        self.many(f.__defaults__ or ())
        self.mapping(f.__kwdefaults__ or {})
        self.many([cell.cell_contents for cell in f.__closure__ or () if _filled(cell)])
        self._seen.pop()

    def code(self, code: Any) -> None:
        self.say("code", code.co_code.hex(), code.co_names)
        self.many(code.co_consts)

    def partial(self, f: Any) -> None:
        self.many((f.func, f.args, f.keywords))

    def method(self, f: Any) -> None:
        self.many((f.__func__, f.__self__))


_WRITERS: tuple[tuple[Any, Callable[[Digests, Any], None]], ...] = (
    ((core.Jaxpr, core.ClosedJaxpr), Digests.jaxpr),
    ((np.ndarray, np.generic, jax.Array), Digests.array),
    (enum.Enum, lambda d, x: d.say(type(x).__name__, x.name)),
    (_PLAIN, lambda d, x: d.say(type(x).__name__, repr(x))),
    (types.FunctionType, Digests.function),
    (types.MethodType, Digests.method),
    (types.CodeType, Digests.code),
    (functools.partial, Digests.partial),
    ((types.ModuleType, type), lambda d, x: d.say(x.__name__)),
    ((tuple, list), Digests.many),
    ((set, frozenset), Digests.unordered),
    (dict, Digests.mapping),
    (jax.tree_util.PyTreeDef, lambda d, x: d.say("tree", x.num_leaves)),
)


def _rules(eqn: Any) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The rules of a function with derivatives of its own, as (jaxpr, constants)."""
    if primitives.kind(eqn) is Kind.CUSTOM_JVP:
        yield compat.custom_jvp_jaxpr(eqn)[:2]
    if primitives.kind(eqn) is Kind.CUSTOM_VJP:
        parts = compat.custom_vjp_parts(eqn)
        yield parts.fwd, parts.fwd_consts
        yield jax.make_jaxpr(lambda *xs: parts.bwd(*xs))(*_bwd_inputs(eqn, parts)), ()


def _bwd_inputs(eqn: Any, parts: compat.CustomVjp) -> list[Any]:
    """Types of residuals and cotangents."""
    outs: list[Any] = [v.aval for v in compat.open_jaxpr(parts.fwd)[0].outvars]
    count = len(outs) - len(eqn.outvars)
    saved, own = iter(outs[:count]), compat.rule_operands(eqn, [v.aval for v in eqn.invars])
    residuals = [next(saved) if i is None else own[i] for i in parts.forwarded]
    moving = list(map(compat.tangent, outs[count:]))
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*residuals, *moving)]


def _type(variable: Any) -> str:
    aval = variable.aval
    return f"{getattr(aval, 'dtype', aval)}{getattr(aval, 'shape', '')}"


def _plain(literal: Any) -> bool:
    return isinstance(literal.val, (bool, int, float, complex))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
