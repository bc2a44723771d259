"""One-shot methods against the slow way: numpy, float64, one column or one output at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from benchmarks.studies.oneshot import layer as oneshot_layer


def linear(p, x):
    return x @ p["w"]


def setting(n, out, tokens=200, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(n, n)) / np.arange(1, n + 1)[:, None]
    x = jnp.asarray(rng.normal(size=(tokens, n)) @ mix + 0.1 * rng.normal(size=(tokens, n)), dtype)
    params = {"w": jnp.asarray(rng.normal(size=(n, out)), dtype)}
    return params, jp.calibrate(linear, params, [x], dtype=dtype)


def add_damping(gram, damping):
    return gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))


def slow_sparsegpt(w, h, choose, group):
    """Column by column (rows here): an explicit inverse of what is left, at every step."""
    w, n = np.array(w, np.float64), len(w)
    mask = np.ones(w.shape, bool)
    for j in range(n):
        if j % group == 0:
            last = min(j + group, n)
            pivots = [np.linalg.inv(h[k:, k:])[0, 0] for k in range(j, last)]
            mask[j:last] = choose(w[j:last] ** 2 / np.array(pivots)[:, None])
        inverse = np.linalg.inv(h[j:, j:])
        error = np.where(mask[j], 0, w[j] / inverse[0, 0])
        w[j:] -= np.outer(inverse[:, 0], error)
    return np.where(mask, w, 0), mask


def largest(scores, density):
    order = np.argsort(-scores, axis=None, kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[: scores.size - round((1 - density) * scores.size)]] = True
    return mask.reshape(scores.shape)


def two_of_four(scores):
    rank = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0)
    return rank < 2


CASES = {
    "blocks": (jp.unstructured(), lambda s: largest(s, 0.5), 8),
    "an incomplete last block": (jp.unstructured(), lambda s: largest(s, 0.5), 9),
    "one block": (jp.unstructured(), lambda s: largest(s, 0.5), 128),
    "2:4": (jp.n_m(2, 4), two_of_four, 4),
    "2:4 in blocks of 8": (jp.n_m(2, 4), two_of_four, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sparsegpt_equals_the_slow_way(name, x64):
    pattern, choose, group = CASES[name]
    params, stats = setting(24, 6, dtype=jnp.float64)
    block = 8 if name.endswith("8") else group
    pruned, masks = jp.oneshot.sparsegpt(params, stats, 0.5, pattern=pattern, block=block)
    h = add_damping(np.asarray(stats.grams["w"]), 0.01)
    weights, mask = slow_sparsegpt(params["w"], h, choose, group)
    assert (np.asarray(masks["w"]) == mask).all()
    np.testing.assert_allclose(pruned["w"], weights, rtol=1e-8, atol=1e-10)


def slow_least_squares(w, h, mask):
    v = np.zeros(w.shape)
    for o in range(w.shape[1]):
        s = np.flatnonzero(mask[:, o])
        v[s, o] = np.linalg.solve(h[np.ix_(s, s)], (h @ w[:, o])[s])
    return v


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 99), st.floats(0.2, 0.8))
def test_least_squares_and_long_refit_equal_the_slow_way(seed, sparsity):
    params, stats = setting(10, 4, seed=seed)
    masks = jp.unstructured()(jp.magnitude(params), sparsity)
    h = add_damping(np.asarray(stats.grams["w"], np.float64), 0.01)
    slow = slow_least_squares(np.asarray(params["w"], np.float64), h, np.asarray(masks["w"]))
    exact = jp.oneshot.least_squares(params, masks, stats)["w"]
    np.testing.assert_allclose(exact, slow, rtol=2e-3, atol=2e-3)
    long = jp.oneshot.refit(params, masks, stats, cg_steps=60)["w"]
    np.testing.assert_allclose(long, slow, rtol=2e-3, atol=2e-3)
    assert (np.asarray(long)[~np.asarray(masks["w"])] == 0).all()


@pytest.mark.slow
def test_ten_steps_are_worth_97_percent_and_the_order_of_methods():
    found = oneshot_layer.study(seed=0, inputs=128, outputs=64, tokens=1024, exact=True)["2:4"]
    dense_gain = found["wanda"]["in"] - found["wanda + least squares"]["in"]
    assert found["wanda"]["in"] - found["wanda + refit"]["in"] >= 0.97 * dense_gain
    out = {name: errors["held out"] for name, errors in found.items()}
    assert out["wanda + refit"] < out["sparsegpt"] < out["wanda"] < out["magnitude"]
    assert out["alps"] < out["sparsegpt + refit"] < out["wanda + refit"]


METHODS = {"sparsegpt": jp.oneshot.sparsegpt, "alps": jp.oneshot.alps}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "pattern, sparsity",
    [
        (jp.unstructured(), 0.7),
        (jp.unstructured(per_output=True), 0.5),
        (jp.n_m(1, 4), 0.75),
        (jp.block((2, 2)), 0.5),
    ],
)
def test_masks_are_the_pattern_s(name, pattern, sparsity):
    params, stats = setting(16, 8)
    pruned, masks = METHODS[name](params, stats, sparsity, pattern=pattern)
    assert float(jp.density(params, masks)) == pytest.approx(1 - sparsity, abs=0.01)
    again = pattern({"w": masks["w"].astype(jnp.float32)}, sparsity)  # a mask of this pattern
    assert (again["w"] == masks["w"]).all()
    assert (np.asarray(pruned["w"])[~np.asarray(masks["w"])] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_layouts_give_the_same_weights(name):
    """Transposed kernels, stacks and heads are solved as the plain kernel is."""
    params, stats = setting(16, 8)
    w, x = params["w"], jax.random.normal(jax.random.key(0), (100, 16))
    scan = lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["s"])[1]  # noqa: E731
    heads = lambda p, x: jnp.einsum("tab,abo->to", x.reshape(-1, 4, 4), p["h"])  # noqa: E731
    programs = {
        "t": (w.T, lambda p, x: x @ p["t"].T, lambda v: v.T),
        "s": (w[None], scan, lambda v: v[0]),
        "h": (w.reshape(4, 4, 8), heads, lambda v: v.reshape(16, 8)),
    }
    plain = jp.calibrate(linear, params, [x])
    wanted, _ = METHODS[name](params, plain, 0.5)
    for key, (leaf, fn, back) in programs.items():
        stats = jp.calibrate(fn, {key: leaf}, [x])
        pruned, masks = METHODS[name]({key: leaf}, stats, 0.5)
        np.testing.assert_allclose(back(pruned[key]), wanted["w"], rtol=1e-4, atol=1e-4)
        assert masks[key].shape == leaf.shape


@pytest.mark.slow
def test_convolutions_are_refit():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    params = {"k": jax.random.normal(jax.random.key(1), (3, 3, 3, 4))}

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)

    stats = jp.calibrate(fn, params, [x])
    masks = jp.unstructured()(jp.wanda(params, input_norms=stats.norms), 0.5)
    refit = jp.oneshot.refit(params, masks, stats)
    masked = jp.apply_masks(params, masks)

    def error(p):
        return float(jnp.sum((fn(p, x) - fn(params, x)) ** 2))

    assert error(refit) < error(masked)
    energy = float(jnp.sum(fn(params, x) ** 2))
    told = jp.oneshot.output_error(params, refit, stats)["k"]
    assert float(told) == pytest.approx(error(refit) / energy, rel=1e-3)


@pytest.mark.slow
def test_other_leaves_stay_and_distributions_count():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    params["a"] = jax.random.normal(jax.random.key(0), (8, 8))
    x = jax.random.normal(jax.random.key(1), (50, 8))
    stats = jp.calibrate(lambda p, x: (x @ p["a"] + p["bias"]) @ p["b"], params, [x])
    pattern = jp.unstructured({"a": 0.75}, where=lambda path, leaf: path == "a")
    pruned, masks = jp.oneshot.sparsegpt(params, stats, 0.5, pattern=pattern)
    assert masks["b"].shape == () and pruned["b"] is params["b"]
    assert int(masks["a"].sum()) == 16


@pytest.mark.slow
def test_dead_inputs_change_nothing_else():
    params, _ = setting(8, 4)
    x = jax.random.normal(jax.random.key(0), (50, 8)).at[:, 3].set(0)
    stats = jp.calibrate(linear, params, [x])
    for method in METHODS.values():
        pruned, masks = method(params, stats, 0.5, pattern=jp.n_m(2, 4))
        assert not masks["w"][3].any()  # they go first
        assert np.isfinite(pruned["w"]).all()
    masks = {"w": jnp.ones((8, 4), bool)}
    refit = jp.oneshot.refit(params, masks, stats)["w"]
    np.testing.assert_allclose(refit[3], params["w"][3])  # kept: as they were


def test_a_singular_gram_matrix_gets_more_damping():
    params, _ = setting(8, 4)
    stats = jp.calibrate(linear, params, [jnp.ones((3, 8))])  # rank 1
    pruned, _ = jp.oneshot.sparsegpt(params, stats, 0.5, damping=0.0)
    assert np.isfinite(pruned["w"]).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_gram_matrix_with_a_negative_eigenvalue_gets_more_damping(name):
    """As rounding leaves it when inputs depend on each other."""
    params, stats = setting(8, 4)
    values, vectors = np.linalg.eigh(np.asarray(stats.grams["w"], np.float64))
    values[0] = -0.02 * values.mean()  # more than the first damping adds
    gram = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)
    bent = dataclasses.replace(stats, grams={"w": gram})
    pruned, masks = METHODS[name](params, bent, 0.5)
    assert np.isfinite(pruned["w"]).all() and float(masks["w"].mean()) == 0.5
    error = jp.oneshot.output_error(params, pruned, stats)["w"]
    plain = jp.apply_masks(params, jp.unstructured()(jp.magnitude(params), 0.5))
    assert error < jp.oneshot.output_error(params, plain, stats)["w"]


def broken(params, stats):
    return dataclasses.replace(stats, grams={"w": stats.grams["w"] * jnp.nan})


@pytest.mark.parametrize("name", [*METHODS, "refit"])
def test_gram_matrices_that_no_damping_helps_are_an_error(name):
    params, stats = setting(8, 4)
    bad = broken(params, stats)
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    with pytest.raises(FloatingPointError, match=r"w, shape \(8, 4\): the Gram matrix .*damping="):
        if name == "refit":
            jp.oneshot.refit(params, masks, bad)
        else:
            METHODS[name](params, bad, 0.5)


def test_patterns_that_couple_leaves_are_refused():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    structure, stats = jp.infer_structure(fn, params, jnp.ones((2, 8))), None
    with pytest.raises(TypeError, match="sparsegpt: .* can't choose within one matrix.*refit"):
        jp.oneshot.sparsegpt(params, stats, 0.5, pattern=jp.structured(structure))


def test_without_grams_the_error_says_so():
    params, _ = setting(8, 4)
    stats = jp.calibrate(linear, params, [jnp.ones((3, 8))], grams=False)
    with pytest.raises(ValueError, match="alps: w, .* it was calibrated without grams"):
        jp.oneshot.alps(params, stats, 0.5)


@pytest.mark.slow
def test_compilation_does_not_grow_with_the_inputs():
    from jaxprune.oneshot._sparsegpt import _matrix

    def equations(n):
        shapes = jnp.ones((n, 4)), jnp.eye(n)
        how = {"within": jp.unstructured().within(0.5), "group": None, "block": 8}
        jaxpr = jax.make_jaxpr(lambda w, g: _matrix(w, g, 0.5, 0.01, **how))(*shapes)
        return str(jaxpr).count("\n")

    assert equations(64) == equations(16)


def test_bfloat16_weights_keep_their_type():
    params, stats = setting(8, 4)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    pruned, masks = jp.oneshot.sparsegpt(half, stats, 0.5)
    assert pruned["w"].dtype == jnp.bfloat16
    assert jp.oneshot.refit(half, masks, stats)["w"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_ria_equals_the_slow_way():
    w, norms = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]), np.array([2.0, 5.0])
    slow = np.zeros(w.shape)
    for i in range(2):
        for j in range(3):
            share = abs(w[i, j]) / abs(w[i]).sum() + abs(w[i, j]) / abs(w[:, j]).sum()
            slow[i, j] = share * norms[i] ** 0.5
    got = jp.scores.ria({"w": jnp.asarray(w, jnp.float32)}, input_norms={"w": norms})["w"]
    np.testing.assert_allclose(got, slow, rtol=1e-6)
    with pytest.raises(TypeError, match="ria needs the evidence input_norms=.*calibrate"):
        jp.scores.ria({"w": jnp.ones((2, 2))})


def slow_obc(w, h, keep, group):
    """Each output on its own, with an inverse of the kept inputs from scratch at every step."""
    result = np.zeros(w.shape)
    for o in range(w.shape[1]):
        v, mask = np.array(w[:, o], np.float64), np.ones(len(w), bool)
        for _ in range(len(w) // group * (group - keep)):
            s = np.flatnonzero(mask)
            inverse = np.linalg.inv(h[np.ix_(s, s)])
            full = [int(mask[g : g + group].sum()) > keep for g in range(0, len(w), group)]
            costs = v[s] ** 2 / np.diag(inverse)
            costs[[not full[i // group] for i in s]] = np.inf
            p = int(np.argmin(costs))
            v[s] -= v[s][p] / inverse[p, p] * inverse[:, p]
            mask[s[p]] = False
            v[s[p]] = 0
        result[:, o] = v
    return result


@pytest.mark.slow
@pytest.mark.parametrize("group, pattern", [(12, jp.unstructured()), (4, jp.n_m(2, 4))])
def test_obc_equals_the_slow_way(group, pattern, x64):
    params, stats = setting(12, 5, dtype=jnp.float64)
    pruned, masks = jp.oneshot.obc(params, stats, 0.5, pattern=pattern)
    h = add_damping(np.asarray(stats.grams["w"]), 0.01)
    slow = slow_obc(np.asarray(params["w"]), h, group // 2, group)
    np.testing.assert_allclose(pruned["w"], slow, rtol=1e-7, atol=1e-9)
    assert ((slow != 0) == np.asarray(masks["w"])).all()


@pytest.mark.slow
def test_obc_is_for_small_layers():
    params = {"w": jnp.ones((1028, 1))}
    stats = jp.calibrate(linear, params, [jnp.ones((2, 1028))])
    with pytest.raises(ValueError, match=r"obc: w, shape \(1028, 1\), has 1028 inputs.*alps"):
        jp.oneshot.obc(params, stats, 0.5)


def slow_dsnot(w, mask, x, group, cycles=50, threshold=0.1):
    mean, variance, norm = x.mean(0), x.var(0), np.sqrt((x**2).sum(0))
    mask = mask.copy()
    for o in range(w.shape[1]):
        for _ in range(cycles):
            m, given = mask[:, o], w[:, o] * mean
            error = given[~m].sum()
            if abs(error) <= threshold:
                break
            other = [i for i in np.flatnonzero(m) if np.sign(error) * given[i] < 0]
            pruned = [i for i in np.flatnonzero(~m) if any(j // group == i // group for j in other)]
            if not pruned:
                break
            back = pruned[np.argmax(np.sign(error) * given[pruned] / variance[pruned])]
            may = [i for i in other if i // group == back // group]
            gone = min(may, key=lambda i: abs(w[i, o]) * norm[i])
            if abs(error - given[back] + given[gone]) >= abs(error):
                break
            mask[back, o], mask[gone, o] = True, False
    return mask


@pytest.mark.slow
@pytest.mark.parametrize(
    "group, pattern", [(16, jp.unstructured(per_output=True)), (4, jp.n_m(2, 4))]
)
def test_dsnot_equals_the_slow_way(group, pattern):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(60, 16)) + rng.normal(size=16), jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)}
    stats = jp.calibrate(linear, params, [x])
    masks = pattern(jp.wanda(params, input_norms=stats.norms), 0.5)
    got = np.asarray(jp.oneshot.dsnot(params, masks, stats, group=group)["w"])
    w64, x64 = np.asarray(params["w"], np.float64), np.asarray(x, np.float64)
    assert (got == slow_dsnot(w64, np.asarray(masks["w"]), x64, group)).all()
    assert (got != np.asarray(masks["w"])).any()
    assert (got.sum(0) == np.asarray(masks["w"]).sum(0)).all()


@pytest.mark.slow
def test_every_product_of_sparsegpt_is_of_full_precision():
    """An accelerator would round float32 operands, and errors add up over the inputs."""
    params = {"w": jnp.ones((32, 4))}
    stats = jp.calibrate(lambda p, x: x @ p["w"], params, [jnp.eye(32)])
    program = str(jax.make_jaxpr(lambda p: jp.oneshot.sparsegpt(p, stats, 0.5))(params))
    products = program.count("dot_general[")
    assert products and program.count("precision=(Precision.HIGHEST, ") == products
