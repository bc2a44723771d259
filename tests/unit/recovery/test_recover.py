"""``jp.recover``: each stage, what it keeps, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.recovery import api
from jaxprune.recovery.objective import objective_of
from jaxprune.recovery.recipe import LONGER, Recipe
from jaxprune.recovery.tuning import Tuned, Tuner, held_out, training

KEEP = np.arange(12) < 6


def fn(params, x):
    h = x @ params["up"]
    h = (h - params["mean"]) * jax.lax.rsqrt(params["var"] + 1e-5) * params["scale"]
    return jax.nn.relu(h) @ params["down"]


def trained(params, x):
    h = x @ params["up"]
    mean, var = h.mean(0), h.var(0)
    out = jax.nn.relu((h - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"]) @ params["down"]
    new = {"mean": 0.9 * params["mean"] + 0.1 * mean, "var": 0.9 * params["var"] + 0.1 * var}
    return out, params | new


def loss(params, x, y):
    out, new = trained(params, x)
    return jnp.mean((out - y) ** 2), new


def still(params, x, y):
    return jnp.mean((fn(params, x) - y) ** 2)


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (4, 12)), "mean": jnp.zeros(12), "var": jnp.ones(12),
        "scale": jnp.ones(12), "down": jax.random.normal(keys[1], (12, 3)), "steps": jnp.arange(2),
    }  # fmt: skip
    xs = jax.random.normal(keys[2], (20, 32, 4)) + 0.5
    batches = [(x, fn(params, x)) for x in xs]
    structure = jp.infer_structure(fn, params, xs[0])
    (name,) = (n for n, d in structure.dims.items() if d.label == "hidden")
    small = jp.compact(fn, params, structure.masks({name: KEEP}), xs[0])
    return params, batches, small


def test_the_loss_falls_and_the_table_says_what_was_done(case, capsys):
    params, batches, small = case
    tuned = jp.recover(small, loss, batches, dense=params, steps=60)
    stages = {s.name: s for s in tuned.recovery.stages}
    assert list(stages) == ["compact", "refit", "tuning", "statistics"]
    assert stages["refit"].loss < stages["compact"].loss
    assert stages["tuning"].loss < 0.9 * stages["refit"].loss
    mine = jnp.mean(jnp.stack([small.cut(loss, *b)(tuned.params, *b)[0] for b in batches[:2]]))
    np.testing.assert_allclose(stages["tuning"].loss, mine, rtol=1e-5)
    out = capsys.readouterr().out
    assert "of the parameters removed" in out and "at the rate" in out and "not finite" not in out
    assert "<table" in tuned.recovery._repr_html_()
    assert tuned.recovery.steps <= 60 and tuned.certificate is small.certificate
    assert jax.tree.map(jnp.shape, tuned.params) == jax.tree.map(jnp.shape, small.params)


@pytest.mark.slow
def test_statistics_follow_the_loss_and_not_the_gradient(case):
    _, batches, small = case
    tuned = jp.recover(small, loss, batches, steps=40, progress=False)
    h = jnp.concatenate([x for x, _ in batches]) @ tuned.params["up"]
    np.testing.assert_allclose(tuned.params["mean"], h.mean(0), atol=1e-3)
    alone = jp.recover(small, still, batches, steps=10, progress=False)
    for name in ("mean", "var", "steps"):
        np.testing.assert_array_equal(alone.params[name], small.params[name])
    assert not np.array_equal(alone.params["up"], small.params["up"])


def test_statistics_are_kept_though_a_teacher_of_other_statistics_is_further_then(case):
    params, batches, small = case
    teacher = lambda x: fn(params, x)  # noqa: E731
    moved = [(x + 5 * (k > 1), y) for k, (x, y) in enumerate(batches)]  # Two are held out.
    tuned = jp.recover(
        small, loss, moved, teacher=teacher, steps=5, optimizer=optax.sgd(0.0), progress=False
    )
    *_, before, last = tuned.recovery.stages
    assert last.name == "statistics" and last.loss > before.loss and not last.said
    h = jnp.concatenate([x for x, _ in moved]) @ tuned.params["up"]
    np.testing.assert_allclose(tuned.params["mean"], h.mean(0), atol=1e-3)


@pytest.mark.slow
def test_a_teacher_alone_and_with_a_loss(case):
    params, batches, small = case
    teacher = lambda x: fn(params, x)  # noqa: E731
    inputs = [(x,) for x, _ in batches]
    alone = jp.recover(small, None, inputs, teacher=teacher, steps=40, progress=False)
    assert alone.recovery.stages[-1].loss < alone.recovery.stages[0].loss
    both = jp.recover(small, still, batches, teacher=teacher, steps=5, progress=False)
    x, y = batches[0]
    distance = jp.training.logit_loss(fn(small.expand(small.params), x), teacher(x)).mean()
    own = still(small.expand(small.params), x, y)
    held = [(x, y) for x, y in batches[:2]]
    assert len(held_out(batches)) == len(held)
    x, y = held[1]
    distance += jp.training.logit_loss(fn(small.expand(small.params), x), teacher(x)).mean()
    own += still(small.expand(small.params), x, y)
    np.testing.assert_allclose(both.recovery.stages[0].loss, (own + distance) / 4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 0), (10, 2), (170, 17)])
def test_the_rate_goes_straight_up_and_straight_down_to_zero(steps, warmup):
    shares = Recipe(steps, warmup, 1, ()).shares_of_rate()
    top = max(warmup - 1, 0)
    assert shares.shape == (steps,) and (shares > 0).all() and shares.max() == shares[top] <= 1
    assert (np.diff(shares[: top + 1]) > 0).all()
    falls = -np.diff([*shares[top:], 0])  # The step after the last one would be at zero.
    np.testing.assert_allclose(falls, falls[0])


def test_an_optimizer_of_ones_own_is_all_that_moves_the_weights(case):
    _, batches, small = case
    tuned = jp.recover(small, still, batches, steps=1, optimizer=optax.sgd(1e-3), progress=False)
    grad = jax.grad(small.cut(still, *batches[0]), allow_int=True)(small.params, *batches[2])
    wanted = small.params["up"] - 1e-3 * grad["up"]
    np.testing.assert_allclose(tuned.params["up"], wanted, rtol=1e-5)
    assert tuned.recovery.steps == 1


def test_leaves_without_statistics_are_left_as_they_are_by_the_refit():
    """A kernel that is joined with another before it is multiplied has no inputs of its own."""

    def joined(params, x):
        w = jnp.concatenate([params["a"], params["b"]], 1)
        return jax.nn.relu(x @ w) @ params["down"]

    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (4, 6)), "b": jax.random.normal(keys[1], (4, 6)),
              "down": jax.random.normal(keys[2], (12, 3))}  # fmt: skip
    x = jax.random.normal(keys[3], (32, 4))
    masks = {"a": KEEP[None, :6] & (np.arange(6) < 3), "b": True, "down": True}
    small = jp.compact(joined, params, masks, x)
    batches = [(x, joined(params, x))]
    near = lambda p, x, y: jnp.mean((joined(p, x) - y) ** 2)  # noqa: E731
    tuned = jp.recover(small, near, batches, dense=params, steps=3, progress=False)
    assert [s.name for s in tuned.recovery.stages] == ["compact", "refit", "tuning"]


@pytest.mark.slow
def test_what_makes_it_worse_is_not_kept(case):
    params, batches, small = case
    tuned = jp.recover(
        small, still, batches, steps=20, optimizer=optax.sgd(1e3), progress=False,
        dense=jax.tree.map(lambda w: w * 3 if w.ndim == 2 else w, params),
    )  # fmt: skip
    assert "not kept" in tuned.recovery.stages[1].said
    assert "no longer pays" in tuned.recovery.stages[-1].said
    jax.tree.map(np.testing.assert_array_equal, tuned.params, small.params)


def test_tuning_goes_on_from_the_trial_that_won(case):
    """One step from the start would lose what forty steps of the trial have won."""
    _, batches, small = case
    held = held_out(batches)
    objective = objective_of(small, loss, None, held[0])
    tuner = Tuner(objective, batches, held, None)
    recipe = Recipe(steps=1, warmup=0, trial=40, rates=(1e-2, 1e-4))
    found = tuner.run(small.params, tuner.loss(small.params), recipe, False)
    assert found.rate == LONGER * 1e-2
    assert found.loss <= dict(found.rates)[1e-2] < 0.9 * tuner.loss(small.params)


def test_trials_go_down_until_one_is_worse_and_the_steps_they_spare_are_tuned(case):
    _, batches, small = case
    held = held_out(batches)
    tuner = Tuner(objective_of(small, loss, None, held[0]), batches, held, None)
    losses = {8e-3: np.inf, 4e-3: 3e9, 2e-3: 4e9, 1e-3: 0.0}
    tuner._trial = lambda params, recipe, rate, progress: Tuned(params, losses[rate], 0, rate)
    recipe = Recipe(steps=5, warmup=0, trial=3, rates=tuple(losses))
    found = tuner.run(small.params, np.inf, recipe, False)
    assert [rate for rate, _ in found.rates] == [8e-3, 4e-3, 2e-3]
    assert found.rate == LONGER * 4e-3 and found.steps == 5 + 3


@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_it_takes_no_more_steps_than_it_is_given(case, steps):
    _, batches, small = case
    tuned = jp.recover(small, still, batches, steps=steps, progress=False)
    assert tuned.recovery.steps <= max(steps, 2)


def test_progress_reaches_the_refit(case, monkeypatch):
    params, batches, small = case
    seen = []
    for name in ("calibrate", "refit"):
        was = getattr(api, name)
        monkeypatch.setattr(
            api, name, lambda *a, was=was, **k: (seen.append(k["progress"]), was(*a, **k))[1]
        )
    jp.recover(small, still, batches, dense=params, steps=1, progress=False)
    assert seen == [False, False]


def test_one_compilation_of_the_step(case):
    _, batches, small = case
    count = []

    def counted(params, x, y):
        count.append(1)
        return still(params, x, y)

    jp.recover(small, counted, batches, steps=30, progress=False)
    assert len(count) <= 6  # it is checked, shaped, differentiated and evaluated once each


def test_held_out_batches_are_not_trained_on():
    batches = [(i,) for i in range(30)]
    held = held_out(batches)
    assert held == [(0,), (1,), (2,)]
    stream = training(batches, len(held))
    assert [next(stream)[0] for _ in range(30)] == [*range(3, 30), 3, 4, 5]
    few = training([(7,)], 1)
    assert [next(few) for _ in range(3)] == [(7,)] * 3


def test_errors(case):
    params, batches, small = case
    with pytest.raises(TypeError, match="a loss.* or teacher="):
        jp.recover(small, None, batches)
    with pytest.raises(ValueError, match=r"the loss returns float32\[32, 3\]; wanted a number"):
        jp.recover(small, lambda p, x, y: fn(p, x) - y, batches)
    with pytest.raises(ValueError, match=r"teacher \(\(32, 12\), 'float32'\); wanted logits"):
        jp.recover(small, None, [b[:1] for b in batches], teacher=lambda x: x @ params["up"])
    with pytest.raises(TypeError, match="used up after one pass"):
        jp.recover(small, still, iter(batches))
    with pytest.raises(ValueError, match="batches is empty"):
        jp.recover(small, still, [])
    with pytest.raises(ValueError, match="steps is 0; wanted a whole number"):
        jp.recover(small, still, batches, steps=0)
    with pytest.raises(FloatingPointError, match="not finite after a few steps at any rate"):
        jp.recover(small, lambda p, x, y: still(p, x, y) * jnp.nan, batches, steps=5)
    with pytest.raises(ValueError, match="nothing to tune"):
        ints = lambda p, x: x @ p["w"]  # noqa: E731
        w = {"w": jnp.ones((4, 3), int)}
        one = jp.compact(ints, w, {"w": True}, jnp.ones((2, 4), int))
        jp.recover(one, lambda p, x: jnp.sum(ints(p, x)) * 1.0, [(jnp.ones((2, 4), int),)])


@pytest.mark.parametrize("steps", [5, 37, 200, 1876])
def test_a_recipe_takes_as_many_steps_as_it_is_given(steps):
    recipe = jp.recovery.recipe_for(0.5, 938, steps)
    assert recipe.steps + recipe.trial * len(recipe.rates) == steps and recipe.trial >= 1
    assert jp.recovery.recipe_for(0.5, None, steps, ()).steps == steps
