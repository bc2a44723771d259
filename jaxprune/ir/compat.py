"""What JAX doesn't promise, in one place: parameter names that change between versions.

Everything here is read by attribute from equations that ``jax.make_jaxpr`` gave; nothing is
imported from private modules. ``tests/unit/ir/test_compat.py`` is the canary: it fails with a
readable message when a release renames what this module reads.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util
from jax.sharding import NamedSharding

from jaxprune.ir import primitives
from jaxprune.ir.primitives import Kind
from jaxprune.sharding import explicit_mesh


def open_jaxpr(jaxpr: Any) -> tuple[core.Jaxpr, tuple[Any, ...]]:
    """The bare jaxpr and its constants, of a closed one (0.10) or a bare one (0.12)."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, tuple(jaxpr.consts)
    return jaxpr, tuple(getattr(jaxpr, "consts", ()) or ())


class ScanParts(NamedTuple):
    """How the operands of a scan are laid out: ``num_consts``, then ``num_carry``, then xs."""

    num_consts: int
    num_carry: int
    length: Any
    reverse: bool
    unroll: Any
    jaxpr: Any


def scan_parts(eqn: Any) -> ScanParts:
    """Reads a scan equation; 0.12 holds the layout as a triple of trees, 0.10 as two numbers."""
    p = eqn.params
    if "num_consts" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    else:
        consts, carry = (len(tree) for tree in p["ft_in"].unpack()[:2])
    return ScanParts(consts, carry, p["length"], p["reverse"], p["unroll"], p["jaxpr"])


def scanned(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Of what belongs to a scan's operands, the part that it takes one row at a time."""
    parts = scan_parts(eqn)
    return operands[parts.num_consts + parts.num_carry :]


def sub_jaxprs(eqn: Any) -> list[Any]:
    """Every jaxpr that an equation holds in its parameters, open or closed."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
                found.append(item)
    return found


def context(eqn: Any) -> Any:
    """What an equation was traced under (a compute type, a mesh), as a context manager."""
    return eqn.ctx.manager


def tangent(aval: Any) -> Any:
    """The type of a value's tangent; a type that can't say is its own."""
    return aval.to_tangent_aval() if hasattr(aval, "to_tangent_aval") else aval


def bind(eqn: Any, xs: Sequence[Any], **changed: Any) -> list[Any]:
    """Binds the equation's primitive to ``xs``, with some parameters changed."""
    here = jax.sharding.get_abstract_mesh()
    with context(eqn), _where_it_runs(xs, here) as freed:
        if sub_jaxprs(eqn):
            return _bind_whole(eqn, xs)
        params = {**eqn.params, **changed}
        if freed:
            params = {k: None if isinstance(v, NamedSharding) else v for k, v in params.items()}
        out = eqn.primitive.bind(*xs, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def bind_plain(eqn: Any, xs: Sequence[Any], of_param: Callable[[Any], Any]) -> list[Any]:
    """Binds the equation's primitive to ``xs``, with ``of_param`` of each parameter."""
    params = {name: of_param(value) for name, value in eqn.params.items()}
    outs = eqn.primitive.bind(*xs, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


@contextlib.contextmanager
def _where_it_runs(xs: Sequence[Any], here: Any) -> Iterator[bool]:
    """Whether an equation of Explicit axes runs where they were made Auto; stays there."""
    traced = jax.sharding.get_abstract_mesh()
    freed = bool(set(traced.explicit_axes) & set(here.auto_axes)) and not explicit_mesh(list(xs))
    with jax.sharding.use_abstract_mesh(here) if freed else contextlib.nullcontext():
        yield freed


def _bind_whole(eqn: Any, xs: Sequence[Any]) -> list[Any]:
    """Equations with sub-programs are evaluated as a program of one equation: that is public."""
    variables = [v for v in eqn.invars if not isinstance(v, core.Literal)]
    values = [x for v, x in zip(eqn.invars, xs, strict=True) if not isinstance(v, core.Literal)]
    unique = dict(zip(variables, values, strict=True))
    info = jax.make_jaxpr(lambda: ())().jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    jaxpr = core.Jaxpr([], list(unique), list(eqn.outvars), [eqn], eqn.effects, debug_info=info)
    return jax.core.eval_jaxpr(jaxpr, [], *unique.values())


class ShardMapParts(NamedTuple):
    """How the operands and results of a ``shard_map`` lie on its mesh."""

    mesh: Any
    in_specs: Sequence[Any]
    out_specs: Sequence[Any]
    jaxpr: Any
    manual_axes: frozenset[str]
    check_vma: bool

    @property
    def devices(self) -> int:
        """How many run the program, each on its own."""
        sizes = dict(self.mesh.shape)
        return math.prod(sizes[axis] for axis in self.manual_axes)


def shard_map_parts(eqn: Any) -> ShardMapParts:
    """Reads a ``shard_map`` equation."""
    p = eqn.params
    manual = frozenset(p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"])
    return ShardMapParts(
        p["mesh"], p["in_specs"], p["out_specs"], p["jaxpr"], manual, p["check_vma"]
    )


def rule_operands(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Of what belongs to a custom derivative's operands, the part that its rule sees.

    Arrays that the function closes over come first; rules close over them, too.
    """
    return list(operands[eqn.params.get("num_consts", 0) :])


def custom_jvp_jaxpr(eqn: Any) -> tuple[Any, Sequence[Any], Sequence[bool]]:
    """The jvp rule of a ``custom_jvp_call`` as (jaxpr, consts, which tangents are zero)."""
    with context(eqn):
        return eqn.params["jvp_jaxpr_fun"].call_wrapped(*_all_move(eqn))


def _all_move(eqn: Any) -> list[bool]:
    return [False for _ in rule_operands(eqn, eqn.invars)]


class CustomVjp(NamedTuple):
    """The rule of a ``custom_vjp_call``."""

    fwd: Any  # jaxpr: operands -> residuals..., outputs...
    fwd_consts: Sequence[Any]
    bwd: Callable[..., Any]  # residuals..., cotangents... -> one for each operand of the rule
    forwarded: Sequence[int | None]  # residuals that are operands passed through


def custom_vjp_parts(eqn: Any) -> CustomVjp:
    """Reads a ``custom_vjp_call``; must follow one call of its forward rule, made here."""
    p = eqn.params
    with context(eqn):
        jaxpr, consts = p["fwd_jaxpr_thunk"].call_wrapped(*_all_move(eqn))
    forwarded = p["out_trees"]()[2]

    own = [v.aval for v in rule_operands(eqn, eqn.invars)]

    def bwd(*args: Any) -> list[Any]:
        with context(eqn):
            out = p["bwd"].call_wrapped(*args)
        given = list(out[0] if isinstance(out, tuple) else out)  # 0.12 adds a second result
        found = iter(given)
        every = [next(found) if len(given) == len(own) or _moves(aval) else None for aval in own]
        return [_array(x, aval) for x, aval in zip(every, own)]

    return CustomVjp(jaxpr, consts, bwd, forwarded)


def kernel_name(eqn: Any) -> str:
    """The kernel that an equation runs, '' where it runs none or a nameless one.

    A Pallas kernel without a name of its own goes by that of its function.
    """
    if primitives.kind(eqn) is not Kind.KERNEL:
        return ""
    given = eqn.params.get("name") or eqn.params.get("target_name")
    if given:
        return str(given)
    info = getattr(eqn.params.get("jaxpr"), "debug_info", None)
    return (getattr(info, "func_src_info", None) or "").split(" ")[0]


def kernel_text(eqn: Any) -> str:
    """What tells kernels of one name apart: a Pallas kernel's program, a target's attributes."""
    return str(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params.get("attributes"))


def _moves(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _array(cotangent: Any, aval: Any) -> Any:
    """Zeros for what JAX leaves symbolic: closed-over arrays and operands that can't move."""
    symbolic = not isinstance(cotangent, jax.Array)
    return jnp.zeros(aval.shape, aval.dtype if _moves(aval) else bool) if symbolic else cotangent


def names_in(size: Any) -> set[str]:
    """The names in a symbolic size such as ``2*b`` or ``floordiv(t, 4)``."""
    return set(re.findall(r"[A-Za-z_]\w*(?!\w*\()", str(size)))


def size_at(size: Any, numbers: Mapping[str, int]) -> int:
    """A symbolic size with numbers for names; JAX prints sizes as Python expressions."""
    functions = {"floordiv": int.__floordiv__, "mod": int.__mod__, "max": max, "min": min}
    return int(eval(str(size), {"__builtins__": {}, **functions, **numbers}))


def casts_to_itself(eqn: Any, args: Sequence[Any]) -> bool:
    """A cast from a weak type, which numbers that were known while tracing have lost."""
    if eqn.primitive.name != "convert_element_type":
        return False
    return bool(jax.typeof(args[0]).dtype == eqn.params["new_dtype"])


def with_equations(jaxpr: Any, eqns: Sequence[Any], consts: Mapping[Any, Any]) -> Any:
    """A closed jaxpr of some of a jaxpr's equations, and of those constants that are left."""
    rest = jaxpr.invars, jaxpr.outvars, list(eqns), jaxpr.effects, jaxpr.debug_info
    return core.ClosedJaxpr(core.Jaxpr([*consts], *rest), [*consts.values()])


@contextlib.contextmanager
def at_source(eqn: Any) -> Iterator[None]:
    """What is traced within keeps the equation's place in the user's code."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names):
        yield


def source_line(eqn: Any) -> str:
    """``model.py:157 (function)`` of the user's code, or '' where only library code is seen.

    The first frame outside installed packages is the user's; where there is none, the module path
    that frameworks attach, or JAX's own summary.
    """
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not any(part in frame.file_name for part in _LIBRARIES):
            return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.line_num} ({frame.function_name})"
    return name_stack(eqn) or source_info_util.summarize(eqn.source_info)


_LIBRARIES = ("site-packages", "dist-packages", "/lib/python", "jaxprune/")


def name_stack(eqn: Any) -> str:
    """The module path that frameworks attach to equations, ``Encoder/Block_3``."""
    return str(eqn.source_info.name_stack)
