"""Pruning down to a floor, and fronts of several targets."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.unit.budget.networks import accuracy, setting

NAN, INF = math.nan, math.inf
PARAMS = {"up": jnp.arange(1.0, 25).reshape(3, 8), "down": jnp.ones((8, 2))}
X = jnp.ones((1, 3))
HALF = jp.Target(params=0.5)
NUMBER = "wanted one number, larger = better"
TREE = "what finetune returned does not match params: it has no leaf 'down' .*; return a tree like"


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def total(params):
    """16 for the dense network, falling with every unit that goes."""
    return fn(params, X).sum()


@functools.cache
def structure():
    return jp.infer_structure(fn, PARAMS, X)


def prune_to_metric(metric=total, floor=9.5, **options):
    options = {"round_to": 1, "verify": False, **options}
    scores = jp.magnitude(PARAMS)
    return jp.prune_to_metric(
        fn, PARAMS, structure(), scores, X, metric=metric, floor=floor, **options
    )


def pareto(targets=(HALF,), **options):
    options = {"round_to": 1, "verify": False, **options}
    return jp.pareto(fn, PARAMS, structure(), jp.magnitude(PARAMS), X, targets=targets, **options)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("verify", [False, True])
def test_a_metric_decides_between_choices_that_meet_the_target(verify):
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1)
    best, even = (search.plan(HALF, verify=verify, uniform=u) for u in (False, True))

    def kept(params):
        return (jnp.abs(params["mid"]["kernel"]).sum(0) > 0).sum()

    units = [int(kept(jp.apply_masks(params, plan.masks))) for plan in (best, even)]
    assert units[0] != units[1]
    for plan, wanted in zip((best, even), units, strict=True):
        near = search.plan(HALF, verify=verify, metric=lambda p, n=wanted: -abs(kept(p) - n))
        chex.assert_trees_all_equal(near.keep, plan.keep)
        assert "chosen by its metric, 0, of those at hand: " in str(near)
        assert near.measured == plan.measured


def double(params, masks):
    return jax.tree.map(lambda w: 2 * w, params)


@pytest.mark.parametrize("metric", [None, total])
def test_a_front_is_finetuned_with_and_without_a_metric(metric):
    front = pareto(metric=metric, finetune=double)
    masked = jp.apply_masks(PARAMS, front.plans[0].masks)
    np.testing.assert_array_equal(front.params[0]["up"], 2 * masked["up"])
    wanted = () if metric is None else (float(total(front.params[0])),)
    assert front.metrics == wanted


def test_a_front_without_metric_and_finetune_has_no_params():
    """So that shapes are enough for it."""
    assert pareto().params == ()


def test_points_of_a_device_that_is_not_here_have_predicted_speedups():
    """Parameters are counted on the compact network, the speed-up isn't measured."""
    front = pareto([1.2], metric=total, device="h100", verify=True, minimum={"*": 1})
    (row,) = front.rows()
    assert "speedup" not in front.plans[0].measured
    assert row["params"] == front.plans[0].measured.params
    assert front.points() == [(front.plans[0].predicted.speedup, front.metrics[0])]


def test_notes_of_a_plan_are_printed():
    found = prune_to_metric()
    noted = dataclasses.replace(found.plan, notes=("the target is missed",))
    assert "note: the target is missed" in str(dataclasses.replace(found, plan=noted))


def test_out_of_reach_is_told_apart_from_below_the_floor():
    with pytest.raises(ValueError, match="3 that were tried is in reach.*at their least") as error:
        prune_to_metric(bisections=3, minimum={"*": 8})
    assert "lower minimum=" in str(error.value.__cause__)
    with pytest.raises(ValueError, match="3 that were tried keeps the .* 15.9.*more bisections="):
        prune_to_metric(bisections=3, floor=15.9)


BAD = {
    "metric returns nothing": (
        lambda: prune_to_metric(lambda p: None),
        TypeError,
        f"metric returned NoneType; {NUMBER}",
    ),
    "metric returns a text": (
        lambda: pareto(metric=lambda p: "0.9"),
        TypeError,
        f"metric returned str; {NUMBER}",
    ),
    "metric returns a complex": (
        lambda: pareto(metric=lambda p: jnp.complex64(1)),
        TypeError,
        rf"metric returned complex64\(\); {NUMBER}",
    ),
    "NaN metric": (
        lambda: prune_to_metric(lambda p: NAN),
        ValueError,
        "dense network's metric is NaN.*give a metric that is a number",
    ),
    "NaN floor": (lambda: prune_to_metric(floor=NAN), ValueError, "below the floor of nan"),
    "no bisections": (
        lambda: prune_to_metric(bisections=0),
        ValueError,
        "bisections is 0; wanted at least 1 budget to try, such as 6",
    ),
    "finetune returns the state": (
        lambda: prune_to_metric(finetune=lambda params, masks: (params, masks)),
        ValueError,
        TREE,
    ),
    "finetune returns nothing": (
        lambda: pareto(finetune=lambda params, masks: None),
        ValueError,
        TREE,
    ),
    "target of prune_to_metric": (
        lambda: prune_to_metric(target=HALF),
        TypeError,
        "prune_to_metric has no option 'target'; its options are metric, .*dims, minimum,.*repeats",
    ),
    "unknown option": (
        lambda: pareto(minimun={"*": 2}),
        TypeError,
        "pareto has no option 'minimun', did you mean 'minimum'; its .*dims, minimum,.*repeats",
    ),
    "metric of a search": (
        lambda: jp.search(
            fn, PARAMS, structure(), PARAMS, X, target=HALF, verify=False, metric=lambda p: p
        ),
        TypeError,
        f"metric returned dict; {NUMBER}",
    ),
    "unknown option of a search": (
        lambda: jp.search(fn, PARAMS, structure(), PARAMS, X, target=HALF, minimun={"*": 2}),
        TypeError,
        "search has no option 'minimun', did you mean 'minimum'; its options are target, ",
    ),
    "one target": (
        lambda: pareto(2.0),
        ValueError,
        r"targets is 2.0; wanted several: write targets=\[2.0\]",
    ),
    "one Target": (
        lambda: pareto(HALF),
        ValueError,
        r"write targets=\[Target\(params=0.5\)\]",
    ),
    "points without speed-up": (
        lambda: pareto(metric=total).points(),
        ValueError,
        r"Target\(params=0.5\) has no speedup to show; write jp.pareto\(..., targets=\[1.5",
    ),
    "points without metric": (
        lambda: pareto([1.2], device="h100", minimum={"*": 1}).points(),
        ValueError,
        r"has no metric to show; write jp.pareto\(..., metric=accuracy",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        call()
