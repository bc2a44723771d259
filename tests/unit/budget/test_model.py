"""Counted costs and times over counts of dimensions, as tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import clock, model
from tests.unit.budget.networks import (
    NETWORKS,
    built,
    clockless,
    searching,
    setting,
    slow_unless_small,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_unless_small(NETWORKS))
def test_counted_costs_are_those_of_the_compact_network(name):
    """The oracle: compact, and count the small program."""
    fn, params, structure, scores, x = setting(name)
    search = searching(name)
    rng = np.random.default_rng(0)
    tables = search.model.tables
    full = jp.cost(fn, params, x)
    assert tables["flops"].at(search.choices.full) == full.flops
    assert tables["bytes"].at(search.choices.full) == full.bytes
    assert tables["peak_memory"].at(search.choices.full) == full.peak_memory
    assert tables["active_params"].at(search.choices.full) == full.active_params
    for _ in range(2):
        choice = np.array([rng.integers(0, len(c)) for c in search.model.counts])
        keep = search.choices.keep(choice)
        small = jp.compact(fn, params, structure.traced_masks(keep), x)
        found = jp.cost(small.fn, small.params, x)
        assert tables["params"].at(choice) == found.params
        # What is carried beside the kept part, and norms of fewer channels, are a little more.
        assert 0.9 * found.flops <= tables["flops"].at(choice) <= 1.02 * found.flops
        assert tables["bytes"].at(choice) == pytest.approx(found.bytes, rel=0.02)


def test_counts_are_aligned_and_within_limits():
    fn, params, structure, scores, x = setting("mlp")
    found = jp.Search(fn, params, structure, scores, x, round_to=8, minimum={"up*": 20}).model
    assert found.chosen(np.array([0, 0])) == {"up/kernel:1": 24, "mid/kernel:1": 8}
    assert all((c % 8 == 0).all() for c in found.counts)


def test_a_narrow_main_path_is_never_emptied():
    fn, params, structure, scores, x = setting("mlp")
    found = jp.Search(fn, params, structure, scores, x, minimum={"*": 0}, round_to=1).model
    assert all(c.min() >= 1 for c in found.counts)


@pytest.mark.slow
def test_embeddings_are_read_where_they_are_taken():
    """A table of 5,000 rows of which six are read moves six rows; nothing is predicted below 0."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"table": (5000, 32), "up": (32, 128), "down": (128, 32), "out": (32, 4)}
    params = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys)}

    def fn(p, tokens):
        h = p["table"][tokens]
        return (h + jax.nn.relu(h @ p["up"]) @ p["down"]).mean(1) @ p["out"]

    tokens = jnp.zeros((2, 6), int)
    structure = jp.infer_structure(fn, params, tokens)
    search = jp.Search(fn, params, structure, jp.magnitude(params), tokens, round_to=8)
    parts = (0.8, 0.3)
    plans = [search.plan(jp.Target(bytes=part), verify=False) for part in parts]
    for part, plan in zip(parts, map(search.verified, plans)):
        assert 0.5 * part < plan.predicted.bytes <= part
        assert plan.predicted.bytes == pytest.approx(plan.measured.bytes, rel=0.02)


def test_an_operand_in_another_order_is_not_timed(monkeypatch):
    """A product reads it as it lies; timed alone, the transpose would take longer than the rest."""
    params = {"up": jnp.ones((48, 16)), "down": jnp.ones((5, 48))}
    fn = lambda p, x: jnp.tanh(x @ p["up"].T) @ p["down"].T  # noqa: E731
    x = jnp.ones((4, 16))
    structure, table = jp.infer_structure(fn, params, x), jp.budget.LatencyTable(False)
    clockless(monkeypatch)
    (dim,) = (name for name, dim in structure.dims.items() if not dim.frozen)
    made = model.build(fn, params, (x,), structure, [dim], 8, {})
    model.add_latency(made, table, None, False)
    assert len(made.groups) == 5 and {g.steps[0].name for g in made.groups if not g.runs} == {
        "transpose"
    }
    timed = {name.split()[0] for name in table.seconds}
    assert timed == {"dot_general", "tanh"}


def test_times_between_widths_follow_the_work(monkeypatch):
    """A recurrent layer takes a quadratic time: exact between the two widths that are timed."""
    made = built("lstm")
    (loop,) = [g for g in made.groups if len(g.dims) == 1 and g.steps[0].name == "scan"]
    seconds = lambda g, at: 1e-3 + 1e-9 * float(g.work(at))  # noqa: E731
    monkeypatch.setattr(clock, "time_group", lambda g, at: lambda: seconds(g, at))
    alone, table = (
        dataclasses.replace(made, groups=[loop], tables={}),
        jp.budget.LatencyTable(False),
    )
    model.add_latency(alone, table, None, False)
    assert len(table) == 2
    for i, count in enumerate(made.counts_of[loop.dims[0]]):
        choice = np.zeros(len(made.axes), int)
        choice[made.order[loop.dims[0]]] = i
        wanted = seconds(loop, {loop.dims[0]: int(count)})
        assert alone.tables["latency"].at(choice) == pytest.approx(wanted, rel=1e-6)
