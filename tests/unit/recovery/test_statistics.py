"""Running statistics measured anew: means over batches, whatever the momentum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp


@settings(max_examples=15)
@given(momentum=st.floats(0.0, 0.99), start=st.floats(-5, 5), count=st.integers(1, 4))
def test_the_mean_over_batches_of_each_batch_s_own(momentum, start, count):
    xs = np.random.default_rng(count).normal(size=(count, 6, 3)).astype(np.float32)

    def update(p, x):
        h = x * p["w"]
        return p | {"mean": momentum * p["mean"] + (1 - momentum) * h.mean(0)}

    params = {"w": jnp.arange(1.0, 4.0), "mean": jnp.full(3, start), "steps": jnp.arange(2)}
    new = jp.recovery.estimate_statistics(update, params, [(x,) for x in xs], progress=False)
    wanted = (xs * np.arange(1.0, 4.0)).mean((0, 1))
    np.testing.assert_allclose(new["mean"], wanted, atol=2e-4)
    np.testing.assert_array_equal(new["w"], params["w"])


@pytest.mark.slow
def test_of_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    net, x = Net(), jax.random.normal(jax.random.key(1), (64, 4))
    variables = net.init(jax.random.key(0), x, True)

    def update(variables, x):
        return variables | net.apply(variables, x, True, mutable=["batch_stats"])[1]

    new = jp.recovery.estimate_statistics(update, variables, [(x,)], progress=False)
    got, wanted = net.apply(new, x, False), net.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(got, wanted[0], atol=1e-4)


def test_an_update_of_another_tree_is_refused():
    with pytest.raises(ValueError, match="update returns another tree than params"):
        update = lambda p, x: {"mean": x.mean()}  # noqa: E731
        params = {"w": jnp.ones(2), "mean": jnp.zeros(())}
        jp.recovery.estimate_statistics(update, params, [(jnp.ones(3),)])
