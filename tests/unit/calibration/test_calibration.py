"""What calibration reads off a program, against numpy on the inputs written out by hand."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.helpers.processes import environment

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def check(stats, name, rows, shape=None):
    """One leaf's statistics against rows (tokens, in) in float64."""
    rows = np.asarray(rows, np.float64)
    wanted = {
        "norms": np.sqrt((rows**2).sum(0)),
        "means": rows.mean(0),
        "variances": rows.var(0),
    }
    for what, value in wanted.items():
        got = getattr(stats, what)[name]
        assert got.shape == (shape or value.shape), what
        np.testing.assert_allclose(np.ravel(got), value, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(stats.grams[name], rows.T @ rows, rtol=2e-5, atol=2e-4)
    assert stats.count[name] == len(rows)


@pytest.mark.slow
def test_a_kernel_over_two_batches():
    params, x, y = {"w": array(5, 3), "b": array(3)}, array(4, 6, 5) + 30, array(2, 5)
    stats = jp.calibrate(lambda p, x: x @ p["w"] + p["b"], params, [x, (y,)])
    check(stats, "w", np.concatenate([x.reshape(-1, 5), y]))
    assert stats.norms["b"] is None and stats.layouts["w"].ins == (0,)


@pytest.mark.slow
def test_variance_survives_a_large_mean_in_float32():
    x = array(1000, 2) + 3000
    stats = jp.calibrate(lambda p, x: x @ p, array(2, 1), [x[:400], x[400:]])
    np.testing.assert_allclose(stats.variances, np.var(np.asarray(x, np.float64), 0), rtol=1e-3)


LAYOUTS = {  # name -> (shape of the leaf, what is computed, shape of its norms)
    "transposed": ((3, 6), lambda w, x: x @ w.T, (1, 6)),
    "weight first": ((3, 6), lambda w, x: jnp.dot(w, x.T), (1, 6)),
    "heads out": ((6, 2, 4), lambda w, x: jnp.einsum("ti,ihd->thd", x, w), (6, 1, 1)),
    "heads in": (
        (2, 3, 4),
        lambda w, x: jnp.einsum("thd,hdo->to", x.reshape(-1, 2, 3), w),
        (2, 3, 1),
    ),
    "merged": ((6, 2, 4), lambda w, x: x @ w.reshape(6, 8), (6, 1, 1)),
    "split": ((6, 8), lambda w, x: jnp.einsum("ti,ihd->thd", x, w.reshape(6, 2, 4)), (6,)),
    "cast": ((6, 4), lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (6,)),
    "half of the outputs": ((6, 4), lambda w, x: x @ w[:, :2], (6,)),
    "vmap": ((6, 4), lambda w, x: jax.vmap(lambda row: w.T @ row)(x), (6,)),
    "jit": ((6, 4), lambda w, x: jax.jit(jnp.matmul)(x, w), (6,)),
    "remat": ((6, 4), lambda w, x: jax.checkpoint(jnp.matmul)(x, w), (6,)),
    "custom derivative": ((6, 4), lambda w, x: jax.nn.relu(_custom(x, w)), (6,)),
    "cond": ((6, 4), lambda w, x: jax.lax.cond(x.sum() < 9, lambda: x @ w, lambda: -(x @ w)), (6,)),
}  # fmt: skip


@jax.custom_vjp
def _custom(x, w):
    return x @ w


_custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    shape, apply, norms = LAYOUTS[name]
    params, x = {"w": array(*shape)}, array(7, 6)
    stats = jp.calibrate(lambda p, x: apply(p["w"], x), params, [x])
    check(stats, "w", x, norms)
    scores = jp.wanda(params, input_norms=stats.norms)["w"]  # wanda takes the same shapes
    assert scores.shape == shape


@pytest.mark.slow
def test_stacked_layers_have_a_statistic_each():
    params, x = array(3, 4, 4), array(6, 4)

    def fn(stack, x):
        return jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, stack)[0]

    stats = jp.calibrate(fn, params, [x])
    rows = np.asarray(x, np.float64)
    for k in range(3):
        np.testing.assert_allclose(stats.grams[k], rows.T @ rows, rtol=1e-4, atol=1e-4)
        rows = np.tanh(rows @ np.asarray(params[k], np.float64))
    assert stats.norms.shape == (3, 4, 1) and stats.count.tolist() == [6, 6, 6]


@pytest.mark.slow
def test_indexed_stacks_and_experts():
    params, x = {"stack": array(3, 4, 4), "experts": array(2, 4, 5)}, array(2, 6, 4)

    def fn(p, x):
        h = x
        for k in range(3):
            h = h @ p["stack"][k]
        return h, jnp.einsum("eti,eio->eto", x, p["experts"])

    stats = jp.calibrate(fn, params, [x])
    np.testing.assert_allclose(stats.grams["experts"], x.mT @ x, rtol=1e-5, atol=1e-5)
    rows = (x @ params["stack"][0]).reshape(-1, 4)
    np.testing.assert_allclose(stats.grams["stack"][1], rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert stats.count["stack"].tolist() == [12, 12, 12]


@pytest.mark.slow
def test_a_recurrent_weight_counts_every_step():
    w, x = array(4, 4), array(5, 3, 4)

    def fn(w, x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(h @ w + x), h), jnp.zeros((3, 4)), x)[1]

    rows = fn(w, x).reshape(-1, 4)
    stats = jp.calibrate(fn, w, [x])
    np.testing.assert_allclose(stats.grams, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert stats.count == 15


def test_a_weight_in_a_while_loop():
    w, x = array(4, 4) / 4, array(3, 4)

    def fn(w, x):
        return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]

    stats = jp.calibrate(fn, w, [x])
    np.testing.assert_allclose(stats.grams, x.T @ x + (x @ w).T @ (x @ w), rtol=1e-4, atol=1e-5)


def test_a_weight_in_a_loop_for_each_row_has_no_statistics():
    w, x = array(4, 4) / 4, array(3, 4)

    def grown(w, x):
        return jax.lax.while_loop(lambda h: h.sum() < 2, lambda h: jnp.exp(h @ w), x)

    stats = jp.calibrate(lambda w, x: jax.vmap(grown, (None, 0))(w, x), w, [x])
    assert "each row has its own number of rounds" in str(stats.reasons)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["SAME", "VALID"]), st.integers(1, 2))
def test_convolutions_multiply_patches(h, w, padding, stride):
    params, x = array(h, w, 2, 3), array(2, 5, 6, 2)
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(k, x):
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), padding, dimension_numbers=numbers
        )

    stats = jp.calibrate(fn, params, [x])
    out = fn(params, x)  # W^T G W is the energy of the outputs, for any W
    kernel = params.reshape(-1, 3)
    np.testing.assert_allclose(
        kernel.T @ stats.grams @ kernel,
        jnp.einsum("nhwo,nhwp->op", out, out),
        rtol=1e-4,
        atol=1e-3,
    )
    assert stats.norms.shape == (h, w, 2, 1) and stats.count == out[..., 0].size


def test_a_weight_used_twice_counts_both():
    w, x = array(4, 4), array(3, 4)
    stats = jp.calibrate(lambda w, x: (x @ w, (2 * x) @ w), w, [x])
    np.testing.assert_allclose(stats.grams, 5 * x.T @ x, rtol=1e-5)
    assert stats.count == 6


REASONS = {
    "unused": (lambda w, x: x, "no contraction consumes it"),
    "scaled": (lambda w, x: x @ (2 * w), "mul.*changed before it is multiplied"),
    "both sides": (lambda w, x: (x @ w, x @ w.T), "two kinds of inputs"),
    "carried": (
        lambda w, x: jax.lax.fori_loop(0, 2, lambda _, s: (s[0] @ s[1], s[1] * 1), (x, w)),
        "carries the weight",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    fn, reason = REASONS[name]
    stats = jp.calibrate(lambda p, x: fn(p["w"], x), {"w": array(4, 4)}, [array(3, 4)])
    assert stats.norms["w"] is None and stats.grams["w"] is None

    assert re.search(reason, stats.reasons["w"])
    if name == "unused":
        return
    masks = {"w": jnp.zeros((4, 4), bool)}
    with pytest.raises(ValueError, match=rf"refit: w, shape \(4, 4\), has no Gram.*{reason}"):
        jp.oneshot.refit({"w": array(4, 4)}, masks, stats)


def test_grouped_convolutions_say_why():
    def fn(k, x):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    stats = jp.calibrate(lambda p, x: fn(p["k"], x), {"k": array(3, 3, 1, 2)}, [array(1, 4, 4, 2)])
    assert stats.grams["k"] is None and "groups" in stats.reasons["k"]


@pytest.mark.slow
def test_where_and_grams_choose_leaves():
    params, x = {"a": array(4, 4), "b": array(4, 4)}, array(3, 4)
    fn = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    stats = jp.calibrate(fn, params, [x], grams=lambda path, leaf: path == "a")
    assert stats.grams["b"] is None and stats.norms["b"] is not None
    stats = jp.calibrate(fn, params, [x], where=lambda path, leaf: path == "a")
    assert stats.norms["b"] is None
    masks = {"a": True, "b": params["b"] > 0}
    got = jp.oneshot.refit(params, masks, stats)["b"]  # masked alone
    np.testing.assert_array_equal(got, jnp.where(masks["b"], params["b"], 0))
    with pytest.raises(ValueError, match="b, shape .* left out of the calibration"):
        jp.oneshot.sparsegpt(params, stats, 0.5)


@pytest.mark.slow
def test_psum_over_a_mapped_axis_is_one_batch():
    w, x = array(4, 2), array(2, 5, 4)
    fn = lambda w, x: x @ w  # noqa: E731

    def part(x):
        stats = jp.calibrate(fn, w, [x], axis_name="data")
        return stats.grams, stats.variances, stats.count

    got = jax.vmap(part, axis_name="data")(x)
    whole = jp.calibrate(fn, w, [x])
    for a, b in zip(got, (whole.grams, whole.variances, whole.count)):
        np.testing.assert_allclose(a[0], b, rtol=1e-5)
        np.testing.assert_allclose(a[1], b, rtol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
import jaxprune as jp
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, halves = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in (("data",), (None, "data")))
rng = np.random.default_rng(0)
params = {k: rng.normal(size=(4, 4)).astype("f") for k in "ab"}
x = rng.normal(size=(2, 6, 4)).astype("f") + 5
fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
want = jp.calibrate(fn, params, [*x])
placed = jax.device_put(params, {"a": halves, "b": rows})
for p in (params, placed):  # parameters on every device, or a part on each
    got = jp.calibrate(fn, p, [jax.device_put(part, rows) for part in x])
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(got.grams))
    for name in ("norms", "means", "variances", "grams", "count"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, name)) for s in (got, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
pruned, _ = jp.oneshot.sparsegpt(placed, got, 0.5)
alone, _ = jp.oneshot.sparsegpt(params, want, 0.5)
for a, b in zip(jax.tree.leaves(pruned), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
print("equal on", len(jax.devices()))
"""


@pytest.mark.slow
def test_sharded_batches_and_params_give_the_same():
    """Needs several devices, which a process can only ask for before JAX starts."""
    command = [sys.executable, "-c", SHARDED]
    run = subprocess.run(command, env=environment(2), capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "equal on 2", run.stderr[-2000:]


@pytest.mark.slow
def test_float64(x64):
    w, x = np.asarray(array(4, 2)), np.asarray(RNG.normal(size=(5, 4)) + 1e3)
    stats = jp.calibrate(lambda w, x: x @ w, jnp.asarray(w), [x], dtype=jnp.float64)
    np.testing.assert_allclose(stats.grams, x.T @ x, rtol=1e-13)


def test_one_compilation_per_call_for_batches_of_one_shape():
    traces = []

    def fn(w, x):
        traces.append(1)
        return x @ w

    for calls in (1, 2):
        jp.calibrate(fn, array(4, 2), [array(3, 4), array(3, 4)])
        assert len(traces) == calls


ERRORS = {
    "no batches": ({"batches": []}, "batches is empty"),
    "NaN": ({"batches": [jnp.full((3, 4), jnp.nan)]}, r"an input of w, shape \(4, 2\), is NaN"),
    "float64": ({"batches": [jnp.ones((3, 4))], "dtype": jnp.float64}, "float64 is not enabled"),
}


def test_an_activation_that_is_not_finite_names_its_reader():
    params = {"a": array(4, 4), "b": array(4, 2)}
    fn = lambda p, x: jnp.log(jnp.abs(x @ p["a"]) * 0) @ p["b"]  # noqa: E731
    with pytest.raises(ValueError, match=r"an input of b, shape \(4, 2\), is NaN or infinite"):
        jp.calibrate(fn, params, [jnp.ones((3, 4))])


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        jp.calibrate(lambda p, x: x @ p["w"], {"w": array(4, 2)}, **given)
