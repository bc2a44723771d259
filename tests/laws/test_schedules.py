"""Schedules reach their ends exactly, rise, and run in any transform."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import schedules

RAMPS = {
    "cubic": schedules.cubic,
    "linear": schedules.linear,
    "square": lambda *a, **k: schedules.polynomial(*a, power=2, **k),
    "cosine": schedules.cosine,
    "exponential": schedules.exponential,
}
FORMULAS = {
    "cubic": lambda s, f, t: f + (s - f) * (1 - t) ** 3,
    "linear": lambda s, f, t: f + (s - f) * (1 - t),
    "square": lambda s, f, t: f + (s - f) * (1 - t) ** 2,
    "cosine": lambda s, f, t: f + (s - f) * (1 + np.cos(np.pi * t)) / 2,
    "exponential": lambda s, f, t: 1 - (1 - s) * ((1 - f) / (1 - s)) ** t,
}
FRACTION = st.integers(0, 99).map(lambda i: i / 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", RAMPS)
@settings(max_examples=20)
@given(FRACTION, FRACTION, st.integers(0, 1000), st.integers(1, 10_000))
def test_formula_ends_and_direction(name, init, final, begin, length):
    end = begin + length
    schedule = RAMPS[name](init, final, begin=begin, end=end)
    steps = np.unique(np.linspace(begin, end, 9).astype(int))
    values = np.array([schedule(t) for t in steps])
    np.testing.assert_allclose(
        values, FORMULAS[name](init, final, (steps - begin) / length), atol=2e-6
    )
    for t in (begin, begin - 1, 0):
        assert float(schedule(t)) == np.float32(init)
    for t in (end, end + 1, 2**31 - 1):
        assert float(schedule(t)) == np.float32(final)
    assert (np.diff(values) * np.sign(final - init) >= -1e-6).all()
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RAMPS, "one_shot", "constant", "rounds", "cyclic"])
def test_arrays_in_every_transform(name):
    schedule = {
        "one_shot": schedules.one_shot(0.9, at=3),
        "constant": schedules.constant(0.9),
        "rounds": schedules.rounds(0.1, 0.9, begin=1, every=3, count=3),
        "cyclic": schedules.cyclic(
            schedules.linear(0, 0.9, begin=1, end=3), period=4, count=2, begin=1
        ),
        **{n: ramp(0.1, 0.9, begin=2, end=7) for n, ramp in RAMPS.items()},
    }[name]
    steps = jnp.arange(10)
    eager = jnp.stack([schedule(int(t)) for t in steps])
    assert eager.dtype == jnp.float32 and isinstance(schedule(1), jax.Array)
    for got in (
        jnp.stack([jax.jit(schedule)(t) for t in steps]),
        jax.vmap(schedule)(steps),
        jax.lax.scan(lambda c, t: (c, schedule(t)), 0, steps)[1],
    ):
        np.testing.assert_allclose(got, eager, rtol=1e-6)
    assert eager[-1] == np.float32(0.9)
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        assert schedule(jnp.int64(9)) == np.float32(0.9)


def test_one_shot_and_constant():
    assert [float(schedules.one_shot(0.5, at=3)(t)) for t in (0, 2, 3, 9)] == [0, 0, 0.5, 0.5]
    assert float(schedules.constant(1)(3)) == 1.0


@pytest.mark.slow
@settings(max_examples=40)
@given(FRACTION, FRACTION, st.integers(0, 50), st.integers(1, 20), st.integers(1, 12))
def test_rounds_prune_the_same_fraction_of_what_is_left(init, final, begin, every, count):
    schedule = schedules.rounds(init, final, begin=begin, every=every, count=count)
    ratio = ((1 - final) / (1 - init)) ** (1 / count)
    assert float(schedule(begin - 1)) == np.float32(init)
    for k in range(1, count + 1):
        first = begin + (k - 1) * every
        for step in (first, first + every - 1):  # a round's first and last step
            wanted = 1 - (1 - init) * ratio**k
            assert float(schedule(step)) == pytest.approx(wanted, abs=1e-6)
    for step in (begin + (count - 1) * every, begin + count * every, 2**31 - 1):
        assert float(schedule(step)) == np.float32(final)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 7), st.integers(1, 12))
def test_a_cycle_is_what_optax_joins(period, count, begin, end):
    """The oracle evaluates a copy of the schedule for each cycle."""
    schedule = schedules.cubic(0.1, 0.9, begin=0, end=end)
    cyclic = schedules.cyclic(schedule, period=period, count=count, begin=begin)
    joined = optax.join_schedules(
        [schedules.constant(0.1)] + [schedule] * count,
        [begin + k * period for k in range(count)],
    )
    steps = jnp.arange(70)
    np.testing.assert_array_equal(jax.vmap(cyclic)(steps), jax.vmap(joined)(steps))
    assert float(cyclic(2**31 - 1)) == np.float32(0.9)


def test_alternating_phases_are_a_cycle_of_one_shots():
    phases = schedules.cyclic(schedules.one_shot(0.9, at=2), period=4, count=2)
    got = [round(float(phases(t)), 1) for t in range(10)]
    assert got == [0, 0, 0.9, 0.9, 0, 0, 0.9, 0.9, 0.9, 0.9]


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.rounds(0.0, 0.75, begin=1, every=3, count=2),
        schedules.cyclic(schedules.one_shot(0.5, at=1), period=4, count=2),
    ],
)
def test_prune_follows_them_step_by_step(schedule):
    params = {"w": jax.random.normal(jax.random.key(0), (10, 10))}
    tx = jp.prune(optax.sgd(0.1), jp.magnitude, schedule, regrow=True)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(9):
        params, state = step(params, state)
        kept = int(optax.tree_utils.tree_get(state, "masks")["w"].sum())
        assert kept == round(100 * (1 - float(schedule(t))))


def test_hyperparameters_may_be_traced():
    def value(final, step):
        return schedules.cubic(0.0, final, begin=0, end=10)(step)

    assert jax.jit(value)(0.5, 10) == 0.5
    assert jax.jit(lambda f: schedules.exponential(0.0, f, begin=0, end=2)(1))(0.75) == 0.5
    final = jax.jit(lambda f: schedules.rounds(0.0, f, begin=0, every=5, count=2)(4))(0.75)
    assert float(final) == 0.5


def test_optax_joins_them():
    joined = optax.join_schedules(
        [schedules.cubic(0.0, 0.5, begin=0, end=5), schedules.constant(0.9)], [10]
    )
    assert float(joined(7)) == 0.5 and float(joined(10)) == np.float32(0.9)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: schedules.cubic(0, 0.5, begin=3, end=3), "begins at step 3 and ends at 3; wanted"),
        (lambda: schedules.cosine(0, 0.5, begin=3, end=1), r"end > begin, or write .*one_shot"),
        (lambda: schedules.exponential(0, 0.5, begin=3, end=1), "wanted end > begin"),
        (lambda: schedules.linear(0, 1.5, begin=0, end=1), "final is 1.5; wanted a sparsity in"),
        (lambda: schedules.linear(-0.1, 1, begin=0, end=1), "init is -0.1; wanted a sparsity in"),
        (lambda: schedules.one_shot(2, at=1), "final is 2; wanted a sparsity in"),
        (lambda: schedules.constant("0.5"), "sparsity is '0.5'; wanted a sparsity in"),
        (lambda: schedules.constant(float("nan")), "sparsity is nan"),
        (lambda: schedules.polynomial(0, 1, begin=0, end=1, power=0), "power is 0; wanted a pos"),
        (lambda: schedules.exponential(0, 1, begin=0, end=1), "final is 1, a density of 0"),
        (
            lambda: schedules.rounds(0, 0.5, begin=0, every=0, count=2),
            "every=0, count=2; wanted at least one step from round to round",
        ),
        (
            lambda: schedules.rounds(0, 0.5, begin=0, every=1, count=0),
            "every=1, count=0; wanted .* at least one round",
        ),
        (lambda: schedules.rounds(0, 1, begin=0, every=1, count=2), "final is 1, a density of 0"),
        (
            lambda: schedules.cyclic(schedules.constant(0.5), period=0, count=1),
            "period=0, count=1; wanted at least one step a cycle",
        ),
        (
            lambda: schedules.cyclic(schedules.constant(0.5), period=1, count=0),
            "period=1, count=0; wanted .* at least one cycle",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_they_are_public():
    assert jp.schedules is schedules
