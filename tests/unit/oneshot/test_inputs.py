"""What one-shot methods do with leaves, layouts and arguments that are not the plain case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.oneshot._linalg import factor

METHODS = {name: getattr(jp.oneshot, name) for name in ("sparsegpt", "alps", "obc")}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear(p, x):
    return x @ p["w"]


@functools.cache  # calibrating compiles; nothing here changes what it gets
def calibrated(n=8, out=4, tokens=64):
    params = {"w": normal(1, n, out)}
    return params, jp.calibrate(linear, params, [normal(0, tokens, n)])


# ------------------------------------------------------------------------ singular Gram matrices


@pytest.mark.slow
@methods
def test_two_equal_inputs_without_damping(method):
    params, _ = calibrated()
    x = normal(0, 64, 8) @ (normal(3, 8, 8) + jnp.eye(8))
    stats = jp.calibrate(linear, params, [x.at[:, 1].set(x[:, 0])])
    plain = jp.apply_masks(params, jp.unstructured()(jp.magnitude(params), 0.5))
    trees = [method(params, stats, 0.5, damping=d)[0] for d in (0.0, 0.01)]
    bare, much, none = (
        float(jp.oneshot.output_error(params, p, stats)["w"]) for p in (*trees, plain)
    )
    assert bare < 1.1 * much and bare < 0.5 * none


@pytest.mark.slow
def test_a_factor_of_rounding_counts_as_none():
    x = np.array(normal(0, 50, 6))
    x[:, 3] = x[:, 2] * (1 + 1e-7)
    gram = jnp.asarray(x.T @ x)
    lower = factor(gram, 0.0)
    h = lower @ lower.T
    added = np.diagonal(h - gram)
    np.testing.assert_allclose(h, gram + np.diag(added), rtol=1e-4, atol=1e-4)
    assert 1e-6 * jnp.mean(jnp.diagonal(gram)) < added.min() < added.max() < 1e-3 * jnp.max(gram)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(6))
    np.testing.assert_allclose(h @ inverse, np.eye(6), atol=0.05)


def half(method):
    return lambda params, masks, stats, **how: method(params, stats, 0.5, **how)


EVERY = {name: half(method) for name, method in METHODS.items()} | {
    "refit": jp.oneshot.refit,
    "least_squares": jp.oneshot.least_squares,
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("damping", [-1.0, float("nan"), "a"])
def test_damping_is_checked(name, damping):
    params, stats = calibrated()
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    with pytest.raises(ValueError, match=f"{name}: damping=.*wanted a number from 0 on"):
        EVERY[name](params, masks, stats, damping=damping)


# ----------------------------------------------------------------- leaves without Gram matrices

REPAIRS = {"refit": jp.oneshot.refit, "least_squares": jp.oneshot.least_squares}
repairs = pytest.mark.parametrize("repair", REPAIRS.values(), ids=REPAIRS)


def network(p, x):
    """An embedding, attention biases, a depthwise kernel, scanned layers with biases."""
    h = p["table"][x]  # (tokens, 6)
    h = jnp.einsum("td,dhk->thk", h, p["q"]) + p["q_bias"]
    h = h.reshape(1, len(x), 6)
    h = jax.lax.conv_general_dilated(
        h, p["depthwise"], (1,), "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=6,
    )[0]  # fmt: skip
    step = lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]) * layer["g"], None)  # noqa: E731
    return jax.lax.scan(step, h, p["layers"])[0]


@functools.cache
def a_network():
    shapes = {
        "table": (9, 6), "q": (6, 2, 3), "q_bias": (2, 3), "depthwise": (3, 1, 6),
        "layers": {"w": (2, 6, 6), "b": (2, 6), "g": (2, 6)},
    }  # fmt: skip
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = treedef.unflatten([normal(k, *shape) for k, shape in enumerate(leaves)])
    return params, jp.calibrate(network, params, [jnp.arange(9)])


@pytest.mark.slow
@repairs
def test_leaves_without_inputs_are_just_masked(repair):
    params, stats = a_network()
    unit = jnp.arange(6) != 2
    masks = {
        "table": unit[None], "q": unit[:, None, None], "q_bias": unit.reshape(2, 3),
        "depthwise": unit[None, None],
        "layers": {"w": unit[None, :, None], "b": jnp.stack([unit, unit]), "g": unit[None]},
    }  # fmt: skip
    got, plain = repair(params, masks, stats), jp.apply_masks(params, masks)
    for name in ("table", "q_bias", "depthwise"):
        np.testing.assert_array_equal(got[name], plain[name])
    for name in ("b", "g"):
        np.testing.assert_array_equal(got["layers"][name], plain["layers"][name])
    assert (
        jp.oneshot.output_error(params, got, stats)["q"]
        < 0.999 * (jp.oneshot.output_error(params, plain, stats)["q"])
    )
    assert not np.allclose(got["layers"]["w"], plain["layers"]["w"])


@pytest.mark.slow
@repairs
def test_kernels_cut_in_whole_outputs_need_no_grams(repair):
    params, _ = calibrated()
    stats = jp.calibrate(linear, params, [normal(0, 9, 8)], grams=False)
    masks = {"w": jnp.array([[True, False, True, True]])}
    np.testing.assert_array_equal(
        repair(params, masks, stats)["w"], jp.apply_masks(params, masks)["w"]
    )
    with pytest.raises(ValueError, match=r"w, shape \(8, 4\).*without grams; write .*grams=True"):
        repair(params, {"w": jnp.ones((8, 1), bool)}, stats)


@repairs
def test_a_scalar_false_removes_a_leaf(repair):
    params, stats = calibrated()
    assert (np.asarray(repair(params, {"w": jnp.asarray(False)}, stats)["w"]) == 0).all()
    assert (np.asarray(repair(params, {"w": False}, stats)["w"]) == 0).all()
    assert repair(params, {"w": True}, stats)["w"] is params["w"]


@pytest.mark.slow
@methods
def test_the_pattern_that_a_warning_names_runs_without_it(method):
    params, stats = a_network()
    with pytest.warns(UserWarning, match="where=lambda path, leaf: path in stats.layouts"):
        method(params, stats, 0.5)
    pattern = jp.unstructured(where=lambda path, leaf: path in stats.layouts)
    _, masks = method(params, stats, 0.5, pattern=pattern)
    assert np.shape(masks["depthwise"]) == () and float(masks["layers"]["w"].mean()) == 0.5


# ------------------------------------------------------------------ patterns on leaves' own axes


def convolution(spec, p, x):
    numbers = ("NHWC", spec, "NHWC")
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]


IMAGE = (2, 4, 4, 8)
LAYOUTS = {  # name -> shape of the leaf, of the inputs, axis of the groups, function
    "(in, out)": ((8, 6), (30, 8), -2, linear),
    "(out, in)": ((6, 8), (30, 8), -1, lambda p, x: x @ p["w"].T),
    "HWIO": ((3, 2, 8, 4), IMAGE, -2, functools.partial(convolution, "HWIO")),
    "OIHW": ((4, 8, 3, 2), IMAGE, 1, functools.partial(convolution, "OIHW")),
    "window": ((4, 3, 3, 4), (2, 4, 4, 3), -1, functools.partial(convolution, "OIHW")),
    "stacked": ((2, 8, 8), (30, 8), -2, scanned),
    "heads": ((8, 2, 3), (30, 8), 0, lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"])),
    "joined heads": ((4, 2, 5), (30, 4, 2), 0, lambda p, x: jnp.einsum("thk,hko->to", x, p["w"])),
}  # fmt: skip


@functools.cache
def of_layout(name):
    shape, inputs, _, fn = LAYOUTS[name]
    params = {"w": normal(1, *shape)}
    return params, jp.calibrate(fn, params, [normal(0, *inputs)])


@pytest.mark.slow
@methods
@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_run_along_the_pattern_s_axis(name, method):
    axis, (params, stats) = LAYOUTS[name][2], of_layout(name)
    pattern = jp.n_m(2, 4, axis=axis)
    pruned, masks = method(params, stats, 0.5, pattern=pattern)
    groups = np.moveaxis(np.asarray(masks["w"]), axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, 4)
    assert (groups.sum(-1) == 2).all()
    assert (np.asarray(pruned["w"])[~np.asarray(masks["w"])] == 0).all()
    plain = jp.apply_masks(params, pattern(jp.wanda(params, input_norms=stats.norms), 0.5))
    error, other = (jp.oneshot.output_error(params, p, stats)["w"] for p in (pruned, plain))
    assert float(error) < float(other)


@pytest.mark.slow
@methods
def test_another_order_of_inputs_is_the_transposed_kernel(method):
    """OIHW with groups along I, against the same kernel as (H W I, O)."""
    w, x = normal(1, 4, 8, 3, 2), normal(0, *IMAGE)
    stats = jp.calibrate(functools.partial(convolution, "OIHW"), {"w": w}, [x])
    got, masks = method({"w": w}, stats, 0.5, pattern=jp.n_m(2, 4, axis=1))
    last = {"w": w.transpose(2, 3, 1, 0)}
    stats = jp.calibrate(functools.partial(convolution, "HWIO"), last, [x])
    want, kept = method(last, stats, 0.5, pattern=jp.n_m(2, 4))
    assert (masks["w"].transpose(2, 3, 1, 0) == kept["w"]).mean() > 0.98
    np.testing.assert_allclose(got["w"].transpose(2, 3, 1, 0), want["w"], atol=0.02, rtol=0.02)


REFUSED = {
    "outputs": ((8, 8), lambda p, x: x @ p["w"], jp.n_m(2, 4, axis=-1), r"axis=-2\)"),
    "(out, in)": ((6, 8), lambda p, x: x @ p["w"].T, jp.n_m(2, 4), r"w, shape \(6, 8\).*axis=-1\)"),
    "heads": ((8, 2, 3), LAYOUTS["heads"][3], jp.n_m(2, 4), r"\(8, 2, 3\): .*axis=-3\)"),
    "no such axis": ((8, 8), linear, jp.n_m(2, 4, axis=5), r"axis=-2\)"),
    "blocks": ((6, 8), lambda p, x: x @ p["w"].T, jp.block((1, 4)), r"block\(\(1, 4\)\) on w"),
    "boxes": ((8, 8), linear, jp.block((1, 1, 2)), "does not tile w|on w, shape"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS["sparsegpt"], METHODS["alps"]])
@pytest.mark.parametrize("name", REFUSED)
def test_patterns_along_other_axes_are_refused(name, method):
    shape, fn, pattern, message = REFUSED[name]
    params = {"w": normal(1, *shape)}
    stats = jp.calibrate(fn, params, [normal(0, 30, 8)])
    with pytest.raises(ValueError, match=message):
        method(params, stats, 0.5, pattern=pattern)


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS["sparsegpt"], METHODS["alps"]])
@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 1)])
def test_blocks_of_convolutions_are_blocks_of_the_leaf(shape, method):
    params = {"w": normal(1, 3, 2, 8, 4)}
    stats = jp.calibrate(functools.partial(convolution, "HWIO"), params, [normal(0, *IMAGE)])
    _, masks = method(params, stats, 0.5, pattern=jp.block(shape))
    again = jp.block(shape)({"w": masks["w"].astype(jnp.float32)}, 0.5)
    assert (again["w"] == masks["w"]).all() and float(masks["w"].mean()) == 0.5


@pytest.mark.slow
@methods
@pytest.mark.parametrize("sparsity, kept", [(0.0, 1.0), (0.5, 0.5), (jnp.asarray(0.25), 0.75)])
def test_n_m_follows_a_schedule_as_the_pattern_does(method, sparsity, kept):
    params, stats = calibrated()
    _, masks = method(params, stats, sparsity, pattern=jp.n_m(2, 4))
    assert float(masks["w"].mean()) == kept
    if method is not METHODS["obc"] and kept == 0.75:  # whole groups, others dense
        groups = np.asarray(masks["w"]).reshape(2, 4, 4).sum(1)
        assert set(groups.ravel()) == {2, 4}


# ---------------------------------------------------------------------------- how much is kept


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55, 0.97, 1.0])
def test_all_methods_keep_as_many(sparsity):
    params, stats = calibrated()
    counts = {name: int(f(params, stats, sparsity)[1]["w"].sum()) for name, f in METHODS.items()}
    assert set(counts.values()) == {max(32 - round(32 * sparsity), int(sparsity < 1))}
    each = np.asarray(jp.oneshot.obc(params, stats, sparsity)[1]["w"]).sum(0)
    assert each.max() - each.min() <= 1


@pytest.mark.slow
def test_obc_keeps_one_more_where_it_costs_most():
    """Against a slow way: the next removal's cost of each output, by a solution without it."""
    params, stats = calibrated(6, 5)
    gram = np.asarray(stats.grams["w"], np.float64)
    h = gram + 0.01 * np.trace(gram) / 6 * np.eye(6)
    w = np.asarray(params["w"], np.float64)
    _, four = jp.oneshot.obc(params, stats, 1 / 3)  # 4 of 6 each
    _, masks = jp.oneshot.obc(params, stats, 1 - 17 / 30)  # 3 each, and 2 more
    costs = [next_cost(h, w[:, o], np.asarray(four["w"])[:, o]) for o in range(5)]
    kept = np.asarray(masks["w"]).sum(0)
    assert (kept[np.argsort(costs)] == [3, 3, 3, 4, 4]).all()


def next_cost(h, w, kept):
    def error(s):
        v = np.zeros(len(w))
        v[s] = np.linalg.solve(h[np.ix_(s, s)], (h @ w)[s])
        return (w - v) @ h @ (w - v)

    s = list(np.flatnonzero(kept))
    return min(error([i for i in s if i != p]) for p in s) - error(s)


def test_obc_refuses_blocks():
    params, stats = calibrated()
    with pytest.raises(TypeError, match=r"obc: .* can't follow jp.block\(\); write .*sparsegpt"):
        jp.oneshot.obc(params, stats, 0.5, pattern=jp.block((2, 2)))


@pytest.mark.slow
def test_a_small_rest_of_inputs_joins_the_last_block():
    params, stats = calibrated(9)
    pattern = jp.unstructured(per_output=True)
    _, masks = jp.oneshot.sparsegpt(params, stats, 0.4, pattern=pattern, block=8)
    assert np.asarray(masks["w"]).sum(0).tolist() == [9 - round(0.4 * 9)] * 4


@pytest.mark.slow
def test_blocks_of_rows_that_do_not_divide_the_block_of_inputs():
    params, stats = calibrated(24, 4, 100)
    _, masks = jp.oneshot.sparsegpt(params, stats, 0.5, pattern=jp.block((6, 2)), block=16)
    tiles = np.asarray(masks["w"]).reshape(4, 6, 2, 2).sum((1, 3))
    assert set(tiles.ravel()) == {0, 12} and tiles.sum() == 48


@pytest.mark.slow
@methods
def test_an_expert_that_no_token_reached_is_pruned_by_magnitude(method):
    params = {"w": normal(1, 3, 8, 4)}
    x = normal(0, 3, 40, 8).at[1].set(0)
    stats = jp.calibrate(lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"]), params, [x])
    pruned, masks = method(params, stats, 0.5)
    kept = np.asarray(masks["w"][1])
    want = np.where(kept, np.asarray(params["w"][1]), 0)
    np.testing.assert_allclose(pruned["w"][1], want, rtol=1e-5, atol=1e-6)
    size = np.abs(np.asarray(params["w"][1]))
    if method is METHODS["obc"]:  # each output on its own
        assert np.sort(size, 0)[4:].sum(0) == pytest.approx(np.where(kept, size, 0).sum(0))
    else:
        assert size[kept].min() >= size[~kept].max() and kept.sum() == 16


@pytest.mark.slow
@methods
def test_methods_are_jittable_as_a_whole(method):
    params, stats = calibrated()
    want = method(params, stats, 0.5)
    for sparsity in (0.5, jnp.asarray(0.5)):
        got = jax.jit(lambda p, s: method(p, stats, s))(params, sparsity)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ one array


@pytest.mark.slow
def test_two_leaves_that_are_one_array_keep_statistics_of_their_own():
    w = normal(1, 16, 6)
    params = {"a": w, "b": w}
    x = normal(0, 60, 16) + normal(2, 16)
    fn = lambda p, x: (x @ p["a"], (x[:, ::-1] ** 2) @ p["b"])  # noqa: E731
    stats = jp.calibrate(fn, params, [x])
    masks = jp.unstructured(per_output=True)(jp.wanda(params, input_norms=stats.norms), 0.5)
    got = jp.oneshot.dsnot(params, masks, stats)
    apart = {"a": w + 0, "b": w + 0}
    want = jp.oneshot.dsnot(apart, masks, stats)
    assert all((got[k] == want[k]).all() for k in "ab") and (got["b"] != masks["b"]).any()
    refit, wanted = (jp.oneshot.refit(p, masks, stats, start=p) for p in (params, apart))
    assert all((refit[k] == wanted[k]).all() for k in "ab")


@pytest.mark.slow
def test_dsnot_swaps_within_groups_along_an_axis():
    params = {"w": normal(1, 6, 8, 3, 1)}
    x = normal(0, *IMAGE) + 1
    stats = jp.calibrate(functools.partial(convolution, "OIHW"), params, [x])
    masks = jp.n_m(2, 4, axis=1)(jp.wanda(params, input_norms=stats.norms), 0.5)
    got = np.asarray(jp.oneshot.dsnot(params, masks, stats, group=4, axis=1)["w"])
    assert (got.reshape(6, 2, 4, 3).sum(2) == 2).all() and (got != np.asarray(masks["w"])).any()


# ------------------------------------------------------------------------------ clear refusals


@pytest.mark.parametrize("call, message", [
    (lambda p, m, s: jp.oneshot.sparsegpt(p, s, 0.5, block=0), "sparsegpt: block=0; wanted an int"),
    (lambda p, m, s: jp.oneshot.sparsegpt(p, s, 0.5, block=-3), "sparsegpt: block=-3; wanted"),
    (lambda p, m, s: jp.oneshot.alps(p, s, 0.5, steps=-1), "alps: steps=-1; wanted an integer"),
    (lambda p, m, s: jp.oneshot.alps(p, s, 0.5, refit_steps=1.5), "alps: refit_steps=1.5; wanted"),
    (lambda p, m, s: jp.oneshot.refit(p, m, s, cg_steps=-1), "refit: cg_steps=-1; wanted"),
    (lambda p, m, s: jp.oneshot.refit(p, m, s, cg_steps=2.5), "refit: cg_steps=2.5; wanted"),
    (lambda p, m, s: jp.oneshot.dsnot(p, m, s, cycles=-1), "dsnot: cycles=-1; wanted an integer"),
    (lambda p, m, s: jp.oneshot.dsnot(p, m, s, group=0), "dsnot: group=0; wanted an integer"),
    (lambda p, m, s: jp.oneshot.dsnot(p, m, s, group=3), r"dsnot: w, shape \(8, 4\): group=3"),
    (lambda p, m, s: jp.oneshot.dsnot(p, m, s, group=4, axis=1), "dsnot: w.*inputs are its axes"),
])  # fmt: skip
def test_sizes_are_checked(call, message):
    params, stats = calibrated()
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    with pytest.raises(ValueError, match=message):
        call(params, masks, stats)


READERS = EVERY | {
    "output_error": lambda p, m, s: jp.oneshot.output_error(p, p, s),
    "dsnot": jp.oneshot.dsnot,
    "flap": lambda p, m, s: jp.scores.flap(p, stats=s),
    "activation_energy": lambda p, m, s: jp.scores.activation_energy(p, stats=s),
    "compensate": lambda p, m, s: jp.oneshot.compensate(p, p, m, s, biases={}),
}


@functools.cache
def of_another_tree():
    return jp.calibrate(lambda p, x: x @ p["v"], {"v": normal(0, 8, 4)}, [normal(1, 5, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_statistics_of_something_else_are_refused(name):
    params, stats = calibrated()
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    call = functools.partial(READERS[name], params, masks)
    for wrong in (None, stats.norms, stats.grams):
        message = f"{name}: stats is a .*wanted all that jp.calibrate"
        if wrong is None and name in ("flap", "activation_energy"):  # scores: evidence is missing
            message = f"{name} needs the evidence stats=; write stats=jp.calibrate"
        with pytest.raises(TypeError, match=message):
            call(wrong)
    _, wide = calibrated(10)
    with pytest.raises(ValueError, match=rf"{name}: the statistics of w, shape \(8, 4\), have"):
        call(wide)
    with pytest.raises(ValueError, match=f"{name}: stats are of another tree than params.*'w'"):
        call(of_another_tree())


def test_a_start_or_pruned_tree_that_does_not_fit_is_named():
    params, stats = calibrated()
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    with pytest.raises(ValueError, match=r"refit: start has shape \(4, 8\) at w, the leaf"):
        jp.oneshot.refit(params, masks, stats, start={"w": params["w"].T})
    with pytest.raises(ValueError, match="the tree of start does not match params"):
        jp.oneshot.refit(params, masks, stats, start={"v": params["w"]})
    with pytest.raises(ValueError, match=r"output_error: pruned has shape \(4, 8\) at w"):
        jp.oneshot.output_error(params, {"w": params["w"].T}, stats)
    with pytest.raises(ValueError, match="the tree of pruned does not match params"):
        jp.oneshot.compensate(params, {}, masks, stats, biases={})


@pytest.mark.slow
@repairs
def test_nan_in_weights_is_not_blamed_on_the_gram_matrix(repair):
    params, stats = calibrated()
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    bad = {"w": params["w"].at[0, 0].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match=r"w, shape \(8, 4\): the dense weights hold NaN"):
        repair(bad, masks, stats)


@pytest.mark.slow
@pytest.mark.parametrize("score", [jp.wanda, jp.scores.ria])
def test_scores_say_where_norms_are(score):
    params, stats = calibrated()
    name = score.__name__
    with pytest.raises(TypeError, match=rf"{name} needs .*calibrate\(fn, params, batches\).norms"):
        score(params)
    with pytest.raises(ValueError, match=f"{name}: input_norms is a Stats .*=stats.norms"):
        score(params, input_norms=stats)
    with pytest.raises(ValueError, match=rf"{name}: input_norms has shape \(3,\) at w"):
        score(params, input_norms={"w": jnp.ones(3)})


def test_trees_without_leaves_and_outputs_without_energy():
    stats = jp.calibrate(lambda p, x: x, {}, [jnp.ones(3)])
    assert jp.oneshot.refit({}, {}, stats) == {}
    assert jp.oneshot.output_error({}, {}, stats) == {}
    params, _ = calibrated()
    silent = jp.calibrate(linear, params, [jnp.zeros((3, 8))])
    assert jp.oneshot.output_error(params, {"w": params["w"] * 0}, silent)["w"] == 0


# ----------------------------------------------------------------------------------- compensate

KERNELS = {  # name -> shape of kernel, of bias, axes of the sum, function
    "(out, in)": ((5, 8), (5,), (1,), lambda p, x: x @ p["w"].T + p["b"]),
    "heads": ((8, 2, 3), (2, 3), (0,), lambda p, x: jnp.einsum("ti,ihd->thd", x, p["w"]) + p["b"]),
    "stack": ((2, 8, 8), (2, 8), (1,), lambda p, x: jax.lax.scan(
        lambda h, layer: (h @ layer["w"] + layer["b"], None), x, p)[0]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_biases_keep_the_mean_of_outputs(name):
    shape, bias, axes, fn = KERNELS[name]
    params = {"w": normal(1, *shape), "b": normal(2, *bias)}
    x = normal(0, 50, 8) + 1
    stats = jp.calibrate(fn, params, [x])
    masks = {"w": normal(3, *shape) > 0, "b": jnp.asarray(True)}
    pruned = jp.apply_masks(params, masks)
    got = jp.oneshot.compensate(params, pruned, masks, stats, biases={"w": "b"})["b"]
    lost = np.asarray(params["w"] - pruned["w"], np.float64) * np.asarray(spread(stats, shape))
    np.testing.assert_allclose(got, np.asarray(params["b"]) + lost.sum(axes), rtol=1e-4, atol=1e-4)
    if name != "stack":
        ours, dense = (fn(p, x).mean(0) for p in (pruned | {"b": got}, params))
        np.testing.assert_allclose(ours, dense, atol=1e-4)


def spread(stats, shape):
    mean = stats.means["w"]
    return np.broadcast_to(mean[:, None] if mean.ndim < len(shape) else mean, shape)


def test_a_bias_of_integers_is_refused():
    params = {"w": normal(1, 8, 4), "b": jnp.zeros(4, jnp.int32)}
    stats = jp.calibrate(lambda p, x: x @ p["w"] + p["b"], params, [normal(0, 9, 8)])
    masks = jax.tree.map(lambda _: jnp.asarray(True), params)
    with pytest.raises(ValueError, match=r"not those of b, int32 of shape \(4,\).* of floats"):
        jp.oneshot.compensate(params, params, masks, stats, biases={"w": "b"})


# ----------------------------------------------------------------------------------- sequential


def blocks_of(count):
    shapes = {"up": (4, 6), "down": (6, 4)}
    return [{k: normal(i, *s) / 2 for k, s in shapes.items()} for i in range(count)]


def residual(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def only(name):
    return lambda path, leaf: path == name


@pytest.mark.slow
@pytest.mark.parametrize("order, drift, traces", [
    (None, 0.0, 2),  # the block itself, and its statistics
    (["up", "down"], 0.0, 3),  # the block itself, and the statistics of each group
    (["up", "down"], 0.5, 7),  # and for each group the products of inputs here and there
])  # fmt: skip
def test_sequential_compiles_once_for_all_blocks(order, drift, traces):
    seen = []

    def block(p, x):
        seen.append(1)
        return residual(p, x)

    groups = None if order is None else [only(name) for name in order]
    batches = [normal(k, 9, 4) for k in range(2)]
    half = lambda p, stats: jp.oneshot.sparsegpt(p, stats, 0.5)  # noqa: E731
    jp.oneshot.sequential(block, blocks_of(5), batches, half, order=groups, error_propagation=drift)
    assert len(seen) == traces


@pytest.mark.slow
def test_sequential_reads_what_a_block_closes_over_anew():
    scale, batches, errors = [1.0], [normal(5, 40, 4)], []
    block = lambda p, x: x + jnp.tanh(scale[0] * x @ p["up"]) @ p["down"]  # noqa: E731
    half = lambda p, stats: jp.oneshot.sparsegpt(p, stats, 0.5)  # noqa: E731
    for scale[0] in (1.0, 4.0):
        got, _ = jp.oneshot.sequential(block, blocks_of(2), batches, half)
        fresh = lambda p, x: x + jnp.tanh(scale[0] * x @ p["up"]) @ p["down"]  # noqa: E731
        want, _ = jp.oneshot.sequential(fresh, blocks_of(2), batches, half)
        errors.append(max(float(jnp.abs(a[k] - b[k]).max()) for a, b in zip(got, want) for k in a))
    assert max(errors) == 0


STACK = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks_of(3))
BATCH = normal(7, 5, 4)
CALLS = {
    "no batches": (blocks_of(2), [], {}, ValueError, "sequential: batches is empty; pass"),
    "one array": (blocks_of(2), BATCH, {}, ValueError, r"sequential: batches is one .*=\[x\]"),
    "a stack": (STACK, [BATCH], {}, TypeError, r"blocks is a dict; wanted a list .*leaf\[k\]"),
    "names": (blocks_of(2), [BATCH], {"order": ["up", "down"]}, TypeError,
              r"order\[0\] is 'up'; wanted a function .* path == 'up'"),
    "a later block": ([*blocks_of(2), {"up": normal(1, 4, 4)}], [BATCH],
                      {"order": [only("up"), only("down")]}, ValueError,
                      r"order\[1\] selects no leaf of blocks\[2\]; its leaves are up"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_sequential_is_clear_about_its_arguments(name):
    blocks, batches, how, error, message = CALLS[name]
    dense = lambda p, stats: (p, jax.tree.map(lambda _: True, p))  # noqa: E731
    with pytest.raises(error, match=message):
        jp.oneshot.sequential(residual, blocks, batches, dense, **how)
