"""A saved model goes with its function: others are refused, the same code in any process is not."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.artefacts import functions
from jaxprune.artefacts.fingerprint import fingerprint

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
SHAPES = {"up": (3, 8), "down": (8, 2)}
PARAMS = {k: jnp.ones(s) for k, s in SHAPES.items()}


def network(act, scale=1.0):
    return lambda p, x: act(x @ p["up"]) @ p["down"] * scale


def cut(fn, x=X):
    masks = jp.infer_structure(fn, PARAMS, x).masks({"up:1": np.arange(8) < 2})
    return jp.compact(fn, PARAMS, masks, x)


def with_jvp(slope):
    act = jax.custom_jvp(jnp.tanh)
    act.defjvp(lambda x, t: (act(*x), t[0] * slope))
    return act


def with_vjp(slope, kept=1.0):
    act = jax.custom_vjp(jnp.tanh)
    act.defvjp(lambda x: (act(x), x * kept), lambda r, g: (g * r * slope,))
    return act


def scanned(w):
    return lambda x: lax.scan(lambda c, _: (jnp.tanh(c * w), None), x, length=2)[0]


def branches(w):
    return lambda x: lax.cond(x.sum() > 0, lambda: jnp.tanh(x), lambda: x * w)


def called_back(factor):
    shape = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    return lambda x: jax.pure_callback(lambda a: np.asarray(a) * factor, shape, x)


def with_key(key):
    return lambda x: x * jax.random.uniform(key)


ONE, TWO = (np.full(8, v, np.float32) for v in (1, 2))
PAIRS = {  # two functions of one structure
    "a scalar": (lambda x: x * 2.0, lambda x: x * 3.0),
    "a closed-over array": (lambda x: x * ONE, lambda x: x * TWO),
    "one entry of it": (lambda x: x * ONE, lambda x: x * np.where(np.arange(8) == 7, 2, ONE)),
    "an operation": (jnp.tanh, jnp.sin),
    "operands": (lambda x: x - ONE, lambda x: ONE - x),
    "an axis": (lambda x: lax.cumsum(x, 0), lambda x: lax.cumsum(x, 1)),
    "a sign": (lambda x: x * 0.0, lambda x: x * -0.0),
    "a parameter": (lambda x: lax.cumsum(x, 1), lambda x: lax.cumsum(x, 1, reverse=True)),
    "a jvp rule": (with_jvp(1.0), with_jvp(2.0)),
    "a vjp rule": (with_vjp(1.0), with_vjp(2.0)),
    "a vjp's forward rule": (with_vjp(1.0), with_vjp(1.0, 2.0)),
    "a constant in a loop": (scanned(ONE), scanned(TWO)),
    "a constant in a branch": (branches(ONE), branches(TWO)),
    "a constant in a jitted function": (jax.jit(lambda x: x * ONE), jax.jit(lambda x: x * TWO)),
    "a constant under remat": (jax.checkpoint(scanned(ONE)), jax.checkpoint(scanned(TWO))),
    "a callback": (called_back(1.0), called_back(2.0)),
    "a random key": (*(lambda x, s=s: x * jax.random.bits(jax.random.key(s)) for s in (0, 1)),),
    "a closed-over key": (with_key(jax.random.key(0)), with_key(jax.random.key(1))),
    "precision": (
        *(lambda x, p=p: jnp.matmul(x, np.eye(8, dtype="f"), precision=p) for p in ("high", None)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_other_functions_have_other_fingerprints(name):
    a, b = (fingerprint(network(act), PARAMS, (X,)) for act in PAIRS[name])
    assert a != b
    again = fingerprint(network(PAIRS[name][0]), PARAMS, (X,))
    assert again == a


def test_names_and_placement_do_not_count():
    def one(x):
        return jnp.tanh(x)

    def other(x):
        return jnp.tanh(x)

    mesh = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inner = [one, other, lambda x: jnp.tanh(x)]
    acts = [jax.jit(f) for f in inner] + [jax.jit(one, out_shardings=mesh, inline=False)]
    found = [fingerprint(network(act), PARAMS, (X,)) for act in acts]
    assert all(f == found[0] for f in found)


ELSEWHERE = """
import json
from tests.unit.artefacts import test_functions as here
print(json.dumps(here.fingerprints(reverse=True)))
"""


def models():
    """Frameworks, custom rules, control flow: (fn, params, args)."""
    import equinox as eqx
    import flax.linen as nn
    from flax import nnx

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(4))(nn.gelu(nn.Dense(8)(x)))
            x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
            return nn.remat(nn.Dense)(3)(nn.BatchNorm(use_running_average=True)(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.down(self.drop(nnx.silu(self.up(x)), deterministic=True))

    x = jnp.ones((2, 5, 3))
    linen = Linen()
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    arrays, rest = eqx.partition(eqx.nn.MLP(3, 3, 8, 2, key=jax.random.key(0)), eqx.is_array)
    found = {
        "linen": (linen.apply, jax.eval_shape(linen.init, jax.random.key(0), x), (x,)),
        "nnx": (lambda s, x: nnx.merge(graph, s)(x), state, (x,)),
        "equinox": (lambda p, x: jax.vmap(jax.vmap(eqx.combine(p, rest)))(x), arrays, (x,)),
    }
    return found | {n: (network(pair[0]), PARAMS, (X,)) for n, pair in PAIRS.items()}


def fingerprints(reverse=False):
    """In reverse order other things are in JAX's caches when a function is traced."""
    cases = list(models().items())
    return {name: fingerprint(*case) for name, case in (cases[::-1] if reverse else cases)}


@pytest.mark.slow
def test_the_same_code_in_another_process_is_the_same_function(tmp_path):
    env = dict(
        os.environ, PYTHONHASHSEED="17", PYTHONPATH=os.pathsep.join([os.getcwd(), *sys.path])
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == fingerprints()


# ------------------------------------------------------------------------------------ loading


def test_another_function_of_the_same_structure_is_refused(tmp_path):
    jp.save(cut(network(jnp.tanh, 1.0)), tmp_path)
    with pytest.raises(ValueError, match="for another function: its constants differ from fn's"):
        jp.load(tmp_path, network(jnp.tanh, 2.0), PARAMS, X)
    with pytest.raises(ValueError, match="for another function: its program"):
        jp.load(tmp_path, network(jnp.sin), PARAMS, X)
    with pytest.raises(ValueError, match=r"say so: jp.load\(..., same_function=True\)"):
        jp.load(tmp_path, network(jnp.sin), PARAMS, X)


def test_another_function_that_is_meant(tmp_path):
    small = cut(network(jnp.tanh, 1.0))
    jp.save(small, tmp_path)
    again = jp.load(tmp_path, network(jnp.tanh, 2.0), PARAMS, X, same_function=True)
    expected = 2 * small.fn(small.params, X)
    np.testing.assert_allclose(again.fn(again.params, X), expected, rtol=1e-6)


@pytest.mark.parametrize("x", [jnp.ones((7, 3)), jnp.ones((1, 3)), jnp.ones((4, 3), jnp.bfloat16)])
def test_arguments_of_other_sizes_and_types(tmp_path, x):
    """The function is compared for the arguments that compact had."""
    fn = network(jnp.tanh)
    small = cut(fn)
    jp.save(small, tmp_path)
    again = jp.load(tmp_path, fn, PARAMS, x)
    np.testing.assert_array_equal(again.fn(again.params, X), small.fn(small.params, X))
    with pytest.raises(ValueError, match="for another function"):
        jp.load(tmp_path, network(jnp.sin), PARAMS, x)


def test_a_loaded_model_is_saved_as_it_was(tmp_path):
    """For other arguments, too: saved, loaded for them, saved again, it is the same function."""
    fn = network(jnp.tanh)
    jp.save(cut(fn), tmp_path / "a")
    again = jp.load(tmp_path / "a", fn, PARAMS, jnp.ones((5, 3)))
    jp.save(again, tmp_path / "b")
    third = jp.load(tmp_path / "b", fn, PARAMS, X)
    np.testing.assert_array_equal(third.fn(third.params, X), again.fn(again.params, X))


def test_arguments_of_another_structure_are_refused(tmp_path):
    def fn(p, batch):
        return network(jnp.tanh)(p, batch["x"] if isinstance(batch, dict) else batch)

    jp.save(cut(fn), tmp_path)
    with pytest.raises(ValueError, match="tree has no leaf '0', and an unknown leaf '0/x'; pass"):
        jp.load(tmp_path, fn, PARAMS, {"x": X})
    jp.load(tmp_path, fn, PARAMS, {"x": X}, same_function=True)


def test_a_function_that_does_not_take_the_saved_arguments(tmp_path):
    jp.save(cut(network(jnp.tanh)), tmp_path)

    def fixed(p, x):
        return network(jnp.tanh)(p, x + jnp.ones((5, 3)))

    with pytest.raises(ValueError, match="fn can't be traced .*shape=.2, 3."):
        jp.load(tmp_path, fixed, PARAMS, jnp.ones((5, 3)))


def test_other_settings_of_precision_are_no_other_function(tmp_path):
    fn = network(jnp.tanh)
    jp.save(cut(fn), tmp_path)
    with jax.enable_x64(True):
        again = jp.load(tmp_path, fn, PARAMS, X)
    assert again.params["up"].dtype == jnp.float32


def test_another_version_of_jax_is_told_and_not_refused(tmp_path, monkeypatch):
    fn = network(jnp.tanh)
    monkeypatch.setattr(functions.jax, "__version__", "0.0.1")
    jp.save(cut(fn), tmp_path)
    monkeypatch.undo()
    jp.load(tmp_path, fn, PARAMS, X)  # written alike: nothing to say
    with pytest.warns(UserWarning, match="saved with jax 0.0.1, and jax .* can't be told"):
        jp.load(tmp_path, network(jnp.sin), PARAMS, X)
