"""A dimension is emptied below a quarter only where that spares the others much."""

import itertools

import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget.score_tables import ROOM, SHORT
from tests.unit.budget.networks import setting

WORTHLESS = {"up/kernel:1": np.linspace(1e-6, 2e-6, 64), "mid/kernel:1": np.linspace(1, 2, 48)}

FLAT = WORTHLESS | {"mid/kernel:1": np.linspace(0, 1, 48) ** 4}  # most units can be spared


def searching(scores=WORTHLESS, **options):
    fn, params, structure, _, x = setting("mlp")
    return jp.Search(fn, params, structure, scores, x, round_to=1, progress=False, **options)


def kept(search, flops):
    plan = search.plan(jp.Target(flops=flops), verify=False)
    return {name: int(np.sum(units)) for name, units in plan.keep.items()}


def least_shares(scores=FLAT, **options):
    search = searching(scores, **options)
    kept_at = [kept(search, flops) for flops in (0.5, 0.3, 0.2, 0.1)]
    return np.array([min(c["up/kernel:1"] / 64, c["mid/kernel:1"] / 48) for c in kept_at])


def test_the_smallest_dimension_keeps_more_and_as_before_where_a_minimum_is_given():
    room, before = least_shares(), least_shares(minimum={"*": 0.125})
    assert (room >= before).all() and (room > before).any()


def test_scores_that_were_measured_are_taken_as_they_are():
    scores = jp.scores.Measured(FLAT)
    assert least_shares(scores) == pytest.approx(least_shares(minimum={"*": 0.125}))
    assert (least_shares(scores) < least_shares()).any()
    for first, later in ((FLAT, scores), (scores, FLAT)):
        for flops in (0.5, 0.3, 0.2, 0.1):
            assert kept(searching(first).stage(later), flops) == kept(searching(later), flops)


def test_a_deep_target_goes_below():
    search = searching()
    counts = kept(search, 0.05)
    assert counts["up/kernel:1"] < ROOM * 64 or counts["mid/kernel:1"] < ROOM * 48
    with pytest.raises(ValueError, match=r"an eighth of each stays by default"):
        search.plan(jp.Target(flops=0.01), verify=False)


@pytest.mark.parametrize("flops", [0.6, 0.3, 0.2, 0.1, 0.05])
def test_a_shortage_costs_its_part_of_all_scores(flops):
    """Every choice, the slow way: scores kept, less a part of their span for what is missing."""
    search = searching()
    every = np.array(list(itertools.product(*search.model.counts)))
    first, second = (np.cumsum(np.sort(v)[::-1]) for v in WORTHLESS.values())
    score = first[every[:, 0] - 1] + second[every[:, 1] - 1]
    short = np.maximum(1 - every / (ROOM * np.array([64, 48])), 0).sum(1)
    worth = score - SHORT * np.ptp(score) * short
    up, mid = every.T
    cost = 16 * up + up * mid + 5 * mid
    mine = (every == list(kept(search, flops).values())).all(1)
    inside = cost <= flops * cost.max()
    assert inside[mine] and worth[mine] >= worth[inside].max() - 0.05 * np.ptp(score)
