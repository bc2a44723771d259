"""Patterns: the laws of masks, on every kind of tree; and every error's text."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.patterns.choose import is_kernel
from jaxprune.scores.evidence import split
from tests.helpers import oracles
from tests.helpers.oracles import TREES, kept_count

EVERYTHING = lambda path, leaf: jnp.ndim(leaf) > 1  # noqa: E731
PATTERNS = {
    "unstructured": jp.unstructured(),
    "per_output": jp.unstructured(per_output=True),
    "erk": jp.unstructured(jp.erk),
    "global": jp.unstructured(jp.global_threshold),
    "n_m": jp.n_m(2, 4),
    "block": jp.block((2, 4)),
    "channel": jp.channel(),
    "channel_in": jp.channel(axis=-2, distribution=jp.global_threshold),
}


def but_slow(*fast):
    """The names of patterns; all but a few are marked as slow."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in PATTERNS]


SPARSITY = st.integers(0, 20).map(lambda i: i / 20)
SEED = st.integers(0, 2**32 - 1)

pytestmark = pytest.mark.filterwarnings("ignore:channel:UserWarning")


def draw(seed, ties=False, dtype=jnp.float32):
    """Scores of a small network: a convolution, a dense layer, a bias."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 4, 8), "dense": (8, 12), "bias": (12,)}
    one = (lambda s: rng.integers(0, 3, s)) if ties else (lambda s: np.abs(rng.normal(size=s)))
    return {name: jnp.asarray(one(shape), dtype) for name, shape in shapes.items()}


def full(masks, scores):
    return {p: np.broadcast_to(np.asarray(masks[p]), scores[p].shape) for p in scores}


quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(name):
    """With a traced sparsity, so that n_m takes any."""
    return quick(PATTERNS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", but_slow("unstructured", "n_m", "block", "channel"))
@settings(max_examples=20)
@given(SEED, SPARSITY, SPARSITY, st.booleans(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_a_higher_sparsity_gives_a_subset(name, seed, a, b, ties, dtype):
    scores = draw(seed, ties, dtype)
    low, high = (full(compiled(name)(scores, s), scores) for s in sorted([a, b]))
    for path in scores:
        assert not (high[path] & ~low[path]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", but_slow("unstructured", "n_m", "block", "channel"))
@settings(max_examples=15)
@given(SEED, SPARSITY, st.booleans(), st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
def test_density_is_the_target_within_one_unit(name, seed, sparsity, ties, dtype):
    scores = draw(seed, ties, dtype)
    if name == "n_m":
        sparsity /= 2
    kept = full(compiled(name)(scores, sparsity), scores)
    assert kept.pop("bias").all()
    units = {"per_output": 12, "n_m": 2, "block": 8, "channel": 72, "channel_in": 72}.get(name, 1)
    if name in ("erk", "global", "channel_in"):  # the target is that of all leaves together
        total, entries = sum(m.sum() for m in kept.values()), sum(m.size for m in kept.values())
        least = 1 if sparsity < 1 else 0
        assert abs(total - max((1 - sparsity) * entries, least)) <= units * len(kept)
        assert sparsity == 1 or all(m.any() for m in kept.values())
    else:
        for mask in kept.values():
            assert abs(mask.sum() - (1 - sparsity) * mask.size) <= units


@pytest.mark.slow
@settings(max_examples=20)
@given(SEED, SPARSITY, st.booleans())
def test_unstructured_is_a_stable_sort(seed, sparsity, ties):
    scores = draw(seed, ties)
    eager, jitted = jp.unstructured()(scores, sparsity), compiled("unstructured")(scores, sparsity)
    for path in ("conv", "dense"):
        wanted = oracles.keep_largest(scores[path], kept_count(scores[path].size, sparsity))
        np.testing.assert_array_equal(eager[path], wanted)
        assert abs(int(jitted[path].sum()) - int(wanted.sum())) <= 1


@pytest.mark.slow
@settings(max_examples=15)
@given(SEED, SPARSITY)
def test_per_output_is_a_sort_of_each_column(seed, sparsity):
    scores = draw(seed)
    masks = jp.unstructured(per_output=True)(scores, sparsity)
    for path in ("conv", "dense"):
        columns = np.asarray(scores[path]).reshape(-1, scores[path].shape[-1])
        k = kept_count(len(columns), sparsity)
        wanted = np.stack([oracles.keep_largest(c, k) for c in columns.T], axis=1)
        np.testing.assert_array_equal(np.asarray(masks[path]).reshape(columns.shape), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unstructured", "per_output", "erk", "n_m"])
@settings(max_examples=15)
@given(SEED, SPARSITY)
def test_masks_are_invariant_under_monotone_maps(name, seed, sparsity):
    """A table of rising values maps the scores, ties and zeros included."""
    rng = np.random.default_rng(seed)
    scores = jax.tree.map(lambda s: s - 1, draw(seed, ties=True))
    table = np.sort(rng.choice([-np.inf, -3.5, -1e-30, 0.0, 1e-30, 2.0, 1e30, np.inf], 3, False))
    mapped = jax.tree.map(lambda s: jnp.asarray(table[np.asarray(s, int) + 1], jnp.float32), scores)
    chex.assert_trees_all_equal(*(compiled(name)(s, sparsity) for s in (scores, mapped)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PATTERNS) - {"n_m", "block"}))
@settings(max_examples=15)
@given(SEED, SPARSITY)
def test_masks_follow_a_permutation_of_units(name, seed, sparsity):
    scores, order = draw(seed), np.random.default_rng(seed).permutation(12)
    moved = {**scores, "dense": scores["dense"][:, order]}
    straight, permuted = (compiled(name)(s, sparsity)["dense"] for s in (scores, moved))
    straight, permuted = (np.broadcast_to(m, (8, 12)) for m in (straight, permuted))
    np.testing.assert_array_equal(straight[:, order], permuted)


def _same_tree(name, scores):
    masks = PATTERNS[name](scores, 0.5)
    assert jax.tree.structure(masks) == jax.tree.structure(scores)
    return masks


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", PATTERNS)
def test_any_tree(name, tree):
    scores = jp.magnitude(TREES[tree])
    floats, join = split(scores)
    leaves = quick(lambda floats: jax.tree.leaves(_same_tree(name, join(floats))))(floats)
    masks = jax.tree.unflatten(jax.tree.structure(scores), leaves)
    flat = jax.tree_util.tree_leaves_with_path(scores)
    for (path, leaf), mask in zip(flat, jax.tree.leaves(masks), strict=True):
        assert mask.dtype == bool
        if is_kernel(jp.typing.path_str(path), leaf):
            assert mask.ndim == leaf.ndim and np.broadcast_shapes(mask.shape, leaf.shape)
            if "global" not in name and name not in ("erk", "channel_in"):
                assert float(mask.mean()) == 0.5
        else:
            assert mask.shape == () and bool(mask)


def test_is_kernel():
    w = jnp.ones((2, 3))
    assert is_kernel("params/Dense_0/kernel", w) and is_kernel("0/1", w) and is_kernel("a/value", w)
    for path in ("bias", "norm/scale", "bn/mean", "bn/var", "up/bias/value"):
        assert not is_kernel(path, w)
    assert not is_kernel("kernel", jnp.ones(3)) and not is_kernel("kernel", jnp.ones((2, 2), int))
    assert not is_kernel("key", jax.random.key(0)) and not is_kernel("activation", jax.nn.relu)


def test_where_receives_paths_as_strings_and_chooses():
    seen = []
    where = lambda path, leaf: seen.append((path, leaf.shape)) or path.endswith("kernel")  # noqa: E731
    scores = {"stem": {"kernel": jnp.ones((2, 2))}, "head": {"w": jnp.ones((2, 2))}}
    masks = jp.unstructured(where=where)(scores, 0.5)
    assert seen == [("head/w", (2, 2)), ("stem/kernel", (2, 2))]
    assert masks["head"]["w"].shape == () and masks["stem"]["kernel"].sum() == 2


@pytest.mark.slow
def test_one_entry_stays_until_sparsity_is_one():
    scores = {"w": jnp.array([[1.0, 2.0, 3.0, 0.0]])}
    for pattern in (jp.unstructured(), jax.jit(jp.unstructured())):
        assert [int(pattern(scores, s)["w"].sum()) for s in (0.9, 0.999, 1.0, 0, 1)] == [
            1,
            1,
            0,
            4,
            0,
        ]


@pytest.mark.slow
@pytest.mark.parametrize("name", but_slow("unstructured", "n_m"))
def test_one_trace_over_many_sparsities_vmap_and_scan(name):
    scores = draw(0)
    del scores["conv"]
    pattern, steps = PATTERNS[name], jnp.linspace(0, 0.5, 4)
    traced = quick(chex.assert_max_traces(pattern, n=1))
    singles = [jax.device_get(traced(scores, s)) for s in steps]
    chex.clear_trace_counter()
    wanted = jax.tree.map(lambda *m: np.stack(m), *singles)

    @quick
    def together(scores, steps):
        vmapped = jax.vmap(pattern, (None, 0))(scores, steps)
        scanned = jax.lax.scan(lambda c, s: (c, pattern(scores, s)), 0, steps)[1]
        many = jax.tree.map(lambda s: jnp.stack([s, 2 * s]), scores)
        both = jax.vmap(lambda s: pattern(s, 0.5))(many)
        return vmapped, scanned, pattern(scores, 0.5), jax.tree.map(lambda m: m[1], both)

    vmapped, scanned, one, second = together(scores, steps)
    chex.assert_trees_all_equal(vmapped, wanted)
    chex.assert_trees_all_equal(scanned, wanted)
    chex.assert_trees_all_equal(second, one)


@pytest.mark.slow
def test_gradients_flow_through_masks_made_inside():
    def loss(params):
        masks = jp.unstructured()(jp.magnitude(params), 0.5)
        return jnp.sum(jp.apply_masks(params, masks)["w"] ** 2)

    grad = jax.grad(loss)({"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])})
    np.testing.assert_array_equal(grad["w"], [[0, 0, 6, 8]])


# ------------------------------------------------------------------------------------- N:M


@pytest.mark.slow
@settings(max_examples=15)
@given(SEED, st.sampled_from([(1, 4, -2), (2, 4, -2), (3, 4, -1), (1, 2, 2), (4, 8, -1)]))
def test_n_m_is_the_sort_of_each_group(seed, row):
    n, m, axis = row
    scores = {"w": draw(seed, ties=True)["conv"]}
    for sparsity in (1 - n / m, None):
        masks = jp.n_m(n, m, axis=axis)(scores, sparsity)
        np.testing.assert_array_equal(masks["w"], slow_n_m(scores["w"], n, m, axis))


def slow_n_m(scores, n, m, axis):
    lines = np.moveaxis(np.asarray(scores), axis, -1)
    groups = lines.reshape(*lines.shape[:-1], -1, m)
    return np.moveaxis(oracles.keep_n_of_m(groups, n, m, -1).reshape(lines.shape), -1, axis)


@settings(max_examples=15)
@given(SEED, st.integers(0, 10))
def test_gradual_n_m_turns_group_by_group_the_cheapest_first(seed, tenths):
    scores = {"w": draw(seed)["dense"]}
    sparsity = 0.05 * tenths
    mask = np.asarray(compiled("n_m")(scores, sparsity)["w"])
    groups = np.asarray(scores["w"]).reshape(2, 4, 12)
    kept = mask.reshape(groups.shape).sum(1)
    assert set(kept.ravel()) <= {2, 4}
    assert abs((kept == 4).mean() - (1 - sparsity / 0.5)) <= 1 / kept.size
    loss = np.sort(groups, axis=1)[:, 1]  # the larger one of the two that go
    if 0 < (kept == 2).sum() < kept.size:
        assert loss[kept == 2].max() <= loss[kept == 4].min()


@pytest.mark.slow
def test_n_m_reaches_its_target_traced_as_an_array_and_beyond():
    scores = draw(0)
    pattern = jp.n_m(1, 3, axis=0, where=lambda path, leaf: path == "conv")
    wanted = pattern(scores)
    for sparsity in (jnp.float32(2 / 3), np.float32(2 / 3), 2 / 3):
        np.testing.assert_array_equal(pattern(scores, sparsity)["conv"], wanted["conv"])
        np.testing.assert_array_equal(jax.jit(pattern)(scores, sparsity)["conv"], wanted["conv"])
    np.testing.assert_array_equal(jax.jit(pattern)(scores, 0.9)["conv"], wanted["conv"])
    assert bool(pattern(scores, 0)["conv"].all())
    half = pattern(scores, jnp.float32(1 / 3))["conv"]  # a schedule in an eager loop
    assert float(half.mean()) == pytest.approx(2 / 3)


# ------------------------------------------------------------------------- blocks, channels


@pytest.mark.slow
@settings(max_examples=15)
@given(SEED, SPARSITY, st.sampled_from([(1, 1), (2, 4), (4, 4), (8,), (3, 4, 8)]))
def test_blocks_are_ranked_by_their_mean(seed, sparsity, shape):
    scores = {"w": draw(seed)["conv"]}
    mask = np.asarray(jp.block(shape)(scores, sparsity)["w"])
    ones = (1,) * (4 - len(shape)) + shape
    corners = [range(0, size, b) for size, b in zip(mask.shape, ones, strict=True)]
    tiles = [
        tuple(slice(i, i + b) for i, b in zip(corner, ones, strict=True))
        for corner in np.stack(np.meshgrid(*corners, indexing="ij"), -1).reshape(-1, 4)
    ]
    kept = np.array([mask[t].all() for t in tiles])
    assert all(mask[t].all() or not mask[t].any() for t in tiles)
    assert kept.sum() == kept_count(len(tiles), sparsity)
    means = np.array([np.asarray(scores["w"])[t].mean() for t in tiles])
    if 0 < kept.sum() < len(tiles):
        assert means[kept].min() >= means[~kept].max() - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_channels_are_ranked_by_their_mean(axis):
    scores = {"w": draw(1)["conv"]}
    mask = np.asarray(jp.channel(axis)(scores, 0.5)["w"])
    others = tuple(i for i in range(4) if i != axis % 4)
    wanted = oracles.keep_largest(np.asarray(scores["w"]).mean(others), kept_count(mask.size, 0.5))
    assert mask.shape == tuple(s if i == axis % 4 else 1 for i, s in enumerate((3, 3, 4, 8)))
    np.testing.assert_array_equal(mask.ravel(), wanted)


@pytest.mark.slow
def test_half_precision_means_do_not_tie():
    scores = {"w": jnp.full((4096, 2), 1.0, jnp.bfloat16).at[0, 1].set(1.5)}
    assert jp.channel()(scores, 0.5)["w"].tolist() == [[False, True]]


@pytest.mark.filterwarnings("default")
def test_channel_warns_on_each_use_and_names_the_call_to_write():
    pattern = jp.channel()
    for _ in range(2):
        with pytest.warns(UserWarning, match="consumers stay uncoupled.*jp.structured"):
            pattern(draw(0), 0.5)


# --------------------------------------------------------------------------------- threshold


@pytest.mark.slow
@settings(max_examples=15)
@given(SEED, st.floats(0, 1), st.sampled_from([jnp.float32, jnp.bfloat16]))
@pytest.mark.filterwarnings("ignore:threshold empties:UserWarning")
def test_threshold_keeps_what_reaches_tau(seed, tau, dtype):
    scores = draw(seed, dtype=dtype)
    taus = {"conv": tau, "dense": 2 * tau}
    for pattern in (jp.threshold(taus.get), jax.jit(jp.threshold(taus.get))):
        masks = pattern(scores)
        for path, cut in taus.items():
            wanted = np.asarray(scores[path], np.float32) >= np.float32(cut)
            np.testing.assert_array_equal(masks[path], wanted)
        assert masks["bias"].shape == ()
    traced = jax.jit(lambda s, t: jp.threshold(t)(s, None))(scores, tau)
    np.testing.assert_array_equal(traced["conv"], masks["conv"])


def test_threshold_names_the_leaves_it_empties():
    with pytest.warns(UserWarning, match="threshold empties dense: .* smaller tau"):
        masks = jp.threshold(lambda path: 99.0 if path == "dense" else 0.0)(draw(0), 0.5)
    assert not masks["dense"].any() and masks["conv"].all()


# ------------------------------------------------------------------------------------ errors

W = {"layer": {"kernel": jnp.ones((3, 3, 3, 6)), "bias": jnp.ones(6)}}
NAN = {"a": jnp.ones((2, 2)), "b": {"kernel": jnp.ones((2, 2)).at[1, 0].set(jnp.nan)}}
ANY = lambda path, leaf: True  # noqa: E731


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("scores", "sparsity", "text"),
    [
        (W, 1.5, "sparsity is 1.5; wanted a fraction in .0, 1. such as 0.9"),
        (W, -0.1, "sparsity is -0.1; wanted a fraction"),
        (W, float("nan"), "sparsity is nan; wanted a fraction"),
        (W, jnp.float32(2), "sparsity is Array.2.*; wanted a fraction"),
        (W, "0.5", "sparsity is '0.5'; wanted a fraction"),
        (W, jnp.ones(2), r"sparsity has shape \(2,\); wanted one number .* jp.unstructured\("),
        ({}, 0.5, r"scores is an empty tree; pass the scores of params: jp.magnitude\(params\)"),
        (None, 0.5, "scores is an empty tree"),
        (
            {"b": jnp.ones(3)},
            0.5,
            r"where=is_kernel selects none of the leaves b\[3\]; pass where=",
        ),
        (NAN, 0.5, r"scores of b/kernel, shape \(2, 2\), hold NaN .*nan_to_num"),
    ],
)
def test_bad_input_of_every_pattern(name, scores, sparsity, text):
    with pytest.raises(ValueError, match=text):
        PATTERNS[name](scores, sparsity)


def test_unscored_sparsity_is_an_error_but_for_n_m_and_threshold():
    with pytest.raises(ValueError, match="sparsity is None; wanted a fraction"):
        jp.unstructured()(W, None)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: jp.unstructured(where=lambda p, x: False)(W, 0.5),
            "where=<lambda> selects none of",
        ),
        (
            lambda: jp.unstructured(where=ANY)({"n": jnp.arange(3)}, 0.5),
            r"scores of n are int32\[3\]; wanted real floats: cast them, or leave",
        ),
        (
            lambda: jp.unstructured(where=ANY)({"c": jnp.ones(3, complex)}, 0.5),
            r"scores of c are complex64\[3\]; wanted real floats",
        ),
        (
            lambda: jp.unstructured(where=ANY)({"f": jax.nn.relu}, 0.5),
            r"scores of f are .*\[\]; wanted real floats",
        ),
        (
            lambda: jp.unstructured()(
                {"a/b": W["layer"]["kernel"], "a": {"b": jnp.ones((2, 2))}}, 0.5
            ),
            "two leaves have the path a/b; rename one",
        ),
        (
            lambda: jp.unstructured(per_output=True, where=ANY)({"b": jnp.ones(3)}, 0.5),
            r"per_output on b, shape \(3,\): there are no inputs .*leaf.ndim >= 2",
        ),
        (lambda: jp.n_m(4, 2), r"n_m\(4, 2\): wanted 0 < n < m, such as n_m\(2, 4\)"),
        (lambda: jp.n_m(0, 4), "wanted 0 < n < m"),
        (
            lambda: jp.n_m(2, 4)(W, 0.5),
            r"n_m\(2, 4\) on layer/kernel, shape \(3, 3, 3, 6\): 4 does not divide axis -2 of size "
            r"3; .* leaf.shape\[-2\] % 4 == 0",
        ),
        (
            lambda: jp.n_m(1, 3)(W, 0.8),
            r"n_m\(1, 3\) has sparsity 0.666667 and can't express 0.8; write .* jp.unstructured",
        ),
        (lambda: jp.n_m(2, 4)(W, 0.3), "can't express 0.3"),
        (lambda: jp.n_m(2, 4)(W, jnp.float32(0.8)), "can't express 0.8"),
        (
            lambda: jp.n_m(2, 4, axis=-5)(W, 0.5),
            r"n_m\(2, 4\) on layer/kernel, shape .*: there is no axis -5; pass another axis=",
        ),
        (lambda: jp.channel(7)(W, 0.5), r"channel\(7\) on layer/kernel, .*no axis 7"),
        (
            lambda: jp.block((4, 4))(W, 0.5),
            r"block\(\(4, 4\)\) does not tile layer/kernel, shape \(3, 3, 3, 6\): blocks lie on "
            r"the last 2 axes; choose sizes that divide \(3, 6\), or leave",
        ),
        (lambda: jp.block((1,) * 5)(W, 0.5), "does not tile layer/kernel"),
        (lambda: jp.block(4), r"block\(4\): wanted a tuple of positive integers such as \(4, 4\)"),
        (lambda: jp.block((4, 0)), "wanted a tuple of positive integers"),
        (lambda: jp.block(()), "wanted a tuple of positive integers"),
        (
            lambda: jp.threshold("a")(W),
            "tau for layer/kernel is 'a'; wanted a number, or a function",
        ),
        (lambda: jp.threshold(lambda p: None)(W), "tau for layer/kernel is None; wanted a number"),
        (lambda: jp.threshold(float("nan"))(W), "tau for layer/kernel is nan; wanted a number"),
        (lambda: jp.threshold(jnp.ones(2))(W), "tau for layer/kernel is .*; wanted a number"),
        (lambda: jp.threshold(0.5)(NAN), "scores of b/kernel, .* hold NaN"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_traced_nan_ranks_lowest_and_dense_leaves_may_hold_nan():
    masks = jax.jit(jp.unstructured())({"w": jnp.array([[jnp.nan, -jnp.inf, 0.0]])}, 1 / 3)
    assert masks["w"].tolist() == [[False, True, True]]
    jp.unstructured()({**draw(0), "bias": jnp.full(12, jnp.nan)}, 0.5)


def test_known_nan_is_found_while_something_else_is_traced():
    with pytest.raises(ValueError, match="scores of b/kernel, .* hold NaN"):
        jax.jit(lambda s: jp.unstructured()(NAN, s))(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*but_slow("unstructured", "n_m", "block"), "threshold"])
def test_strict_promotion_and_64_bit_types(name, x64):
    pattern = {**PATTERNS, "threshold": jp.threshold(0.1)}[name]
    rng = np.random.default_rng(0)
    types = {"a": jnp.bfloat16, "b": jnp.float32, "c": jnp.float64}
    scores = {path: jnp.asarray(rng.random((4, 8)), dtype) for path, dtype in types.items()}
    with jax.numpy_dtype_promotion("strict"):
        both = quick(lambda scores, sparsity: (pattern(scores, 0.5), pattern(scores, sparsity)))
        chex.assert_trees_all_equal(*both(scores, jnp.float64(0.5)))
