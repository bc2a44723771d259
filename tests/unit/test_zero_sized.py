"""Leaves without entries: patterns, scores and methods pass them by; the others don't notice."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

T = jp.training
ADAM = optax.adam(1e-2)
KERNEL = jax.random.normal(jax.random.key(0), (8, 4))
PARAMS = {"none": jnp.zeros((0, 4)), "w": KERNEL, "wide": jnp.zeros((4, 0)), "b": jnp.ones(3)}
ALONE = {"w": KERNEL, "b": PARAMS["b"]}
PATTERNS = {
    "unstructured": jp.unstructured(),
    "every leaf": jp.unstructured(where=lambda path, leaf: True),
    "per_output": jp.unstructured(per_output=True),
    "n_m": jp.n_m(2, 4),
    "n_m of outputs": jp.n_m(2, 4, axis=-1),
    "block": jp.block((4, 2)),
    "channel": jp.channel(),
    "channel of inputs": jp.channel(0),
    "threshold": jp.threshold(0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_mask_the_other_leaves_as_without_them(name: str) -> None:
    pattern = PATTERNS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "channel.* cuts each leaf on its own")
        wanted = pattern(jp.magnitude(ALONE), 0.5)
        eager = pattern(jp.magnitude(PARAMS), 0.5)
        traced = jax.jit(lambda params: pattern(jp.magnitude(params), 0.5))(PARAMS)
    for masks in (eager, traced):
        np.testing.assert_array_equal(masks["w"], wanted["w"])
        assert jp.apply_masks(PARAMS, masks)["none"].shape == (0, 4)
        assert float(jp.density(PARAMS, masks)) == float(jp.density(ALONE, wanted))
        assert float(jp.masks.overlap(PARAMS, masks, masks)) == 1.0
        back = jp.masks.unpack(jp.masks.pack(masks))
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(masks)))
    assert "none" in str(jp.summary(PARAMS, eager))


SCORES = {
    "l2": jp.scores.l2,
    "rms": jp.scores.rms_normalized,
    "lamp": jp.scores.lamp,
    "fpgm": jp.scores.fpgm,
    "saliency": functools.partial(jp.saliency, grad=PARAMS),
    "random": functools.partial(jp.random, key=jax.random.key(0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_scores_have_the_shape_of_params(name: str) -> None:
    for call in (SCORES[name], jax.jit(SCORES[name])):
        scores = call(PARAMS)
        assert jax.tree.map(jnp.shape, scores) == jax.tree.map(jnp.shape, PARAMS)


CUBIC = jp.schedules.cubic(0.0, 0.5, begin=0, end=3)
METHODS = {
    "prune": lambda p: jp.prune(ADAM, jp.magnitude, CUBIC, every=2, pattern=p),
    "set": lambda p: T.set(ADAM, 0.5, every=2, pattern=p),
    "rigl": lambda p: T.packed(T.rigl(ADAM, 0.5, every=2, pattern=p)),
    "ste": lambda p: T.ste(ADAM, CUBIC, pattern=p),
    "movement": lambda p: T.movement(ADAM, CUBIC, pattern=p),
    "admm": lambda p: T.admm(ADAM, 0.5, every=2, pattern=p),
    "ac_dc": lambda p: T.ac_dc(ADAM, 0.5, begin=0, end=2, sparse_steps=1, dense_steps=1, pattern=p),
    "snfs": lambda p: T.snfs(ADAM, 0.5, every=2),
    "soft_threshold": lambda p: T.soft_threshold(ADAM, 5e-4),
    "keep": lambda p: optax.chain(ADAM, jp.keep_params_sparse(p(jp.magnitude(PARAMS), 0.5))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", [jp.unstructured(jp.global_threshold), jp.n_m(2, 4)])
def test_methods_train_what_there_is(name: str, pattern: Any) -> None:
    tx = METHODS[name](pattern)

    @jax.jit
    def run(params: Any) -> Any:
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        return T.masked_params(params, state), state

    used, state = run(PARAMS)
    assert used["none"].shape == (0, 4)
    if name not in ("soft_threshold", "rigl"):  # of no density; packed
        masks = optax.tree_utils.tree_get(state, "masks")
        assert masks["w"].sum() == 16
        assert (used["w"] != 0).sum() <= 16


@pytest.mark.slow
def test_structures_cost_and_compact_pass_them_by() -> None:
    params = {"up": KERNEL, "down": jnp.ones((4, 2)), "none": jnp.zeros((0,))}
    params |= {"to": jnp.ones((8, 0)), "of": jnp.ones((0, 2))}
    x = jnp.linspace(-1.0, 1.0, 24).reshape(3, 8)

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["up"]) @ p["down"] + (x @ p["to"]) @ p["of"] + p["none"].sum()

    structure = jp.infer_structure(fn, params, x)
    for distribution in (jp.uniform, jp.erk, jp.global_threshold, jp.distributions.lamp):
        pattern = jp.structured(structure, distribution=distribution)
        masks = pattern(jp.magnitude(params), 0.5)
        small = jp.compact(fn, params, masks, x)
        assert small.params["up"].shape == (8, 2)
        wanted = fn(jp.apply_masks(params, masks), x)
        np.testing.assert_allclose(small.fn(small.params, x), wanted, rtol=1e-5)
        assert jax.tree.map(jnp.shape, small.expand(small.params)) == jax.tree.map(
            jnp.shape, params
        )
    assert jp.cost(fn, params, x).flops > 0
