"""Saved plans: what comes back is the same model, and another model's plan is refused."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

import jaxprune as jp
from jaxprune.artefacts import save
from tests.models.zoo import ENTRIES


class Net(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width)(x)
        h = h + nn.Dense(self.width)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(h))))
        return nn.Dense(2)(nn.relu(h))


X = jax.random.normal(jax.random.key(0), (5, 3))


def cut(dtype=jnp.float32):
    net = Net()
    params = jax.tree.map(lambda w: w.astype(dtype), net.init(jax.random.key(1), X))
    params = jax.tree.map(lambda w: w + jnp.asarray(0.1, dtype), params)
    structure = jp.infer_structure(net.apply, params, X)
    free = [d for d in structure.dims.values() if not d.frozen]
    masks = structure.masks({d.name: np.arange(d.size) % 2 == 0 for d in free})
    return net.apply, params, jp.compact(net.apply, params, masks, X)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_saved_model_comes_back(tmp_path, dtype):
    fn, params, small = cut(dtype=dtype)
    jp.save(small, tmp_path / "model")
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    again = jp.load(tmp_path / "model", fn, shapes, X)
    assert jax.tree.map(jnp.shape, again.params) == jax.tree.map(jnp.shape, small.params)
    np.testing.assert_array_equal(again.fn(again.params, X), small.fn(small.params, X))
    assert str(again.certificate) == str(small.certificate)
    jax.tree.map(np.testing.assert_array_equal, again.restrict(params), small.restrict(params))
    assert again.certificate.check() < (1e-12 if dtype == jnp.float32 else 1e-2)
    for name, kept in small.keep.items():
        np.testing.assert_array_equal(again.keep[name], kept)


@pytest.mark.slow
def test_random_keys_are_saved(tmp_path):
    def fn(p, x):
        noise = jax.random.normal(p["key"], (x.shape[0], 2))
        return jnp.tanh(x @ p["up"]) @ p["down"] + noise

    params = {"key": jax.random.key(3), "up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    masks = jp.infer_structure(fn, params, X).masks({"up:1": np.arange(8) < 2})
    small = jp.compact(fn, params, masks, X)
    jp.save(small, tmp_path)
    again = jp.load(tmp_path, fn, params, X)
    np.testing.assert_array_equal(again.fn(again.params, X), small.fn(small.params, X))


@pytest.mark.slow
def test_the_plan_is_text_and_names_what_print_names(tmp_path):
    _, params, small = cut()
    jp.save(small, tmp_path)
    with safe_open(tmp_path / save.FILE, "np") as file:  # as others read it
        plan = json.loads(file.metadata()["jaxprune"])
        path = next(row["path"] for row in plan["leaves"] if row["path"].endswith("kernel"))
        found = file.get_tensor(f"params/{path}")
    names = {row["name"] for row in plan["dimensions"]}
    assert names == {entry.name for entry in small.certificate.entries}
    leaves = jax.tree_util.tree_leaves_with_path(small.params)
    np.testing.assert_array_equal(found, {jp.typing.path_str(p): leaf for p, leaf in leaves}[path])
    assert {file.name for file in tmp_path.iterdir()} == {save.FILE}


class Other(Net):
    """The same leaves, coupled otherwise."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width)(x)
        a = nn.Dense(self.width)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(h))))
        return nn.Dense(2)(nn.relu(a))


@pytest.mark.slow
def test_another_models_plan_is_refused(tmp_path):
    fn, params, small = cut()

    def told(p, x):
        return fn(p, x), 2 * p["params"]["Dense_1"]["bias"]

    jp.save(small, tmp_path)
    wide = Net(10).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="is saved as .* and is .* in params; call jp.compact"):
        jp.load(tmp_path, Net(10).apply, wide, X)
    with pytest.raises(ValueError, match="the saved plan is of another model: .*Dense"):
        jp.load(tmp_path, Other().apply, params, X, same_function=True)
    with pytest.raises(ValueError, match="of another model: dimension .* can't be cut any more"):
        jp.load(tmp_path, told, params, X, same_function=True)
    ints = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.int32), params)
    with pytest.raises(ValueError, match="is saved as float32 and is int32 in params"):
        jp.load(tmp_path, fn, ints, X)


@pytest.mark.slow
def test_a_pruned_run_goes_on_bitwise_from_an_orbax_checkpoint(tmp_path):
    """Small parameters, the sliced optimizer state: restored, the next steps are the same."""
    fn, params, small = cut()
    optimizer = optax.adamw(1e-2)
    full_state = optimizer.init(params)
    state = (small.params, small.restrict(full_state))

    @jax.jit
    def step(state, x):
        grads = jax.grad(lambda p: jnp.sum(small.fn(p, x) ** 2))(state[0])
        updates, inner = optimizer.update(grads, state[1], state[0])
        return optax.apply_updates(state[0], updates), inner

    state = step(state, X)
    with ocp.StandardCheckpointer() as keeper:
        keeper.save(tmp_path / "state", state)
        keeper.wait_until_finished()
        again = keeper.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    for _ in range(3):
        state, again = step(state, X), step(again, X)
    jax.tree.map(np.testing.assert_array_equal, state, again)


NETWORKS = {  # sizes that are NumPy's, carried units, loops, callbacks, states
    "zero_padded_shortcut", "softmax_over_units", "scan_over_layers", "host_callback", "linen_lstm",
    "experts_choose_tokens", "layer_norm_by_var", "pallas_kernel", "decode_with_cache",
}  # fmt: skip
ZOO = {entry.name: entry for entry in ENTRIES if entry.name in NETWORKS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_plans_of_other_networks_come_back(tmp_path, name):
    """What loading decides anew (units that are carried, slices that are folded) is what was."""
    fn, params, args = ZOO[name].build()
    structure = jp.infer_structure(fn, params, *args)
    free = [d for d in structure.dims.values() if not d.frozen]
    masks = structure.masks({d.name: np.arange(d.size) % 2 == 0 for d in free})
    small = jp.compact(fn, params, masks, *args)
    jp.save(small, tmp_path)
    again = jp.load(tmp_path, ZOO[name].build()[0], params, *args)
    assert str(again.certificate) == str(small.certificate)
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    for dim, decision in small._plan.decisions.items():
        np.testing.assert_array_equal(again._plan.decisions[dim].carried, decision.carried)
    assert again._plan.leftovers.keys() == small._plan.leftovers.keys()
