"""Selection against a full sort: exact counts whatever the type, the ties, the size."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import selection
from tests.helpers import oracles
from tests.helpers.processes import environment

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]
SHAPES = [(), (7,), (3, 2, 4, 5), (40, 30)]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 2e-45, 1.0, -1.0]


@st.composite
def scores(draw):
    """All distinct, or mostly ties, or the special values."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(TYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "ties", "special"]))
    if kind == "special":
        return rng.choice(SPECIAL, size=shape).astype(dtype)
    values = rng.normal(size=shape) if kind == "normal" else rng.integers(-1, 2, size=shape)
    return np.asarray(values).astype(dtype)


@pytest.mark.slow
@settings(max_examples=60)
@given(scores(), st.floats(0, 1))
def test_keeps_what_a_stable_sort_keeps(x, fraction):
    k = round(fraction * x.size)
    np.testing.assert_array_equal(selection.keep_largest(x, k), oracles.keep_largest(x, k))


@pytest.mark.slow
@pytest.mark.parametrize("large", [0, 2**30], ids=["written out", "in a loop"])
def test_the_kth_largest_of_several_arrays_in_every_type(monkeypatch, large):
    monkeypatch.setattr(selection, "_LARGE", large)
    rng = np.random.default_rng(0)
    for dtype in TYPES if large else TYPES[:2]:
        xs = [rng.choice(SPECIAL, size=(3, 5)).astype(dtype), rng.normal(size=20).astype(dtype)]
        find = jax.jit(lambda *xs_k: selection.kth_largest(xs_k[:-1], xs_k[-1]))
        both = np.concatenate(
            [np.asarray(selection.ordered_bits(jnp.asarray(x))).ravel() for x in xs]
        )
        for k in (1, 2, 9, 17, 30, 35):
            assert find(*xs, jnp.int32(k)) == np.sort(both)[-k], (dtype, k)


@pytest.mark.slow
def test_intervals_of_places_are_comparisons_of_ordered_bits():
    for dtype in TYPES:
        x = jnp.asarray(np.array([*SPECIAL, 2.0, -3.0]).astype(dtype))
        bits = selection.ordered_bits(x)
        for cut in [*bits, bits.dtype.type(5), ~bits.dtype.type(5)]:
            np.testing.assert_array_equal(selection._equal(x, cut), bits == cut)
            if cut > 0:
                np.testing.assert_array_equal(selection._at_least(x, cut), bits >= cut)


@pytest.mark.slow
def test_a_mask_update_without_jit():
    x = np.random.default_rng(0).integers(0, 3, size=(4, 5)).astype(np.float16)
    with jax.disable_jit():
        np.testing.assert_array_equal(selection.keep_largest(x, 7), oracles.keep_largest(x, 7))
        tx = jp.prune(optax.sgd(0.1), jp.magnitude, 0.5)
        params = {"w": jnp.asarray(x + 1)}
        updates, state = tx.update(params, tx.init(params), params)
    assert state.masks["w"].sum() == 10
    assert (optax.apply_updates(params, updates)["w"] != 0).sum() == 10


def kernels(*shapes, dtype=jnp.float32):
    return {f"w{i}": jax.ShapeDtypeStruct(shape, dtype) for i, shape in enumerate(shapes)}


ONE, TWO = kernels((1700, 1200)), kernels((3, 3, 256, 256), (700, 600))
HALF = kernels((1700, 1200), dtype=jnp.bfloat16)
# The bytes that XLA stores per parameter besides the mask, which is a byte itself.
MEMORY = {
    "bfloat16": (jp.unstructured(), HALF, 0.01),
    "per output": (jp.unstructured(per_output=True), ONE, 0.03),
    "one threshold": (jp.unstructured(jp.global_threshold), TWO, 0.02),
    "N:M": (lambda scores, sparsity: jp.n_m(2, 4)(scores), HALF, 0.01),
    "N:M on a schedule": (jp.n_m(2, 4), ONE, 1.01),  # a float per group
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORY)
def test_a_mask_update_takes_the_byte_of_the_mask_and_no_more(name):
    """|w| included: scores are computed anew in each pass. Compiled, not run."""
    pattern, params, most = MEMORY[name]
    update = jax.jit(lambda params, sparsity: pattern(jp.magnitude(params), sparsity))
    compiled = update.lower(params, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    size = sum(x.size for x in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= most * size
    assert size <= memory.output_size_in_bytes <= 1.01 * size  # the masks


@pytest.mark.slow
def test_ties_of_a_large_leaf_stay_exact():
    rng = np.random.default_rng(0)
    for x in [rng.normal(size=(600, 500)), rng.integers(0, 3, size=(600, 500))]:
        x = x.astype(np.float32)
        assert x.size >= selection._LARGE
        for k in [0, 1, 1234, x.size - 1, x.size]:
            np.testing.assert_array_equal(selection.keep_largest(x, k), oracles.keep_largest(x, k))


@pytest.mark.slow
def test_counts_stay_exact_beyond_what_float32_can_count():
    size = 2**24 + 3
    kept = selection.keep_largest(jnp.zeros((1, size), jnp.bfloat16), 2**24 + 1)
    assert jnp.sum(kept, dtype=jnp.int32) == 2**24 + 1
    assert kept[0, 2**24] and not kept[0, 2**24 + 1]


def test_float64_is_ranked_in_all_its_digits(x64):
    x = 1 + np.arange(9.0).reshape(3, 3) * 2**-52
    assert jnp.asarray(x).dtype == jnp.float64
    np.testing.assert_array_equal(selection.keep_largest(x, 4), oracles.keep_largest(x, 4))


@pytest.mark.slow
def test_order_of_the_bits_is_the_order_of_the_floats():
    ladder = [np.nan, -np.inf, -1.0, -1e-45, 0.0, 1e-45, 1.0, np.inf]
    bits = np.asarray(selection.ordered_bits(jnp.array(ladder, jnp.float32))).astype(np.int64)
    assert (np.diff(bits) > 0).all()
    zeros = selection.ordered_bits(jnp.array([0.0, -0.0]))
    assert zeros[0] == zeros[1]


def test_k_is_clipped_and_empty_arrays_pass():
    assert selection.keep_largest(jnp.ones(3), 9).sum() == 3
    assert selection.keep_largest(jnp.ones(3), -1).sum() == 0
    assert selection.keep_largest(jnp.ones((0, 3)), 0).shape == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["jit", "vmap", "scan", "grad"])
def test_under_every_transform(transform):
    x = jax.random.normal(jax.random.key(0), (4, 6, 5))
    ks = jnp.array([0, 3, 17, 30])
    wanted = [oracles.keep_largest(a, int(k)) for a, k in zip(x, ks, strict=True)]
    if transform == "jit":
        got = [jax.jit(selection.keep_largest)(a, k) for a, k in zip(x, ks, strict=True)]
    elif transform == "vmap":
        got = jax.vmap(selection.keep_largest)(x, ks)
    elif transform == "scan":
        _, got = jax.lax.scan(lambda c, ak: (c, selection.keep_largest(*ak)), 0, (x, ks))
    else:
        loss = lambda a, k: jnp.sum(jnp.where(selection.keep_largest(a, k), a, 0))  # noqa: E731
        got = [jax.grad(loss)(a, k).astype(bool) for a, k in zip(x, ks, strict=True)]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_columns_of_a_large_leaf():
    x = np.random.default_rng(0).integers(0, 99, size=(600, 500)).astype(np.float32)
    assert x.size >= selection._LARGE
    mask = jp.unstructured(per_output=True)({"w": x}, 0.9)["w"]
    for column in range(0, 500, 50):
        wanted = oracles.keep_largest(x[:, column], 60)
        np.testing.assert_array_equal(mask[:, column], wanted)


@pytest.mark.slow
@settings(max_examples=30)
@given(scores().filter(lambda x: x.ndim > 1), st.integers(1, 4), st.integers(0, 3))
def test_n_of_m_is_the_sort_of_each_group(x, n, axis):
    axis %= x.ndim
    m = x.shape[axis]
    got = selection.keep_n_of_m(jnp.asarray(x), n, axis)
    np.testing.assert_array_equal(
        got, oracles.keep_n_of_m(np.nan_to_num(x, nan=-np.inf), n, m, axis)
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_counts_over_arrays_are_those_of_one_sort(seed, sparsity, floor, ties):
    rng = np.random.default_rng(seed)
    shapes = [(3, 4), (7,), (20, 6)]
    draw = (lambda s: rng.integers(0, 3, s)) if ties else (lambda s: rng.normal(size=s))
    xs = [(draw(s) * scale).astype(np.float32) for s, scale in zip(shapes, [1, 0, 2], strict=True)]
    shares = [oracles.kept_count(x.size, sparsity) for x in xs]
    least = [min(int(np.ceil(floor * n)), n) for n in shares]
    got = selection.keep_counts([jnp.asarray(x) for x in xs], shares, least)
    assert [int(n) for n in got] == oracles.keep_counts(xs, shares, least)
    assert sum(int(n) for n in got) == sum(shares)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.integers(1, 2**31 - 1), st.floats(0, 1, width=32))
def test_kept_count_is_exact_traced_or_not(size, sparsity):
    exact = size - sparsity * size  # the double product of a float32 and an int32 is exact enough
    known = selection.kept_count(size, sparsity)
    traced = int(jax.jit(lambda s: selection.kept_count(size, s))(jnp.float32(sparsity)))
    assert known == oracles.kept_count(size, sparsity)
    for kept in (known, traced):
        assert abs(kept - exact) <= 0.6 or (kept == 1 and sparsity < 1)
    assert selection.kept_count(10**8, 0.9) == 10**7


def test_kept_count_of_float64(x64):
    traced = jax.jit(lambda s: selection.kept_count(10**9, s))(jnp.float64(0.9))
    assert int(traced) == 10**8


@pytest.mark.slow
def test_totals_beyond_int32_ask_for_64_bits():
    tall = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    call = lambda a, b: selection.keep_counts([a, b], [1, 1], [0, 0])  # noqa: E731
    with pytest.raises(ValueError, match=r"ranking 4294967296 entries .* jax.enable_x64\(True\)"):
        jax.eval_shape(call, tall, tall)
    with jax.enable_x64(True):
        assert jax.eval_shape(call, tall, tall)[0].dtype == jnp.int32


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_nothing_scatters_gathers_or_sorts(platform):
    shapes = jax.ShapeDtypeStruct((1000, 1000), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.export.export(selection.keep_largest, platforms=[platform])(*shapes)
    for operation in ("scatter", "gather", "sort", "dynamic_slice"):
        assert f"stablehlo.{operation}" not in program.mlir_module()


SHARDED = """
import re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxprune import selection
jax.config.update("jax_cpu_enable_async_dispatch", False)  # programs could wait for each other
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
for rows, spec in [(1024, P("x", None)), (256, P(None, "x"))]:  # large, small
    x = jax.random.normal(jax.random.key(0), (rows, 512))
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    compiled = jax.jit(selection.keep_largest).lower(placed, jnp.int32(999)).compile()
    moved = re.findall(r"= (.*?) (?:all-|collective)", compiled.as_text())
    assert moved, "the leaf was not sharded"
    dims = re.findall(r"\\w+\\[([\\d,]*)\\]", " ".join(moved))
    sizes = [np.prod([int(d) for d in shape.split(",") if d]) for shape in dims]
    assert max(sizes) <= len(jax.devices()), (spec, sizes)
    mask = compiled(placed, jnp.int32(999))
    assert (np.asarray(mask) == (x >= np.sort(x.ravel())[-999])).all()
    assert mask.sharding.is_equivalent_to(placed.sharding, 2)
print("counts only", len(jax.devices()))
"""


@pytest.mark.slow
def test_a_sharded_leaf_exchanges_counts_only():
    """Needs several devices, which a process can only ask for before JAX starts."""
    command = [sys.executable, "-c", SHARDED]
    run = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "counts only 8", run.stderr[-2000:]


def strictly(x):
    """What all of selection keeps."""
    return (
        selection.keep_largest(x, 5).sum(),
        selection.keep_n_of_m(x[:4], 2, 0).sum(),
        sum(selection.keep_counts([x, x[:2]], [4, 3], [1, 2])),
        jax.jit(lambda s: selection.kept_count(9, s))(jnp.float32(0.5)),
    )


@pytest.mark.slow
def test_strict_promotion_and_64_bit_types(x64):
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.bfloat16, jnp.float64):
            x = jnp.arange(30).astype(dtype).reshape(6, 5)
            assert [int(n) for n in strictly(x)] == [5, 2 * 5, 7, 5]
            jax.eval_shape(strictly, jax.ShapeDtypeStruct((600, 500), dtype))  # written out


def webster(total, sizes):
    """One by one to the size whose next half is due first."""
    given = [min(size, 1) for size in sizes]
    while sum(given) < total:
        due = [(n + 0.5) / size if n < size else np.inf for n, size in zip(given, sizes)]
        given[int(np.argmin(due))] += 1
    return given


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.data())
def test_shares_are_in_proportion_sum_to_the_total_and_never_rise_as_it_falls(sizes, data):
    least = sum(n > 0 for n in sizes)
    total = data.draw(st.integers(least, sum(sizes)))
    got = np.asarray(selection.apportion(total, tuple(sizes)))
    assert got.sum() == total
    assert (got <= sizes).all() and (got >= np.minimum(sizes, 1) * (total > 0)).all()
    assert np.abs(got - webster(total, sizes)).max() <= 1, "only ties may fall elsewhere"
    if total > least:
        fewer = np.asarray(selection.apportion(total - 1, tuple(sizes)))
        assert (fewer <= got).all()


def test_shares_of_many_entries_are_exact_in_their_sum():
    sizes = (10**9, 10**9 - 7, 12, 5)
    for total in (4, 10**9 + 1, 2 * 10**9 - 3, sum(sizes)):
        got = np.asarray(selection.apportion(total, sizes)).astype(np.int64)
        assert got.sum() == total
        assert abs(got[0] - got[1]) <= 200
