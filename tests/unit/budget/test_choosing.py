"""Which counts are chosen: objectives, budgets, uniform choices."""

import itertools

import jax
import numpy as np
import pytest

import jaxprune as jp
from tests.unit.budget.networks import HALF, setting


def best_by_trying(search, budgets):
    """The most of the objective, over every choice."""
    problem = search.choices.problem(budgets)
    every = itertools.product(*(range(n) for n in problem.sizes))
    fits = [np.array(c) for c in every if problem.fits(np.array(c))]
    return max(problem.score.at(c) for c in fits)


@pytest.mark.parametrize("objective", ["sum", "proportional", "balanced"])
def test_the_best_of_an_objective_is_found(objective):
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, objective=objective, round_to=4)
    budgets = jp.Target(flops=0.5).budgets(search.dense)
    found = search.choices.worth.at(search.choices.solved(budgets))
    best = best_by_trying(search, budgets)
    assert found >= best - 0.02 * abs(best)


def unequal():
    """The mlp's search; a unit of one dimension is worth what four of the other are."""
    units = {"up/kernel:1": np.arange(64.0) ** 2, "mid/kernel:1": 4 * np.arange(48.0) ** 2}
    fn, params, structure, _, x = setting("mlp")
    return jp.Search(fn, params, structure, units, x, round_to=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [unequal, pytest.param(lambda: jp.Search(*setting("vit"), round_to=2), marks=pytest.mark.slow)],
    ids=["mlp", "vit"],
)
def test_keeps_more_than_uniform(make):
    search = make()
    for fraction in (0.75, 0.5):
        target = jp.Target(flops=fraction)
        ours, uniform = (search.plan(target, verify=False, uniform=u) for u in (False, True))
        assert ours.score > uniform.score


def test_units_of_largest_score_are_kept():
    fn, params, structure, scores, x = setting("mlp")
    plan = jp.search(fn, params, structure, scores, x, target=jp.Target(params=0.5), round_to=1)
    units = structure.unit_scores(scores, jp.reduce.sum)
    for name, kept in plan.keep.items():
        assert np.asarray(units[name])[kept].min() >= np.asarray(units[name])[~kept].max(initial=0)


@pytest.mark.parametrize("worth", [(1.0, 1.0), (3.0, 1.0)])
def test_proportional_empties_nothing_that_is_worth_something(worth):
    """The sum takes one dimension to its least first; shares are weighed by what they hold."""
    fn, params, structure, _, x = setting("mlp")
    names = [n for n, d in structure.dims.items() if not d.frozen]
    units = {n: np.full(structure.dims[n].size, w) for n, w in zip(names, worth)}
    least = {}
    for objective in ("sum", "proportional"):
        plan = jp.search(
            fn, params, structure, units, x, target=jp.Target(flops=0.4), objective=objective,
            round_to=1, verify=False, minimum={"*": 0.125},
        )  # fmt: skip
        least[objective] = min(v.mean() for v in plan.keep.values())
    assert least["proportional"] > least["sum"]


def test_balanced_does_not_see_the_scale_of_a_leaf():
    fn, params, structure, scores, x = setting("mlp")
    scaled = {**scores, "mid": jax.tree.map(lambda s: s * 1e-4, scores["mid"])}

    def keep(scores, objective):
        plan = jp.search(
            fn, params, structure, scores, x, target=HALF, round_to=1, objective=objective
        )
        return {name: kept.tolist() for name, kept in plan.keep.items()}

    balanced = [{n: sum(k) for n, k in keep(s, "balanced").items()} for s in (scores, scaled)]
    assert balanced[0] == balanced[1]
    assert keep(scores, "sum") != keep(scaled, "sum")


def test_the_way_up_has_single_steps_and_leaves_out_what_is_held():
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, device="h100", round_to=1)
    budgets, choices = search._budgets(jp.Target(speedup=1.5)), search.choices
    way = choices.upwards(budgets, choices.full // 4, (), uniform=False)
    assert (way[0] == choices.full // 4).all() and (way[-1] == choices.full).all()
    assert all((b - a).sum() == 1 and (b >= a).all() for a, b in itertools.pairwise(way))
    held = choices.upwards(budgets, choices.full // 4, {0}, uniform=False)
    assert all(c[0] == way[0][0] for c in held) and held[-1][1] == choices.full[1]


def test_scores_of_entries_are_balanced_and_scores_of_units_summed():
    fn, params, structure, scores, x = setting("mlp")
    free = {n: d.size for n, d in structure.dims.items() if not d.frozen}
    units = {n: 100.0**i * np.arange(1.0, size + 1) for i, (n, size) in enumerate(free.items())}
    for given, wanted, not_this in ((scores, "balanced", "sum"), (units, "sum", "balanced")):
        found, named, other = (
            jp.Search(fn, params, structure, given, x, round_to=1, objective=objective).plan(HALF)
            for objective in (None, wanted, not_this)
        )
        assert found.widths == named.widths != other.widths
    staged = jp.Search(fn, params, structure, scores, x, round_to=1).stage(units).plan(HALF)
    assert staged.widths == found.widths
