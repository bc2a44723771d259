"""A dimension is emptied below a quarter only where a target leaves no choice."""

import itertools

import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget.score_tables import ROOM
from tests.unit.budget.networks import setting

WORTHLESS = {"up/kernel:1": np.linspace(1e-6, 2e-6, 64), "mid/kernel:1": np.linspace(1, 2, 48)}


def searching(**options):
    fn, params, structure, _, x = setting("mlp")
    return jp.Search(fn, params, structure, WORTHLESS, x, round_to=1, progress=False, **options)


def kept(search, flops):
    plan = search.plan(jp.Target(flops=flops), verify=False)
    return {name: int(np.sum(units)) for name, units in plan.keep.items()}


@pytest.mark.parametrize("objective", [None, "proportional", "balanced"])
def test_units_without_worth_keep_a_quarter_of_their_dimension(objective):
    counts = kept(searching(objective=objective), 0.2)
    assert counts["up/kernel:1"] >= ROOM * 64 and counts["mid/kernel:1"] >= ROOM * 48


def test_a_minimum_that_is_given_is_what_counts():
    assert kept(searching(minimum={"*": 0.125}), 0.2)["up/kernel:1"] < ROOM * 64


def test_a_deep_target_goes_below():
    search = searching()
    counts = kept(search, 0.05)
    assert counts["up/kernel:1"] < ROOM * 64 or counts["mid/kernel:1"] < ROOM * 48
    with pytest.raises(ValueError, match=r"an eighth of each stays by default"):
        search.plan(jp.Target(flops=0.01), verify=False)


@pytest.mark.parametrize("flops", [0.6, 0.3, 0.2, 0.1, 0.05])
def test_the_shortage_is_weighed_as_all_scores_together(flops):
    """Every choice, the slow way: scores kept, less the span of all of them for what is missing."""
    search = searching()
    every = np.array(list(itertools.product(*search.model.counts)))
    first, second = (np.cumsum(np.sort(v)[::-1]) for v in WORTHLESS.values())
    score = first[every[:, 0] - 1] + second[every[:, 1] - 1]
    short = np.maximum(1 - every / (ROOM * np.array([64, 48])), 0).sum(1)
    worth = score - np.ptp(score) * short
    up, mid = every.T
    cost = 16 * up + up * mid + 5 * mid
    mine = (every == list(kept(search, flops).values())).all(1)
    inside = cost <= flops * cost.max()
    assert inside[mine] and worth[mine] >= worth[inside].max() - 0.05 * np.ptp(score)
