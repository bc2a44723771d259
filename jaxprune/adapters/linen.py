"""Flax Linen: a module that runs at the small sizes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from jaxprune.typing import Compact

PARAMS = "params"


class Small(nn.Module):
    """A Linen module at the small sizes; :func:`wrap` makes it.

    Attributes:
      runner: the module and its compact model, with the programs that were cut.
    """

    runner: _Runner

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module gives: its arguments, collections and random streams."""
        own = self._declared()
        assert self.scope is not None
        # The streams as they come: those of the wrapped module at this place.
        rngs = {name: rng.as_jax_rng() for name, rng in self.scope.rngs.items()}
        mutable = tuple(c for c in self.runner.collections() if self._may_change(c))
        result, updates = self.runner.run(own, rngs, mutable, args, kwargs)
        if not self.is_initializing():
            for collection, tree in updates.items():
                for name, value in tree.items():
                    self.put_variable(collection, name, value)
        return result

    def _may_change(self, collection: str) -> bool:
        return collection != PARAMS and self.is_mutable_collection(collection)

    def _declared(self) -> dict[str, dict[str, Any]]:
        """The variables at this place; at initialization copies of the small parameters."""
        found: dict[str, dict[str, Any]] = {}
        for collection, tree in self.runner.initial().items():
            for name, value in tree.items():
                first = functools.partial(jax.tree.map, jnp.array, value)
                if collection == PARAMS:
                    held = self.param(name, lambda _, first=first: first())
                else:
                    held = self.variable(collection, name, first).value
                found.setdefault(collection, {})[name] = held
        return found


class _Runner:
    """Cuts the module's program, once for each way in which it is called."""

    def __init__(self, module: nn.Module, small: Compact):
        self.module, self.small = module, small
        self._known: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": {}}

    def initial(self) -> dict[str, Any]:
        return unfreeze(self.small.params)

    def collections(self) -> tuple[str, ...]:
        return tuple(self.initial())

    def run(self, own: Any, rngs: Any, mutable: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        """The outputs, and the updated collections at their small sizes."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if _is_array(x)]
        fixed = tuple(None if _is_array(x) else (x,) for x in leaves)

        def apply(variables: Any, arrays: Any, rngs: Any) -> Any:
            rest = iter(arrays)
            filled = [next(rest) if x is None else x[0] for x in fixed]
            args, kwargs = jax.tree.unflatten(treedef, filled)
            if not mutable:
                return self.module.apply(variables, *args, rngs=rngs, **kwargs), {}
            return self.module.apply(variables, *args, rngs=rngs, mutable=list(mutable), **kwargs)

        variables = jax.tree.unflatten(jax.tree.structure(self.small.params), jax.tree.leaves(own))
        types = [(np.shape(x), str(jnp.result_type(x))) for x in arrays]
        cut = self._cut(
            (str(treedef), fixed, str(types), tuple(rngs), mutable), apply, arrays, rngs
        )
        return cut(variables, arrays, rngs)

    def _cut(self, key: Any, apply: Callable[..., Any], arrays: Any, rngs: Any) -> Any:
        """Remembered for calls one by one; what can't be a key (a function of the call) is not."""
        try:
            known = self._known.get(key)
        except TypeError:
            return self.small.cut(apply, arrays, rngs)
        if known is None:
            known = self._known[key] = self.small.cut(apply, *_types((arrays, rngs)))
        return known


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def wrap(small: Compact, *, module: nn.Module | None = None) -> Small:
    """Returns a Linen module that runs at the small sizes, with the original's collections.

    ``init`` gives copies of ``small.params``, whatever keys it gets. ``apply`` takes the arguments
    of the original: train flags, masks, ``rngs``, ``mutable``; each way to call it is cut when it
    is first met (:meth:`Compact.cut`), so that updated statistics have the small shapes, too. A
    random stream gives what it gives in the original. It can be a submodule of other modules, and
    be trained and saved as any; it keeps no module of its own that holds sizes.

    Args:
      small: compacted from ``module.apply`` or a ``functools.partial`` of it, whose parameters
        are the module's variables, all collections that it reads.
      module: the original, where ``small.fn`` was compacted from another function of it.

    Returns:
      A ``flax.linen.Module``.

    Raises:
      TypeError: where the module can't be told from the function, or params are no collections.
      ValueError: when it is called in a way that can't be had at this cut; it says which dimension.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> from jaxprune.adapters import linen
      >>> net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((1, 3))
      >>> variables = net.init(jax.random.key(0), x)
      >>> structure = jp.infer_structure(net.apply, variables, x)
      >>> masks = structure.masks({"params/layers_0/kernel:1": np.arange(8) < 4})
      >>> module = linen.wrap(jp.compact(net.apply, variables, masks, x))
      >>> module.init(jax.random.key(1), x)["params"]["layers_0"]["kernel"].shape
      (3, 4)
    """
    if not isinstance(small.params, Mapping) or PARAMS not in small.params:
        raise TypeError(
            f"wrap wants variables as parameters, {{'params': ..., ...}}, got "
            f"{type(small.params).__name__}; compact module.apply with what module.init gives"
        )
    return Small(_Runner(module or _module_of(small), small))


def _module_of(small: Compact) -> nn.Module:
    """The module whose ``apply`` was compacted."""
    fn: Any = getattr(small.fn, "fn", small.fn)
    while not isinstance(getattr(fn, "__self__", None), nn.Module):
        inner = fn.func if isinstance(fn, functools.partial) else getattr(fn, "__wrapped__", None)
        if inner is None or inspect.ismethod(fn):
            raise TypeError(
                f"wrap can't tell the module from {fn!r:.80}, which was compacted; write "
                "jaxprune.adapters.linen.wrap(small, module=module), or compact module.apply or "
                "functools.partial(module.apply, train=False)"
            )
        fn = inner
    return fn.__self__
