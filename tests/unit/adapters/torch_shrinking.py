"""A torch module that was shrunk, held in torch against its compact function."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import torch as adapter
from tests.unit.adapters import shrinking
from tests.zoo.check import gradient_error, relative_error


def halved(module: Any, x: Any, semantics: str = "masked", **options: Any) -> Any:
    """The compact model of a lifted module; no parameter is zero."""
    fn, params = adapter.lift(module, x)
    return shrinking.halved(fn, params, jnp.asarray(x.numpy()), semantics=semantics, **options)


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def errors(module: Any, small: Any, x: Any) -> tuple[float, float]:
    """Of outputs and of parameters times their gradients, which folded scales leave, in float64."""
    still = copy.deepcopy(module).double().eval()
    outputs = still(x.double() if x.is_floating_point() else x)
    outputs.square().sum().backward()
    ours = {n: (p * p.grad).detach().numpy() for n, p in still.named_parameters()}
    with jax.enable_x64(True):
        widen = lambda a: jnp.asarray(a, jnp.float64) if a.dtype == np.float32 else a  # noqa: E731
        params, array = jax.tree.map(widen, (small.params, jnp.asarray(x.numpy())))
        expected = jax.jit(small.fn)(params, array)
        loss = lambda params: jnp.square(small.fn(params, array)).sum()  # noqa: E731
        gradients = jax.jit(jax.grad(loss, allow_int=True))(params)
    theirs = {n: np.asarray(at(params, n)) * np.asarray(at(gradients, n)) for n in ours}
    return relative_error(expected, outputs.detach().numpy()), gradient_error(theirs, ours)


def at(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree
