"""Pruning down to a floor, and fronts of several targets."""

import chex
import pytest

import jaxprune as jp
from tests.unit.budget.networks import accuracy, setting


@pytest.mark.parametrize("finetune", [None, lambda params, masks: params])
def test_prunes_as_far_as_the_metric_allows(finetune):
    fn, params, structure, scores, x = setting("mlp")
    metric = accuracy(fn, params, x)
    found = jp.prune_to_metric(
        fn, params, structure, scores, x,
        metric=metric, floor=0.75, finetune=finetune, round_to=1,
    )  # fmt: skip
    assert found.metric >= 0.75 and metric(found.params) == found.metric
    assert found.plan.measured.flops < 1 and len(found.trace) >= 3
    below = [budget for budget, value in found.trace if value < 0.75]
    assert all(budget < found.plan.target.flops for budget in below)
    assert "floor 0.75" in str(found)


def test_a_front_from_one_search():
    fn, params, structure, scores, x = setting("mlp")
    targets = [jp.Target(flops=f) for f in (0.8, 0.5)]
    metric = accuracy(fn, params, x)
    front = jp.pareto(fn, params, structure, scores, x, targets=targets, metric=metric, round_to=1)
    alone = jp.search(fn, params, structure, scores, x, target=targets[1], round_to=1)
    chex.assert_trees_all_equal(front.plans[1].keep, alone.keep)
    assert [row["metric"] for row in front.rows()] == list(front.metrics)
    assert front.dense == 1 and front.plans[0].score > front.plans[1].score


def test_a_search_prunes_to_a_metric_as_the_function_does():
    fn, params, structure, scores, x = setting("mlp")
    metric, every = accuracy(fn, params, x), []
    search = jp.Search(fn, params, structure, scores, x, round_to=1)
    found = search.to_metric(
        metric, floor=0.75, minimize="params", bisections=2, verify=False,
        progress=lambda tries: every.append(list(tries)) or every[-1],
    )  # fmt: skip
    alone = jp.prune_to_metric(
        fn, params, structure, scores, x, metric=metric, floor=0.75, minimize="params",
        bisections=2, verify=False, round_to=1,
    )  # fmt: skip
    chex.assert_trees_all_equal(found.masks, alone.masks)
    assert every == [[0, 1]] and found.trace == alone.trace
