"""Budgets of large models: memory at the peak, caches, and parameters that one token uses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget.solver import Largest, Problem, Term, Total, solve
from tests.models.zoo import mixture, states
from tests.unit.budget.networks import setting


def searched(model, target, **options):
    fn, params, args = model()
    structure = jp.infer_structure(fn, params, *args)
    search = jp.Search(fn, params, structure, jp.magnitude(params), *args, round_to=1, **options)
    return search.plan(target), jp.cost(fn, params, *args)


@pytest.mark.parametrize("asked", [0.5, 384])
def test_a_cache_fits_its_budget(asked):
    """As a share or in bytes; the small step's own cache is counted."""
    plan, dense = searched(states.decode_with_cache, jp.Target(kv_cache=asked))
    share = plan.measured.kv_cache / (dense.kv_cache if asked > 1 else 1)
    assert 0 < share <= 0.5
    assert plan.predicted.kv_cache == plan.measured.kv_cache


def test_active_parameters_fit_their_budget():
    plan, dense = searched(mixture.top_k_by_gathered_weights, jp.Target(active_params=0.6))
    assert 0.4 < plan.measured.active_params <= 0.6
    assert plan.predicted.active_params == pytest.approx(plan.measured.active_params)
    assert plan.dense["active_params"] == dense.active_params < dense.params


def test_memory_fits_its_budget():
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1)
    plan = search.plan(jp.Target(peak_memory=0.6))
    assert 0.5 < plan.measured.peak_memory <= 0.6
    small = jp.compact(fn, params, plan.masks, x)
    dense = jp.cost(fn, params, x).peak_memory
    assert jp.cost(small.fn, small.params, x).peak_memory / dense == plan.measured.peak_memory


def test_memory_as_a_table_is_that_of_the_small_network():
    """The oracle: the same network, written at these widths."""
    fn, params, structure, scores, x = setting("mlp")
    model = jp.Search(fn, params, structure, scores, x, round_to=8).model
    for choice in itertools.product(*(range(len(c)) for c in model.counts)):
        up, mid = (model.chosen(np.array(choice))[n] for n in model.names)
        shapes = {
            "up": {"kernel": (16, up), "bias": (up,)},
            "mid": {"kernel": (up, mid)}, "down": {"kernel": (mid, 5)},
        }  # fmt: skip
        small = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=_shape)
        if up and mid:
            found = model.tables["peak_memory"].at(np.array(choice))
            assert found == jp.cost(fn, small, x).peak_memory


def _shape(x):
    return isinstance(x, tuple)


def test_the_largest_sum_is_solved_for():
    """The oracle: all choices."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        tables = [rng.uniform(0, 1, (2, 5)).cumsum(1) for _ in range(3)]
        totals = [Total([Term((0,), t[0]), Term((1,), t[1])], 2) for t in tables]
        worth = rng.uniform(0, 1, (2, 5)).cumsum(1)
        score = Total([Term((0,), worth[0]), Term((1,), worth[1])], 2)
        problem = Problem([5, 5], score, {"peak": Largest(totals)}, {"peak": 3.0})
        found = solve(problem)
        every = [np.array(c) for c in itertools.product(range(5), range(5))]
        fitting = [c for c in every if max(t.at(c) for t in totals) <= 3]
        best = max(map(score.at, fitting), default=None)
        assert (found is None) == (best is None)
        assert found is None or (problem.fits(found) and score.at(found) >= 0.95 * best)


def test_a_function_without_a_cache_has_no_budget_of_it():
    fn, params, structure, scores, x = setting("mlp")
    with pytest.raises(ValueError, match=r"hands back no leaf of params anew.*give one decode"):
        jp.search(fn, params, structure, scores, x, target=jp.Target(kv_cache=0.5), round_to=1)


def test_budgets_out_of_reach_name_the_least():
    fn, params, structure, scores, x = setting("mlp")
    with pytest.raises(ValueError, match=r"peak_memory=0.001.*it would be peak_memory=0\.\d+"):
        jp.search(fn, params, structure, scores, x, target=jp.Target(peak_memory=1e-3), round_to=1)
