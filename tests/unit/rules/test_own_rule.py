"""Rules of a user's own: from opaque to exact, with public names only."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jaxprune as jp
from jaxprune.rules import registry

X = jax.random.normal(jax.random.key(0), (4, 5))


@pytest.fixture(autouse=True)
def table():
    """Each test starts from the table as jaxprune has it."""
    before = dict(registry.RULES)
    yield
    registry.RULES.clear()
    registry.RULES.update(before)


def primitive(name, impl):
    """A primitive as a user makes it: computed, typed and lowered by a function."""
    p = Primitive(name)
    p.multiple_results = True
    listed = lambda *xs, **kw: [impl(*xs, **kw)]  # noqa: E731
    p.def_impl(listed)

    def types(*avals, **kw):
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        return [a.update(shape=s.shape, dtype=s.dtype) for a, s in zip(avals, made(*shapes, **kw))]

    def made(*shapes, **kw):
        return jax.eval_shape(lambda *xs: listed(*xs, **kw), *shapes)

    p.def_abstract_eval(types)
    mlir.register_lowering(p, mlir.lower_fun(listed, multiple_results=True))
    return p


@functools.cache  # A certificate checks against params that someone holds.
def draw(**shapes):
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def half(fn, params, *args):
    """The compact function without every other unit of all that can be pruned."""
    structure = jp.infer_structure(fn, params, *args)
    free = {n: np.arange(d.size) % 2 == 0 for n, d in structure.dims.items() if not d.frozen}
    masks = structure.masks(free)
    return jp.compact(fn, params, masks, *args), jp.apply_masks(params, masks), free


def same_gradients(fn, small, masked, *args):
    """In float64, where nothing hides in rounding."""

    def loss(f):
        return lambda p: jnp.sum(f(p, *wide(args)) ** 2)

    def wide(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)

    with jax.enable_x64(True):
        wanted = small.restrict(jax.grad(loss(fn))(wide(masked)))
        got = jax.grad(loss(small.fn))(wide(small.params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-9), got, wanted)


# ------------------------------------------------------------ a fused bias + gelu with own gradient

bias_gelu_p = primitive("bias_gelu", lambda x, b: jax.nn.gelu(x + b))
bias_gelu_grad_p = primitive(
    "bias_gelu_grad", lambda x, b, g: jax.vjp(lambda y: jax.nn.gelu(y), x + b)[1](g)[0]
)


@jax.custom_vjp
def bias_gelu(x, b):
    return bias_gelu_p.bind(x, b)[0]


def backward(saved, g):
    (dy,) = bias_gelu_grad_p.bind(*saved, g)
    return dy, dy.sum(tuple(range(dy.ndim - 1)))


bias_gelu.defvjp(lambda x, b: (bias_gelu(x, b), (x, b)), backward)


def mlp(params, x):
    return bias_gelu(x @ params["up"], params["bias"]) @ params["down"]


MLP = {"up": (5, 8), "bias": (8,), "down": (8, 3)}


def test_without_a_rule_the_primitive_is_opaque_and_named():
    structure = jp.infer_structure(mlp, draw(**MLP), X)
    assert not [d for d in structure.dims.values() if not d.frozen]
    assert "bias_gelu at test_own_rule.py" in structure.dims["up:1"].frozen
    assert "no rule for this primitive" in structure.dims["up:1"].frozen


@pytest.mark.slow
def test_with_a_rule_it_compacts_exactly_and_so_do_its_gradients():
    jp.rules.register(bias_gelu_p, jp.rules.elementwise(zero_if="all"))
    jp.rules.register("bias_gelu_grad", jp.rules.elementwise())
    params = draw(**MLP)
    small, masked, free = half(mlp, params, X)
    assert list(free) == ["up:1"]
    assert small.certificate.exact and small.certificate.check() < 1e-9
    assert {n: a.shape for n, a in small.params.items()} == {
        "up": (5, 4), "bias": (4,), "down": (4, 3),
    }  # fmt: skip
    same_gradients(mlp, small, masked, X)


@pytest.mark.slow
def test_what_is_zero_lets_a_unit_go_whose_consumer_is_not_masked():
    jp.rules.register(bias_gelu_p, jp.rules.elementwise(zero_if="all"))
    jp.rules.register("bias_gelu_grad", jp.rules.elementwise())
    params, kept = draw(**MLP), jnp.arange(8) < 5
    masks = {"up": kept[None], "bias": kept, "down": jnp.asarray(True)}
    small = jp.compact(mlp, params, masks, X)
    (entry,) = small.certificate.entries
    assert (entry.removed, entry.status) == (3, "exact")
    assert small.certificate.check() < 1e-9


# ------------------------------------------------------------ other forms of rules

scaled_p = primitive("own_scaled_matmul", lambda x, w, *, scale: scale * (x @ w))
dense_p = primitive("own_dense", lambda x, w, b: jnp.tanh(x @ w + b))
norm_p = primitive("own_norm", lambda x, s: x / (1 + jnp.square(x).mean(-1, keepdims=True)) * s)
swiglu_p = primitive("own_swiglu", lambda g, u: jax.nn.silu(g) * u)
tanh_p = primitive("own_tanh", jnp.tanh)

attention_p = primitive(
    "own_attention",
    lambda q, k, v: jnp.einsum(
        "bhqk,bkhv->bqhv", jax.nn.softmax(0.3 * jnp.einsum("bqhd,bkhd->bhqk", q, k)), v
    ),
)


def attend(p, x):
    q, k, v = (jnp.einsum("ti,ihd->thd", x, p[n])[None] for n in "qkv")
    return jnp.einsum("bqhv,hvo->bqo", attention_p.bind(q, k, v)[0], p["o"])


CASES = {
    # name: (register, fn, parameters, prunable dimensions)
    "a product is a sum of products": (
        lambda: jp.rules.register(
            scaled_p, jp.rules.named_axes("...i, io -> ...o", sums="i", linear=True)
        ),
        lambda p, x: scaled_p.bind(jnp.tanh(x @ p["up"]), p["down"], scale=0.3)[0],
        {"up": (5, 8), "down": (8, 3)},
        {"up:1"},
    ),
    "a fused layer": (
        lambda: jp.rules.register(
            dense_p, jp.rules.named_axes("...i, io, o -> ...o", sums="i", zeros="o")
        ),
        lambda p, x: dense_p.bind(dense_p.bind(x, p["a"], p["b"])[0], p["c"], p["d"])[0] @ p["e"],
        {"a": (5, 8), "b": (8,), "c": (8, 6), "d": (6,), "e": (6, 2)},
        {"a:1", "c:1"},
    ),
    "a norm keeps what it averages over": (
        lambda: jp.rules.register(norm_p, jp.rules.named_axes("...d, d -> ...d", frozen="d")),
        lambda p, x: norm_p.bind(x @ p["a"], p["s"])[0] @ p["b"],
        {"a": (5, 8), "s": (8,), "b": (8, 2)},
        set(),
    ),
    "attention passes heads, and sums over their size": (
        lambda: jp.rules.register(
            attention_p,
            jp.rules.named_axes("bqhd, bkhd, bkhv -> bqhv", sums="d", frozen="k"),
        ),
        attend,
        {"q": (5, 4, 6), "k": (5, 4, 6), "v": (5, 4, 2), "o": (4, 2, 3)},
        {"q:1", "q:2", "v:2"},
    ),
    "a gated unit": (
        lambda: jp.rules.register(swiglu_p, jp.rules.elementwise(zero_if="any")),
        lambda p, x: swiglu_p.bind(x @ p["g"], x @ p["u"])[0] @ p["d"],
        {"g": (5, 8), "u": (5, 8), "d": (8, 2)},
        {"g:1"},
    ),
    "like another": (
        lambda: jp.rules.register(tanh_p, like="tanh"),
        lambda p, x: tanh_p.bind(x @ p["up"])[0] @ p["down"],
        {"up": (5, 8), "down": (8, 3)},
        {"up:1"},
    ),
    "by hand": (
        lambda: jp.rules.register(
            tanh_p, jp.rules.Rule(couple=lambda step: [step.ins[0].axes])
        ),
        lambda p, x: tanh_p.bind(x @ p["up"])[0] @ p["down"],
        {"up": (5, 8), "down": (8, 3)},
        {"up:1"},
    ),
    "evaluated by a function": (
        lambda: jp.rules.register(
            scaled_p,
            jp.rules.named_axes("...i, io -> ...o", sums="i"),
            evaluate=lambda x, w, *, scale: scale * (x @ w),
        ),
        lambda p, x: scaled_p.bind(jnp.tanh(x @ p["up"]), p["down"], scale=0.3)[0],
        {"up": (5, 8), "down": (8, 3)},
        {"up:1"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_forms_of_rules(name):
    register, fn, shapes, prunable = CASES[name]
    register()
    small, _, free = half(fn, draw(**shapes), X)
    assert set(free) == prunable
    assert small.certificate.exact and small.certificate.check() < 1e-9


def test_a_linear_rule_carries_what_removed_units_still_give():
    """cosh of a removed unit is 1: that part of the sum is evaluated apart and added."""
    CASES["a product is a sum of products"][0]()

    def fn(params, x):
        h = jnp.cosh(x @ params["up"])
        return scaled_p.bind(h, h.T, scale=0.3)[0]

    masks = {"up": (jnp.arange(8) < 3)[None]}
    small = jp.compact(fn, draw(up=(5, 8)), masks, X)
    (entry,) = small.certificate.entries
    assert (entry.removed, entry.status) == (5, "corrected")
    assert small.certificate.check() < 1e-9


@pytest.mark.parametrize("linear", [True, False])
def test_zero_factors_are_known_to_give_zeros(linear):
    """Only a sum of products is sure to be zero where its kernel is."""
    rule = jp.rules.named_axes("...i, io -> ...o", sums="i", linear=linear)
    jp.rules.register(scaled_p, rule)
    fn = lambda p, x: jax.nn.relu(scaled_p.bind(x, p["up"], scale=0.3)[0]) @ p["down"]  # noqa: E731
    masks = {"up": (jnp.arange(8) < 3)[None], "down": jnp.asarray(True)}
    small = jp.compact(fn, draw(up=(5, 8), down=(8, 3)), masks, X)
    (entry,) = small.certificate.entries
    assert (entry.status == "exact") == linear
    assert small.certificate.check() < 1e-9


def test_a_sum_over_leading_axes_is_not_guessed():
    """One result lacks the letter n, and the rule doesn't say why."""
    jp.rules.register("own_pair", jp.rules.named_axes("nf, f -> nf, f"))
    p = Primitive("own_pair")
    p.multiple_results = True
    p.def_abstract_eval(lambda x, b: [x, b])
    fn = lambda p_, x: p.bind(p_["rows"].T @ x, p_["b"])[0]  # noqa: E731
    structure = jp.infer_structure(fn, draw(rows=(4, 6), b=(5,)), X)
    assert "doesn't say how axis 'n' is reduced" in structure.dims["rows:1"].frozen


def dense(params, x):
    return dense_p.bind(x, params["w"], params["b"])[0]


MISFITS = {
    "...i, io -> ...o": "3 arrays of shapes .* where the rule names 2",
    "i, io, o -> o": r"shape \(4, 5\) where the rule names 'i'",
    "...i, oi, o -> ...o": "axis 'i' has sizes 5 and 8",
    "...i, io, o -> ...io": "axis 'i' has sizes 5 and 4",
    "...i, ...o, o -> ...o": r"leading axes .* do not broadcast to \(4,\)",
}


@pytest.mark.parametrize("subscripts", MISFITS)
def test_an_equation_that_its_rule_does_not_fit_stays_opaque(subscripts):
    jp.rules.register(dense_p, jp.rules.named_axes(subscripts))
    structure = jp.infer_structure(dense, draw(w=(5, 8), b=(8,)), X)
    assert re.search(MISFITS[subscripts], structure.dims["w:0"].frozen)
    assert "no rule for this primitive here" in structure.dims["w:0"].frozen


def test_entries_that_do_not_broadcast_stay_opaque():
    jp.rules.register(dense_p, jp.rules.elementwise(zero_if="any"))
    params = draw(w=(5, 8), b=(8,))
    structure = jp.infer_structure(dense, params, X)
    assert "do not broadcast to the results" in structure.dims["w:1"].frozen
    masks = {"w": jnp.zeros((5, 8), bool), "b": jnp.asarray(True)}
    small = jp.compact(dense, params, masks, X)  # nor is its result known to be zero
    assert small.certificate.check() < 1e-9


@pytest.mark.slow
def test_a_primitive_of_ones_own_inside_a_loop_and_a_branch():
    jp.rules.register(bias_gelu_p, jp.rules.elementwise(zero_if="all"))
    jp.rules.register(bias_gelu_grad_p, jp.rules.elementwise())

    def layer(x, p):
        deep = jax.lax.cond(p["bias"].sum() > 0, bias_gelu, bias_gelu, x @ p["up"], p["bias"])
        return x + deep @ p["down"], None

    fn = lambda params, x: jax.lax.scan(layer, x, params)[0]  # noqa: E731
    params = draw(up=(3, 5, 8), bias=(3, 8), down=(3, 8, 5))
    small, masked, free = half(fn, params, X)
    assert list(free) == ["bias:1", "bias:0"] and small.certificate.check() < 1e-9
    assert small.params["up"].shape[-1] == 4
    same_gradients(fn, small, masked, X)


# ------------------------------------------------------------ kernels


def kernel(x_ref, b_ref, o_ref, *, scale=1.0):
    o_ref[...] = scale * jnp.tanh(x_ref[...] + b_ref[...])


def bias_tanh(x, b, name="bias_tanh", **options):
    body = functools.partial(kernel, **options)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True, name=name)(x, b)


def pallas_mlp(params, x, **options):
    return bias_tanh(x @ params["up"], params["bias"], **options) @ params["down"]


def register_kernel(name="bias_tanh", **options):
    rule = jp.rules.elementwise(zero_if="all")
    evaluate = functools.partial(bias_tanh, name=name, **options)
    jp.rules.register("pallas_call", rule, kernel=name or "kernel", evaluate=evaluate)


def frozen(fn, params, *args):
    return jp.infer_structure(fn, params, *args).dims["up:1"].frozen


def test_a_pallas_kernel_without_a_rule_is_named():
    assert "(kernel 'bias_tanh')" in frozen(pallas_mlp, draw(**MLP), X)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bias_tanh", None])
def test_a_pallas_kernel_compacts_exactly(name):
    """Without a name of its own a kernel goes by its function's."""
    register_kernel(name)
    fn = functools.partial(pallas_mlp, name=name)
    small, masked, free = half(fn, draw(**MLP), X)
    assert list(free) == ["up:1"] and small.certificate.exact
    np.testing.assert_allclose(small.fn(small.params, X), fn(masked, X), 1e-5, 1e-6)
    np.testing.assert_allclose(
        jax.jit(small.fn)(small.params, X[:2]), fn(masked, X[:2]), 1e-5, 1e-6
    )


def test_other_kernels_of_pallas_stay_opaque():
    register_kernel()
    assert "(kernel 'other')" in frozen(functools.partial(pallas_mlp, name="other"), draw(**MLP), X)


def test_a_kernel_built_with_other_options_is_not_taken_for_the_registered_one():
    register_kernel(scale=1.0)
    why = frozen(functools.partial(pallas_mlp, scale=2.0), draw(**MLP), X)
    assert "evaluate makes another kernel under the name 'bias_tanh'" in why


def test_the_derivative_of_a_kernel_has_its_name_but_not_its_rule():
    register_kernel()

    def fn(params, x):
        h = x @ params["up"]
        return jax.jvp(lambda h: bias_tanh(h, params["bias"]), (h,), (h,))[1] @ params["down"]

    assert "evaluate fails for its operands" in frozen(fn, draw(**MLP), X)


def test_an_evaluate_of_other_results_leaves_the_primitive_opaque():
    jp.rules.register(tanh_p, like="tanh", evaluate=lambda h: h[0])
    fn = lambda p, x: tanh_p.bind(x @ p["up"])[0]  # noqa: E731
    assert "evaluate gives [((8,)" in frozen(fn, draw(up=(5, 8)), X)


# forward and backward kernels, hidden in a custom_vjp


@jax.custom_vjp
def square_kernel(x):
    return _call(lambda x_ref, o_ref: o_ref.__setitem__(..., x_ref[...] ** 2), "square", x)


def square_gradient(x, g):
    def body(x_ref, g_ref, o_ref):
        o_ref[...] = 2 * x_ref[...] * g_ref[...]

    return _call(body, "square_gradient", x, g)


def _call(body, name, x, *more):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True, name=name)(x, *more)


square_kernel.defvjp(lambda x: (square_kernel(x), x), lambda x, g: (square_gradient(x, g),))


@pytest.mark.slow
def test_kernels_inside_a_custom_vjp_keep_their_gradients():
    fn = lambda p, x: square_kernel(x @ p["up"]) @ p["down"]  # noqa: E731
    params = draw(up=(5, 8), down=(8, 3))
    jp.rules.register(
        "pallas_call", jp.rules.elementwise(zero_if="all"), kernel="square", evaluate=square_kernel
    )
    assert "(kernel 'square_gradient')" in frozen(fn, params, X)
    jp.rules.register(
        "pallas_call",
        jp.rules.elementwise(zero_if="any"),
        kernel="square_gradient",
        evaluate=square_gradient,
    )
    small, masked, _ = half(fn, params, X)
    assert small.certificate.exact
    assert small.params["up"].shape == (5, 4)
    same_gradients(fn, small, masked, X)


def foreign(h, eps):
    return jax.ffi.ffi_call("own_target", jax.ShapeDtypeStruct(h.shape, h.dtype))(h, eps=eps)


def test_a_foreign_function_goes_by_its_target():
    jp.rules.register(
        "ffi_call",
        jp.rules.elementwise(),
        kernel="own_target",
        evaluate=lambda h: foreign(h, np.float32(0.5)),
    )
    params = draw(up=(5, 8), down=(8, 3))
    assert frozen(lambda p, x: foreign(x @ p["up"], np.float32(0.5)) @ p["down"], params, X) is None
    why = frozen(lambda p, x: foreign(x @ p["up"], np.float32(0.25)) @ p["down"], params, X)
    assert "evaluate makes another kernel" in why


# ------------------------------------------------------------ clear errors

RULE = jp.rules.elementwise()
ERRORS = {
    "no primitive": (lambda: jp.rules.register(3, RULE), TypeError, "or the name of one, got int"),
    "empty name": (lambda: jp.rules.register("", RULE), ValueError, "got an empty string"),
    "no rule": (lambda: jp.rules.register("mine"), ValueError, "either a rule, .* or like="),
    "two rules": (
        lambda: jp.rules.register("mine", RULE, like="exp"),
        ValueError,
        "either a rule, .* or like=",
    ),
    "a factory": (
        lambda: jp.rules.register("mine", jp.rules.elementwise),
        TypeError,
        r"wants a rule, jp.rules.elementwise\(\), .* got function",
    ),
    "there already": (
        lambda: jp.rules.register("exp", RULE),
        ValueError,
        "exp has a rule already; to overrule it pass replace=True",
    ),
    "like what": (
        lambda: jp.rules.register("mine", like="expp"),
        ValueError,
        r"like='expp' has no rule to take over; near names: \['exp'",
    ),
    "like a function": (
        lambda: jp.rules.register("mine", like=jnp.exp),
        TypeError,
        "like wants the name of a primitive",
    ),
    "like a loop": (
        lambda: jp.rules.register("mine", like="scan"),
        ValueError,
        "like='scan' holds programs of its own",
    ),
    "evaluate": (
        lambda: jp.rules.register("mine", RULE, evaluate=3),
        TypeError,
        "evaluate wants a function of the operands, got int",
    ),
    "any kernel": (
        lambda: jp.rules.register("pallas_call", RULE),
        ValueError,
        "pallas_call runs any kernel; say which one",
    ),
    "kernel's type": (
        lambda: jp.rules.register("pallas_call", RULE, kernel=kernel),
        TypeError,
        "kernel wants the kernel's name, got function",
    ),
    "kernel of what": (
        lambda: jp.rules.register("exp", RULE, kernel="k"),
        ValueError,
        r"kernel= is for \['ffi_call', 'pallas_call'\]; exp has none",
    ),
    "kernel's sizes": (
        lambda: jp.rules.register("pallas_call", RULE, kernel="k"),
        ValueError,
        "the sizes of a kernel are fixed in its pallas_call; pass evaluate=",
    ),
    "zero_if": (
        lambda: jp.rules.elementwise(zero_if="both"),
        ValueError,
        "wants zero_if 'all', 'any' or None, got 'both'",
    ),
    "no text": (lambda: jp.rules.named_axes(3), TypeError, "named_axes wants text"),
    "no arrow": (lambda: jp.rules.named_axes("ab, c"), ValueError, "can't read 'ab, c'"),
    "a letter twice": (lambda: jp.rules.named_axes("aa -> a"), ValueError, "can't read"),
    "dots at the end": (lambda: jp.rules.named_axes("a... -> a"), ValueError, "can't read"),
    "sums of a result": (
        lambda: jp.rules.named_axes("ni, io -> no", sums="o"),
        ValueError,
        r"sums='o' does not fit 'ni, io -> no'; possible are \['i'\]",
    ),
    "frozen nothing": (
        lambda: jp.rules.named_axes("ni, io -> no", frozen="z"),
        ValueError,
        "frozen='z' does not fit",
    ),
    "zeros of what is lost": (
        lambda: jp.rules.named_axes("ni, io -> no", zeros="i"),
        ValueError,
        "zeros='i' does not fit",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_clear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_rule_may_be_overruled_when_it_is_said():
    jp.rules.register(tanh_p, jp.rules.Rule(couple=registry.couple_opaque))
    fn = lambda p, x: tanh_p.bind(x @ p["up"])[0] @ p["down"]  # noqa: E731
    params = draw(up=(5, 8), down=(8, 3))
    assert frozen(fn, params, X)
    with pytest.raises(ValueError, match="own_tanh has a rule already"):
        jp.rules.register(tanh_p, like="tanh")
    jp.rules.register(tanh_p, like="tanh", replace=True)
    assert frozen(fn, params, X) is None


def test_a_rule_by_hand_must_give_the_axes_of_its_results():
    jp.rules.register(tanh_p, jp.rules.Rule(couple=lambda step: [step.ins[0].axes[:1]]))
    with pytest.raises(
        ValueError, match=r"own_tanh gives axes of sizes \[\(4,\)\] .* \[\(4, 8\)\]"
    ):
        jp.infer_structure(lambda p, x: tanh_p.bind(x @ p["up"])[0], draw(up=(5, 8)), X)


def test_a_rule_taken_over_must_find_its_parameters():
    jp.rules.register(scaled_p, like="dot_general")
    fn = lambda p, x: scaled_p.bind(x, p["up"], scale=0.3)[0]  # noqa: E731
    with pytest.raises(ValueError, match="rule of dot_general does not fit own_scaled_matmul at"):
        jp.infer_structure(fn, draw(up=(5, 8)), X)
