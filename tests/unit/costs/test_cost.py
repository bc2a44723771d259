"""FLOPs, bytes and parameters against hand counts, brute force, XLA, and equal programs."""

import itertools
import math
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxprune as jp


def sds(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def flops(fn, *args):
    return jp.cost(fn, *args).flops


def xla_flops(fn, *args):
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


# Contractions


def test_mlp_by_hand():
    def mlp(params, x):
        h = jax.nn.relu(x @ params["w1"] + params["b1"])
        return h @ params["w2"] + params["b2"]

    params = {"w1": sds(784, 300), "b1": sds(300), "w2": sds(300, 10), "b2": sds(10)}
    c = jp.cost(mlp, params, sds(32, 784))
    matmuls = 2 * 32 * (784 * 300 + 300 * 10)
    assert c.flops == matmuls + 32 * 300 * 2 + 32 * 10  # bias and relu; bias
    assert c.params == 784 * 300 + 300 + 300 * 10 + 10
    assert c.by_primitive == {"dot_general": matmuls, "add": 32 * 310, "max": 32 * 300}
    assert c.notes == ()


@given(st.data())
def test_dot_general_is_a_brute_force_count(data):
    """Batch, free and contracting sizes in any axis order."""
    size = st.integers(1, 4)
    b, m, n, k = (data.draw(st.lists(size, max_size=2)) for _ in range(4))
    left, right = [*b, *m, *k], [*k, *b, *n]
    dims = (
        (tuple(range(len(b) + len(m), len(left))), tuple(range(len(k)))),
        (tuple(range(len(b))), tuple(range(len(k), len(k) + len(b)))),
    )
    got = flops(lambda x, y: lax.dot_general(x, y, dims), sds(*left), sds(*right))
    assert got == 2 * math.prod([*b, *m, *n, *k])


@pytest.mark.parametrize("m, k, n", [(16, 32, 8), (1, 128, 64)])
def test_a_dot_agrees_with_xla(m, k, n):
    def dot(w, x):
        return x @ w

    args = jnp.ones((k, n)), jnp.ones((m, k))
    assert flops(dot, *args) == xla_flops(dot, *args)


def test_attention_by_hand():
    def attention(params, x):
        q, k, v = jnp.einsum("bte,ecd->cbtd", x, params["qkv"]).reshape(3, B, T, H, D)
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, H * D) @ params["out"]

    B, T, E, H, D = 2, 16, 32, 4, 8
    c = jp.cost(attention, {"qkv": sds(E, 3, H * D), "out": sds(H * D, E)}, sds(B, T, E))
    qkv, scores, out = 2 * B * T * E * 3 * H * D, 2 * B * H * T * T * D, 2 * B * T * H * D * E
    assert c.by_primitive["dot_general"] == qkv + 2 * scores + out
    # softmax: max, subtract, exp, sum, divide; and the max with -inf per row
    assert c.flops - c.by_primitive["dot_general"] == 5 * B * H * T * T + B * H * T


def test_ragged_dot_meets_one_group_per_row():
    args = sds(6, 4), sds(3, 4, 5), sds(3, dtype=jnp.int32)
    assert flops(lambda x, w, n: lax.ragged_dot(x, w, n), *args) == 2 * 6 * 4 * 5


# Convolutions


def brute_force_taps(out, window, stride, low, base, dilation):
    """Goes through all pairs; a tap counts unless it lands between two real entries."""
    positions = itertools.product(range(out), range(window))
    return sum((o * stride + w * dilation - low) % base == 0 for o, w in positions)


@given(
    st.integers(4, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
)
def test_conv_is_a_brute_force_count(n, window, stride, pad, base, dilation, groups):
    def conv(k, x):
        return lax.conv_general_dilated(
            x, k, (stride, 1), [(pad, pad), (0, 0)], (base, 1), (dilation, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    args = sds(window, 2, 4 // groups, 8), sds(3, n, 5, 4)
    out = jax.eval_shape(conv, *args).shape
    taps = brute_force_taps(out[1], window, stride, pad, base, dilation) * out[2] * 2
    assert flops(conv, *args) == 2 * 3 * 8 * (4 // groups) * taps


X = sds(2, 8, 8, 4)


def conv_cost(features=6, kernel=(3, 3), layer=nn.Conv, **kwargs):
    conv = layer(features, kernel, use_bias=False, **kwargs)
    return jp.cost(conv.apply, jax.eval_shape(conv.init, jax.random.key(0), X), X)


def test_convolutions_by_hand():
    assert conv_cost().flops == 2 * (2 * 8 * 8 * 6) * (9 * 4)  # SAME: padding counts
    assert conv_cost(padding="VALID").flops == 2 * (2 * 6 * 6 * 6) * (9 * 4)
    assert conv_cost(strides=2).flops == 2 * (2 * 4 * 4 * 6) * (9 * 4)
    assert conv_cost(feature_group_count=2).flops == 2 * (2 * 8 * 8 * 6) * (9 * 2)
    assert conv_cost(4, feature_group_count=4).flops == 2 * (2 * 8 * 8 * 4) * 9  # depthwise
    assert conv_cost(8, feature_group_count=4).flops == 2 * (2 * 8 * 8 * 8) * 9  # multiplier 2
    valid_dilated = conv_cost(padding="VALID", kernel_dilation=2)
    assert valid_dilated.flops == 2 * (2 * 4 * 4 * 6) * (9 * 4)


def test_a_transposed_convolution_costs_its_input():
    """Stride 2: each input entry meets each of the 2 x 2 taps once, though the result is larger."""
    c = conv_cost(6, (2, 2), nn.ConvTranspose, strides=(2, 2))
    assert c.flops == 2 * (2 * 8 * 8) * (4 * 4 * 6)


@pytest.mark.slow
def test_a_valid_convolution_agrees_with_xla():
    conv = nn.Conv(6, (3, 3), padding="VALID", use_bias=False)
    params, x = conv.init(jax.random.key(0), jnp.ones(X.shape)), jnp.ones(X.shape)
    assert flops(conv.apply, params, x) == xla_flops(conv.apply, params, x)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("strides", [1, 2])
def test_gradients_of_a_convolution_cost_what_it_does(groups, strides):
    """Up to the padding of the input's gradient: exactly the convolution's cost, twice."""

    def loss(k, x):
        return jnp.sum(
            lax.conv_general_dilated(
                x, k, (strides, strides), "VALID", feature_group_count=groups,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        )  # fmt: skip

    args = sds(4, 4, 8 // groups, 8), sds(2, 12, 12, 8)
    forward = jp.cost(loss, *args).by_primitive["conv_general_dilated"]
    step = jp.cost(jax.grad(loss, argnums=(0, 1)), *args).by_primitive["conv_general_dilated"]
    # The forward pass is dead in the gradient of a sum: only the two gradients remain. The input's
    # reads each of 12 x 12 entries' 4 x 4 taps, padding included, but none that falls between.
    out = (12 - 4) // strides + 1
    assert step == forward + forward * (12 * 4 // strides) ** 2 // (out * 4) ** 2


# Whole networks


class Block(nn.Module):
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Block(8)(nn.Conv(8, (3, 3), use_bias=False)(x))
        x = Block(16, 2)(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


def test_resnet_by_hand():
    net, x = ResNet(), sds(4, 16, 16, 3)
    c = jp.cost(net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x)
    at16, at8 = 4 * 16 * 16, 4 * 8 * 8  # pixels
    convs = 2 * (at16 * 8 * (27 + 72 + 72) + at8 * 16 * (72 + 144 + 8))
    assert c.by_primitive == {
        "conv_general_dilated": convs,
        "dot_general": 2 * 4 * 16 * 10,
        "max": 2 * (at16 * 8 + at8 * 16),
        "add": at16 * 8 + at8 * 16 + 4 * 10,
        "reduce_window_max": at8 // 4 * 16 * 4,
        "reduce_sum": at8 // 4 * 16,
        "div": 4 * 16,
    }
    assert c.params == 8 * 27 + 2 * 8 * 72 + 16 * (72 + 144 + 8) + 160 + 10


def layers(scanned):
    """One residual layer, with a bias; over stacked weights by scan, or by a Python loop."""

    def layer(h, p):
        return h + jnp.tanh(h @ p["w"] + p["b"]), None

    def loop(params, x):
        for i in range(5):
            x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], params))
        return x

    return (lambda params, x: lax.scan(layer, x, params)[0]) if scanned else loop


def test_a_scan_over_layers_costs_the_loop():
    args = {"w": sds(5, 16, 16), "b": sds(5, 16)}, sds(4, 16)
    scan, loop = jp.cost(layers(True), *args), jp.cost(layers(False), *args)
    assert scan.flops == loop.flops == 5 * 4 * 16 * (2 * 16 + 3)
    assert scan.bytes == loop.bytes == 4 * (5 * (4 * 16 + 16 * 16 + 4 * 16) + 5 * 16)
    assert [e.times for e in scan.equations if e.primitive == "dot_general"] == [5]


def test_scans_nest():
    def outer(w, x):
        return lax.scan(lambda h, _: (lax.scan(lambda g, k: (g @ k, None), h, w)[0], None), x,
                        length=3)[0]  # fmt: skip

    assert flops(outer, sds(5, 4, 4), sds(2, 4)) == 3 * 5 * 2 * 2 * 4 * 4


def custom_jvp(fn):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return wrapped


def custom_vjp(fn):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: jax.vjp(fn, *args), lambda back, ct: back(ct))
    return wrapped


WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "vmap": lambda fn: jax.vmap(lambda w, x: fn(w, x[None])[0], (None, 0)),
    "nested": lambda fn: jax.jit(jax.checkpoint(jax.jit(fn))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_cost_nothing(wrap):
    def fn(w, x):
        return jnp.tanh(x @ w)

    args = sds(8, 3), sds(4, 8)
    plain, wrapped = jp.cost(fn, *args), jp.cost(wrap(fn), *args)
    assert (plain.flops, plain.bytes) == (wrapped.flops, wrapped.bytes) == (2 * 96 + 12, 4 * 68)


def test_remat_costs_the_forward_twice():
    def loss(fn):
        return jax.grad(lambda w, x: jnp.sum(fn(fn(x, w), w) ** 2))

    def layer(x, w):
        return jnp.sin(x @ w)

    args = sds(8, 8), sds(4, 8)
    once = jp.cost(loss(layer), *args).by_primitive["dot_general"]
    again = jp.cost(loss(jax.checkpoint(layer)), *args).by_primitive["dot_general"]
    assert (once, again) == (5 * 2 * 4 * 64, 7 * 2 * 4 * 64)


def test_shard_map_counts_all_devices():
    mesh = jax.sharding.AbstractMesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(w, x):
        return jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")
        )(w, x)

    assert flops(fn, sds(16, 8), sds(32, 16)) == 2 * 32 * 16 * 8


def test_dead_code_costs_nothing():
    @jax.jit
    def two(w, x):
        return x @ w, x @ w @ w

    def fn(w, x):
        jnp.sum(w @ w)
        return two(w, x)[0]

    assert flops(fn, sds(8, 8), sds(4, 8)) == 2 * 4 * 64


# Elementwise, reductions, windows


@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (jnp.exp, 24),
        (lambda x: x + x[:1], 24),  # broadcast in the primitive: per result element
        (lambda x: jnp.where(x > 0, x, 0.0), 48),  # compare, select
        (jnp.sum, 24),
        (lambda x: jnp.max(x, 0), 24),
        (lambda x: jnp.argmax(x, 1), 24),
        (lambda x: lax.cumsum(x, 1), 24),
        (lambda x: lax.reduce(x, 1.0, lambda a, b: a * b, (0,)), 24),
        (lambda x: lax.sort(x, dimension=1), 24 * 3),  # log2(6), rounded up
        (lambda x: lax.top_k(x, 2)[0], 24 * 3),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 3), (2, 3), "VALID"), 4 * 6),
        (lambda x: lax.reduce_window(x, 1.0, lambda a, b: a * b, (2, 3), (2, 3), "VALID"), 4 * 6),
        (lambda x: x.at[0].add(1.0), 6),
        (lambda x: jnp.fft.fft(x[:, :4]), 5 * 16 * 2),
        (lambda x: x.T.reshape(2, 12)[::-1].astype(jnp.bfloat16), 0),
        (lambda x: jnp.concatenate([x, jnp.zeros((1, 6))])[:, 1:], 0),
        (lambda x: x.at[0].set(1.0), 0),
        (lambda x: lax.dynamic_slice(x, (1, 1), (2, 2)), 0),
    ],
)
def test_small_operations_by_hand(fn, want):
    c = jp.cost(fn, sds(4, 6))
    assert (c.flops, c.notes) == (want, ())


def test_a_max_pool_gradient_reads_its_windows():
    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID").sum()

    assert jp.cost(jax.grad(pool), sds(8, 8)).by_primitive["select_and_scatter_add"] == 16 * 4


# Control flow and what can't be known


def test_a_cond_costs_its_dearest_branch():
    def fn(w, x):
        return lax.cond(x[0] > 0, lambda x: x @ w, lambda x: x * 2, x)

    c = jp.cost(fn, sds(3, 3), sds(3))
    assert c.flops == 2 * 9 + 1
    assert (
        len(c.notes) == 1 and "dearest branch" in c.notes[0] and "cond at test_cost" in c.notes[0]
    )


def test_a_while_costs_one_iteration_and_says_so():
    def fn(w, x):
        return lax.while_loop(lambda x: x[0] < 9, lambda x: x @ w, x)

    c = jp.cost(fn, sds(3, 3), sds(3))
    assert c.flops == 2 * 9 + 1
    assert len(c.notes) == 1 and "one iteration" in c.notes[0]
    fixed = jp.cost(lambda w, x: lax.fori_loop(0, 4, lambda i, x: x @ w, x), sds(3, 3), sds(3))
    assert (fixed.by_primitive["dot_general"], fixed.notes) == (4 * 2 * 9, ())


def test_what_has_no_rule_is_said():
    c = jp.cost(lambda x: jnp.linalg.cholesky(x) @ x, sds(4, 4))
    assert c.by_primitive["dot_general"] == 2 * 4**3
    assert len(c.notes) == 1 and "cholesky" in c.notes[0] and "no rule" in c.notes[0]


@pytest.mark.parametrize("estimated", [True, False])
def test_a_kernel_is_known_by_its_own_estimate(estimated):
    pallas = pytest.importorskip("jax.experimental.pallas")
    estimate = pallas.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)

    def copy(x, out):
        out[...] = x[...]

    kernel = pallas.pallas_call(
        copy, out_shape=sds(4, 4), cost_estimate=estimate if estimated else None
    )
    c = jp.cost(kernel, sds(4, 4))
    assert (c.flops, len(c.notes), c.bytes) == (123 if estimated else 0, not estimated, 2 * 64)


# Bytes


def test_bytes_of_matmuls_with_merged_epilogues():
    def mlp(params, x):
        w1, b1, w2 = params
        return jax.nn.gelu(x @ w1 + b1) @ w2

    c = jp.cost(mlp, (sds(8, 32), sds(32), sds(32, 2)), sds(4, 8))
    first, second = 4 * 8 + 8 * 32 + 4 * 32, 4 * 32 + 32 * 2 + 4 * 2
    assert c.bytes == 4 * (first + second + 32)  # the bias is read by nothing but an addition


def test_bytes_without_contractions_are_the_ends():
    assert jp.cost(lambda x, y: jnp.exp(x) + y, sds(8, 4), sds(4)).bytes == 4 * (32 + 4 + 32)
    assert jp.cost(lambda x, y: jnp.exp(x), sds(8, 4), sds(4)).bytes == 4 * (32 + 32)  # y is dead


def test_a_cast_or_broadcast_operand_moves_at_its_smaller_size():
    half = sds(8, 4, dtype=jnp.bfloat16)
    c = jp.cost(lambda w, x: x @ w.astype(jnp.float32), half, sds(2, 8))
    assert c.bytes == 2 * 32 + 4 * (16 + 8)
    c = jp.cost(lambda w, x: x @ jnp.broadcast_to(w[:, None], (8, 4)), sds(8), sds(2, 8))
    assert c.bytes == 4 * (8 + 16 + 8)


def test_a_gather_moves_what_it_takes():
    c = jp.cost(lambda table, ids: table[ids], sds(1000, 16), sds(3, dtype=jnp.int32))
    assert c.bytes == 4 * (2 * 3 * 16 + 3) and c.notes == ()


def test_closed_over_arrays_are_read_too():
    w = jnp.ones((8, 4))
    assert jp.cost(lambda x: x @ w, sds(2, 8)).bytes == 4 * (16 + 32 + 8)


def test_params_are_the_float_leaves_of_the_first_argument():
    tree = {"w": sds(3, 4), "half": sds(2, dtype=jnp.bfloat16), "step": sds(dtype=jnp.int32)}
    assert jp.cost(lambda p, x: p["w"] @ x, tree, sds(4)).params == 14


def test_equations_know_the_leaves_that_they_read():
    def fn(params, x):
        stacked, flat, scale = params
        w = flat.reshape(8, 8).astype(jnp.float32) * 2
        h, _ = lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x @ (w - w.mean()), stacked)
        return h * scale

    params = sds(3, 8, 8), sds(64, dtype=jnp.bfloat16), sds(8)
    rows = [e for e in jp.cost(fn, params, sds(2, 8)).equations if e.primitive == "dot_general"]
    assert [e.inputs for e in rows] == [(3, 1), (0,)]  # the activations are no leaf


def test_nothing_is_computed():
    """A program of 10^18 FLOPs on terabytes, counted at once; one trace."""
    fn = chex.assert_max_traces(lambda w, x: x @ w, n=1)
    start = time.perf_counter()
    assert flops(fn, sds(10**6, 10**6), sds(10**6, 10**6)) == 2 * 10**18
    assert time.perf_counter() - start < 5


def test_compact_programs_cost_what_small_ones_do():
    def mlp(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((6, 8)), "b": jnp.ones((8, 3))}
    keep = np.arange(8) < 5
    masks = {"a": jnp.asarray(keep[None, :]), "b": jnp.asarray(keep[:, None])}
    small = jp.compact(mlp, params, masks, sds(2, 6))
    native = {"a": sds(6, 5), "b": sds(5, 3)}
    got, want = jp.cost(small.fn, small.params, sds(2, 6)), jp.cost(mlp, native, sds(2, 6))
    assert (got.flops, got.bytes, got.params) == (want.flops, want.bytes, want.params)


# Tables and errors


def test_print_shows_totals_the_dearest_first_and_notes():
    def fn(w, x):
        return lax.while_loop(lambda x: x[0, 0] < 9, lambda x: jnp.tanh(x @ w), x)

    c = jp.cost(fn, sds(32, 32), sds(16, 32))
    lines = str(c).splitlines()
    assert lines[0] == "33.3 k FLOPs, 8.19 k bytes, 1.02 k parameters"
    assert lines[1] == "about 10.2 k bytes of memory at the peak"
    assert "dot_general float32[16,32] float32[32,32] -> float32[16,32]" in lines[3]
    assert "test_cost.py" in lines[3] and "98.5%" in lines[3]
    assert lines[-1].startswith("note: while at test_cost.py")
    assert c.table(1).splitlines()[-1] == "... and 2 more"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jp.cost(3, X),
            TypeError,
            r"wants a function, jp.cost\(fn, params, x\), got int 3",
        ),
        (lambda: jp.cost(jnp.sin), ValueError, r"no arguments.*jp.cost\(fn, params, x\)"),
        (
            lambda: jp.cost(jnp.sum, {"a": X, "mode": "train"}),
            TypeError,
            "argument 0/mode holds str 'train'; close over what is static",
        ),
        (lambda: jp.cost(jnp.sum, X, True), TypeError, "argument 1 holds bool True"),
        (lambda: jp.cost(jnp.sin, X).table(0), ValueError, "table wants limit >= 1 .* got 0"),
    ],
)
def test_clear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
