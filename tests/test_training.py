"""Masks inside optax: bitwise zeros, scheduled density, one compilation."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp

OPTIMIZERS = {
    "sgd+momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        optax.adam, hyperparam_dtype=jnp.float32  # in bf16 b2 = 0.999 rounds to 1
    )(learning_rate=0.1),
    "clip chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
}


def params_of(kind, dtype):
    w, b = jax.random.normal(jax.random.key(0), (8, 6)), jnp.ones(6)
    params = {
        "dict": {"kernel": w, "bias": b},
        "tuple": (w, b),
        "nnx": nnx.state(nnx.Linear(8, 6, rngs=nnx.Rngs(0))),
        "equinox": eqx.filter(eqx.nn.Linear(8, 6, key=jax.random.key(0)), eqx.is_array),
    }[kind]
    return jax.tree.map(lambda x: x.astype(dtype), params)


def gradients(params, step):
    """Any gradient will do, as long as it moves every entry."""
    return jax.tree.map(lambda p: (p + jnp.sin(jnp.arange(p.size).reshape(p.shape) + step)
                                   ).astype(p.dtype), params)  # fmt: skip


def run(tx, params, steps=8):
    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    chex.clear_trace_counter()
    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, i)
    return params, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["dict", "tuple", "nnx", "equinox"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_entries_are_bitwise_zero(name, kind, dtype):
    if name == "muon" and kind in ("nnx", "equinox") and dtype == jnp.bfloat16:
        pytest.skip("muon keeps float32 momentum beside bf16 updates; the dict case covers it")
    params = params_of(kind, dtype)
    schedule = jp.schedules.cubic(0.0, 0.75, begin=0, end=5)
    tx = jp.prune(OPTIMIZERS[name](), jp.magnitude, schedule, every=2)
    after, state = run(tx, params)
    masks = optax.tree_utils.tree_get(state, "masks")
    kernels = [m for m in jax.tree.leaves(masks) if m.shape]
    assert [int(m.sum()) for m in kernels] == [12]  # 48 entries at 75 %, though 5 % 2 != 0
    for p, m in zip(jax.tree.leaves(after), jax.tree.leaves(masks), strict=True):
        pruned = np.asarray(jnp.where(m, 0.0, p), np.float32)
        np.testing.assert_array_equal(pruned.view(np.uint32), 0)


SCORES = {
    "magnitude": jp.magnitude,
    "saliency": jp.saliency,
    "random": lambda p, **e: jp.random(p, key=jax.random.key(0), step=e["step"]),
}
PATTERNS = {
    "unstructured": (jp.unstructured(), 0.5),
    "global": (jp.unstructured(jp.global_threshold), 0.5),
    "erk": (jp.unstructured(jp.erk), 0.5),
    "2:4": (jp.n_m(2, 4), 0.5),
    "block": (jp.block((2, 2)), 0.5),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_score_with_every_pattern(score, pattern):
    made, sparsity = PATTERNS[pattern]
    params = params_of("dict", jnp.float32)
    after, state = run(jp.prune(optax.adam(0.1), SCORES[score], sparsity, pattern=made), params)
    assert abs(float(jp.density(state.masks, params)) - 0.5) <= 1 / 48 + 1e-6
    assert int((after["kernel"] == 0).sum()) == int((~state.masks["kernel"]).sum())


def test_stands_inside_other_transforms():
    params = params_of("dict", jnp.float32)
    inside = jp.prune(optax.adam(0.1), jp.magnitude, 0.5)
    for tx in (
        optax.chain(optax.clip_by_global_norm(1.0), inside),
        optax.MultiSteps(inside, 2).gradient_transformation(),
        optax.apply_if_finite(inside, 3),
    ):
        after, state = run(tx, params)
        masks = optax.tree_utils.tree_get(state, "masks")
        np.testing.assert_array_equal(jnp.where(masks["kernel"], 0, after["kernel"]), 0)
        assert int(masks["kernel"].sum()) == 24


def test_massive_ties_keep_the_exact_number():
    params = {"w": jnp.ones((16, 16), jnp.bfloat16)}
    tx = jp.prune(optax.sgd(0.0), jp.magnitude, 0.9)
    _, state = run(tx, params, 2)
    assert int(state.masks["w"].sum()) == 256 - 230


def test_scan_over_steps_and_an_ensemble():
    tx = jp.prune(optax.adam(0.1), jp.magnitude, jp.schedules.cubic(0, 0.5, begin=0, end=3))

    def train(params):
        def body(carry, i):
            params, state = carry
            updates, state = tx.update(gradients(params, i), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(5))[0]

    members = {"w": jax.random.normal(jax.random.key(0), (3, 8, 4))}
    after, state = jax.jit(jax.vmap(train))(members)
    np.testing.assert_array_equal((after["w"] == 0).sum((1, 2)), [16] * 3)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_extra_arguments_reach_the_inner_transform():
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    tx, params = jp.prune(inner, jp.magnitude, 0.5), params_of("dict", jnp.float32)
    updates, _ = tx.update(gradients(params, 0), tx.init(params), params, value=jnp.float32(1))
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_fixed_masks_after_the_optimizer():
    params = params_of("dict", jnp.float32)
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    tx = optax.chain(optax.adamw(0.1), jp.keep_params_sparse(masks))
    after, state = run(tx, params)
    np.testing.assert_array_equal(after["kernel"] != 0, masks["kernel"])
    assert optax.tree_utils.tree_get(state, "masks")["kernel"].shape == (8, 6)


def test_resume_from_a_checkpoint_is_bitwise(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = jp.prune(optax.adam(0.1), jp.magnitude, jp.schedules.cubic(0, 0.5, begin=0, end=6))
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    state = tx.init(params)

    def advance(params, state, steps):
        for i in steps:
            updates, state = tx.update(gradients(params, i), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    half = advance(params, state, range(4))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "half", half)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "half", half)
    for x, y in zip(
        jax.tree.leaves(advance(*half, range(4, 8))),
        jax.tree.leaves(advance(*restored, range(4, 8))),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_clear_errors():
    params = {"w": jnp.ones((4, 4))}
    tx = jp.prune(optax.sgd(0.1), jp.magnitude, 0.5)
    with pytest.raises(ValueError, match="prune needs the parameters: call update"):
        tx.update(params, tx.init(params))
    fixed = jp.keep_params_sparse({"w": jnp.ones((4, 4), bool)})
    with pytest.raises(ValueError, match="keep_params_sparse needs the parameters"):
        fixed.update(params, fixed.init(params))
    with pytest.raises(ValueError, match="every is 0"):
        jp.prune(optax.sgd(0.1), jp.magnitude, 0.5, every=0)
    with pytest.raises(ValueError, match="sparsity is 5"):
        jp.prune(optax.sgd(0.1), jp.magnitude, 5)
    bad = jp.prune(optax.sgd(0.1), lambda p, **e: p["w"], 0.5)
    with pytest.raises(ValueError, match="score function gave a tree of structure"):
        bad.update(params, bad.init(params), params)
    bad = jp.prune(optax.sgd(0.1), lambda p, **e: {"w": p["w"][0]}, 0.5)
    with pytest.raises(ValueError, match=r"score of w has shape \(4,\)"):
        bad.update(params, bad.init(params), params)
