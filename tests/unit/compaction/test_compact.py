"""compact against the masked model, computed at full size; values, gradients, shapes, states."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.compaction import checking
from jaxprune.rules import registry


def batch_norm(train=False):
    return nn.BatchNorm(use_running_average=not train)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm()(nn.Conv(8, (3, 3))(x)))
        y = nn.relu(batch_norm()(nn.Conv(8, (3, 3))(x)))
        y = batch_norm()(nn.Conv(8, (3, 3))(y))
        x = nn.relu(x + y)
        y = batch_norm()(nn.Conv(12, (3, 3), strides=2)(x))
        x = nn.relu(y + nn.Conv(12, (1, 1), strides=2)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class Concatenated(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jnp.concatenate([x, nn.relu(nn.Conv(6, (3, 3))(x))], -1)
        return nn.Dense(5)(nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(8, (1, 1))(x))
        x = nn.gelu(nn.Conv(16, (3, 3), feature_group_count=8)(x))  # depth multiplier 2
        gate = nn.sigmoid(nn.Dense(16)(nn.relu(nn.Dense(4)(x.mean((1, 2))))))
        return nn.Dense(5)((x * gate[:, None, None]).reshape(x.shape[0], -1))


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4)(x))
        x = jnp.pad(nn.avg_pool(x, (2, 2), (2, 2)), ((0, 0), (0, 0), (0, 0), (2, 2)))
        return nn.Dense(5)(x.mean((1, 2)))


NETS = [Residual, Concatenated, Separable, Grouped]
X = jax.random.normal(jax.random.key(7), (2, 8, 8, 3))


def build(net):
    """Variables with statistics, biases and scales that are neither zero nor one."""
    variables = jax.jit(net().init)(jax.random.key(0), X)
    noise = lambda a: a + 0.2 * jnp.abs(jax.random.normal(jax.random.key(a.size), a.shape))  # noqa: E731
    return (lambda v, x: net().apply(v, x)), jax.tree.map(noise, variables)


def halves(structure, seed=0):
    rng = np.random.default_rng(seed)
    keep = {}
    for name, dim in structure.dims.items():
        if not dim.frozen:
            keep[name] = np.zeros(dim.size, bool)
            keep[name][rng.permutation(dim.size)[: max(1, dim.size // 2)]] = True
    assert keep
    return keep


def relative(expected, got):
    return float(jnp.max(jnp.abs(expected - got)) / jnp.max(jnp.abs(expected)))


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_compact_equals_masked_in_value_and_gradient(net):
    fn, params = build(net)
    structure = jp.infer_structure(fn, params, X)
    masks = structure.masks(halves(structure))
    masked = jp.apply_masks(params, masks)
    small = jp.compact(fn, params, masks, X)
    assert small.certificate.exact, str(small.certificate)
    assert jp.cost(small.fn, small.params, X).flops < jp.cost(fn, params, X).flops
    got = jax.jit(small.fn)(small.params, X)
    assert relative(jax.jit(fn)(masked, X), got) < 1e-5
    assert small.certificate.check(2) < 1e-12
    full = jax.jit(jax.grad(lambda p: (fn(p, X) ** 2).sum()))(masked)
    mine = jax.jit(jax.grad(lambda p: (small.fn(p, X) ** 2).sum()))(small.params)
    scale = optax.tree_utils.tree_norm(full)
    for a, b in zip(jax.tree.leaves(small.restrict(full)), jax.tree.leaves(mine), strict=True):
        assert float(jnp.max(jnp.abs(a - b)) / scale) < 1e-5


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), net=st.sampled_from(NETS))
def test_expand_after_compact_is_apply_masks(seed, net):
    fn, params = build(net)
    structure = jp.infer_structure(fn, params, X)
    masks = structure.masks(halves(structure, seed))
    small = jp.compact(fn, params, masks, X)
    full, masked = small.expand(small.params), jp.apply_masks(params, masks)
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(masked), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_all_true_masks_change_nothing():
    fn, params = build(Residual)
    masks = jax.tree.map(lambda a: jnp.ones(a.shape, bool), params)
    small = jp.compact(fn, params, masks, X)
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, params)
    assert str(small.certificate).startswith("nothing to remove")
    np.testing.assert_array_equal(small.fn(small.params, X), fn(params, X))


@pytest.mark.slow
def test_jit_vmap_and_other_batch_sizes():
    fn, params = build(Residual)
    structure = jp.infer_structure(fn, params, X)
    small = jp.compact(fn, params, structure.masks(halves(structure)), X)
    wanted = small.fn(small.params, X)
    np.testing.assert_allclose(jax.jit(small.fn)(small.params, X[:1]), wanted[:1], rtol=1e-4)
    rows = jax.vmap(small.fn, (None, 0))(small.params, X[:, None])[:, 0]
    np.testing.assert_allclose(rows, wanted, rtol=1e-4)


@pytest.mark.slow
def test_the_compact_program_has_the_flops_of_the_native_small_module():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(self.width, (3, 3))(x)))
            return nn.Dense(5)(x.reshape(x.shape[0], -1))

    big, native = Net(8), Net(4)
    params = big.init(jax.random.key(0), X)
    structure = jp.infer_structure(big.apply, params, X)
    masks = structure.masks({"params/Conv_0/kernel:3": np.arange(8) % 2 == 0})
    small = jp.compact(big.apply, params, masks, X)
    fresh = native.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small.params)
    assert jp.cost(small.fn, small.params, X).flops == jp.cost(native.apply, fresh, X).flops
    np.testing.assert_allclose(
        native.apply(small.params, X), small.fn(small.params, X), rtol=1e-4, atol=1e-5
    )


def dense(params, x, activation=jax.nn.relu):
    return activation(x @ params["up"] + params["bias"]) @ params["down"]


def dense_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (3, 8), "bias": (8,), "down": (8, 4)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


ROWS = jax.random.normal(jax.random.key(1), (5, 3))
PRODUCER = {"up": np.arange(8)[None] < 3, "bias": np.arange(8) < 3, "down": np.array(True)}
CONSUMER = {"up": np.array(True), "bias": np.array(True), "down": np.arange(8)[:, None] < 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masks", "activation", "left"),
    [
        (PRODUCER, jax.nn.relu, 3),
        (PRODUCER, jax.nn.gelu, 3),
        (PRODUCER, jax.nn.silu, 3),
        (PRODUCER, jax.nn.sigmoid, 3),  # 0.5 reaches the next layer: a constant, folded
        (CONSUMER, jax.nn.sigmoid, 3),
        ({**PRODUCER, "bias": np.array(True)}, jax.nn.relu, 3),  # a constant, too
        ({**PRODUCER, "up": np.array(True)}, jax.nn.relu, 8),  # the units depend on the input
    ],
)
def test_partial_masks_are_removed_only_where_that_is_exact(masks, activation, left):
    fn, params = (lambda p, x: dense(p, x, activation)), dense_params()
    small = jp.compact(fn, params, masks, ROWS)
    assert small.params["up"].shape == (3, left)
    assert relative(fn(jp.apply_masks(params, masks), ROWS), small.fn(small.params, ROWS)) < 1e-6
    if left == 8:
        assert "not zero where" in str(small.certificate) and not small.certificate.exact


@pytest.mark.slow
def test_a_softmax_over_pruned_units_carries_them():
    fn, params = (lambda p, x: dense(p, x, jax.nn.softmax)), dense_params()
    structure = jp.infer_structure(fn, params, ROWS)
    masks = structure.masks({"up:1": np.arange(8) < 3})
    small = jp.compact(fn, params, masks, ROWS)
    assert small.certificate.exact and small.params["up"].shape == (3, 3)
    assert "corrected" in str(small.certificate)
    assert relative(fn(jp.apply_masks(params, masks), ROWS), small.fn(small.params, ROWS)) < 1e-6


def test_relus_own_gradient_survives():
    params = {"up": jnp.zeros((3, 8)), "down": jnp.ones((8, 4))}
    fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]  # noqa: E731
    structure = jp.infer_structure(fn, params, ROWS)
    small = jp.compact(fn, params, structure.masks({"up:1": np.arange(8) < 3}), ROWS)
    grad = jax.grad(lambda p: small.fn(p, ROWS).sum())(small.params)
    np.testing.assert_array_equal(grad["up"], 0)  # max would give a half at 0


def test_an_emptied_branch_is_gone_and_the_certificate_says_so():
    masks = {
        "up": np.zeros((1, 8), bool),
        "bias": np.zeros(8, bool),
        "down": np.zeros((8, 1), bool),
    }
    small = jp.compact(dense, dense_params(), masks, ROWS)
    assert small.params["up"].shape == (3, 0)
    assert "gone from the program" in str(small.certificate)
    np.testing.assert_array_equal(small.fn(small.params, ROWS), 0)


@pytest.mark.slow
def test_an_emptied_dimension_that_is_still_read_keeps_one_unit():
    params = {"up": dense_params()["up"]}
    fn = lambda p, x: jax.nn.softmax(x @ p["up"]).max(-1)  # noqa: E731
    masks = {"up": np.zeros((1, 8), bool)}
    small = jp.compact(fn, params, masks, ROWS)
    assert "one (of zeros) stays" in str(small.certificate) and small.params["up"].shape == (3, 1)
    assert relative(fn(jp.apply_masks(params, masks), ROWS), small.fn(small.params, ROWS)) < 1e-6


@pytest.mark.slow
def test_params_may_hold_random_keys():
    params = {**dense_params(), "key": jax.random.key(0)}
    fn = lambda p, x: dense(p, x) * jax.random.uniform(p["key"])  # noqa: E731
    masks = jp.infer_structure(fn, params, ROWS).masks({"up:1": np.arange(8) < 3})
    small = jp.compact(fn, params, masks, ROWS)
    assert small.params["up"].shape == (3, 3)
    assert relative(fn(jp.apply_masks(params, masks), ROWS), small.fn(small.params, ROWS)) < 1e-6


def test_optimizer_states_are_sliced_by_the_same_plan():
    params = dense_params()
    structure = jp.infer_structure(dense, params, ROWS)
    masks = structure.masks({"up:1": np.arange(8) < 3})
    small = jp.compact(dense, params, masks, ROWS)
    state = small.restrict(optax.adamw(1e-3).init(params))
    fresh = optax.adamw(1e-3).init(small.params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, fresh)


@pytest.mark.slow
def test_training_mode_returns_sliced_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(batch_norm(train=True)(nn.Dense(6)(x))))

    variables = Net().init(jax.random.key(0), ROWS)
    fn = lambda v, x: Net().apply(v, x, mutable=["batch_stats"])  # noqa: E731
    structure = jp.infer_structure(fn, variables, ROWS)
    masks = structure.masks({"params/Dense_1/kernel:1": np.arange(6) < 2})
    small = jp.compact(fn, variables, masks, ROWS)
    y, state = small.fn(small.params, ROWS)
    expected, full = fn(jp.apply_masks(variables, masks), ROWS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    mean = full["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(state["batch_stats"]["BatchNorm_0"]["mean"], mean[:2], atol=1e-6)
    assert small.certificate.check() < 1e-12


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda s: s.expand({"up": jnp.ones((3, 3))}),
            "expand got another structure .*has no leaf .bias. .nor .down..$",
        ),
        (lambda s: s.expand(dense_params()), "expand got shape"),
        (
            lambda s: s.fn({"up": 1.0}, ROWS),
            "got params of another structure: .* no leaf .bias. .nor .down.*; pass",
        ),
        (lambda s: s.fn(dense_params(), ROWS), r"got shape \(8,\) for bias"),
        (lambda s: s.restrict([{"up": jnp.ones((3, 7))}]), "restrict got shape"),
        (lambda s: s.certificate.check(0), "check wants n >= 1"),
    ],
)
def test_bad_input(call, text):
    structure = jp.infer_structure(dense, dense_params(), ROWS)
    masks = structure.masks({"up:1": np.arange(8) < 3})
    with pytest.raises(ValueError, match=text):
        call(jp.compact(dense, dense_params(), masks, ROWS))


def test_masks_of_another_shape_are_refused_before_anything_happens():
    masks = {"up": np.ones((3, 7), bool), "bias": np.array(True), "down": np.array(True)}
    with pytest.raises(ValueError, match="the mask of up is bool"):
        jp.compact(dense, dense_params(), masks, ROWS)


@pytest.mark.slow
def test_nnx_and_equinox_modules_compact():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.down = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.norm(self.up(x))))

    net = Net(nnx.Rngs(0))
    net.eval()
    graphdef, state = nnx.split(net)
    module = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(module, eqx.is_array)
    for fn, params in [
        (lambda s, x: nnx.merge(graphdef, s)(x), state),
        (lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays),
    ]:
        structure = jp.infer_structure(fn, params, ROWS)
        masks = structure.masks(halves(structure))
        small = jp.compact(fn, params, masks, ROWS)
        assert small.certificate.exact
        assert sum(x.size for x in jax.tree.leaves(small.params)) < sum(
            x.size for x in jax.tree.leaves(params)
        )
        expected = fn(jp.apply_masks(params, masks), ROWS)
        assert relative(expected, small.fn(small.params, ROWS)) < 1e-5


def test_arguments_that_freeze_a_pruned_dimension_are_refused():
    def fn(params, x):
        h = jax.nn.relu(x @ params["up"])
        return (jnp.sort(h, axis=-1) if len(x) == 1 else h) @ params["down"]

    params = dense_params()
    structure = jp.infer_structure(fn, params, ROWS)
    masks = structure.masks({"up:1": np.arange(8) < 3, "bias:0": np.ones(8, bool)})
    small = jp.compact(fn, params, masks, ROWS)
    with pytest.raises(ValueError, match="freeze a pruned dimension.*sorted by value"):
        small.fn(small.params, ROWS[:1])


def test_a_wrong_rule_is_found_by_its_shape(monkeypatch):
    structure = jp.infer_structure(dense, dense_params(), ROWS)
    masks = structure.masks({"up:1": np.arange(8) < 3})
    rule = registry.RULES["dot_general"]
    wrong = dataclasses.replace(rule, evaluate=lambda view, step, xs: [jnp.zeros((1, 1))])
    monkeypatch.setitem(registry.RULES, "dot_general", wrong)
    with pytest.raises(AssertionError, match="the rule for dot_general is wrong"):
        jp.compact(dense, dense_params(), masks, ROWS)


@pytest.mark.slow
def test_the_check_reports_nan_and_draws_each_argument_anew():
    def fn(params, x, y):
        return jax.nn.relu((x - y) @ params["up"]) @ params["down"]

    params = dense_params()
    structure = jp.infer_structure(fn, params, ROWS, ROWS)
    masks = structure.masks({"up:1": np.arange(8) < 3})
    small = jp.compact(fn, params, masks, ROWS, ROWS)
    with jax.enable_x64(True):
        drawn = checking.draw(jax.random.key(0), (ROWS, ROWS), jnp.float64)
    assert not np.array_equal(*drawn)
    assert small.certificate.check() < 1e-12
    good, bad = jnp.array([1.0, 2.0]), jnp.array([1.0, jnp.nan])
    assert checking.error(good, bad) == float("inf")
    assert np.isnan(checking.error(bad, good)) and np.isnan(checking.error(bad, bad))
    low = jnp.array([1.0, -jnp.inf])  # as logits have where a choice is not allowed
    assert checking.error(low, low) == 0.0 and checking.error(low, -low) == float("inf")


@pytest.mark.slow
def test_results_of_one_step_keep_their_own_blocks():
    """A split of two dimensions, one of them carried: its block shows the other in part only."""
    params = {"up": dense_params()["up"], "down": dense_params()["down"]}

    def fn(p, x):
        h = x @ p["up"]
        left, right = jnp.split(jax.nn.sigmoid(h - h.mean(-1, keepdims=True)), 2, -1)
        return jnp.concatenate([jax.nn.softmax(left), right * 2], -1) @ p["down"]

    structure = jp.infer_structure(fn, params, ROWS)
    for keep in ({"up:1.0": np.arange(4) < 2}, halves(structure)):
        masks = structure.masks(keep)
        small = jp.compact(fn, params, masks, ROWS)
        assert small.certificate.exact and "corrected" in str(small.certificate)
        got = small.fn(small.params, ROWS)
        assert relative(fn(jp.apply_masks(params, masks), ROWS), got) < 1e-6


def test_the_certificate_states_what_carried_units_cost():
    params, x = {"up": jnp.ones((3, 64)), "down": jnp.ones((64, 2))}, jnp.ones((1, 3))

    def fn(p, x):
        return jax.nn.softmax(x @ p["up"]) @ p["down"]

    masks = jp.infer_structure(fn, params, x).masks({"up:1": np.arange(64) < 16})
    certificate = jp.compact(fn, params, masks, x).certificate
    (entry,) = certificate.entries
    assert (entry.status, entry.carried) == ("corrected", 48) and entry.evaluations > 0
    assert 1.0 < certificate.overhead < 2.0
    assert f"corrected: 48 units carried through {entry.evaluations} operations" in str(certificate)
    assert f"FLOPs {certificate.overhead:.3g} x" in str(certificate)
    plain = jp.compact(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, masks, x)
    assert plain.certificate.overhead == 1.0


@pytest.mark.slow
def test_functions_that_fix_their_types_are_compared_in_them():
    """A loop whose carry is float32 by declaration can't be traced in float64."""
    params, x = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}, jnp.ones((1, 3))

    def fn(p, x):
        start = jnp.zeros((1, 8), jnp.float32)
        hidden = jax.lax.fori_loop(0, 2, lambda i, h: h + jnp.tanh(x @ p["up"]), start)
        return hidden @ p["down"]

    masks = jp.infer_structure(fn, params, x).masks({"up:1": np.arange(8) < 2})
    with pytest.warns(UserWarning, match="compared in the given types, for float64 fails"):
        assert jp.compact(fn, params, masks, x).certificate.check() < 1e-6


@pytest.mark.slow
def test_divisions_by_masked_zeros_are_told():
    """A weight norm without an epsilon: 0 / 0 in the masked model, gone in the compact one."""
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in {"up": (3, 8), "down": (8, 2)}.items()
    }

    def fn(p, x):
        size = jnp.sqrt(jnp.sum(p["up"] ** 2, axis=0))
        return jnp.tanh(x @ (p["up"] / size)) @ p["down"]

    masks = jp.infer_structure(fn, params, ROWS).masks({"up:1": np.arange(8) < 2})
    certificate = jp.compact(fn, params, masks, ROWS).certificate
    assert [place.split(" at ")[0] for place in certificate.hazards] == ["sqrt", "div"]
    assert "the masked model may not be finite: div at test_compact.py" in str(certificate)
    assert np.isnan(certificate.check()) and np.isnan(certificate.check(2))
    kept = jp.compact(fn, params, masks, ROWS, semantics="kept")
    assert not kept.certificate.hazards and jnp.isfinite(kept.fn(kept.params, ROWS)).all()


def test_trees_are_restricted_with_and_without_64_bits():
    params = dense_params()
    masks = jp.infer_structure(dense, params, ROWS).masks({"up:1": np.arange(8) < 2})
    small = jp.compact(dense, params, masks, ROWS)
    for wide in (False, True, False):
        with jax.enable_x64(wide):
            assert small.restrict(params)["up"].shape == (3, 2)
            assert small.certificate.check() < 1e-12


@pytest.mark.slow
def test_whole_scanned_layers_go_when_zero_makes_them_the_identity():
    rng = np.random.default_rng(0)
    shapes = {"up": (4, 3, 8), "bias": (4, 8), "down": (4, 8, 3)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}

    def fn(p, x):
        def layer(h, q):
            return h + jnp.tanh(h @ q["up"] + q["bias"]) @ q["down"], None

        return jax.lax.scan(layer, x, p)[0]

    structure = jp.infer_structure(fn, params, ROWS)
    layers = next(d for d in structure.dims.values() if d.label == "layers")
    assert layers.frozen is None and layers.size == 4
    keep = np.array([True, False, True, False])
    small = jp.compact(fn, params, structure.masks({layers.name: keep}), ROWS)
    assert small.params["up"].shape == (2, 3, 8)
    assert small.certificate.check() < 1e-12
    assert jp.cost(small.fn, small.params, ROWS).flops < 0.51 * jp.cost(fn, params, ROWS).flops

    def decayed(p, x):
        return jax.lax.scan(lambda h, q: (0.5 * h + jnp.tanh(h @ q["up"]) @ q["down"], None), x, p)[
            0
        ]

    structure = jp.infer_structure(decayed, params, ROWS)
    layers = next(d for d in structure.dims.values() if d.label == "layers")
    assert "each step changes what the next one gets" in layers.frozen


def set_apart(count, inner=jax.nn.sigmoid):
    """A detector's head: the first units get another activation than the others."""

    def fn(p, x):
        h = x @ p["a"]
        return jnp.concatenate([inner(h[:, :count]), jax.nn.relu(h[:, count:])], -1) @ p["c"]

    keys = jax.random.split(jax.random.key(0), 2)
    params = {"a": jax.random.normal(keys[0], (3, 16)), "c": jax.random.normal(keys[1], (16, 2))}
    return fn, params


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_masked_unit_that_a_slice_sets_apart_stays_and_is_told(count):
    fn, params = set_apart(count)
    keep = jnp.arange(16) >= 8
    masks = {"a": jnp.broadcast_to(keep, (3, 16)), "c": jnp.broadcast_to(keep[:, None], (16, 2))}
    small = jp.compact(fn, params, masks, ROWS)
    certificate = small.certificate
    assert small.params["a"].shape == (3, 9) and not certificate.exact
    assert "one (of zeros) stays so that none is empty" in str(certificate)
    assert certificate.entries[0].name == "a:1.0" and certificate.entries[0].status == "kept"
    assert certificate.check() < 1e-12


def test_a_unit_that_a_slice_sets_apart_and_no_mask_covers_is_not_told():
    fn, params = set_apart(1)
    structure = jp.infer_structure(fn, params, ROWS)
    small = jp.compact(fn, params, structure.masks({"a:1.1": np.arange(15) < 7}), ROWS)
    assert small.certificate.exact and len(small.certificate.entries) == 1
    assert small.params["a"].shape == (3, 8)


def test_a_unit_that_a_slice_sets_apart_is_shown_as_fixed():
    fn, params = set_apart(1)
    structure = jp.infer_structure(fn, params, ROWS)
    assert structure.dims["a:1.0"].label == "one unit of a"
    assert "a single unit that a slice sets apart" in structure.dims["a:1.0"].frozen
    assert structure.dims["a:1.1"].frozen is None and structure.dims["a:1.1"].label == "hidden"
    with pytest.raises(ValueError, match="'a:1.0' can't be pruned: a single unit that a slice"):
        structure.masks({"a:1.0": [False]})


@pytest.mark.parametrize("part", ["a", "c"])
def test_a_unit_set_apart_that_one_leaf_masks_is_told(part):
    fn, params = set_apart(1)
    masks = {name: jnp.ones(w.shape, bool) for name, w in params.items()}
    masks[part] = masks[part].at[(slice(None), 0) if part == "a" else 0].set(False)
    certificate = jp.compact(fn, params, masks, ROWS).certificate
    assert not certificate.exact and [e.name for e in certificate.entries] == [
        "a:1.0" if part == "a" else "c:0.0"
    ]


def test_a_unit_that_padding_and_two_slices_set_apart_is_told():
    def fn(p, x):
        h = jnp.pad(x @ p["a"], ((0, 0), (1, 0)))
        return (h[:, 1:5] * h[:, 5:6] + h[:, :1]) @ p["c"]

    params = {"a": jnp.ones((3, 5)), "c": jnp.ones((4, 2))}
    masks = {"a": jnp.ones((3, 5), bool).at[:, 4].set(False), "c": jnp.asarray(True)}
    certificate = jp.compact(fn, params, masks, ROWS).certificate
    assert not certificate.exact and "a single unit that a slice sets apart" in str(certificate)
