"""A Linen module at the small sizes: signature, collections and random streams of the original."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nn = pytest.importorskip("flax.linen")
import jaxprune as jp  # noqa: E402
from jaxprune.adapters import linen  # noqa: E402

X = jax.random.normal(jax.random.key(0), (4, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool, scale: Any = None) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x if scale is None else x * scale)


@functools.cache
def wrapped() -> Any:
    net = Net()
    fn = functools.partial(net.apply, train=False)
    variables = net.init(jax.random.key(0), X, False)
    masks = _half(fn, variables)
    return net, jp.apply_masks(variables, masks), jp.compact(fn, variables, masks, X)


def _half(fn: Any, variables: Any) -> Any:
    structure = jp.infer_structure(fn, variables, X)
    return structure.masks({"params/Dense_0/kernel:1": np.arange(8) % 2 == 0})


def test_init_gives_copies_of_the_small_params():
    _, _, small = wrapped()
    variables = linen.wrap(small).init(jax.random.key(7), X, train=True)
    jax.tree.map(np.testing.assert_array_equal, variables, small.params)
    assert jax.tree.structure(variables) == jax.tree.structure(small.params)
    assert (
        variables["params"]["Dense_0"]["kernel"] is not small.params["params"]["Dense_0"]["kernel"]
    )


def test_each_mode_equals_the_masked_model_with_its_statistics_and_dropout():
    net, masked, small = wrapped()
    module, rngs = linen.wrap(small), {"dropout": jax.random.key(5)}
    expected = net.apply(masked, X, train=False, scale=jnp.ones(1))
    got = module.apply(small.params, X, train=False, scale=jnp.ones(1))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    options: Any = {"rngs": rngs, "mutable": ["batch_stats"]}
    expected, full = net.apply(masked, X, True, **options)
    got, updated = module.apply(small.params, X, True, **options)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    mean = full["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(updated["batch_stats"]["BatchNorm_0"]["mean"], mean[::2], atol=1e-6)


def test_it_compiles_once_is_pickled_and_trains_inside_another_module():
    _, _, small = wrapped()
    module = pickle.loads(pickle.dumps(linen.wrap(small)))

    class Outer(nn.Module):
        inner: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(1)(self.inner(x, train=False))

    net = Outer(module)
    variables = net.init(jax.random.key(0), X)
    loss = lambda p: jnp.mean(net.apply({**variables, "params": p}, X) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert grads["inner"]["Dense_0"]["kernel"].shape == (3, 4)
    assert float(jnp.abs(grads["inner"]["Dense_0"]["kernel"]).max()) > 0


def test_functions_that_hide_their_module_want_it():
    net, _, small = wrapped()
    hidden = jp.compact(
        lambda v, x: net.apply(v, x, False), small.expand(small.params), small.masks, X
    )
    with pytest.raises(
        TypeError, match=r"can't tell the module from .*wrap\(small, module=module\)"
    ):
        linen.wrap(hidden)
    got = linen.wrap(hidden, module=net).apply(hidden.params, X, train=False)
    np.testing.assert_allclose(got, small.fn(small.params, X), atol=1e-6)
    jitted = jax.jit(functools.partial(net.apply, train=False))
    assert linen.wrap(jp.compact(jitted, small.expand(small.params), small.masks, X)) is not None


def test_params_that_are_no_collections_are_refused():
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    masks = {"w": jnp.arange(4) < 2, "v": True}
    small = jp.compact(lambda p, x: x @ p["w"] @ p["v"], params, masks, X)
    with pytest.raises(TypeError, match=r"wants variables as parameters, \{'params': ...,"):
        linen.wrap(small)


def test_a_call_that_reads_what_is_gone_is_refused():
    class Showing(nn.Module):
        @nn.compact
        def __call__(self, x: Any, hidden: bool = False) -> Any:
            y = nn.Dense(8)(x)
            return y if hidden else nn.Dense(2)(y)

    net = Showing()
    variables = net.init(jax.random.key(0), X)
    small = jp.compact(net.apply, variables, _half(net.apply, variables), X)
    with pytest.raises(ValueError, match="this function can't be had at the cut"):
        linen.wrap(small).apply(small.params, X, hidden=True)


def test_a_configuration_takes_the_sizes_and_the_params_as_they_are():
    class Sized(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Dense(self.width)(x))
            return nn.Dense(2)(x)

    net = Sized(width=8)
    variables = net.init(jax.random.key(0), X)
    structure = jp.infer_structure(net.apply, variables, X)
    small = jp.compact(net.apply, variables, _half(net.apply, variables), X)
    width = small.sizes[structure.dims["params/Dense_0/kernel:1"].label]
    got = Sized(width=width).apply(small.params, X)
    np.testing.assert_allclose(got, small.fn(small.params, X), atol=1e-6)
