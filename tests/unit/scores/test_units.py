"""Taylor scores of units: the slow way beside them, and what they refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def fn(params, x):
    h = jax.nn.relu((x @ params["up"] - params["mean"]) * jax.lax.rsqrt(params["var"] + 1e-5))
    return (h + params["bias"]) @ params["down"]


def loss(params, x, y):
    return jnp.mean(jnp.square(fn(params, x) - y))


def draw(seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    params = {
        "up": jax.random.normal(keys[0], (3, 5)),
        "mean": jax.random.normal(keys[1], (5,)),
        "var": jnp.ones(5),
        "bias": jax.random.normal(keys[2], (5,)),
        "down": jax.random.normal(keys[3], (5, 2)),
        "steps": jnp.arange(3),
    }
    batches = [
        (jax.random.normal(jax.random.fold_in(keys[4], i), (4, 3)), jnp.ones((4, 2)))
        for i in range(3)
    ]
    return params, batches


def slowly(params, batches):
    """Each batch, each unit, each of its entries, in numpy."""
    total = np.zeros(5)
    for batch in batches:
        grad = jax.grad(loss, allow_int=True)(params, *batch)
        for u in range(5):
            entries = [(params["up"][:, u], grad["up"][:, u]), (params["bias"][u], grad["bias"][u]),
                       (params["down"][u], grad["down"][u])]  # fmt: skip
            total[u] += sum(float(np.sum(np.asarray(w) * np.asarray(g))) for w, g in entries) ** 2
    return total / len(batches)


@pytest.fixture(scope="module")
def found():
    params, batches = draw()
    return params, batches, jp.infer_structure(fn, params, batches[0][0])


def test_the_squared_sum_over_all_slots_of_a_unit_without_running_statistics(found):
    params, batches, structure = found
    (units,) = jp.scores.taylor_units(structure, params, loss, batches).values()
    assert units.dtype == np.float32
    np.testing.assert_allclose(units, slowly(params, batches), rtol=1e-4)


def test_fisher_takes_each_example_alone(found):
    params, batches, structure = found
    (units,) = jp.scores.taylor_units(structure, params, loss, batches, fisher=True).values()
    alone = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    np.testing.assert_allclose(units, slowly(params, alone), rtol=1e-4)


def test_what_a_loss_returns_beside_its_number_is_left_alone(found):
    params, batches, structure = found
    two = lambda p, *batch: (loss(p, *batch), {"statistics": p["mean"]})  # noqa: E731
    got, want = (jp.scores.taylor_units(structure, params, f, batches) for f in (two, loss))
    chex.assert_trees_all_equal(got, want)


def test_one_program_for_all_batches_of_a_shape(found):
    params, batches, structure = found
    traced = chex.assert_max_traces(loss, n=1)
    jp.scores.taylor_units(structure, params, traced, batches)


def test_scores_for_search_and_they_find_the_units_that_matter(found):
    params, batches, structure = found
    params = params | {"down": params["down"] * jnp.array([[1.0], [0], [1], [0], [1]])}
    params = params | {"bias": params["bias"] * 0}
    scores = jp.scores.taylor_units(structure, params, loss, batches)
    target = jp.Target(params=0.75)
    x = batches[0][0]
    plan = jp.search(fn, params, structure, scores, x, target=target, round_to=1)
    (kept,) = plan.keep.values()
    assert not kept[[1, 3]].all() and kept[[0, 2, 4]].all()


def test_errors(found):
    params, batches, structure = found
    units = jp.scores.taylor_units
    with pytest.raises(TypeError, match=r"used up after one pass; write list\(batches\)"):
        units(structure, params, loss, iter(batches))
    with pytest.raises(ValueError, match="batches is empty"):
        units(structure, params, loss, [])
    with pytest.raises(ValueError, match="up has shape"):
        units(structure, params | {"up": jnp.ones((3, 6))}, loss, batches)
    bad = [(batches[0][0] * jnp.nan, batches[0][1])]
    with pytest.raises(ValueError, match=r"scores of .*, 5 units, are not finite: the loss"):
        units(structure, params, loss, bad)
    with pytest.raises(
        ValueError, match=r"the loss returns float32\[.*\]; wanted a number, such as"
    ):
        units(structure, params, lambda p, x, y: x @ p["up"], batches)
