"""Equinox: a user's own module at the small sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxprune.adapters import _shrinking
from jaxprune.adapters._shrinking import Framework
from jaxprune.adapters._sizes import (
    Leaf,
    Reader,
    Rows,
    Scale,
    Table,
    first,
    leading,
    of,
    product,
    shape,
    size,
    trailing,
    unchanged,
)
from jaxprune.typing import Compact

__all__ = [
    "Scale", "first", "leading", "of", "product", "register", "shape", "shrink", "size", "trailing",
]  # fmt: skip


def _spatial(read: Callable[..., Reader], axis: int) -> Reader:
    """Reads an axis of a convolution's weight, (out, in / groups, *spatial), the last ones."""
    return lambda m, stored: read("weight", axis - m.num_spatial_dims)(m, stored)


_OUT, _IN, _GROUPS = _spatial(size, -2), _spatial(size, -1), _spatial(leading, -2)
_CONV = Rows(
    {
        "in_channels": product(_IN, of("groups", _GROUPS)),
        "out_channels": _OUT,
        "groups": _GROUPS,
    }
)
_CHANNELS = first(size("weight", -1), size("bias", -1))
_NORM = Rows({"shape": first(shape("weight"), shape("bias"))})
_CELL = Rows({"input_size": size("weight_ih", -1), "hidden_size": size("weight_hh", -1)})


TABLE = Table(
    {
        eqx.nn.Linear: Rows(
            {"in_features": size("weight", -1), "out_features": size("weight", -2)}
        ),
        eqx.nn.Conv: _CONV,
        eqx.nn.ConvTranspose: _CONV,
        eqx.nn.LayerNorm: _NORM,
        eqx.nn.RMSNorm: _NORM,
        eqx.nn.GroupNorm: Rows({"groups": leading("weight", -1), "channels": size("weight", -1)}),
        eqx.nn.BatchNorm: Rows({"input_size": _CHANNELS}),
        eqx.nn.MultiheadAttention: Rows(
            {
                "num_heads": leading("query_proj.weight", -2),
                "query_size": size("query_proj.weight", -1),
                "key_size": size("key_proj.weight", -1),
                "value_size": size("value_proj.weight", -1),
                "output_size": size("output_proj.weight", -2),
                "qk_size": trailing("query_proj.weight", -2),
                "vo_size": trailing("value_proj.weight", -2),
            },
            Scale("qk_size", into=(("query_proj.weight", "query_proj.bias"),)),
        ),
        eqx.nn.LSTMCell: _CELL,
        eqx.nn.GRUCell: _CELL,
        eqx.nn.Embedding: Rows(
            {"num_embeddings": size("weight", -2), "embedding_size": size("weight", -1)}
        ),
        eqx.nn.MLP: Rows(
            {
                "in_size": size("layers.0.weight", -1),
                "out_size": size("layers.-1.weight", -2),
                "width_size": size("layers.-1.weight", -1),
            }
        ),
        eqx.nn.RotaryPositionalEmbedding: Rows({"embedding_size": lambda m, stored: None}),
    }
)
WITHOUT_SIZES = (
    eqx.nn.AdaptivePool, eqx.nn.Dropout, eqx.nn.Identity, eqx.nn.Lambda, eqx.nn.PReLU, eqx.nn.Pool,
    eqx.nn.Sequential, eqx.nn.Shared, eqx.nn.SpectralNorm, eqx.nn.StateIndex, eqx.nn.WeightNorm,
)  # fmt: skip
TABLE.update({kind: Rows({}) for kind in WITHOUT_SIZES})


def _modules(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, tree
    below = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, eqx.Module) and x is not tree
    )
    for keys, found in below:
        if isinstance(found, eqx.Module):
            here = "/".join(
                str(getattr(k, "name", getattr(k, "idx", getattr(k, "key", k)))) for k in keys
            )
            yield from _modules(found, f"{path}/{here}" if path else here)


def _leaves(tree: Any) -> list[Leaf]:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, Leaf)]


def _is_none(x: Any) -> bool:
    return x is None


def _graft(module: Any, tree: Any) -> Any:
    """A copy of the module with other arrays; where the tree has None, it keeps its own."""
    own, treedef = jax.tree.flatten(module, is_leaf=_is_none)
    new = jax.tree.leaves(tree, is_leaf=_is_none)
    if len(own) != len(new):
        raise ValueError(
            f"small.params have {len(new)} leaves, and {type(module).__name__} {len(own)}; pass "
            "the module that was partitioned for jp.compact: params, static = "
            "eqx.partition(module, eqx.is_inexact_array)"
        )
    stands_in = any(isinstance(x, Leaf) for x in new)
    pairs = zip(own, new, strict=True)
    return jax.tree.unflatten(treedef, [_kept(a, stands_in) if b is None else b for a, b in pairs])


def _kept(x: Any, stands_in: bool) -> Any:
    return unchanged("", np.shape(x)) if stands_in and eqx.is_array(x) else x


def _assign(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a copy that nobody else holds yet."""
    object.__setattr__(module, name, value)


def _bare(call: Any, module: Any) -> tuple[Callable[..., Any], Any]:
    arrays, static = eqx.partition(module, eqx.is_array)
    return lambda arrays, *args: call(eqx.combine(arrays, static), *args), arrays


FRAMEWORK = Framework(
    "equinox",
    TABLE,
    _graft,
    _modules,
    _leaves,
    _assign,
    _bare,
    {
        "module(*args)": lambda m, *args: m(*args),
        "jax.vmap(module)(*args)": lambda m, *args: jax.vmap(m)(*args),
    },
)


def register(layer: type, sizes: Mapping[str, Reader], scale: Scale | None = None) -> None:
    """Tells :func:`shrink` which sizes a type of layers stores.

    Args:
      layer: the type; its subclasses have the same rows, unless they have their own.
      sizes: attribute -> where its size is read: ``size("kernel", -1)`` is an axis of the array at
        a dotted path, counted from the end so that layers may be stacked; ``leading`` and
        ``trailing`` read the heads and the size of heads x size; ``product``, ``first`` and ``of``
        combine others. A function ``(module, stored) -> (full, small)`` will do as well.
      scale: the size whose root the layer divides by, and the arrays that make up for it.

    Example:
      >>> import equinox as eqx, jax
      >>> from jaxprune.adapters import equinox as adapter
      >>> class Gated(eqx.Module):
      ...     both: eqx.nn.Linear
      ...     width: int = eqx.field(static=True)
      >>> adapter.register(Gated, {"width": adapter.trailing("both.weight", -2)})
    """
    TABLE[layer] = Rows(dict(sizes), scale)


def shrink(module: Any, small: Compact, *, call: Callable[..., Any] | None = None) -> Any:
    """Returns the user's own module at the small sizes, equal to ``small.fn``.

    Arrays are those of ``small``, and the module's where it has none.
    The sizes that layers store are set by the table of their types. A layer that has no rows gets
    numbers replaced that are the size of an axis in it. Where attention divides by the root of
    the head size, what is missing is folded into the query. All of that is held against
    ``small.fn`` on random arguments like those that were given to ``jp.compact``, in float64 where
    the module allows, to 1e-5 of the largest output.

    Args:
      module: a module, or a tree of such: ``(module, state)`` if both were partitioned for
        ``jp.compact``.
      small: compacted from a function that calls this module.
      call: how that function calls it, ``lambda module, *args: ...``. Unless told, it is
        ``module(*args)`` or ``jax.vmap(module)(*args)``, whichever has its shapes.

    Returns:
      A new module (or tree) of the same type. Train it, serialize it and shard it as any.

    Raises:
      ValueError: for a dimension that can't be had so, by its label, name and modules: what a norm
        divides by, sizes or scales in code of the user's own. Leave it out of the masks, compact
        with ``semantics="kept"``, or :func:`register` what the layer stores. For ``call``, where
        it can't be told; for params of another module, or a module in another mode.
      ArithmeticError: where the compact function gives NaN, so that nothing can be compared.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> from jaxprune.adapters import equinox as adapter
      >>> net = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
      >>> params, static = eqx.partition(net, eqx.is_inexact_array)
      >>> fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> masks = structure.masks({"layers/1/weight:1": np.arange(8) < 4})
      >>> small = jp.compact(fn, params, masks, jnp.ones((1, 3)))
      >>> adapter.shrink(net, small).width_size
      4
    """
    return _shrinking.shrink(FRAMEWORK, module, small, call)
