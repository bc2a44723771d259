"""Parameters that one token uses, and the cache that a step hands back."""

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from tests.models.zoo import mixture, states

ONE = mixture.WIDTH * mixture.HIDDEN  # One of an expert's two matrices.
IDLE = {  # Of each expert network: so many experts of four are not chosen.
    "every_expert_softmax": 0,
    "top_k_routing": 2,
    "top_k_by_gathered_weights": 2,
    "capacity_dispatch": 3,
    "sorted_ragged_dot": 3,
    "experts_choose_tokens": 0,
    "shared_expert": 3,
}


@pytest.mark.parametrize(("name", "idle"), IDLE.items())
def test_experts_that_are_not_chosen_are_idle(name, idle):
    fn, params, args = getattr(mixture, name)()
    found = jp.cost(fn, params, *args)
    assert found.params - found.active_params == 2 * idle * ONE


def scanned(p, x):
    """Layers of experts in a loop; what they make goes into the next layer's router."""

    def layer(x, p):
        values, chosen = jax.lax.top_k(x @ p["router"], 2)
        gate = jnp.einsum("tk,tke->te", values, jax.nn.one_hot(chosen, 4))
        y = jnp.einsum("td,edf->tef", x, p["up"])
        return x + jnp.einsum("tef,efd,te->td", jnp.tanh(y), p["down"], gate), None

    return jax.lax.scan(layer, x, p)[0]


def test_experts_in_a_loop():
    shapes = {"router": (3, 6, 4), "up": (3, 4, 6, 8), "down": (3, 4, 8, 6)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    found = jp.cost(scanned, params, jax.ShapeDtypeStruct((5, 6), jnp.float32))
    assert found.params - found.active_params == 3 * 2 * 2 * 48
    assert "active for one token" in str(found)


def test_a_router_that_is_a_matrix_for_each_head_counts_whole():
    def fn(p, x):
        shares = jax.nn.softmax(jnp.einsum("td,dhe->the", x, p["router"]))
        gate = jnp.where(shares >= jax.lax.top_k(shares, 2)[0][..., -1:], shares, 0)
        return jnp.einsum("the,edf->thf", gate, p["up"])

    params = {"router": jnp.ones((6, 3, 4)), "up": jnp.ones((4, 6, 8))}
    assert jp.cost(fn, params, jnp.ones((5, 6))).active_params == 6 * 3 * 4 + 4 * 6 * 8


def test_a_vocabulary_is_no_set_of_experts():
    def generate(p, ids):
        step = lambda ids, _: (jnp.argmax(jnp.tanh(p["embed"][ids]) @ p["out"], -1), ids)  # noqa: E731
        return jax.lax.scan(step, ids, None, length=3)[1]

    params = {"embed": jnp.ones((7, 6)), "out": jnp.ones((6, 7))}
    found = jp.cost(generate, params, jnp.zeros((2,), jnp.int32))
    assert found.active_params == found.params == 84


# -------------------------------------------------------------------------------------- cache


def test_a_cache_is_what_comes_back_anew():
    fn, params, args = states.decode_with_cache()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(params["cache"]))
    found = jp.cost(fn, params, *args)
    assert found.kv_cache == cache and f"{cache} bytes of cache" in str(found)
    same = jp.cost(lambda p, *args: {**fn(p, *args), "weights": p["weights"]}, params, *args)
    assert same.kv_cache == cache  # what only passes through is no cache


def test_a_cache_may_be_another_argument():
    fn, params, args = states.decode_with_cache()

    def step(weights, cache, *args):
        return fn({"weights": weights, "cache": cache}, *args)

    found = jp.cost(step, params["weights"], params["cache"], *args)
    assert found.kv_cache == jp.cost(fn, params, *args).kv_cache


def test_without_a_cache_there_is_none():
    assert jp.cost(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 4))}, jnp.ones((2, 3))).kv_cache == 0
