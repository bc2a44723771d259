"""Other trees cut by the same plan: the oracle is the optimizer's own init at the small size."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (7, 5))
A, B, C = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 16), (16,), (16, 3)]))

TREES = {
    "dict": ({"a": A, "b": B, "c": C}, lambda p: (p["a"], p["b"], p["c"])),
    "nested": ({"l": {"a": A, "b": B}, "m": {"c": C}}, lambda p: (*p["l"].values(), p["m"]["c"])),
    "tuple": ((A, B, C), lambda p: p),
    "list": ([A, B, C], lambda p: p),
    "pair": ((A, C), lambda p: (p[0], 0.0, p[1])),
    "one array": (A, lambda p: (p, 0.0, p.T)),
}


def by_rank(params):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


# Rates are given; everything else is the optimizer's own.
PLACED = {
    **{name: lambda name=name: getattr(optax, name)(0.1) for name in (
        "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "adan",
        "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "noisy_sgd", "novograd",
        "optimistic_gradient_descent", "polyak_sgd", "radam", "rmsprop", "rprop", "sgd",
        "sign_sgd", "yogi")},
    **{name: lambda name=name: getattr(contrib, name)(0.1) for name in (
        "acprop", "ademamix", "adopt", "dadapt_adamw", "dog", "dowg", "madgrad", "momo",
        "momo_adam", "muon", "prodigy", "schedule_free_adamw", "simplified_ademamix", "sophia")},
    "cocob": lambda: contrib.cocob(),
    "momentum": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "sharpness-aware": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
    "mechanic": lambda: contrib.mechanize(optax.adam(0.1)),
    "schedule-free": lambda: contrib.schedule_free(optax.adam(0.1), 0.1),
    "split complex": lambda: contrib.split_real_and_imaginary(optax.adam(0.1)),
    "steps together": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "average": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "masked": lambda: optax.masked(optax.adam(0.1), lambda p: jax.tree.map(jnp.ndim, p)),
    "by rank": lambda: optax.multi_transform(
        {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1, 0.9)}, by_rank),
    "if finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "found nan": lambda: optax.chain(optax.zero_nans(), optax.adam(0.1)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "pruned": lambda: jp.prune(optax.adam(0.1), jp.magnitude, 0.5),
}  # fmt: skip

REFUSED = {
    "accumulators per axis": (lambda: optax.sm3(0.1), r"0/mu/{a}/0, wanted \(5, 16\) as {a} has"),
    "factored moments": (
        lambda: optax.adafactor(0.1, min_dim_size_to_factor=2), r"0/v_row/{a}, wanted \(5, 16\)"),
    "a memory": (lambda: optax.lbfgs(0.1), r"restrict got shape \(10, 5, 16\) for 0/diff_params"),
    "low rank": (lambda: contrib.galore(0.1), r"mu/{a}, wanted \(5, 16\) as {a} has"),
    "one vector": (lambda: optax.flatten(optax.adam(0.1)), "restrict got shape .* for 0/mu, w"),
    "packed masks": (
        lambda: jp.training.packed(jp.training.rigl(optax.adam(0.1), 0.5)),
        r"masks/{a}/bits, wanted \(5, 16\) as {a} has"),
}  # fmt: skip


def cut(name):
    params, parts = TREES[name]

    def fn(p, x):
        a, b, c = parts(p)
        return jax.nn.relu(x @ a + b) @ c

    structure = jp.infer_structure(fn, params, X)
    free = [d.name for d in structure.dims.values() if not d.frozen]
    masks = structure.masks({n: np.arange(16) % 2 == 0 for n in free})
    return params, jp.compact(fn, params, masks, X)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("tree", ["dict", "tuple"])
def test_states_are_those_of_small_params_and_go_on(tree, name):
    params, small = cut(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some optimizers are deprecated
        tx = PLACED[name]()
        state = small.restrict(tx.init(params))
        native = tx.init(small.params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, native)

    def loss(p):
        return (small.fn(p, X) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(small.params)
    more = {"value": value} if name in ("polyak_sgd", "momo", "momo_adam") else {}
    more |= {"obj_fn": loss} if name == "sophia" else {}
    updates, _ = tx.update(grads, state, small.params, **more)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, small.params)


@pytest.mark.parametrize("tree", TREES)
def test_moments_of_any_tree_are_the_slices_of_its_own(tree):
    params, small = cut(tree)
    moments = jax.tree.map(lambda leaf: leaf * leaf, params)
    state = optax.adam(0.1).init(params)
    state = small.restrict((state[0]._replace(mu=moments), state[1]))
    jax.tree.map(np.testing.assert_array_equal, state[0].mu, small.restrict(moments))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("tree", ["dict", "nested", "tuple"])
def test_a_state_that_can_not_be_placed_is_named(tree, name):
    params, small = cut(tree)
    make, text = REFUSED[name]
    where = {"dict": "a", "nested": "l/a", "tuple": "0"}[tree]
    with pytest.raises(ValueError, match=text.replace("{a}", where)) as error:
        small.restrict(make().init(params))
    assert error.match(r"call init\(small.params\)")


def test_one_array_has_no_path_and_is_named_params():
    params, small = cut("one array")
    with pytest.raises(ValueError, match=r"for 0/mu/0, wanted \(5, 16\) as params has"):
        small.restrict(optax.sm3(0.1).init(params))


def test_accumulators_below_a_path_alone_are_named():
    _, small = cut("nested")
    with pytest.raises(ValueError, match=r"for mu/l/a/0, wanted \(5, 16\) as l/a has"):
        small.restrict({"mu": {"l": {"a": [jnp.ones(5), jnp.ones(16)]}}})


def test_what_belongs_to_no_parameter_passes():
    _, small = cut("list")
    other = {"step": jnp.arange(3), "key": jax.random.key(0), "0": {"rows": jnp.ones(4)}}
    jax.tree.map(np.testing.assert_array_equal, small.restrict(other)["0"], other["0"])
    assert jax.tree.map(jnp.shape, small.restrict(other)) == jax.tree.map(jnp.shape, other)


def test_masks_that_repeat_along_an_axis_are_cut_along_the_others():
    _, small = cut("dict")
    masks = {"a": jnp.ones((1, 16), bool), "b": jnp.asarray(True), "c": jnp.ones((16, 1), bool)}
    found = jax.tree.map(jnp.shape, small.restrict({"masks": masks}))
    assert found == {"masks": {"a": (1, 8), "b": (), "c": (8, 1)}}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x)))
        return nn.Dense(5)(nn.relu(nn.Dense(8)(x)))


@pytest.mark.slow
def test_an_optimizer_may_see_one_collection_of_the_variables():
    variables = Net().init(jax.random.key(0), X)
    structure = jp.infer_structure(Net().apply, variables, X)
    masks = jp.structured(structure)(jp.magnitude(variables), 0.5)
    small = jp.compact(Net().apply, variables, masks, X)
    state = small.restrict(optax.adam(0.1).init(variables["params"]))
    native = optax.adam(0.1).init(small.params["params"])
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, native)
    with pytest.raises(
        ValueError, match=r"mu/BatchNorm_0/bias/0, wanted|mu/Dense_0/kernel/0, want"
    ):
        small.restrict(optax.sm3(0.1).init(variables["params"]))
