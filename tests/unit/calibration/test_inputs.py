"""Calibration where its inputs or programs are not the plain case: meshes, batches, lost uses."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.helpers.processes import environment


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear(p, x):
    return x @ p["w"]


def gram(*rows):
    rows = np.concatenate([np.asarray(r, np.float64).reshape(-1, r.shape[-1]) for r in rows])
    return rows.T @ rows


# --------------------------------------------------------------------------- what keeps its axes

PASSED_ON = {
    "barrier": lambda p, x: x @ jax.lax.optimization_barrier((x, p["w"]))[1],
    "stop_gradient": lambda p, x: x @ jax.lax.stop_gradient(p["w"]),
    "negated": lambda p, x: x @ -p["w"],
    "copied": lambda p, x: x @ jnp.copy(p["w"]),
    "put": lambda p, x: x @ jax.device_put(p["w"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSED_ON)
def test_weights_are_followed_through(name):
    x = normal(0, 7, 4)
    stats = jp.calibrate(PASSED_ON[name], {"w": normal(1, 4, 3)}, [x])
    assert stats.reasons == {}
    np.testing.assert_allclose(stats.grams["w"], gram(x), rtol=1e-5, atol=1e-5)


MESHES = """
import jax, jax.numpy as jnp, numpy as np
import jaxprune as jp
from jax import P
auto = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
explicit = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))

def fn(p, x):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["stack"])[0]
    h = jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["again"]), h)
    more = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["while"]))
    h = jax.lax.while_loop(lambda s: s[0] < 2, more, (0, h))[1]
    h = jax.lax.cond(True, lambda h: h @ p["cond"], lambda h: h, h)
    numbers = ("NHC", "HIO", "NHC")
    return h, jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=numbers)

shapes = {"a": (4, 4), "stack": (2, 4, 4), "again": (4, 4), "while": (4, 4), "cond": (4, 4),
          "k": (3, 4, 5)}
params = {k: jax.random.normal(jax.random.key(i), s) for i, (k, s) in enumerate(shapes.items())}
x = jax.random.normal(jax.random.key(9), (6, 3, 4)) + 1
want = jp.calibrate(fn, params, [x])
fields = ("norms", "means", "variances", "grams", "count")

def check(got):
    for name, one in zip(fields, got):
        for k in shapes:
            np.testing.assert_allclose(
                one[k], getattr(want, name)[k], rtol=1e-4, atol=1e-4, err_msg=f"{name} {k}")

def part(p, x):
    stats = jp.calibrate(fn, p, [x], axis_name="data")
    assert stats.reasons == {}, stats.reasons
    return [getattr(stats, name) for name in fields]

check(jax.shard_map(part, mesh=auto, in_specs=(P(), P("data")), out_specs=P())(params, x))
placed = jax.device_put(x, jax.NamedSharding(explicit, P("data")))
for p in (params, jax.device_put(params, jax.NamedSharding(explicit, P()))):
    stats = jp.calibrate(fn, p, [placed])
    assert stats.reasons == {}
    check([getattr(stats, name) for name in fields])
print("equal on", len(jax.devices()))
"""


@pytest.mark.slow
def test_within_shard_map_and_on_an_explicit_mesh():
    """Needs several devices, which a process can only ask for before JAX starts."""
    command = [sys.executable, "-c", MESHES]
    run = subprocess.run(command, env=environment(2), capture_output=True, text=True, timeout=240)
    assert run.stdout.strip() == "equal on 2", run.stderr[-2000:]


# ------------------------------------------------------------------------------------ lost uses


def test_uses_that_are_not_counted_are_told():
    params, x = {"w": normal(1, 4, 4), "v": normal(2, 4, 4)}, normal(0, 5, 4)

    def fn(p, x):
        return x @ p["w"] @ (2 * p["w"]) @ jnp.exp(p["w"]) @ p["v"]

    stats = jp.calibrate(fn, params, [x])
    np.testing.assert_allclose(stats.grams["w"], gram(x), rtol=1e-5, atol=1e-5)
    reason = stats.reasons["w"]
    assert reason.startswith("uses that are not counted: mul at test_inputs.py")
    assert "; exp at" in reason and set(stats.reasons) == {"w"}


@pytest.mark.slow
def test_a_tied_embedding_is_counted_in_full():
    params = {"table": normal(1, 9, 4)}
    fn = lambda p, ids: p["table"][ids] @ p["table"].T  # noqa: E731
    stats = jp.calibrate(fn, params, [jnp.array([1, 2, 3])])
    assert stats.reasons == {}
    np.testing.assert_allclose(stats.grams["table"], gram(params["table"][1:4]), rtol=1e-5)


NO_INPUTS = {
    "bias of heads": ((2, 3), lambda w, x: x.reshape(-1, 2, 3) + w, "spread along the inputs"),
    "scale of an axis": ((1, 6), lambda w, x: x * w, "spread along the inputs"),
    "table": ((9, 6), lambda w, x: w[jnp.argmax(x, -1)], "rows are looked up"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_INPUTS)
def test_leaves_that_no_contraction_consumes_are_told_so(name):
    shape, fn, why = NO_INPUTS[name]
    stats = jp.calibrate(lambda p, x: fn(p["w"], x), {"w": normal(1, *shape)}, [normal(0, 5, 6)])
    assert "no contraction consumes it" in stats.reasons["w"] and why in stats.reasons["w"]


# -------------------------------------------------------------------- several calls and batches


def test_what_a_function_closes_over_may_change_between_calls():
    scale = [1.0]
    fn = lambda p, x: (scale[0] * x) @ p["w"]  # noqa: E731
    params, x = {"w": normal(1, 4, 3)}, normal(0, 5, 4)
    for factor in (1.0, 3.0):
        scale[0] = factor
        stats = jp.calibrate(fn, params, [x])
        np.testing.assert_allclose(stats.grams["w"], gram(factor * x), rtol=1e-5, atol=1e-4)


def test_a_method_of_an_object_is_traced_once_per_call():
    class Model:
        traces = 0

        def apply(self, p, x):
            Model.traces += 1
            return x @ p["w"]

    jp.calibrate(Model().apply, {"w": normal(1, 4, 3)}, [normal(k, 5, 4) for k in range(3)])
    assert Model.traces == 1


@pytest.mark.slow
def test_batches_may_use_different_leaves():
    params = {"a": normal(1, 4, 3), "b": normal(2, 4, 3), "c": normal(3, 4, 3)}

    def fn(p, x, y=None):
        return (x @ p["a"], x @ p["c"]) if y is None else (x @ p["a"], y @ p["b"])

    x, y, z = normal(4, 5, 4), normal(5, 6, 4), normal(6, 2, 4)
    stats = jp.calibrate(fn, params, [x, (z, y), x])
    for name, rows in {"a": (x, z, x), "b": (y,), "c": (x, x)}.items():
        np.testing.assert_allclose(stats.grams[name], gram(*rows), rtol=1e-5, atol=1e-4)
        rows = np.concatenate(rows)
        np.testing.assert_allclose(stats.variances[name], rows.var(0), rtol=1e-4)
        assert stats.count[name] == len(rows)
    assert stats.reasons == {}


def test_a_use_that_is_lost_in_one_batch_is_told():
    fn = lambda p, x, lost=None: x @ (p["w"] if lost is None else 2 * p["w"])  # noqa: E731
    x = normal(0, 5, 4)
    stats = jp.calibrate(fn, {"w": normal(1, 4, 3)}, [(x, 1), x])
    np.testing.assert_allclose(stats.grams["w"], gram(x), rtol=1e-5, atol=1e-5)
    assert "not counted: mul" in stats.reasons["w"]


def test_another_layout_in_another_batch_names_the_leaf():
    fn = lambda p, x, t=None: x @ (p["w"] if t is None else p["w"].T)  # noqa: E731
    x = normal(0, 5, 4)
    with pytest.raises(ValueError, match=r"w, shape \(4, 4\), .* \(0,\) in one batch and \(1,\)"):
        jp.calibrate(fn, {"w": normal(1, 4, 4)}, [x, (x, 1)])


def test_a_batch_without_tokens_counts_none():
    params, x = {"w": normal(1, 4, 3)}, normal(0, 5, 4)
    stats = jp.calibrate(linear, params, [x[:0], x, x[:0]])
    np.testing.assert_allclose(stats.grams["w"], gram(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.means["w"], x.mean(0), rtol=1e-5, atol=1e-6)
    assert stats.count["w"] == 5
    none = jp.calibrate(linear, params, [x[:0]])
    assert none.count["w"] == 0 and (np.asarray(none.norms["w"]) == 0).all()


X = jnp.ones((3, 4))
WRONG = {
    "one array": ({"batches": X}, r"batches is one \w+; wanted an iterable of batches: batches="),
    "a dict": ({"batches": {"x": X}}, "batches is one dict; wanted an iterable"),
    "a list": ({"batches": [[X, X]]}, r"a batch is a list of 2; pass a tuple .*batches=\[\(x, y\)"),
    "shapes": (
        {"batches": [jax.ShapeDtypeStruct((3, 4), "f")]},
        "calibrate needs data, .*batches=",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_batches_are_checked(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        jp.calibrate(linear, {"w": normal(1, 4, 3)}, **given)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float16])
def test_sums_are_of_float32_or_float64(dtype):
    with pytest.raises(TypeError, match="dtype=.*wanted what sums stay exact in, jnp.float32"):
        jp.calibrate(linear, {"w": normal(1, 4, 3)}, [X], dtype=dtype)
