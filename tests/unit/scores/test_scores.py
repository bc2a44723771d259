"""Scores over every kind of tree, and what they say when evidence is missing."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune._leaf import is_float
from jaxprune.scores.channels import is_norm_scale
from jaxprune.scores.evidence import split
from tests.helpers.oracles import TREES

KEY = jax.random.key(1)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SCORES = {
    "magnitude": jp.magnitude,
    "l2": jp.scores.l2,
    "rms_normalized": jp.scores.rms_normalized,
    "lamp": jp.scores.lamp,
    "random": functools.partial(jp.random, key=KEY),
    "smallest": jp.scores.smallest,
    "inverted": jp.scores.inverted(jp.magnitude),
    "saliency": jp.saliency,
    "snip": jp.scores.snip,
    "taylor": jp.scores.taylor,
    "movement": jp.scores.movement,
    "grasp": jp.scores.grasp,
    "obd": jp.scores.obd,
    "fisher": jp.scores.fisher,
    "adam_fisher": jp.scores.adam_fisher,
    "woodfisher": jp.scores.woodfisher,
    "synflow": functools.partial(jp.scores.synflow, fn=lambda p: squares(p)),
    "apoz": jp.scores.apoz,
    "mean_activation": jp.scores.mean_activation,
    "ria": jp.scores.ria,
    "wanda": jp.scores.wanda,
    "flap": jp.scores.flap,
    "activation_energy": jp.scores.activation_energy,
    "fpgm": jp.scores.fpgm,
    "batch_norm_scale": functools.partial(
        jp.scores.batch_norm_scale, where=lambda p, x: is_float(x)
    ),
}
OF_BLOCKS = {"block_divergence", "block_influence", "block_loss"}
OF_UNITS = {"taylor_units", "loss_units"}
NO_SCORES = {"activity", "in_rounds", "experts", *OF_UNITS, *OF_BLOCKS}


def squares(params):
    return sum(jnp.sum(jnp.abs(w) ** 2) for w in jax.tree.leaves(params) if is_float(w))


def gradients(params):
    return jax.tree.map(lambda w: w * 2 if is_float(w) else w, params)


def all_evidence(params):
    grad = gradients(params)
    inputs = jax.tree.map(lambda w: jnp.ones(w.shape) if is_float(w) else w, params)
    outputs = jax.tree.map(lambda w: jnp.ones(w.shape[-1]) / 4 if is_float(w) else w, params)
    return {
        **dict.fromkeys(("grad", "hvp", "hessian", "fisher", "nu"), grad),
        **dict.fromkeys(("zeros", "means"), outputs),
        "grads": jax.tree.map(lambda g: jnp.stack([g, -g, g / 2]) if is_float(g) else g, grad),
        "input_norms": inputs,
        "stats": jp.typing.Stats(*[inputs] * 5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", SCORES)
def test_any_tree_and_unknown_evidence(name, tree):
    """Traced, not computed."""
    floats, join = split(TREES[tree])

    def check(floats):
        params = join(floats)
        scores = SCORES[name](params, **all_evidence(params), step=jnp.int32(3), foreign="ignored")
        assert jax.tree.structure(scores) == jax.tree.structure(params)
        for w, score in zip(jax.tree.leaves(params), jax.tree.leaves(scores), strict=True):
            if is_float(w):
                assert score.shape == w.shape and jnp.issubdtype(score.dtype, jnp.floating)
            else:
                assert score is w  # counters, random keys and functions pass through
        return len(floats)

    assert jax.eval_shape(check, floats).shape == ()


def every_score(params, evidence):
    return {name: score(params, **evidence) for name, score in SCORES.items()}


compiled_scores = jit(every_score)  # all in one program, which compiles once for each shape


@pytest.mark.slow
def test_half_precision_gives_the_scores_of_the_same_numbers_in_float32():
    """Nothing is accumulated in bfloat16: 4096 equal terms would stop adding up at 256."""
    half = {"w": jax.random.normal(KEY, (1024, 4)).astype(jnp.bfloat16)}
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    got, wanted = (compiled_scores(p, all_evidence(wide)) for p in (half, wide))
    for name in SCORES:
        x, y = (np.asarray(scores[name]["w"], np.float32) for scores in (got, wanted))
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_vmap_scores_each_of_an_ensemble():
    many = {"w": jax.random.normal(KEY, (2, 1024, 4))}
    together = jit(jax.vmap(lambda p: every_score(p, all_evidence(p))))(many)
    one = {"w": many["w"][1]}
    alone = compiled_scores(one, all_evidence(one))
    for name in SCORES:
        x, y = together[name]["w"][1], alone[name]["w"]
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_strict_promotion_and_64_bit_types(dtype, x64):
    params = {"a": jnp.arange(12.0, dtype=dtype).reshape(3, 4), "b": jnp.ones(4, dtype)}
    with jax.numpy_dtype_promotion("strict"):
        scores = jax.eval_shape(lambda p: every_score(p, all_evidence(p)), params)
    for name in set(SCORES) - {"random"}:
        assert scores[name]["a"].dtype == jnp.float64 or dtype == jnp.bfloat16, name


@pytest.mark.slow
def test_nan_is_never_hidden():
    params = {"w": jnp.array([[1.0, jnp.nan], [2.0, 3.0]])}
    every = compiled_scores(params, all_evidence({"w": jnp.ones((2, 2))}))
    for name in set(SCORES) - {"random", "apoz", "mean_activation", "activation_energy"}:
        assert jnp.isnan(every[name]["w"][0, 1]), name
        with pytest.raises(ValueError, match="hold NaN"):
            jp.unstructured()(every[name], 0.5)


def test_every_public_score_is_tested_here():
    public = {n for n, f in vars(jp.scores).items() if inspect.isfunction(f) and n[0] != "_"}
    assert public == set(SCORES) | NO_SCORES


def test_values_against_the_formula():
    w, g = np.array([-2.0, 0.5, 3.0]), np.array([1.0, -4.0, 0.0])
    params, grad = {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)}
    np.testing.assert_array_equal(jp.magnitude(params)["w"], np.abs(w))
    np.testing.assert_array_equal(jp.scores.l2(params)["w"], w**2)
    np.testing.assert_array_equal(jp.saliency(params, grad=grad)["w"], np.abs(w * g))
    np.testing.assert_array_equal(jp.scores.taylor(params, grad=grad)["w"], w * g)


@pytest.mark.slow
def test_taylor_is_the_first_order_change_of_the_loss_complex_weights_too():
    def loss(p):
        return jnp.sum(jnp.abs(p["w"] - 1) ** 2)

    for w in (jnp.array([2.0, -1.0]), jnp.array([1 + 2j, -1j])):
        params, small = {"w": w}, 1e-3
        score = jp.scores.taylor(params, grad=jax.grad(loss)(params))["w"]
        shrunk = [loss({"w": w.at[i].multiply(1 - small)}) for i in range(2)]
        change = (loss(params) - jnp.stack(shrunk)) / small
        np.testing.assert_allclose(score, change, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_products_of_half_precision_do_not_underflow(dtype):
    params = {"w": jnp.array([1e-3, 2e-3], dtype)}
    scores = jp.saliency(params, grad={"w": jnp.full(2, 1e-6, dtype)})["w"]
    assert scores.dtype == jnp.float32 and 0 < scores[0] < scores[1]
    assert jp.scores.l2({"w": jnp.array([1e-4], jnp.float16)})["w"][0] > 0


@pytest.mark.slow
def test_random_depends_on_key_step_and_leaf_alone():
    params = {"a": jnp.ones((20, 5)), "b": jnp.ones((20, 5), jnp.bfloat16)}
    first = jp.random(params, key=KEY)
    np.testing.assert_array_equal(first["a"], jp.random(params, key=KEY)["a"])
    assert not jnp.allclose(first["a"], first["b"])
    for other in (
        jp.random(params, key=jax.random.key(2)),
        jp.random(params, key=KEY, step=0),
        jax.jit(lambda s: jp.random(params, key=KEY, step=s))(1),
    ):
        assert not jnp.allclose(first["a"], other["a"])
    assert 0.4 < first["a"].mean() < 0.6


@pytest.mark.slow
def test_random_prunes_inside_optax():
    params = {"w": jnp.ones((10, 10))}
    tx = jp.prune(optax.sgd(0.1), functools.partial(jp.random, key=KEY), 0.7)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jnp.sum(optax.apply_updates(params, updates)["w"] != 0) == 30
    assert optax.tree_utils.tree_get(state, "masks")["w"].sum() == 30


def test_batch_norm_scale_finds_the_norms_of_each_framework():
    trees = (TREES["nnx"], jp.scores.batch_norm_scale(TREES["nnx"]))
    params, flat = (
        {jp.typing.path_str(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in trees
    )
    np.testing.assert_array_equal(flat["norm/scale/value"], abs(params["norm/scale/value"]))
    assert flat["norm/scale/value"].all() and flat["up/kernel/value"].sum() == 0
    norm = eqx.nn.LayerNorm(3)
    params = {"norm": norm, "linear": eqx.nn.Linear(3, 2, key=KEY)}
    scores = jp.scores.batch_norm_scale(params)
    assert scores["norm"].weight.sum() == 3
    assert scores["norm"].bias.sum() == scores["linear"].weight.sum() == 0
    assert is_norm_scale("bn/gamma", jnp.ones(3)) and not is_norm_scale("bn/beta", jnp.ones(3))
    mine = jp.scores.batch_norm_scale({"g": -jnp.ones(2)}, where=lambda path, leaf: path == "g")
    np.testing.assert_array_equal(mine["g"], [1, 1])


@pytest.mark.slow
def test_batch_norm_scale_ranks_the_channels_of_a_structure():
    params = {
        "conv": jax.random.normal(KEY, (3, 8)),
        "norm": {"scale": jnp.arange(8.0) - 4},
        "head": jax.random.normal(KEY, (8, 2)),
    }
    fn = lambda p, x: jnp.tanh((x @ p["conv"]) * p["norm"]["scale"]) @ p["head"]  # noqa: E731
    structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
    masks = jp.structured(structure, reduce=jp.reduce.sum)(jp.scores.batch_norm_scale(params), 0.5)
    (kept,) = (k for n, k in structure.keep(masks).items() if not structure.dims[n].frozen)
    np.testing.assert_array_equal(kept, [1, 1, 1, 0, 0, 0, 0, 1])  # |-4|, |-3|, |-2|, |3|


W = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


NEEDED = {
    "saliency": r"grad=; write grad=jax.grad\(loss\)\(params\)",
    "snip": r"grad=; write grad=jax.grad\(loss\)\(params\)",
    "taylor": r"grad=; write grad=jax.grad\(loss\)\(params\)",
    "movement": r"grad=; write grad=jax.grad\(loss\)\(params\)",
    "grasp": r"hvp=; write hvp=jp.scores.evidence.gradient_flow\(loss, params, batches\)",
    "obd": r"hessian=; write hessian=jp.scores.evidence.hessian_diagonal\(loss, params, batches",
    "fisher": r"fisher=; write fisher=jp.scores.evidence.fisher_diagonal\(loss, params, batches\)",
    "adam_fisher": r'nu=; write nu=optax.tree_utils.tree_get\(opt_state, "nu"\)',
    "woodfisher": r"grads=; write grads=jp.scores.evidence.example_gradients\(loss, params",
    "synflow": r"fn=; write functools.partial\(jp.scores.synflow, fn=model.apply, args=\(x,\)\)",
    "apoz": r"zeros=; write zeros=jp.scores.activity\(fn, params, batches\).zeros",
    "mean_activation": r"means=; write means=jp.scores.activity\(fn, params, batches\).means",
    "wanda": r"input_norms=; write input_norms=jp.calibrate\(fn, params, batches\).norms",
}


@pytest.mark.parametrize("name", NEEDED)
def test_missing_evidence_says_what_to_pass_and_how_to_compute_it(name):
    with pytest.raises(TypeError, match=f"{name} needs the evidence {NEEDED[name]}"):
        getattr(jp.scores, name)(W)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jp.random(W),
            TypeError,
            r"random needs the evidence key=; write functools.partial\(jp.random, key=",
        ),
        (
            lambda: jp.scores.movement(W, grad=W, previous={"layer": W}),
            ValueError,
            "tree of previous does not match .*; pass previous=the last step's scores",
        ),
        (
            lambda: jp.scores.woodfisher(W, grads=W),
            ValueError,
            r"grads has shape \(2,\) at layer/bias; wanted \(n, \*\(2,\)\), one gradient per",
        ),
        (
            lambda: jp.scores.woodfisher(W, grads={}),
            ValueError,
            "tree of grads does not match params: .*pass grads=jp.scores.evidence.example_grad",
        ),
        (
            lambda: jp.scores.woodfisher(W, grads=W, block=0),
            ValueError,
            "block=0, damping=0.001; wanted at least one entry a block, and a positive damping",
        ),
        (
            lambda: jp.scores.woodfisher(W, grads=W, damping=0.0),
            ValueError,
            "block=64, damping=0.0; wanted at least one entry a block, and a positive damping",
        ),
        (
            lambda: jp.scores.apoz(W, zeros={"layer": None}),
            ValueError,
            r"apoz: the tree of zeros does not match params: it has .*; wanted params' structure",
        ),
        (
            lambda: jp.scores.apoz(W, zeros={"layer": {"kernel": jnp.ones(3), "bias": None}}),
            ValueError,
            r"zeros has shape \(3,\) at layer/kernel, the leaf \(3, 2\); wanted one number for "
            "each of its outputs, its last axis",
        ),
        (
            lambda: jp.scores.wanda(
                W, input_norms={"layer": {"kernel": jnp.ones(2), "bias": None}}
            ),
            ValueError,
            r"input_norms has shape \(2,\) at layer/kernel, the leaf \(3, 2\); wanted one number "
            "for each of its inputs, its axis -2",
        ),
        (
            lambda: jp.scores.wanda(
                W, input_norms={"layer": {"kernel": jnp.ones((3, 2, 1)), "bias": None}}
            ),
            ValueError,
            r"input_norms has shape \(3, 2, 1\) at layer/kernel",
        ),
        (
            lambda: jp.saliency(W, grad={"layer": {"kernel": 1}}),
            ValueError,
            r"tree of grad does not match params: it has no leaf 'layer/bias'; pass grad=jax.grad",
        ),
        (
            lambda: jp.saliency(
                W, grad={"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}}
            ),
            ValueError,
            r"grad has shape \(2, 3\) at layer/kernel, the leaf \(3, 2\); pass grad=jax.grad",
        ),
        (
            lambda: jp.scores.batch_norm_scale(W),
            ValueError,
            "finds no scale of a normalisation among the leaves .*layer/bias.*where=lambda",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
def test_nnx_gradients_match_their_state():
    graphdef, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    grad = jax.grad(lambda s: nnx.merge(graphdef, s)(jnp.ones((1, 3))).sum())(state)
    scores = jp.saliency(state, grad=grad)
    np.testing.assert_allclose(*(jax.tree.leaves(t)[1] for t in (scores, jp.magnitude(state))))


@pytest.mark.slow
def test_evidence_reaches_scores_inside_prune_through_extra_arguments():
    params = {"w": jax.random.normal(KEY, (6, 10))}
    fn = lambda p, x: jax.nn.relu(x @ p["w"])  # noqa: E731
    synflow = functools.partial(jp.scores.synflow, fn=fn, args=(jnp.ones((1, 6)),))
    schedule = jp.schedules.exponential(0.0, 0.7, begin=0, end=3)

    def run(score, extra):
        tx = jp.prune(optax.adam(1e-2), score, schedule)

        @jit
        def step(params, state):
            updates, state = tx.update(params, state, params, **extra(state))
            return optax.apply_updates(params, updates), state

        state, now = tx.init(params), params
        for _ in range(4):
            now, state = step(now, state)
        return int((now["w"] != 0).sum())

    nu = lambda state: {"nu": optax.tree_utils.tree_get(state, "nu")}  # noqa: E731
    assert run(jp.scores.adam_fisher, nu) == 18
    assert run(jp.wanda, lambda state: {"input_norms": {"w": jnp.arange(6.0)}}) == 18
    assert run(synflow, lambda state: {}) == 18
