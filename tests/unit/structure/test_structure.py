"""Which dimensions are found, what they are called, and what is refused."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp


def mlp(params, x):
    return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]


def mlp_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": jax.random.normal(keys[0], (3, 8)),
        "bias": jax.random.normal(keys[1], (8,)),
        "down": jax.random.normal(keys[2], (8, 4)),
    }


X = jnp.ones((2, 3))


def free(structure):
    return {name for name, dim in structure.dims.items() if not dim.frozen}


def test_an_mlp_has_one_hidden_dimension_with_three_slots():
    structure = jp.infer_structure(mlp, mlp_params(), X)
    assert free(structure) == {"up:1"}
    dim = structure.dims["up:1"]
    assert {(s.path, s.axis) for s in dim.slots} == {("up", 1), ("bias", 0), ("down", 0)}
    assert (dim.size, dim.params) == (8, 24 + 8 + 32)


def test_inputs_and_logits_are_frozen_and_say_so():
    structure = jp.infer_structure(mlp, mlp_params(), X)
    assert "input" in structure.dims["up:0"].frozen
    assert "output" in structure.dims["down:1"].frozen


def test_nothing_is_computed():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), mlp_params())
    structure = jp.infer_structure(mlp, shapes, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert free(structure) == {"up:1"}


def test_masks_and_keep_are_inverse():
    structure = jp.infer_structure(mlp, mlp_params(), X)
    keep = {"up:1": np.arange(8) % 3 == 0}
    masks = structure.masks(keep)
    assert masks["up"].shape == (1, 8) and masks["down"].shape == (8, 1)
    np.testing.assert_array_equal(structure.keep(masks)["up:1"], keep["up:1"])
    assert all(m.shape == () for m in jax.tree.leaves(structure.masks({})))


def test_an_opaque_primitive_names_itself_and_the_users_line():
    def fn(params, x):
        return jnp.linalg.qr(x @ params["up"])[0].sum() + (x @ params["up"]) @ params["down"]

    structure = jp.infer_structure(fn, mlp_params(), jnp.ones((9, 3)))
    assert not free(structure)
    assert "qr" in structure.dims["up:1"].frozen and "test_structure.py" in str(structure)


def test_a_leaf_that_nothing_reads_is_not_offered():
    structure = jp.infer_structure(mlp, {**mlp_params(), "ema": jnp.ones((8, 4))}, X)
    assert free(structure) == {"up:1"}
    assert structure.dims["ema:1"].frozen == "nothing in this trace reads it"


def test_the_unread_rest_of_a_position_table_is_not_offered():
    def fn(params, x):
        return (x + params["pos"][: x.shape[0]]) @ params["w"]

    params = {"pos": jnp.ones((16, 3)), "w": jnp.ones((3, 2))}
    assert not free(jp.infer_structure(fn, params, X))


@pytest.mark.slow
def test_batch_statistics_follow_their_channels():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
            return nn.Dense(2)(nn.relu(x))

    net = Net()
    variables = net.init(jax.random.key(0), X, False)
    for train in (False, True):
        fn = lambda v, x, t=train: net.apply(v, x, t, mutable=["batch_stats"] if t else False)  # noqa: E731
        dim = jp.infer_structure(fn, variables, X).dims["params/Dense_0/kernel:1"]
        assert dim.frozen is None
        assert "batch_stats/BatchNorm_0/mean" in {s.path for s in dim.slots}


def test_nnx_modules_are_read_through_split_and_merge():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    structure = jp.infer_structure(lambda s, x: nnx.merge(graphdef, s)(x), state, X)
    assert sorted(structure.dims[n].size for n in free(structure)) == [6]


@pytest.mark.slow
def test_structured_rounds_and_never_empties():
    params = mlp_params()
    structure = jp.infer_structure(mlp, params, X)
    scores = jp.magnitude(params)
    for sparsity, wanted in [(0.0, 8), (0.4, 4), (0.6, 4), (0.99, 4), (1.0, 4)]:
        masks = jp.structured(structure, round_to=4)(scores, sparsity)
        assert structure.keep(masks)["up:1"].sum() == wanted
    assert structure.keep(jp.structured(structure)(scores, 1.0))["up:1"].sum() == 1


@pytest.mark.slow
def test_structured_keeps_the_units_of_largest_mean_score():
    params = mlp_params()
    structure = jp.infer_structure(mlp, params, X)
    scores = jp.magnitude(params)
    unit = [
        np.concatenate([scores["up"][:, i], scores["bias"][i : i + 1], scores["down"][i]]).mean()
        for i in range(8)
    ]
    masks = jax.jit(jp.structured(structure))(scores, 0.5)
    expected = np.zeros(8, bool)
    expected[np.argsort(unit)[4:]] = True
    np.testing.assert_array_equal(structure.keep(masks)["up:1"], expected)


def test_structured_takes_scores_of_units():
    params = mlp_params()
    structure = jp.infer_structure(mlp, params, X)
    given = {"up:1": np.array([3.0, 1.0, 7.0, 2.0, 8.0, 5.0, 4.0, 6.0])}
    pattern = jp.structured(structure, dims="up:1")
    for choose in (pattern, jax.jit(pattern)):
        masks = choose(given, 0.5)
        assert jax.tree.structure(masks) == structure.treedef
        np.testing.assert_array_equal(structure.keep(masks)["up:1"], given["up:1"] > 4)
    entries = jp.magnitude(params)
    same = pattern(structure.unit_scores(entries), 0.5)
    jax.tree.map(np.testing.assert_array_equal, same, pattern(entries, 0.5))


def test_structured_takes_what_taylor_units_gives():
    params = mlp_params()
    structure = jp.infer_structure(mlp, params, X)
    loss = lambda p, x: jnp.sum(jnp.square(mlp(p, x)))  # noqa: E731
    scores = jp.scores.taylor_units(structure, params, loss, [(jnp.ones((2, 3)),)])
    kept = structure.keep(jp.structured(structure)(scores, 0.5))["up:1"]
    assert scores["up:1"][kept].min() >= scores["up:1"][~kept].max()
    assert kept.sum() == 4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: s.masks({"nope": np.ones(8)}), "no dimension is named 'nope'"),
        (lambda s: s.masks({"up:1": np.ones(7)}), r"has shape \(7,\), wanted \(8,\)"),
        (lambda s: s.masks({"up:1": np.zeros(8)}), "keeps none of 8 units"),
        (lambda s: s.masks({"down:1": np.arange(4) > 0}), "can't be pruned: output"),
        (lambda s: s.keep({"up": True}), "masks have another structure than params"),
        (lambda s: s.keep({"up": np.ones((3, 7), bool), "bias": np.array(True),
                           "down": np.array(True)}), "mask"),
        (lambda s: jp.structured(s, dims="head*"), "matches no prunable dimension"),
        (lambda s: jp.structured(s, dims="down:1"), "frozen: down:1"),
        (lambda s: jp.structured(s, round_to=0), "round_to is 0"),
        (lambda s: s.unit_scores({"up": jnp.ones((3, 8))}), "scores have another structure"),
        (lambda s: s.unit_scores(mlp_params(), "max"), "reduce is 'max'; wanted a function"),
        (lambda s: jp.structured(s, reduce="taylor"), "pass reduce=jp.reduce.taylor"),
        (lambda s: jp.structured(s)({"up": np.ones(8)}, 0.5), "scores have another structure"),
        (lambda s: jp.structured(s)({"down:1": np.ones(4)}, 0.5), r"none for \['up:1'\]"),
        (lambda s: jp.structured(s)({"up:1": np.ones(8), "x": 1}, 0.5), r"\['x'\] name no"),
        (lambda s: jp.structured(s)({"up:1": np.ones(7)}, 0.5), r"shape \(7,\), wanted \(8,\)"),
        (lambda s: jp.structured(s)({"up:1": np.full(8, np.nan)}, 0.5), "scores of up:1 hold NaN"),
    ],
)  # fmt: skip
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call(jp.infer_structure(mlp, mlp_params(), X))


def test_bad_functions_and_params():
    with pytest.raises(TypeError, match="infer_structure wants a function"):
        jp.infer_structure(3, mlp_params(), X)
    with pytest.raises(ValueError, match="params has no array leaf"):
        jp.infer_structure(mlp, {}, X)


def test_an_output_that_only_shares_a_parameters_name_is_an_output():
    """Logits named like a kernel of their shape are no update of that kernel."""

    def fn(params, x):
        return {"out": jnp.tanh(x @ params["up"]) @ params["out"]}

    params = {"up": jnp.ones((3, 8)), "out": jnp.ones((8, 4))}
    structure = jp.infer_structure(fn, params, jnp.ones((8, 3)))
    assert "output" in structure.dims["out:1"].frozen


def test_a_training_step_follows_its_parameters():
    def step(params, x):
        grads = jax.grad(lambda p: (mlp(p, x) ** 2).sum())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    assert "up:1" in free(jp.infer_structure(step, mlp_params(), X))


EQUAL = {"a/b": jnp.ones((5, 8)), "a": {"b": jnp.ones((8, 6))}, "c": jnp.ones((6, 3))}


@pytest.mark.parametrize(
    "call",
    [
        lambda fn, p, x: jp.infer_structure(fn, p, x),
        lambda fn, p, x: jp.compact(fn, p, jax.tree.map(lambda w: jnp.asarray(True), p), x),
        lambda fn, p, x: jp.calibrate(fn, p, [x]),
        lambda fn, p, x: jp.summary(p),
        lambda fn, p, x: jp.unstructured()(jp.magnitude(p), 0.5),
        lambda fn, p, x: jp.unstructured(where=lambda path, w: path == "c")(jp.magnitude(p), 0.5),
        lambda fn, p, x: jp.distributions.like(p),
        lambda fn, p, x: jp.distributions.without_ends(jp.uniform)(p, 0.5),
    ],
)
def test_leaves_with_equal_paths_are_an_error_at_once(call):
    def fn(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a/b"]) @ p["a"]["b"]) @ p["c"]

    text = r"two leaves have the path a/b; rename one, .*: \['a'\]\['b'\], \['a/b'\]"
    with pytest.raises(ValueError, match=text):
        call(fn, EQUAL, jnp.ones((2, 5)))


def test_keys_that_print_alike_are_an_error_at_once():
    params = collections.OrderedDict({1: jnp.ones((3, 8)), "1": jnp.ones((8, 2))})
    with pytest.raises(ValueError, match=r"two leaves have the path 1; .*: \[1\], \['1'\]"):
        jp.infer_structure(lambda p, x: jnp.tanh(x @ p[1]) @ p["1"], params, X)
