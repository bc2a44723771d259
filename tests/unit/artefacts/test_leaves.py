"""Every leaf comes back bitwise, of its own type and kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

import jaxprune as jp
from jaxprune.artefacts import files, leaves, save, tensors
from jaxprune.artefacts.host import is_key, to_host

FEW_VALUES = {"bool": 2, "int2": 2, "uint2": 4, "int4": 8, "uint4": 16, "float4_e2m1fn": 16}
WIDE = ("int64", "uint64", "float64", "complex128")


def random_array(dtype, shape, seed=0):
    """Random bits: NaNs of all kinds, negative zeros and subnormals are among them."""
    rng, wanted = np.random.default_rng(seed), tensors.DTYPES[dtype]
    size = (*shape, wanted.itemsize)
    bits = rng.integers(0, FEW_VALUES.get(dtype, 256), size=size).astype(np.uint8)
    return bits.view(wanted).reshape(shape)


def round_trip(folder, params):
    """Through a file, as jp.save and jp.load do it."""
    ordered = dict(sorted(params.items()))
    text = leaves.describe(list(ordered), [np.shape(x) for x in ordered.values()], ordered)
    files.write(folder, "x", {"format": "x", "version": 1, "leaves": text}, arrays_of(ordered))
    found, arrays = files.read(folder, "x", "x", 1)
    rows = [(r, tensors.unpack(arrays[f"params/{r['path']}"], r["dtype"])) for r in found["leaves"]]
    return {row["path"]: leaves.restore(row, array) for row, array in rows}


def arrays_of(params):
    return leaves.arrays_of(list(params), params)


def same(a, b):
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
    assert isinstance(a, (np.ndarray, np.generic)) == isinstance(b, (np.ndarray, np.generic))
    assert jax.typeof(a) == jax.typeof(b)  # with weak types, and the generators of random keys
    a, b = to_host(a), to_host(b)
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", tensors.DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3)], ids=str)
def test_types(tmp_path, dtype, shape):
    array = random_array(dtype, shape)
    params = {"numpy": array} | ({} if dtype in WIDE else {"jax": jnp.asarray(array)})
    again = round_trip(tmp_path, params)
    for name in params:
        same(again[name], params[name])


@pytest.mark.parametrize("dtype", WIDE)
def test_wide_types(tmp_path, dtype):
    with jax.enable_x64(True):
        params = {"wide": jnp.asarray(random_array(dtype, (2, 3)))}
        same(round_trip(tmp_path, params)["wide"], params["wide"])
    with pytest.raises(ValueError, match=f"holds wide as {dtype}, which would become .*enable_x64"):
        round_trip_of_file(tmp_path)


def round_trip_of_file(folder):
    found, arrays = files.read(folder, "x", "x", 1)
    row = found["leaves"][0]
    leaves.restore(row, tensors.unpack(arrays["params/wide"], row["dtype"]))


OTHERS = {
    "weak": lambda: jnp.full((3,), 0.1),
    "a weak scalar": lambda: jnp.asarray(2),
    "a weak empty array": lambda: jnp.full((0, 2), 1.0),
    "a float": lambda: 0.1,
    "an int": lambda: -3,
    "a bool": lambda: True,
    "a complex": lambda: 1 - 2j,
    "a NumPy scalar": lambda: np.float32(0.1),
    "Fortran's order": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "a view": lambda: np.arange(8.0)[::-2],
    "a key": lambda: jax.random.key(3),
    "keys": lambda: jax.random.split(jax.random.key(3, impl="rbg"), 4),
    "an unsafe key": lambda: jax.random.key(3, impl="unsafe_rbg"),
    "an old key": lambda: jax.random.PRNGKey(3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_leaves(tmp_path, name):
    leaf = OTHERS[name]()
    same(round_trip(tmp_path, {"leaf": leaf})["leaf"], leaf)


@pytest.mark.slow
@given(
    names=st.lists(st.text(), min_size=1, unique=True),
    array=hnp.arrays(
        st.sampled_from([np.float32, np.int8]), hnp.array_shapes(min_dims=0, min_side=0)
    ),
)
def test_names(tmp_path_factory, names, array):
    """Any text names a leaf, __metadata__ and slashes too, and others can read the file."""
    folder = tmp_path_factory.mktemp("names")
    params = {name: array + i for i, name in enumerate([*names, "__metadata__", "a/b"])}
    again = round_trip(folder, params)
    assert again.keys() == params.keys()
    jax.tree.map(same, again, params)
    with safe_open(folder / "x", "np") as file:
        for name, leaf in params.items():
            np.testing.assert_array_equal(file.get_tensor(f"params/{name}"), leaf)


@pytest.mark.slow
def test_a_model_of_many_types(tmp_path):
    params = {
        "up": jnp.ones((3, 8), jnp.bfloat16), "down": np.ones((8, 2), np.float64),
        "scale": 0.5, "bias": jnp.full((2,), 0.1), "count": np.int64(3), "key": jax.random.key(0),
        "table": jnp.arange(8).astype(jnp.int4), "empty": jnp.zeros((0, 3), jnp.float8_e4m3fn),
        "phase": jnp.asarray([1j, 2]), "on": jnp.asarray([True, False]),
    }  # fmt: skip

    def fn(p, x):
        h = jnp.tanh(x @ p["up"]) * p["table"].astype("f")
        noise = jax.random.normal(p["key"], (2,)) * p["on"] + jnp.abs(p["phase"]).astype("f")
        return (
            h @ p["down"] * p["scale"]
            + p["bias"]
            + noise
            + p["count"]
            + p["empty"].astype("f").sum()
        )

    x = jnp.ones((2, 3))
    masks = jp.infer_structure(fn, params, x).masks({"up:1": np.arange(8) % 2 == 0})
    small = jp.compact(fn, params, masks, x)
    jp.save(small, tmp_path)
    again = jp.load(tmp_path, fn, params, x)
    jax.tree.map(same, again.params, small.params)
    same(again.fn(again.params, x), small.fn(small.params, x))
    jp.export(small, tmp_path, x)
    model = jp.load_exported(tmp_path)
    np.testing.assert_allclose(model.fn(model.params, x), small.fn(small.params, x), rtol=1e-5)


def test_leaves_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="two leaves of params are named 'a/b'; give them other"):
        leaves.arrays_of(["a/b", "c", "a/b"], [1, 2, 3])
    generator = jax.extend.random.define_prng_impl(
        key_shape=(1,), seed=lambda s: s[None].astype("uint32"), name="mine",
        split=lambda k, s: jnp.zeros((*s, 1), "uint32"), fold_in=lambda k, d: k,
        random_bits=lambda k, w, s: jnp.zeros(s, f"uint{w}"),
    )  # fmt: skip
    key = jax.random.key(0, impl=generator)
    assert is_key(key)
    with pytest.raises(TypeError, match="noise is key<.*, which can't be written; wanted"):
        leaves.describe(["noise"], [()], [key])


@pytest.mark.slow
def test_a_tree_whose_leaves_come_in_another_order(tmp_path):
    """Leaves are found by their paths: the plan of one leaf is not taken for another's."""

    class Reversed(dict):
        pass

    def flatten(tree):
        keys = sorted(tree, reverse=True)
        return [(jax.tree_util.DictKey(k), tree[k]) for k in keys], tuple(keys)

    jax.tree_util.register_pytree_with_keys(
        Reversed, flatten, lambda keys, kids: Reversed(zip(keys, kids))
    )

    def fn(p, x):
        return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]

    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 8)), "b": rng.normal(size=8), "c": rng.normal(size=(8, 3))}
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    x = jnp.ones((2, 3))
    masks = {"a": (np.arange(8) < 3)[None], "b": np.array(True), "c": np.array(True)}
    small = jp.compact(fn, params, masks, x)
    assert small.params["a"].shape == (3, 3)
    jp.save(small, tmp_path)
    assert files.read(tmp_path, save.FILE, save.FORMAT, save.VERSION)[0]["folded"]
    again = jp.load(tmp_path, fn, Reversed(params), x, same_function=True)
    np.testing.assert_allclose(again.fn(again.params, x), small.fn(small.params, x), rtol=1e-6)
    same = jp.load(tmp_path, lambda p, x: fn(p, x), params, x)
    np.testing.assert_array_equal(same.fn(same.params, x), small.fn(small.params, x))
