"""Cost by hand counts, timing of a known sleep, reports and pictures."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jnp.ones((2, 8, 8, 4))


def conv_flops(**kwargs):
    conv = nn.Conv(6, (3, 3), use_bias=False, **kwargs)
    return jp.cost(conv.apply, conv.init(jax.random.key(0), X), X).flops


def test_flops_by_hand():
    assert jp.cost(lambda w, x: x @ w, jnp.ones((3, 4)), jnp.ones((2, 3))).flops == 2 * 2 * 3 * 4
    assert conv_flops() == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert conv_flops(padding="VALID") == 2 * (2 * 6 * 6 * 6) * (3 * 3 * 4)
    assert conv_flops(feature_group_count=2) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 2)


def test_a_scan_counts_every_step():
    w = jnp.ones((5, 4, 4))
    scanned = lambda w, x: jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, w)[0]  # noqa: E731

    def unrolled(w, x):
        for k in w:
            x = jnp.tanh(x @ k)
        return x

    x = jnp.ones((2, 4))
    assert jp.cost(scanned, w, x).flops == jp.cost(unrolled, w, x).flops == 5 * (64 + 8)


def test_a_cond_counts_its_dearest_branch_and_a_while_says_so():
    fn = lambda w, x: jax.lax.cond(x[0] > 0, lambda v: v @ w, lambda v: v, x)  # noqa: E731
    assert jp.cost(fn, jnp.ones((3, 3)), jnp.ones(3)).by_primitive["dot_general"] == 18
    loop = lambda p, x: jax.lax.while_loop(lambda v: v[0] < 9, lambda v: v + 1, x)  # noqa: E731
    assert "while" in jp.cost(loop, (), jnp.ones(3)).notes[0]


def test_agrees_with_xla_on_a_dot():
    fn, args = (lambda a, b: a @ b), (jnp.ones((16, 32)), jnp.ones((32, 8)))
    xla = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert jp.cost(fn, *args).flops == (xla[0] if isinstance(xla, list) else xla)["flops"]


def test_a_known_sleep_is_timed():
    def slow(x):
        time.sleep(0.02)
        return np.asarray(x)

    fn = lambda x: jax.pure_callback(slow, jax.ShapeDtypeStruct((2,), jnp.float32), x)  # noqa: E731
    timing = jp.benchmark(fn, jnp.ones(2), rounds=5)
    assert 0.02 <= timing.median < 0.2 and len(timing.samples) == 5
    assert timing.quartiles[0] <= timing.median <= timing.quartiles[1]


def test_compare_takes_ratios_within_rounds():
    x = jnp.ones((64, 64))
    result = jp.compare({"one": (lambda a: a @ a, (x,)), "same": (lambda a: a @ a, (x,))}, rounds=5)
    assert result.ratios["one"] == (1.0, 1.0, 1.0)
    assert "speed-up over one" in str(result)


def test_summary_counts_kept_entries():
    params = {"w": jnp.ones((2, 4)), "b": jnp.ones(2)}
    made = jp.summary(params, {"w": jnp.eye(2, 4, dtype=bool), "b": jnp.asarray(True)},
                      flops=(100, 50))  # fmt: skip
    assert made.density == 0.4
    assert "2.00 x fewer" in str(made) and "total" in str(made)


def test_pictures_have_units():
    pytest.importorskip("matplotlib").use("Agg")
    ax = jp.plot.accuracy_speedup({"L2": [(1.0, 0.9), (2.0, 0.8)]}, dense=0.91)
    assert "[%]" in ax.get_ylabel()
    assert "[x]" in jp.plot.measured_theoretical({"L2": [(4.0, 2.0)]}).get_xlabel()
    assert jp.plot.densities(jp.summary({"w": jnp.ones(3)})).get_xlim() == (0, 1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: jp.cost(3), TypeError, "cost wants a function"),
        (lambda: jp.benchmark(3), TypeError, "wanted a function to time"),
        (lambda: jp.benchmark(jnp.sin, "x"), TypeError, "an argument holds str"),
        (lambda: jp.compare({}), ValueError, "compare got no entries"),
        (lambda: jp.benchmark(jnp.sin, 1.0, rounds=0), ValueError, "rounds is 0"),
        (lambda: jp.compare({"a": (jnp.sin, (1.0,))}, baseline="b"), ValueError, "baseline 'b'"),
        (lambda: jp.summary({}), ValueError, "summary got an empty tree"),
    ],
)
def test_clear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
