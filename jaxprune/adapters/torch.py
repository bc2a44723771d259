"""PyTorch: a user's own module as a JAX function, and the module at the small sizes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.adapters import _checking, _lifting, _refusing, _shrinking
from jaxprune.adapters._lifting import torch
from jaxprune.adapters._shrinking import Framework
from jaxprune.adapters._sizes import (
    Leaf,
    Reader,
    Rows,
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
    "first", "leading", "lift", "of", "product", "register", "shape", "shrink", "size", "trailing",
]  # fmt: skip

nn = torch.nn
_CHANNELS = Rows({"num_features": first(*(size(n, -1) for n in ("weight", "running_mean")))})
_NORM = Rows({"normalized_shape": first(shape("weight"), shape("bias"))})
_GROUPS = leading("weight", 0)
_CONV = Rows(
    {
        "in_channels": product(size("weight", 1), of("groups", _GROUPS)),
        "out_channels": size("weight", 0),
        "groups": _GROUPS,
    }
)
_TRANSPOSED = Rows(
    {
        "in_channels": size("weight", 0),
        "out_channels": product(size("weight", 1), of("groups", _GROUPS)),
        "groups": _GROUPS,
    }
)
_LOOKUP = Rows({"num_embeddings": size("weight", 0), "embedding_dim": size("weight", 1)})
_CELL = Rows({"input_size": size("weight_ih", 1), "hidden_size": size("weight_hh", 1)})
_KEYS, _VALUES = ((f"{n}_proj_weight", "in_proj_weight") for n in "kv")
_FIRST = "encoder.layers.0"

TABLE = Table(
    {
        nn.Linear: Rows({"in_features": size("weight", 1), "out_features": size("weight", 0)}),
        nn.Bilinear: Rows(
            {
                "in1_features": size("weight", 1),
                "in2_features": size("weight", 2),
                "out_features": size("weight", 0),
            }
        ),
        **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
        **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
        **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _CHANNELS),
        **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _CHANNELS),
        nn.SyncBatchNorm: _CHANNELS,
        nn.LayerNorm: _NORM,
        nn.RMSNorm: _NORM,
        nn.GroupNorm: Rows({"num_groups": leading("weight", 0), "num_channels": size("weight", 0)}),
        nn.PReLU: Rows({"num_parameters": size("weight", 0)}),
        nn.Embedding: _LOOKUP,
        nn.EmbeddingBag: _LOOKUP,
        nn.MultiheadAttention: Rows(
            {
                "embed_dim": size("out_proj.weight", 0),
                "kdim": first(*(size(n, 1) for n in _KEYS)),
                "vdim": first(*(size(n, 1) for n in _VALUES)),
                "num_heads": leading("out_proj.weight", 1),
                "head_dim": trailing("out_proj.weight", 1),
            }
        ),
        nn.Transformer: Rows(
            {
                "d_model": size(f"{_FIRST}.linear1.weight", 1),
                "nhead": leading(f"{_FIRST}.self_attn.out_proj.weight", 1),
            }
        ),
        nn.RNNBase: Rows(
            {
                "input_size": size("weight_ih_l0", 1),
                "hidden_size": first(*(size(f"weight_{n}_l0", 1) for n in ("hr", "hh"))),
                "proj_size": size("weight_hr_l0", 0),
            }
        ),
        nn.RNNCellBase: _CELL,
    }
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # bases of the users' own blocks
WITHOUT_SIZES = tuple(
    kind
    for kind in vars(nn).values()
    if inspect.isclass(kind)
    and issubclass(kind, nn.Module)
    and TABLE.rows(kind) is None
    and kind not in (nn.Module, nn.Unflatten, *_CONTAINERS)
)
TABLE.update({kind: Rows({}) for kind in WITHOUT_SIZES})


def _call(module: Any, *args: Any) -> Any:
    return module(*args)


def _modules(module: Any) -> Iterator[tuple[str, Any]]:
    for name, found in module.named_modules():
        yield name.replace(".", "/"), found


def _leaves(module: Any) -> list[Leaf]:
    return [x for x in _lifting.tensors(module).values() if isinstance(x, Leaf)]


def _graft(module: Any, tree: Any) -> Any:
    """A copy of the module with other tensors; what the tree lacks stays, or has a stand-in."""
    own, new = _lifting.tensors(module), _lifting.named(tree)
    for name in new:
        if name not in own:
            raise ValueError(
                f"small.params hold {name}, which {type(module).__name__} has not; pass the "
                "module that was lifted: jaxprune.adapters.torch.lift(module, *args)"
            )
    if any(isinstance(x, Leaf) for x in new.values()):
        rest = {name: unchanged(name, x.shape) for name, x in own.items()}
        return _lifting.replaced(module, rest | new)
    return _lifting.replaced(
        module, {name: _lifting.alike(x, own[name]) for name, x in new.items()}
    )


FRAMEWORK = Framework(
    "torch",
    TABLE,
    _graft,
    _modules,
    _leaves,
    setattr,
    _lifting.pure,
    {"module(*args)": _call},
    _lifting.run,
)


def register(layer: type, sizes: Mapping[str, Reader]) -> None:
    """Tells :func:`shrink` which sizes a type of modules stores.

    Args:
      layer: the type; its subclasses have the same rows, unless they have their own.
      sizes: attribute -> where its size is read: ``size("weight", 0)`` is an axis of the parameter
        or buffer at a dotted path; ``leading`` and ``trailing`` read the heads and the size of
        heads x size; ``product``, ``first`` and ``of`` combine others. A function
        ``(module, stored) -> (full, small)`` will do as well.

    Example:
      >>> import torch
      >>> from jaxprune.adapters import torch as adapter
      >>> class Gated(torch.nn.Module):
      ...     def __init__(self, width):
      ...         super().__init__()
      ...         self.width, self.both = width, torch.nn.Linear(4, 2 * width)
      >>> adapter.register(Gated, {"width": adapter.trailing("both.weight", 0)})
    """
    TABLE[layer] = Rows(dict(sizes))


def lift(
    module: Any, *args: Any, call: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns a PyTorch module as a pure JAX function ``fn(params, *args)``, and its parameters.

    The function computes what the module does in evaluation mode, for every batch size and length
    that it takes, and is differentiated, compiled and pruned as any. It is held against the module
    in torch at once, on random arguments like those given (integers as given), in float64 where
    the module allows, to 1e-5 of the largest output. The module stays as it is, and the function
    does not change with it.

    Args:
      module: a ``torch.nn.Module`` in any mode.
      *args: example arguments, tensors or arrays.
      call: how the module is called, ``lambda module, *args: module(*args).logits``; unless told,
        it is ``module(*args)``. What it gives is a tree of tensors.

    Returns:
      The function, of arrays, and a nested dictionary of copies of all parameters and buffers:
      ``params["layers"]["0"]["weight"]`` is ``module.state_dict()["layers.0.weight"]``. A tensor
      that stands in several places is one leaf, at the first of them.

    Raises:
      TypeError: for what is no module.
      NotImplementedError: for an operation that torchax has not, by name and line.
      ValueError: for a module that JAX can't trace (branches on values), or that gives other
        numbers, as one that draws random ones.

    Example:
      >>> import jax, torch
      >>> from jaxprune.adapters import torch as adapter
      >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
      >>> fn, params = adapter.lift(net, torch.ones(1, 3))
      >>> jax.tree.map(lambda x: x.shape, params)
      {'0': {'bias': (8,), 'weight': (8, 3)}, '2': {'bias': (2,), 'weight': (2, 8)}}
      >>> fn(params, jax.numpy.ones((5, 3))).shape
      (5, 2)
    """
    _lifting.check("lift", module)
    call, kind = call or _call, type(module).__name__
    fn, params = _lifting.pure(call, module)
    examples = jax.tree.map(lambda x: jnp.asarray(_lifting.array(x)), args)
    reference = _checking.Reference(fn, params, examples)
    try:
        error = reference.error(functools.partial(_lifting.run, call, module))
    except (NotImplementedError, _checking.NotNumbers):
        raise
    except Exception as raised:
        raise ValueError(
            f"{kind} can't be lifted: at {_lifting.where(raised)} it raises "
            f"{type(raised).__name__}: {str(raised)[:300]}"
        ) from raised
    if not error <= _checking.tolerance(params):
        raise ValueError(
            f"{kind}, lifted by torchax {_lifting.torchax.__version__}, differs from torch by "
            f"{error:.1e}, relative to the largest output: it draws random numbers or keeps state "
            "in evaluation mode, or torchax computes one of its operations otherwise"
        )
    return fn, params


def shrink(
    module: Any, small: Compact, *, call: Callable[..., Any] | None = None, gradients: bool = True
) -> Any:
    """Returns the user's own module at the small sizes, equal to ``small.fn``.

    It is a deep copy with the parameters and buffers of ``small`` in the module's own types and on
    its devices; the module that is given stays as it is, and tensors that are shared stay shared.
    The sizes that modules store are set by the table of their types. A module that has no rows
    gets numbers replaced that are the size of an axis in it. Where attention divides by the root
    of the head size, what is missing is folded into the query. All of that is held against
    ``small.fn`` in torch, in evaluation mode, on random arguments like those that were given to
    ``jp.compact``, in float64 where the module allows, to 1e-5 of the largest output and gradient.

    Args:
      module: the module that was lifted.
      small: compacted from what :func:`lift` gave.
      call: how the module is called, where :func:`lift` was told.
      gradients: False compares outputs alone, for modules that detach or that are no longer
        trained.

    Returns:
      A plain ``torch.nn.Module`` of the same type and in the same mode. Train, save, compile and
      export it as any.

    Raises:
      TypeError: for what is no module.
      ValueError: for a dimension that can't be had so, by its label, name and modules: what a norm
        divides by, heads that ``nn.MultiheadAttention`` ties to its width, sizes in code of the
        user's own. Leave it out of the masks, compact with ``semantics="kept"``, or
        :func:`register` what the module stores. For ``call``, where it can't be told; for params
        of another module; for gradients that differ.
      ArithmeticError: where the compact function gives NaN, so that nothing can be compared.

    Example:
      >>> import jax.numpy as jnp, numpy as np, torch, jaxprune as jp
      >>> from jaxprune.adapters import torch as adapter
      >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
      >>> fn, params = adapter.lift(net, torch.ones(1, 3))
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> masks = structure.masks({"2/weight:1": np.arange(8) < 4})
      >>> small = jp.compact(fn, params, masks, jnp.ones((1, 3)))
      >>> adapter.shrink(net, small)[0]
      Linear(in_features=3, out_features=4, bias=True)
    """
    _lifting.check("shrink", module)
    new = _shrinking.shrink(FRAMEWORK, module, small, call)
    if gradients:
        reference = _checking.Reference(small.fn, small.params, small.certificate._checker.args)
        times = _lifting.gradient_error(reference, call or _call, new)
        if not times <= 1:
            raise _refusing.Unequal(
                f"{type(module).__name__} at the small sizes gives the outputs of small.fn, but "
                f"gradients that differ {times:.0f} times as much as they may, relative to the "
                "largest: its forward detaches, or stops gradients, where JAX differentiates; to "
                "compare outputs alone write jaxprune.adapters.torch.shrink(module, small, "
                "gradients=False)"
            )
    return new
