"""PyTorch modules as pure JAX functions, by torchax: tensors and arrays, copies, runs, errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
from jaxprune.adapters import _checking

MISSING = (
    "jaxprune.adapters.torch needs PyTorch and a torchax that imports beside it (0.0.13 does "
    "beside torch 2.12, not 2.13): pip install 'jaxprune[torch]'; here importing them raises "
    "{kind}: {error}"
)
try:
    import torch

    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torchax says of parts that are not used here
        import torchax
        from torchax.tensor import OperatorNotFound
    torch.backends.mha.set_fastpath_enabled(fast)  # torchax turns it off for the whole process
except (ImportError, AttributeError) as missing:
    raise ImportError(MISSING.format(kind=type(missing).__name__, error=missing)) from missing

GRADIENTS = 1e-3  # the largest relative error of any, where they are not in float64
Call = Callable[..., Any]  # (module, *args) -> outputs
_LIBRARIES = (torch, torchax, jax, jaxprune, np, contextlib, copy)  # no code of the user's
_ROOTS = tuple(os.path.dirname(p.__file__ or "") + os.sep for p in _LIBRARIES)


def array(x: Any) -> Any:
    """A copy of a tensor on JAX's side, 64 bits where JAX has them; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return jnp.asarray(x) if isinstance(x, np.ndarray) else x
    x = x.detach().cpu()
    if x.dtype is torch.bfloat16:  # NumPy has no such type.
        return jnp.array(x.float().numpy()).astype(jnp.bfloat16)
    return jnp.array(x.numpy())


def tensor(x: Any) -> Any:
    """A copy of an array on torch's side; integers, which index there, are of 64 bits."""
    if not isinstance(x, jax.Array):
        return x
    x = torch.from_dlpack(jax.device_put(x, jax.devices("cpu")[0])).clone()
    return x.long() if x.dtype is torch.int32 else x


def check(call: str, module: Any) -> None:
    """Raises for what is no module."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"{call} wants a torch.nn.Module, got {type(module).__name__}; write "
            f"jaxprune.adapters.torch.{call}(module, ...)"
        )


def tensors(module: Any) -> dict[str, Any]:
    """Parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def replaced(module: Any, new: Mapping[str, Any]) -> Any:
    """A deep copy of a module that holds other things instead of the tensors of these names.

    A tensor that stands in several places is replaced in all of them.
    """
    own = tensors(module)
    return copy.deepcopy(module, {id(own[name]): x for name, x in new.items()})


def alike(x: Any, old: Any) -> Any:
    """An array as a tensor, or a parameter, of another's type and on its device."""
    new = tensor(jnp.asarray(x)).to(old.device, old.dtype)
    return torch.nn.Parameter(new, old.requires_grad) if _is_parameter(old) else new


def _is_parameter(x: Any) -> bool:
    return isinstance(x, torch.nn.Parameter)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a": {"b": x}}`` of ``{"a.b": x}``."""
    tree: dict[str, Any] = {}
    for name, x in flat.items():
        *above, last = name.split(".")
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), above, tree)[last] = x
    return tree


def named(tree: Any) -> dict[str, Any]:
    """``{"a.b": x}`` of ``{"a": {"b": x}}``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(getattr(key, "key", key)) for key in path): x for path, x in leaves}


class _Called(torch.nn.Module):
    """A module, called as a function calls it."""

    def __init__(self, module: Any, call: Call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *args: Any) -> Any:
        return self.call(self.module, *args)


def pure(call: Call, module: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A JAX function of ``(params, *args)`` that computes what the module does, and its params."""
    called = _Called(_without_weights(module), call)
    env = torchax.default_env()

    def fn(params: Any, *args: Any) -> Any:
        states = {f"module.{name}": jnp.asarray(x) for name, x in named(params).items()}
        states, args = env.j2t_iso((states, jax.tree.map(array, args)))
        with _named(type(module).__name__), _slow_path(), env:
            return env.t2j_iso(torch.func.functional_call(called, states, args))

    return fn, nested({name: array(x) for name, x in tensors(module).items()})


def _without_weights(module: Any) -> Any:
    """A copy in evaluation mode, of shapes; tensors that are no buffers are constants of JAX."""
    own = tensors(module)
    meta = {name: x.detach().to("meta") for name, x in own.items()}
    meta = {n: torch.nn.Parameter(x) if _is_parameter(own[n]) else x for n, x in meta.items()}
    still = replaced(module, meta).eval()
    for layer in still.modules():
        for name, x in vars(layer).items():
            if isinstance(x, torch.Tensor):
                vars(layer)[name] = torchax.default_env().j2t_iso(array(x))
    return still


@contextlib.contextmanager
def _slow_path() -> Iterator[None]:
    """Attention by operations that torchax knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _named(module: str) -> Iterator[None]:
    """Tells the operation that torchax lacks."""
    try:
        yield
    except OperatorNotFound as error:
        raise NotImplementedError(
            f"{module} can't be lifted: torchax {torchax.__version__} has no JAX form of an "
            f"operation at {where(error)}: {error}; write it by other operations, or teach it by "
            "torchax.default_env().override_op_definition"
        ) from error


def where(error: BaseException) -> str:
    """The line of the user's own code that raised, or else that of a layer of torch."""
    frames = traceback.extract_tb(error.__traceback__)
    layers = [f for f in frames if f.name == "forward"]
    own = [f for f in frames if not f.filename.startswith(_ROOTS)]
    last = [*frames, *layers, *own][-1]
    return f"{os.path.basename(last.filename)}:{last.lineno} ({last.name})"


def run(call: Call, module: Any, wide: bool, *args: Any) -> Any:
    """What a module gives in torch, in evaluation mode."""
    with torch.no_grad():
        return jax.tree.map(array, call(_still(module, wide), *jax.tree.map(tensor, args)))


def _still(module: Any, wide: bool) -> Any:
    still = copy.deepcopy(module).cpu().eval()
    return still.double() if wide else still


def gradient_error(reference: _checking.Reference, call: Call, module: Any) -> float:
    """The largest error of the gradients that torch has, as a multiple of what is allowed.

    They are those of a weighted sum of the outputs. Where a parameter of the module is a multiple
    of the function's, for a scale is folded into it, its gradient is by the chain rule.
    """

    def measure(wide: bool, args: Any, outputs: Any) -> float:
        params = _checking.widened(reference.params) if wide else reference.params
        ours = _gradients(call, module, wide, *args)
        if not ours or not any(map(_checking.floating, jax.tree.leaves(outputs))):
            return 0.0
        loss = lambda params: _weighted(reference.fn(params, *args), jnp)  # noqa: E731
        theirs = named(_checking.jit(jax.grad(loss, allow_int=True))(params))
        old, new = named(params), tensors(_still(module, wide))
        largest = max(float(np.max(np.abs(theirs[n]), initial=0.0)) for n in ours) or 1.0
        errors = [_error(g, theirs[n], array(new[n]), old[n]) for n, g in ours.items()]
        allowed = _checking.tolerance(reference.params) if wide else GRADIENTS
        return max(errors) / largest / allowed

    return reference.measured(measure)


def _gradients(call: Call, module: Any, wide: bool, *args: Any) -> dict[str, Any]:
    """By parameter; empty where the module gives none, as under ``torch.no_grad``."""
    still = _still(module, wide)
    loss = _weighted(call(still, *jax.tree.map(tensor, args)), torch)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    return {n: array(p.grad) for n, p in still.named_parameters() if p.grad is not None}


def _weighted(outputs: Any, xp: Any) -> Any:
    """A sum of all floats among the outputs, each entry with a weight of its own."""
    found = [x for x in jax.tree.leaves(outputs) if hasattr(x, "dtype") and _is_real(x)]
    return sum(
        (xp.cos(xp.arange(x.size if xp is jnp else x.numel())).reshape(x.shape) * x).sum()
        for x in found
    )


def _is_real(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, torch.Tensor) else _checking.floating(x)


def _error(ours: Any, theirs: Any, new: Any, old: Any) -> float:
    """The largest error of a gradient by the old parameter, of which the new one is a multiple."""
    ours, theirs, new, old = map(np.asarray, (ours, theirs, new, old))
    if not np.array_equal(new, old):
        told = old != 0
        ours, theirs = ours[told] * (new[told] / old[told]), theirs[told]
    return float(np.max(np.abs(ours - theirs), initial=0.0))
