"""The solver against trying everything, and its laws."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.budget.solver import Problem, Term, Total, first_uniform, merged, solve


def rising(rng, shape):
    """A table that rises along each axis, as sizes and costs do."""
    table = rng.uniform(size=shape) ** 3
    for axis in range(len(shape)):
        table = np.cumsum(table, axis=axis)
    return table


def random_problem(seed, dims=4, candidates=4, budgets=1):
    rng = np.random.default_rng(seed)
    pairs = list(itertools.combinations(range(dims), 2))

    def total(which):
        return Total([Term(p, rising(rng, (candidates,) * 2)) for p in which], dims)

    costs = {f"cost {k}": total(pairs) for k in range(budgets)}
    full = np.full(dims, candidates - 1)
    limits = {n: rng.uniform(0.3, 0.9) * c.at(full) for n, c in costs.items()}
    return Problem([candidates] * dims, total(pairs), costs, limits)


def everything(problem):
    every = itertools.product(*(range(n) for n in problem.sizes))
    return [c for c in map(np.array, every) if problem.fits(c)]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 2))
def test_near_the_best_of_all_choices(seed, budgets):
    problem = random_problem(seed, budgets=budgets)
    best = max((problem.score.at(c) for c in everything(problem)), default=None)
    choice = solve(problem)
    if best is None:
        assert choice is None
        return
    assert problem.fits(choice)
    assert problem.score.at(choice) >= 0.9 * best
    uniform = first_uniform(problem)
    assert uniform is None or problem.score.at(choice) >= problem.score.at(uniform)


def test_mostly_the_best_of_all_choices():
    found = []
    for seed in range(20):
        problem = random_problem(seed)
        every = everything(problem)
        if every:
            found.append(problem.score.at(solve(problem)) / max(map(problem.score.at, every)))
    assert np.mean(found) > 0.99


def test_line_is_the_sum_at_each_candidate():
    problem = random_problem(3)
    choice = np.array([1, 2, 0, 3])
    for d in range(4):
        at = [problem.score.at(np.where(np.arange(4) == d, i, choice)) for i in range(4)]
        rest = at[0] - problem.score.line(choice, d)[0]
        np.testing.assert_allclose(problem.score.line(choice, d) + rest, at)


def test_steps_over_a_cliff():
    """Costs that only fall at every second candidate, as on a device with tiles."""
    cost = Total([Term((0,), np.array([1.0, 3, 3, 5, 5]))], 1)
    score = Total([Term((0,), np.arange(5.0))], 1)
    assert solve(Problem([5], score, {"c": cost}, {"c": 3.5})) == 2


def test_all_is_kept_when_all_fits():
    problem = random_problem(0)
    problem.budgets = dict.fromkeys(problem.budgets, 1000000000.0)
    assert (solve(problem) == problem.full()).all()


def test_none_when_nothing_fits():
    problem = random_problem(0)
    problem.budgets = dict.fromkeys(problem.budgets, 1e-09)
    assert solve(problem) is None


@pytest.mark.parametrize("seed", range(3))
def test_merging_terms_changes_no_sum(seed):
    problem = random_problem(seed)
    doubled = Total(merged([*problem.score.terms, *problem.score.terms]), 4)
    choice = np.array([0, 3, 1, 2])
    assert len(doubled.terms) == len(problem.score.terms)
    np.testing.assert_allclose(doubled.at(choice), 2 * problem.score.at(choice))
