"""Each rule on its own: what it calls zero is zero, and restricting operands restricts results.

The oracle is the primitive itself at full size: a rule may not claim more than what it gives.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.ir import axes, compat, tape
from jaxprune.rules import registry, zeros
from jaxprune.structure import infer

KEY = jax.random.key(3)
IDS = np.array([2, 0, 2])


class Restricted:
    """A view that keeps the given positions of leaves."""

    def __init__(self, kept):
        self.kept = kept
        self.sizes = {leaf: len(index) for leaf, index in kept.items()}

    def size(self, axis):
        return axes.size_of(axis, self.sizes)

    def shape(self, axs):
        return tuple(map(self.size, axs))

    def index(self, axis):
        return axes.index_of(axis, self.kept)

    def take(self, array, axs):
        for k, axis in enumerate(axs):
            if self.size(axis) != axis.size:
                array = array.take(self.index(axis), axis=k)
        return array


def program(fn, arrays):
    closed = jax.make_jaxpr(fn)(*arrays)
    return tape.build(closed, [tape.Value(v.aval) for v in closed.jaxpr.invars], registry.couple)


def draw(shape, rng, dtype=np.float32):
    """Normal entries, some whole slices zero."""
    array = rng.normal(size=shape).astype(dtype)
    for k, n in enumerate(shape):
        if n > 2 and rng.random() < 0.7:
            np.moveaxis(array, k, 0)[rng.permutation(n)[: n // 2]] = 0
    return jnp.asarray(array)


def walk(fn, arrays):
    """(step, operands, results, facts of the operands) of every equation, at full size."""
    ran, found = program(fn, arrays), []
    env, facts = dict(zip(ran.inputs, arrays, strict=True)), {}
    for step in ran.steps:
        xs = [env.get(v, v.const) for v in step.ins]
        known = [facts[v] if v in facts else facts_of(x) for v, x in zip(step.ins, xs, strict=True)]
        ys = compat.bind(step.eqn, xs)
        claimed = registry.rule_of(step).zeros(step, known)
        found.append((step, xs, ys, known, claimed))
        env.update(zip(step.outs, ys, strict=True))
        facts.update(zip(step.outs, claimed, strict=True))
    return found


def concrete(x):
    """None for random keys."""
    return None if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)


def facts_of(x):
    array = concrete(x)
    return zeros.unknown(np.shape(x)) if array is None else zeros.of_array(array != 0)


def claims_hold(claim, y):
    array = concrete(y)
    assert tuple(map(len, claim.axes)) == y.shape
    if array is None:
        return not (claim.all or any(v.any() for v in claim.axes))
    truth = zeros.of_array(array != 0)
    slices = all((~c | t).all() for c, t in zip(claim.axes, truth.axes, strict=True))
    return slices and (truth.all or not claim.all)


def free_leaves(step, known):
    """Leaves that the rule lets change, those that are summed away left out."""
    mixed = {
        leaf for m in registry.rule_of(step).mixes(step, known) for leaf in axes.leaves(m.axis)
    }
    held = [a for v in [*step.ins, *step.outs] for a in v.axes]
    leaves = dict.fromkeys(leaf for a in held for leaf in axes.leaves(a))
    return [leaf for leaf in leaves if not is_held(leaf) and leaf not in mixed and leaf.size > 1]


# (name, function, shapes of its arrays, axes of its first array that stay free)
def row(name, fn, *shapes, free):
    return pytest.param(fn, shapes, free, id=name)


def window(reduce, init, dims=(1, 2, 1), strides=(1, 2, 1)):
    return lambda x: lax.reduce_window(x, init, reduce, dims, strides, "VALID")


max_pool = window(lax.max, -jnp.inf)
A, M = (4, 6, 5), (3, 4, 4)  # an array, a stack of matrices
# jax 0.8 gathers at known places and splits here, which keeps each unit apart.
SOME = (0, 1, 2) if jax.__version_info__ < (0, 9) else (0, 2)


def spd(m):
    return m @ jnp.swapaxes(m, -1, -2) + 3 * jnp.eye(4)


def conv(x, w, **kwargs):
    numbers = ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, **kwargs)


def kernel_gradient(x, w, groups):
    return jax.grad(lambda w: (conv(x, w, feature_group_count=groups) * x.sum()).sum())(w)


def ragged(lhs, rhs, contracting, lhs_ragged, groups):
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, ((), ())),
        lhs_ragged_dimensions=[lhs_ragged],
        rhs_group_dimensions=groups,
    )
    return lax.ragged_dot_general(lhs, rhs, jnp.array([1, 3]), numbers)


ROWS = [
    row("add", lambda x, y: x + y, A, (4, 1, 5), free=(0, 1, 2)),
    row("mul", lambda x, y: x * y, A, A, free=(0, 1, 2)),
    row("div", lambda x, y: x / y, A, A, free=(0, 1, 2)),
    row("div by a positive", lambda x, y: x / (jnp.abs(y) + 1), A, A, free=(0, 1, 2)),
    row("rem", lambda x, y: lax.rem(x, jnp.exp(y)), A, A, free=(0, 1, 2)),
    row("shift", lambda x: x.astype(jnp.int32) << x.astype(jnp.int32), A, free=(0, 1, 2)),
    row("integer_pow", lambda x: x**3, A, free=(0, 1, 2)),
    row("integer_pow of zero", lambda x: x**0, A, free=(0, 1, 2)),
    row("pow", lambda x: jnp.abs(x) ** 1.5, A, free=(0, 1, 2)),
    row("pow of zero to zero", lambda x, y: jnp.abs(x) ** y, A, A, free=(0, 1, 2)),
    row("select_n", lambda p, x, y: jnp.where(p > 0, x, y), A, A, A, free=(0, 1, 2)),
    row("clamp", lambda x: jnp.clip(x, -0.5, 0.5), A, free=(0, 1, 2)),
    row("clamp above zero", lambda x: lax.clamp(0.1, x, 0.5), A, free=(0, 1, 2)),
    row("reduce_precision", lambda x: lax.reduce_precision(x, 5, 4), A, free=(0, 1, 2)),
    row("nextafter", lambda x: jnp.nextafter(x, 1.0), A, free=(0, 1, 2)),
    row("bitcast", lambda x: lax.bitcast_convert_type(x, jnp.int32), A, free=(0, 1, 2)),
    row("bitcast to words", lambda x: lax.bitcast_convert_type(x, jnp.int16), A, free=(0, 1, 2)),
    row("bitcast of words", lambda x: lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int16), jnp.float32), A, free=(0, 1, 2)),
    row("transpose", lambda x: x.transpose(2, 0, 1), A, free=(0, 1, 2)),
    row("squeeze", lambda x: x[:, None][:, 0], A, free=(0, 1, 2)),
    row("broadcast_in_dim", lambda x: jnp.broadcast_to(x, (3, *A)), A, free=(0, 1, 2)),
    row("zeros_like", lambda x: jnp.zeros_like(x) + x, A, free=(0, 1, 2)),
    row("empty", lambda x: lax.empty(A, jnp.float32) * 0 + x, A, free=(0, 1, 2)),
    row("reshape", lambda x: x.reshape(8, 3, 5), A, free=(0, 1, 2)),
    row("reshape with dimensions", lambda x: lax.reshape(x, (5, 24), (2, 0, 1)), A, free=(0, 1, 2)),
    row("concatenate", lambda x: jnp.concatenate([x, jnp.ones((4, 2, 5)), x], 1), A,
        free=(0, 1, 2)),
    row("split", lambda x: jnp.split(x, (2,), 1), A, free=(0, 1, 2)),
    row("pad", lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))), A, free=(0, 1, 2)),
    row("pad with ones", lambda x: lax.pad(x, 1.0, ((0, 0, 0), (1, 2, 0), (0, 0, 0))), A,
        free=(0, 1, 2)),
    row("pad inside", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 2, 1), (0, 0, 0))), A,
        free=(0, 2)),
    row("slice", lambda x: x[:, 1:4], A, free=(0, 1, 2)),
    row("slice by strides", lambda x: x[:, ::2], A, free=(0, 1, 2)),
    row("slice by odd strides", lambda x: x[:, 1::4], A, free=SOME),
    row("stack", lambda x, y: jnp.stack([x, y, jnp.zeros(A)], 1), A, A, free=(0, 1, 2)),
    row("unstack", lambda x: jnp.unstack(x, axis=1), A, free=SOME),
    row("tile", lambda x: jnp.tile(x, (1, 2, 1)), A, free=(0, 1, 2)),
    row("rev", lambda x: x[:, ::-1], A, free=(0, 1, 2)),
    row("repeat", lambda x: jnp.repeat(x, 2, 1), A, free=(0, 1, 2)),
    row("roll", lambda x: jnp.roll(x, 2, 1), A, free=(0, 1, 2)),
    row("iota", lambda x: x + lax.broadcasted_iota(jnp.float32, A, 1), A, free=(0, 1, 2)),
    row("random_bits", lambda x: x * jax.random.normal(KEY, A), A, free=(0, 1, 2)),
    row("random keys", lambda x: x * jax.vmap(lambda k, r: jax.random.uniform(k, (6, 5)))(
        jax.random.split(jax.random.fold_in(KEY, 1), 4), x), A, free=(1, 2)),
    row("random keys, rewrapped", lambda x: x * jax.random.bits(jax.random.clone(
        jax.random.wrap_key_data(jax.random.key_data(KEY))), A), A, free=(0, 1, 2)),
    row("random_gamma", lambda x: x + jax.random.gamma(KEY, jnp.abs(x) + 1), A, free=()),
    row("rng_bit_generator", lambda x: x + lax.rng_bit_generator(
        jnp.zeros(4, jnp.uint32), A)[1], A, free=(0, 1, 2)),
    row("reduce_sum", lambda x: x.sum(1), A, free=(0, 1, 2)),
    row("reduce_max", lambda x: x.max(1), A, free=(0, 1, 2)),
    row("reduce_xor", lambda x: lax.reduce(
        x.astype(jnp.int32), np.int32(0), lax.bitwise_xor, (1,)), A, free=(0, 1, 2)),
    row("reduce", lambda x, y: lax.reduce(
        (x, y), (0.0, 1.0), lambda a, b: (a[0] + b[0], a[1] * b[1] + 1), (1,)), A, A,
        free=(0, 2)),
    row("argmax", lambda x: x.argmax(1), A, free=(0, 2)),
    row("cumsum", lambda x: jnp.cumsum(x, 1), A, free=(0, 1, 2)),
    row("cumsum, reversed", lambda x: lax.cumsum(x, 1, reverse=True), A, free=(0, 1, 2)),
    row("cumprod", lambda x: lax.cumprod(x, 1), A, free=(0, 1, 2)),
    row("cummax", lambda x: lax.cummax(x, 1, reverse=True), A, free=(0, 1, 2)),
    row("cummin", lambda x: lax.cummin(x, 1), A, free=(0, 1, 2)),
    row("cumlogsumexp", lambda x: lax.cumlogsumexp(x, 1), A, free=(0, 1, 2)),
    row("sort", lambda x: jnp.sort(x, 1), A, free=(0, 2)),
    row("sort of two", lambda x, y: lax.sort((x, y), dimension=1, num_keys=1), A, A, free=(0, 2)),
    row("top_k", lambda x: lax.top_k(x, 2), A, free=(0, 1)),
    row("approx_top_k", lambda x: lax.approx_max_k(x, 2, reduction_dimension=1), A, free=(0, 2)),
    row("reduce_window_max", max_pool, A, free=(0, 2)),
    row("reduce_window_sum", window(lax.add, 0.0), A, free=(0, 2)),
    row("reduce_window_max of padding", lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), ((0, 0), (2, 0), (0, 0))), A, free=(0, 2)),
    row("reduce_window", window(lambda a, b: a * b + 1, 0.5), A, free=(0, 2)),
    row("select_and_scatter_add", lambda x, t: jax.vjp(max_pool, x)[1](t), A, (4, 3, 5),
        free=(0, 2)),
    row("select_and_gather_add", lambda x, t: jax.jvp(max_pool, (x,), (t,)), A, A, free=(0, 2)),
    row("dynamic_slice", lambda x: lax.dynamic_slice(x, (0, jnp.int32(x[0, 0, 0]), 0), (4, 2, 5)),
        A, free=(0, 2)),
    row("dynamic_update_slice", lambda x, u: lax.dynamic_update_slice(
        x, u, (0, jnp.int32(x[0, 0, 0]), 0)), A, (4, 2, 5), free=(0, 2)),
    row("gather", lambda x: x[:, IDS], A, free=(0, 2)),
    row("gather in an order", lambda x: x[:, np.array([3, 0, 5, 1, 4, 2])], A, free=(0, 1, 2)),
    row("gather of a few", lambda x: x[:, np.array([3, 0])], A, free=(0, 1, 2)),
    row("gather of a run", lambda x: x[..., np.array([2, 3])], A, free=(0, 1, 2)),
    row("take", lambda x: jnp.take(x, IDS, 1), A, free=(0, 2)),
    row("gather that fills ones", lambda x: jnp.take(
        x, np.array([9, 0]), 1, mode="fill", fill_value=1.0), A, free=(0, 2)),
    row("take_along_axis", lambda x: jnp.take_along_axis(
        x, jnp.zeros((4, 2, 5), jnp.int32) + jnp.int32(x[:, :1] > 0), 1), A, free=(0, 2)),
    row("scatter", lambda x, u: x.at[:, IDS].set(u), A, (4, 3, 5), free=(0, 2)),
    row("scatter-add", lambda x, u: x.at[:, IDS].add(u), A, (4, 3, 5), free=(0, 2)),
    row("scatter-sub", lambda x, u: x.at[:, IDS].subtract(u), A, (4, 3, 5), free=(0, 2)),
    row("scatter-mul", lambda x, u: x.at[:, IDS].multiply(u), A, (4, 3, 5), free=(0, 2)),
    row("scatter-max", lambda x, u: x.at[:, IDS].max(u), A, (4, 3, 5), free=(0, 2)),
    row("scatter-min", lambda x, u: x.at[:, IDS].min(u), A, (4, 3, 5), free=(0, 2)),
    row("scatter of a function", lambda x: x.at[:, IDS].apply(jnp.cos), A, free=(0, 2)),
    row("scatter of a function of zero", lambda x: x.at[:, IDS].apply(jnp.sin), A, free=(0, 2)),
    row("gather and scatter by batch", lambda x, u: jnp.put_along_axis(
        x, jnp.zeros((4, 1, 5), jnp.int32) + jnp.int32(x[:, :1] > 0), u, 1, inplace=False),
        A, (4, 1, 5), free=()),
    row("dot_general", lambda x, y: jnp.einsum("abc,adc->abd", x, y), A, (4, 3, 5),
        free=(0, 1, 2)),
    row("ragged_dot_general", lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 3])),
        (4, 6), (2, 6, 5), free=(1,)),
    row("ragged_dot_general, contracted", lambda x, y: ragged(
        x, y, ((0,), (0,)), 0, []), (4, 6), (4, 5), free=(1,)),
    row("conv", conv, (4, 6, 8), (3, 8, 4), free=(0, 2)),
    row("conv of groups", functools.partial(conv, feature_group_count=4), (4, 6, 8), (3, 2, 12),
        free=(0, 2)),
    row("conv of batch groups", lambda x, w: lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), batch_group_count=4),
        (8, 6, 5), (3, 5, 12), free=(0, 2)),
    row("gradient of a conv of groups", functools.partial(kernel_gradient, groups=4),
        (4, 6, 8), (3, 2, 12), free=(0, 2)),
    row("gradient of a depthwise conv", functools.partial(kernel_gradient, groups=8),
        (4, 6, 8), (3, 1, 16), free=(0, 2)),
    row("cholesky", lambda m: lax.linalg.cholesky(spd(m)), M, free=(0, 2)),
    row("qr", jnp.linalg.qr, M, free=(0,)),
    row("svd", jnp.linalg.svd, M, free=(0,)),
    row("eigh", lambda m: jnp.linalg.eigh(m), M, free=(0,)),
    row("lu", lambda m: lax.linalg.lu(spd(m)), M, free=(0, 2)),
    row("householder_product", lambda m: lax.linalg.householder_product(m, m[:, 0]), M, free=(0,)),
    row("triangular_solve", lambda b, m: lax.linalg.triangular_solve(
        spd(m), b, left_side=True), (3, 4, 6), M, free=(0, 2)),
    row("triangular_solve from the right", lambda b, m: lax.linalg.triangular_solve(
        spd(m), b), (3, 6, 4), M, free=(0, 1)),
    row("tridiagonal_solve", lambda b, d: lax.linalg.tridiagonal_solve(
        d, d + 5, d, b), (3, 4, 6), (3, 4), free=(0,)),
    row("fft", lambda x: jnp.fft.fft(x), A, free=(0, 1)),
    row("rfft2", lambda x: jnp.fft.rfft2(x), A, free=(0,)),
    row("irfft", lambda x: jnp.fft.irfft(x.astype(jnp.complex64)), A, free=(0, 1)),
    row("psum of a vmap", lambda x: jax.vmap(lambda r: lax.psum(r, "i"), axis_name="i")(x), A,
        free=(0, 1, 2)),
    row("pmax of a vmap", lambda x: jax.vmap(lambda r: lax.pmax(r, "i"), axis_name="i")(x), A,
        free=(0, 1, 2)),
    row("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y)), A, M,
        free=(0, 1, 2)),
    row("debug_print", lambda x: (jax.debug.print("{}", x), x)[1], A, free=(0, 1, 2)),
]  # fmt: skip


def is_held(leaf):
    """Whether the masked model may not lose units of a dimension."""
    return infer.blocked(leaf, infer.MASKED) is not None


@pytest.mark.parametrize(("fn", "shapes", "free"), ROWS)
def test_free_axes(fn, shapes, free):
    ran = program(fn, [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])
    opaque = [s.name for s in ran.steps if registry.rule_of(s) is registry.OPAQUE]
    assert not opaque
    first = ran.inputs[0].axes
    found = [k for k, a in enumerate(first) if not all(map(is_held, axes.leaves(a)))]
    assert tuple(found) == free


@pytest.mark.slow
@pytest.mark.parametrize(("fn", "shapes", "free"), ROWS)
def test_what_is_called_zero_is_zero(fn, shapes, free):
    rng = np.random.default_rng(zlib.crc32(str(shapes).encode()))
    for _ in range(3):
        for step, _xs, ys, _known, claimed in walk(fn, [draw(s, rng) for s in shapes]):
            for claim, y in zip(claimed, ys, strict=True):
                assert claims_hold(claim, y), f"{step.name} calls too much zero"


@pytest.mark.slow
@pytest.mark.parametrize(("fn", "shapes", "free"), ROWS)
def test_restricted_operands_give_the_restricted_result(fn, shapes, free):
    rng = np.random.default_rng(5)
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    for step, xs, ys, known, _ in walk(fn, arrays):
        kept = {
            leaf: np.sort(rng.permutation(leaf.size)[: max(1, leaf.size // 2)])
            for leaf in free_leaves(step, known)
        }
        view = Restricted(kept)
        small = [view.take(x, v.axes) for x, v in zip(xs, step.ins, strict=True)]
        got = registry.rule_of(step).evaluate(view, step, small)
        for y, value, result in zip(ys, step.outs, got, strict=True):
            expected = concrete(view.take(y, value.axes))
            assert result.shape == view.shape(value.axes)
            if expected is not None and step.name != "empty":
                np.testing.assert_allclose(result, expected, rtol=2e-4, atol=2e-5)
