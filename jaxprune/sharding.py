"""How arrays lie on a mesh of devices, for everything that changes shapes or chooses entries.

Algorithms here are written for one device. On Auto axes of a mesh XLA spreads them by itself. On
Explicit axes the type of each array says how it lies, and an operation for which that is not clear
must be told: there algorithms run where those axes are Auto (:func:`freely`), and what they give
is laid out as what it belongs to. Where several processes hold parts of an array, each of them
calls, and :func:`host` gives its content to all.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def explicit_mesh(tree: Any) -> Any:
    """The mesh with Explicit axes on which some array of the tree lies, or None."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh if isinstance(x, jax.Array) else None
        if mesh is not None and mesh.explicit_axes:
            return mesh
    return None


def layout(x: Any) -> NamedSharding | None:
    """How an array lies on a mesh, where it is on one and that is known while tracing."""
    if not isinstance(x, jax.Array):
        return None
    if isinstance(x, jax.core.Tracer):
        return jax.typeof(x).sharding if explicit_mesh(x) else None
    return _on_devices(x.sharding)


def declared_layout(x: Any) -> NamedSharding | None:
    """As :func:`layout`, also of a ``jax.ShapeDtypeStruct`` that says it."""
    return _on_devices(x.sharding) if isinstance(x, jax.ShapeDtypeStruct) else layout(x)


def _on_devices(sharding: Any) -> NamedSharding | None:
    several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding if several else None


def parts(sharding: NamedSharding, rank: int) -> list[tuple[Any, int]]:
    """Along each axis the names of the mesh axes that it is cut over, and into how many parts."""
    names = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    return [(name, _count(sharding.mesh, name)) for name in names]


def _count(mesh: Any, names: Any) -> int:
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return 1
    return math.prod(mesh.shape[name] for name in ([names] if isinstance(names, str) else names))


def fitting(sharding: NamedSharding, shape: Sequence[Any]) -> NamedSharding:
    """The same for another shape: whole along the axes that the mesh does not divide."""
    pairs = zip(parts(sharding, len(shape)), shape)
    names = [name if _divides(n, size) else None for (name, n), size in pairs]
    return _with(sharding, names[: len(sharding.spec)])  # as short as it was written


def _divides(count: int, size: Any) -> bool:
    """A size may be a name, see ``jax.export``: then the mesh has divided it before."""
    return count == 1 or not isinstance(size, int | np.integer) or size % count == 0


def _with(sharding: NamedSharding, names: Sequence[Any]) -> NamedSharding:
    spec = sharding.spec
    more = {k: v for k in ("unreduced", "reduced") if (v := getattr(spec, k, None))}
    return NamedSharding(sharding.mesh, PartitionSpec(*names, **more))


def alongside(sharding: NamedSharding, full: Sequence[int], shape: Sequence[int]) -> NamedSharding:
    """For what broadcasts to an array of shape ``full``: as that, whole where sizes differ."""
    lead = len(full) - len(shape)
    names = [name for name, _ in parts(sharding, len(full))][lead:]
    same = [n == m for n, m in zip(shape, full[lead:], strict=True)]
    return _with(sharding, [name if ok else None for name, ok in zip(names, same)])


def put(x: Any, sharding: NamedSharding) -> Any:
    """``x``, laid out so; what is traced on Auto axes is left to the compiler."""
    if isinstance(x, jax.core.Tracer):
        return jax.sharding.reshard(x, sharding) if sharding.mesh.explicit_axes else x
    if layout(x) == sharding:
        return x
    if not isinstance(sharding.mesh, Mesh):  # something else is traced
        return jax.sharding.reshard(x, sharding) if sharding.mesh.explicit_axes else x
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda a: a, out_shardings=sharding)(x)
    return jax.device_put(x, sharding)


def whole(x: Any) -> Any:
    """An array that is at hand, in full on each device of its mesh."""
    found = None if isinstance(x, jax.core.Tracer) else layout(x)
    return x if found is None else put(x, NamedSharding(found.mesh, PartitionSpec()))


def like(x: Any, leaf: Any) -> Any:
    """A mask or score, laid out as the leaf that it broadcasts to."""
    found = layout(leaf)
    if found is None or not np.ndim(x):
        return x
    return put(x, alongside(found, np.shape(leaf), np.shape(x)))


def over(mask: Any, leaf: Any) -> Any:
    """A mask as ``jnp.where(mask, leaf, ...)`` wants it on Explicit axes: laid out as the leaf."""
    found = layout(leaf)
    if found is None or not (explicit_mesh(leaf) and explicit_mesh(mask) and np.ndim(mask)):
        return mask
    return put(jnp.broadcast_to(mask, np.shape(leaf)), found)


def freely(fun: Callable[..., Any], *args: Any, as_in: Any = None) -> Any:
    """``fun(*args)`` where XLA chooses how arrays are spread over Explicit axes, too.

    Args:
      fun: closes over no array that lies on the mesh.
      *args: trees of arrays.
      as_in: a tree like the results, of the leaves that they are laid out as; None: they are whole
        on each device.
    """
    mesh = explicit_mesh((args, as_in))
    if mesh is None:
        found = fun(*args)
        return found if as_in is None else jax.tree.map(like, found, as_in)
    free = _free(mesh)
    with jax.sharding.use_abstract_mesh(free):
        found = fun(*jax.tree.map(lambda x: _cast(x, free), args))
    if as_in is None:
        return jax.tree.map(lambda x: _typed(x, mesh, None), found)
    return jax.tree.map(lambda x, leaf: _typed(x, mesh, leaf), found, as_in)


def on_meshes(results: int) -> Callable[[Any], Any]:
    """Decorates a function of (params, ...) that gives so many trees like params; 0: others.

    On Explicit axes it runs freely; what it gives is laid out as params are.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))

        def run(args: Any, named: Any) -> Any:
            return function(*args, **named)

        @functools.wraps(function)
        def wrapper(*args: Any, **named: Any) -> Any:
            params = args[0] if args else named.get(first)
            trees = (None, params, (params,) * results)[min(results, 2)]
            return freely(run, args, named, as_in=trees)

        return wrapper

    return decorate


def _free(mesh: Any) -> Any:
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))


def _cast(x: Any, free: Any) -> Any:
    """An array with its Explicit axes made Auto; it stays where it is."""
    return jax.sharding.reshard(x, NamedSharding(free, PartitionSpec())) if explicit_mesh(x) else x


def _typed(x: Any, mesh: Any, leaf: Any) -> Any:
    """A result on Auto axes with the type of its leaf; what lies on no mesh needs none."""
    if not isinstance(x, jax.Array) or jax.typeof(x).sharding.mesh.empty:
        return like(x, leaf)
    named = NamedSharding(mesh, PartitionSpec())
    if explicit_mesh(leaf):
        named = alongside(jax.typeof(leaf).sharding, np.shape(leaf), np.shape(x))
    return jax.sharding.reshard(x, named)


def bound(fun: Callable[..., list[Any]], xs: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    """``fun(*xs)``, run freely, with the types of ``avals`` as far as they fit the results."""
    mesh = explicit_mesh(xs)
    if mesh is None:
        return fun(*xs)
    free = _free(mesh)
    with jax.sharding.use_abstract_mesh(free):
        found = fun(*(_cast(x, free) for x in xs))
    return [typed(x, aval) for x, aval in zip(found, avals, strict=True)]


def typed(x: Any, aval: Any) -> Any:
    """``x`` with the type that its program declares, as far as that fits its shape."""
    x = varying_as(x, aval)
    declared = getattr(aval, "sharding", None)
    if declared is None or not declared.mesh.explicit_axes:
        return x
    if not (isinstance(x, jax.core.Tracer) or layout(x)):
        return x
    named = fitting(declared, np.shape(x))
    return x if jax.typeof(x).sharding == named else jax.sharding.reshard(x, named)


def varying_as(x: Any, aval: Any) -> Any:
    """``x`` as what may differ from device to device of a ``shard_map`` around, as declared."""
    wanted = varying(aval)
    missing = wanted - varying(jax.typeof(x)) if wanted else wanted
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def varying(aval: Any) -> frozenset[str]:
    """The mesh axes of a ``shard_map`` along which an array of this type may differ."""
    kind = getattr(aval, "manual_axis_type", aval)
    return frozenset(getattr(kind, "varying", None) or getattr(kind, "vma", None) or ())


def abstract(aval: Any) -> jax.ShapeDtypeStruct:
    """A type to trace with; on Explicit axes it says how the array lies."""
    declared = getattr(aval, "sharding", None)
    named = declared if declared is not None and declared.mesh.explicit_axes else None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=named)


def at_full_size(x: Any, was: NamedSharding | None, shape: Sequence[int]) -> NamedSharding | None:
    """How a cut parameter lay at full size, as far as its type has to say it."""
    if not explicit_mesh(x):
        return None
    own = jax.typeof(x).sharding
    if was is not None and was.mesh.axis_names == own.mesh.axis_names:
        named = NamedSharding(own.mesh, was.spec)
        if parts(fitting(named, np.shape(x)), len(shape)) == parts(own, len(shape)):
            return named
    return fitting(own, shape)


def as_declared(x: Any, aval: Any) -> bool:
    """Whether an operand has the shape that its program declares, and lies as it says."""
    declared = getattr(aval, "sharding", None)
    if np.shape(x) != aval.shape or declared is None or not isinstance(x, jax.Array):
        return np.shape(x) == aval.shape
    own = jax.typeof(x).sharding
    return own.mesh.empty or own.spec == declared.spec


def reshaped(fun: Callable[..., Any], x: Any, to: NamedSharding | None = None) -> Any:
    """``fun(x)``, which only moves entries, laid out as ``to``, or as x, where the mesh divides it.

    An array at hand is moved in one compiled program, so that no device holds all of it.
    """
    own = layout(x)
    if own is None:
        return fun(x)
    to = to if to is not None and to.mesh.axis_names == own.mesh.axis_names else own
    if isinstance(x, jax.core.Tracer):
        return _moved(fun, to, x)
    shape = jax.eval_shape(fun, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape
    out = NamedSharding(own.mesh, fitting(to, shape).spec)
    return jax.jit(lambda x: _moved(fun, to, x), out_shardings=out)(x)


def _moved(fun: Callable[..., Any], to: NamedSharding, x: Any) -> Any:
    mesh = explicit_mesh(x)
    if mesh is None:
        return fun(x)
    free = _free(mesh)
    with jax.sharding.use_abstract_mesh(free):
        y = fun(_cast(x, free))
    return jax.sharding.reshard(y, NamedSharding(mesh, fitting(to, y.shape).spec))


def host(x: Any) -> np.ndarray:
    """The content of an array on this host; where it lies on several, each process has to ask."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
