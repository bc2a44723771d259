"""What a model is here, and how a module of each framework becomes one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.PRNGKey(0)


class Model(NamedTuple):
    """A pure function of ``(params, *args)``, its initial parameters and its inputs."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


Builder = Callable[..., Model]


class Models(dict[str, Callable[[], Model]]):
    """The models of a group by name."""

    def add(self, name: str, build: Builder, *args: Any, **kwargs: Any) -> None:
        self[name] = partial(build, *args, **kwargs)

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Callable[[Builder], Builder]:
        """Decorates a builder; several rows may share one."""

        def register(build: Builder) -> Builder:
            self.add(name, build, *args, **kwargs)
            return build

        return register


def floats(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(*shape: int, high: int = 40, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(3, high, shape), jnp.int32)


def weights(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Parameters of plain functions: normal, scaled by the inputs of a kernel."""
    return {
        name: floats(*shape, seed=seed) / (shape[-2] if len(shape) > 1 else 1) ** 0.5
        for seed, (name, shape) in enumerate(shapes.items())
    }


def by_path(path: str) -> Any:
    """The class or function that a dotted path names."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def linen(module: Any, *args: Any, rngs: tuple[str, ...] = (), **kwargs: Any) -> Model:
    """A Flax Linen module; its state beside the parameters travels with them."""
    key = jax.random.key(0)
    init = jax.jit(partial(module.init, **kwargs))
    params = init({"params": key} | dict.fromkeys(rngs, key), *args)
    return Model(lambda p, *a: module.apply(p, *a, **kwargs), params, args)


def nnx_model(module: Any, *args: Any, call: Any = None, **kwargs: Any) -> Model:
    """A Flax NNX module, split; its random streams are part of the state, as all its variables."""
    from flax import nnx

    graphdef, state = nnx.split(module)
    call = call or (lambda m, *a: m(*a, **kwargs))
    return Model(lambda p, *a: call(nnx.merge(graphdef, p), *a), state, args)


def haiku_model(call: Callable[..., Any], *args: Any, **training: Any) -> Model:
    """A Haiku function that needs no random key; parameters and state as one tree.

    Batch statistics come into being in training only: the first call has ``training``.
    """
    import haiku as hk

    net = hk.transform_with_state(call)
    first = hk.transform_with_state(partial(call, **training) if training else call)
    params, state = jax.jit(first.init)(KEY, *args)
    if not state:
        return Model(lambda p, *a: net.apply(p, {}, None, *a)[0], params, args)
    tree = {"params": params, "state": state}
    return Model(lambda p, *a: net.apply(p["params"], p["state"], None, *a)[0], tree, args)


def equinox_model(module: Any, *args: Any, call: Any = None, batch: bool = True) -> Model:
    """An Equinox module, partitioned; ``call(module, *args)`` for one example."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)
    call = call or (lambda m, *a: m(*a))

    def fn(p: Any, *a: Any) -> Any:
        one = partial(call, eqx.combine(p, static))
        return jax.vmap(one)(*a) if batch else one(*a)

    return Model(fn, params, args)


def stateful_equinox(build: Callable[[], Any], *args: Any, call: Any = None) -> Model:
    """An Equinox module whose batch statistics live in an ``eqx.nn.State``."""
    import equinox as eqx

    module, state = eqx.nn.make_with_state(build)()
    module = eqx.nn.inference_mode(module)
    params, static = eqx.partition((module, state), eqx.is_inexact_array)
    call = call or (lambda m, s, x: m(x, s))

    def fn(p: Any, *a: Any) -> Any:
        m, s = eqx.combine(p, static)
        return jax.vmap(lambda *one: call(m, s, *one)[0], axis_name="batch")(*a)

    return Model(fn, params, args)
