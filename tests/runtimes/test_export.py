"""Exported models: any batch size, no code. The reference is the compact model in this process."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.helpers.processes import environment


class Image(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x + nn.Conv(8, (3, 3))(nn.relu(nn.GroupNorm(2)(x)))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Text(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 16)(ids)
        x = x + nn.Embed(16, 16)(jnp.arange(ids.shape[1]))
        mask = nn.make_causal_mask(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return nn.Dense(11)(x)


class Sound(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(8))(nn.silu(nn.Conv(6, (3,))(x)))
        return nn.Dense(3)(x[:, -1])


class Padded(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")  # pads the batch with nothing
        return nn.Dense(5)(nn.relu(nn.Conv(8, (3, 3), padding="VALID")(x)).mean((1, 2)))


MODELS = {
    "padded": (Padded(), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), "b, h, w, 3"),
    "image": (Image(), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), "b, ..."),
    "text": (Text(), jax.ShapeDtypeStruct((2, 8), jnp.int32), "b, t"),
    "sound": (Sound(), jax.ShapeDtypeStruct((2, 6, 4), jnp.float32), "b, ..."),
}


def halved(net, spec):
    x = jnp.ones(spec.shape, spec.dtype)
    params = jax.jit(net.init)(jax.random.key(1), x)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(w.dtype), params)
    structure = jp.infer_structure(net.apply, params, x)
    free = [d for d in structure.dims.values() if not d.frozen]
    masks = structure.masks({d.name: np.arange(d.size) % 2 == 0 for d in free})
    return jp.compact(net.apply, params, masks, x)


@pytest.mark.parametrize("name", MODELS)
def test_any_batch_and_length(tmp_path, name):
    net, spec, shapes = MODELS[name]
    small = halved(net, spec)
    jp.export(small, tmp_path, spec, shapes=shapes)
    model = jp.load_exported(tmp_path)
    same = jax.jit(small.fn)
    for batch in (1, 5):
        shape = (batch, *spec.shape[1:]) if name != "text" else (batch, 3 * batch)
        x = jax.random.randint(jax.random.key(batch), shape, 0, 11).astype(spec.dtype)
        np.testing.assert_allclose(
            jax.jit(model.fn)(model.params, x), same(small.params, x), rtol=1e-5, atol=1e-6
        )


def test_it_runs_in_a_process_without_the_code(tmp_path):
    small = halved(*MODELS["image"][:2])
    jp.export(small, tmp_path, jnp.ones((2, 8, 8, 3)))
    code = (
        "import sys, jax, jax.numpy as jnp, jaxprune as jp; m = jp.load_exported(sys.argv[1]);"
        "assert 'flax' not in sys.modules; x = jnp.ones((2, 8, 8, 3));"
        "print(float(m.fn(m.params, x).sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    expected = float(small.fn(small.params, jnp.ones((2, 8, 8, 3))).sum())
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)


def test_sizes_used_as_numbers(tmp_path):
    """The batch size itself enters the result, and a loop runs over a length that is a name."""

    def fn(p, x):
        def step(state, row):
            return jnp.tanh(row @ p["up"] + state @ p["again"]), state.mean()

        last, means = jax.lax.scan(step, jnp.zeros((x.shape[0], 8)), x.swapaxes(0, 1))
        return last[-1:] @ p["down"] / x.shape[0], means + jnp.arange(x.shape[1])

    rng = np.random.default_rng(0)
    shapes = {"up": (3, 8), "again": (8, 8), "down": (8, 2)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    structure = jp.infer_structure(fn, params, x)
    small = jp.compact(fn, params, structure.masks({"again:1": np.arange(8) < 3}), x)
    assert small.params["again"].shape == (3, 3)
    jp.export(small, tmp_path, x, shapes="b, t, ...")
    model = jp.load_exported(tmp_path)
    y = jnp.asarray(rng.normal(size=(5, 7, 3)), jnp.float32)
    for a, b in zip(model.fn(model.params, y), small.fn(small.params, y)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_cast_of_a_known_number_within_a_call(tmp_path):
    """At numbers JAX leaves it out of the program."""

    def fn(p, x):
        return jnp.where(x @ p["up"] > 0, x @ p["up"], -1e9) @ p["down"]

    params, x = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}, jnp.ones((2, 3))
    masks = jp.infer_structure(fn, params, x).masks({"up:1": np.arange(8) < 3})
    small = jp.compact(fn, params, masks, x)
    jp.export(small, tmp_path, x, shapes="b, ...")
    model = jp.load_exported(tmp_path)
    np.testing.assert_allclose(model.fn(model.params, x[:1]), small.fn(small.params, x[:1]))


W, X = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((4, 3), np.float32)
ALONE = {  # a function, what export is given, and the inputs of what is loaded
    "a lone array": (lambda w, x: x @ w, (W, X), (W, X)),
    "no params": (lambda p, x: x @ W, ({}, X), (X,)),
    "no input": (lambda p: p["w"].sum(), ({"w": W},), ({"w": W},)),
}


@pytest.mark.parametrize("name", ALONE)
def test_where_no_tree_comes_before_an_input_all_are_inputs(tmp_path, name):
    fn, given, inputs = ALONE[name]
    jp.export(fn, tmp_path, *given)
    model = jp.load_exported(tmp_path)
    assert model.params == {}
    np.testing.assert_allclose(model.fn(model.params, *inputs), fn(*given))


def test_a_program_says_what_it_takes(tmp_path):
    jp.export(lambda w, x: x @ w, tmp_path, W, X)
    model = jp.load_exported(tmp_path)
    taken = r"takes params \[\] and inputs \[float32\[3,2\], float32\[4,3\]\].*a lone array are an"
    with pytest.raises(ValueError, match=taken):
        model.fn(model.params, X)
    jp.export(lambda p, x: x @ p["w"], tmp_path, {"w": W}, X)
    with pytest.raises(ValueError, match=r"takes params \['w'\] and inputs"):
        jp.load_exported(tmp_path).fn(X)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="exported.safetensors is missing"):
        jp.load_exported(tmp_path)


WITHOUT = """
import sys
sys.modules["flatbuffers"] = None
import jax.numpy as jnp, numpy as np, jaxprune as jp
fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
params, x = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}, jnp.ones((1, 3))
masks = jp.infer_structure(fn, params, x).masks({"up:1": np.arange(8) < 2})
small = jp.compact(fn, params, masks, x)
for call in (lambda: jp.export(small, sys.argv[1], x), lambda: jp.load_exported(sys.argv[1])):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_without_flatbuffers_it_says_what_to_install(tmp_path):
    """And the program that was there still is."""
    jp.export(halved(*MODELS["sound"][:2]), tmp_path, jnp.ones((2, 6, 4)))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "exporting needs flatbuffers: pip install 'jaxprune[save]'",
        "programs need flatbuffers: pip install 'jaxprune[save]'",
    ]
    assert jp.load_exported(tmp_path).params


def test_a_program_of_arrays_over_devices_is_for_one_device(tmp_path):
    """What is exported on a mesh runs anywhere."""
    code = (
        "import sys, jax, jax.numpy as jnp, numpy as np, dataclasses, jaxprune as jp;"
        "from jax.sharding import NamedSharding as N, PartitionSpec as P;"
        "fn = lambda p, x: jnp.tanh(x @ p['up']) @ p['down'];"
        "params, x = {'up': jnp.ones((3, 8)), 'down': jnp.ones((8, 2))}, jnp.ones((4, 3));"
        "masks = jp.infer_structure(fn, params, x).masks({'up:1': np.arange(8) < 4});"
        "small = jp.compact(fn, params, masks, x);"
        "mesh = jax.make_mesh((4,), ('m',), axis_types=(jax.sharding.AxisType.Auto,));"
        "spread = {'up': jax.device_put(small.params['up'], N(mesh, P(None, 'm'))),"
        "          'down': jax.device_put(small.params['down'], N(mesh, P('m')))};"
        "jp.export(dataclasses.replace(small, params=spread), sys.argv[1],"
        "          jax.device_put(x, N(mesh, P('m'))))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(4), check=True)
    model = jp.load_exported(tmp_path)
    expected = jnp.full((4, 2), 4 * np.tanh(3.0))
    np.testing.assert_allclose(model.fn(model.params, jnp.ones((4, 3))), expected, rtol=1e-6)
