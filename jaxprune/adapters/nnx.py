"""Flax NNX: a user's own module at the small sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxprune.adapters import _shrinking
from jaxprune.adapters._refusing import Unequal
from jaxprune.adapters._shrinking import Framework
from jaxprune.adapters._sizes import (
    Leaf,
    Read,
    Reader,
    Rows,
    Scale,
    Table,
    first,
    inside,
    leading,
    leaf,
    of,
    product,
    shape,
    size,
    trailing,
    unchanged,
)
from jaxprune.typing import Compact, path_str

__all__ = [
    "Scale", "first", "leading", "of", "product", "register", "shape", "shrink", "size", "trailing",
]  # fmt: skip


def _kernel_axes(part: Callable[[Any], slice]) -> Reader:
    """Sizes of LinearGeneral: its kernel's axes are (batch..., in..., out...), its last ones."""

    def read(module: Any, stored: Any) -> Read:
        found = leaf(module, "kernel")
        return None if found is None else found.shape[part(module)]

    return read


def _in(m: Any) -> slice:
    return slice(-len(m.in_features) - len(m.out_features), -len(m.out_features))


def _out(m: Any) -> slice:
    return slice(-len(m.out_features), None)


def _batch(m: Any) -> slice:
    inner = len(m.in_features) + len(m.out_features)
    return slice(-inner - len(m.batch_axis), -inner)


def _transposed(axis: int, other: int) -> Reader:
    """An axis of a ConvTranspose's kernel, which may lie the other way round."""

    def read(module: Any, stored: Any) -> Read:
        return size("kernel", other if module.transpose_kernel else axis)(module, stored)

    return read


_GROUPS = leading("kernel", -1)
_FEATURES = first(size("scale", -1), size("bias", -1), size("mean", -1))
_HEADS, _HEAD = size("query.kernel", -2), size("query.kernel", -1)


def _recurrent(inputs: str, hidden: str) -> Rows:
    return Rows({"in_features": size(inputs, -2), "hidden_features": size(hidden, -2)})


TABLE = Table(
    {
        nnx.Linear: Rows({"in_features": size("kernel", -2), "out_features": size("kernel", -1)}),
        nnx.LinearGeneral: Rows(
            {
                "in_features": _kernel_axes(_in),
                "out_features": _kernel_axes(_out),
                "batch_axis": _kernel_axes(_batch),
            }
        ),
        nnx.Einsum: Rows({"kernel_shape": shape("kernel"), "bias_shape": shape("bias")}),
        nnx.Conv: Rows(
            {
                "kernel_shape": shape("kernel"),
                "in_features": product(size("kernel", -2), of("feature_group_count", _GROUPS)),
                "out_features": size("kernel", -1),
                "feature_group_count": _GROUPS,
            }
        ),
        nnx.ConvTranspose: Rows(
            {
                "kernel_shape": shape("kernel"),
                "in_features": _transposed(-2, -1),
                "out_features": _transposed(-1, -2),
            }
        ),
        nnx.Embed: Rows(
            {"num_embeddings": size("embedding", -2), "features": size("embedding", -1)}
        ),
        nnx.BatchNorm: Rows({"num_features": _FEATURES}),
        nnx.LayerNorm: Rows({"num_features": _FEATURES}),
        nnx.RMSNorm: Rows({"num_features": _FEATURES}),
        nnx.InstanceNorm: Rows({"num_features": _FEATURES}),
        nnx.GroupNorm: Rows(
            {
                "num_groups": first(leading("scale", -1), leading("bias", -1)),
                "group_size": first(trailing("scale", -1), trailing("bias", -1)),
            }
        ),
        nnx.MultiHeadAttention: Rows(
            {
                "num_heads": _HEADS,
                "num_kv_heads": size("key.kernel", -2),
                "head_dim": _HEAD,
                "qkv_features": product(_HEADS, _HEAD),
                "in_features": size("query.kernel", -3),
                "in_kv_features": size("key.kernel", -3),
                "out_features": size("out.kernel", -1),
            },
            Scale("head_dim", into=(("query_ln.scale",), ("query.kernel", "query.bias"))),
        ),
        nnx.LSTMCell: _recurrent("ii.kernel", "hi.kernel"),
        nnx.OptimizedLSTMCell: _recurrent("dense_i.kernel", "dense_h.kernel"),
        nnx.GRUCell: _recurrent("dense_i.kernel", "dense_h.kernel"),
        nnx.SimpleCell: _recurrent("dense_i.kernel", "dense_h.kernel"),
        nnx.LoRA: Rows({"in_features": size("lora_a", -2), "out_features": size("lora_b", -1)}),
    }
)
WITHOUT_SIZES = (
    nnx.Bidirectional, nnx.Dict, nnx.Dropout, nnx.List, nnx.PReLU, nnx.RNN, nnx.RNNCellBase,
    nnx.Sequential, nnx.SpectralNorm, nnx.WeightNorm,
)  # fmt: skip
TABLE.update({kind: Rows({}) for kind in WITHOUT_SIZES})


def _modules(module: Any) -> Iterator[tuple[str, Any]]:
    for path, found in nnx.iter_modules(module):
        yield "/".join(map(str, path)), found


def _leaves(module: Any) -> list[Leaf]:
    return [x for x in jax.tree.leaves(nnx.state(module)) if isinstance(x, Leaf)]


def _assign(module: Any, name: str, value: Any) -> None:
    held = getattr(module, name)
    if isinstance(held, nnx.Variable):
        held.set_value(value)
    else:
        setattr(module, name, value)


def _graft(module: Any, tree: Any) -> Any:
    """A copy of the module with other leaves; what the tree lacks stays, or has a stand-in."""
    graphdef, state = nnx.split(module)
    own, treedef = jax.tree_util.tree_flatten_with_path(state)
    new = {_keys(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    stands_in = any(isinstance(x, Leaf) for x in new.values())
    taken: dict[int, Any] = {}
    places = {_keys(path): i for i, (path, _) in enumerate(own)}
    for keys, x in new.items():
        i = _place(keys, places, module)
        if i in taken and not _same(taken[i], x):
            raise Unequal(
                f"{'/'.join(keys)} is shared: the module holds it twice, and params, being an "
                "nnx.Module, one copy for each place, which are cut differently; pass "
                "nnx.split(module)[1] as params to compact"
            )
        taken[i] = x
    rest = [unchanged(path_str(p), np.shape(x)) if stands_in else x for p, x in own]
    leaves = [taken.get(i, x) for i, x in enumerate(rest)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(path_str(path).split("/"))


def _place(keys: tuple[str, ...], places: Mapping[tuple[str, ...], int], module: Any) -> int:
    """Which leaf of the module it is: params may be a State, a tuple of such, a dict, a module."""
    for inner in (keys, keys[1:]):
        for ways in (inner, (*inner, "value")):
            if ways in places:
                return places[ways]
    shared = _at(module, keys)
    for other, i in places.items():
        if shared is not None and _at(module, other) is shared:
            return i
    raise ValueError(
        f"small.params hold {'/'.join(keys)}, which {type(module).__name__} has not; pass the "
        "module that was split for jp.compact"
    )


def _at(module: Any, keys: tuple[str, ...]) -> Any:
    """The variable at a path of keys."""
    return inside(module, ".".join(k for k in keys if k != "value"))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Leaf):
        return a.factors == b.factors
    return np.array_equal(a, b)


def _bare(call: Any, module: Any) -> tuple[Callable[..., Any], Any]:
    graphdef, state = nnx.split(module)
    return lambda state, *args: call(nnx.merge(graphdef, state), *args), state


FRAMEWORK = Framework(
    "nnx",
    TABLE,
    _graft,
    _modules,
    _leaves,
    _assign,
    _bare,
    {"module(*args)": lambda m, *args: m(*args)},
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
      >>> from flax import nnx
      >>> from jaxprune.adapters import nnx as adapter
      >>> class Gated(nnx.Module):
      ...     def __init__(self, width, rngs):
      ...         self.width, self.both = width, nnx.Linear(4, 2 * width, rngs=rngs)
      >>> adapter.register(Gated, {"width": adapter.trailing("both.kernel", -1)})
    """
    TABLE[layer] = Rows(dict(sizes), scale)


def shrink(module: Any, small: Compact, *, call: Callable[..., Any] | None = None) -> Any:
    """Returns the user's own module at the small sizes, equal to ``small.fn``.

    The module that is given stays as it is. Parameters and statistics are those of ``small``,
    modules that are shared stay shared, and what ``small`` does not hold (random streams, a state
    that was closed over) is the module's.
    The sizes that layers store are set by the table of their types. A layer that has no rows gets
    numbers replaced that are the size of an axis in it. Where attention divides by the root of
    the head size, what is missing is folded into the query. All of that is held against
    ``small.fn`` on random arguments like those that were given to ``jp.compact``, in float64 where
    the module allows, to 1e-5 of the largest output.

    Args:
      module: an ``nnx.Module``, in the mode (train, eval) that was compacted.
      small: compacted from a function that calls this module.
      call: how that function calls it, ``lambda module, *args: ...``. Unless told, it is
        ``module(*args)``.

    Returns:
      A new module of the same type. Train it, split it, save it and shard it as any.

    Raises:
      ValueError: for a dimension that can't be had so, by its label, name and modules: what a norm
        divides by, sizes or scales in code of the user's own. Leave it out of the masks, compact
        with ``semantics="kept"``, or :func:`register` what the layer stores. For ``call``, where
        it can't be told; for params of another module, or a module in another mode.
      ArithmeticError: where the compact function gives NaN, so that nothing can be compared.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> from jaxprune.adapters import nnx as adapter
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs))
      >>> graphdef, params = nnx.split(net)
      >>> fn = lambda p, x: nnx.merge(graphdef, p)(x)
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> masks = structure.masks({"layers/0/kernel/value:1": np.arange(8) < 4})
      >>> small = jp.compact(fn, params, masks, jnp.ones((1, 3)))
      >>> adapter.shrink(net, small).layers[0].out_features
      4
    """
    return _shrinking.shrink(FRAMEWORK, module, small, call)
