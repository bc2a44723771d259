"""Searches from a target to a plan: what is met, what is said, and what stays as it was."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import api
from jaxprune.budget.score_tables import OBJECTIVES
from jaxprune.structure.select import chosen_dims
from tests.unit.budget.networks import HALF, clockless, close, searching, setting, slow_unless_small


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_unless_small(["mlp", "vit", "scanned gpt"]))
@pytest.mark.parametrize("target", [jp.Target(flops=0.6), jp.Target(params=0.5, bytes=0.8)])
def test_counted_targets_are_met_by_the_compact_network(name, target):
    fn, params, structure, scores, x = setting(name)
    plan = searching(name).plan(target)
    small = jp.compact(fn, params, plan.masks, x)
    dense, found = jp.cost(fn, params, x), jp.cost(small.fn, small.params, x)
    for cost, fraction in target.given.items():
        assert getattr(found, cost) <= fraction * getattr(dense, cost) * (1 + 1e-6)
        assert plan.measured[cost] == pytest.approx(getattr(found, cost) / getattr(dense, cost))
    for dim, kept in plan.keep.items():
        np.testing.assert_array_equal(small.keep[dim], kept)
    close(small, fn, params, plan.masks, x)


def test_absolute_and_fractional_budgets_agree():
    fn, params, structure, scores, x = setting("mlp")
    dense = jp.cost(fn, params, x).flops
    plans = [
        jp.search(fn, params, structure, scores, x, target=jp.Target(flops=f), round_to=1)
        for f in (0.5, 0.5 * dense)
    ]
    chex.assert_trees_all_equal(plans[0].keep, plans[1].keep)
    assert plans[1].predicted.flops == pytest.approx(plans[0].predicted["flops"] * dense)


def test_a_dense_network_that_meets_the_target_stays_whole():
    fn, params, structure, scores, x = setting("mlp")
    plan = jp.search(fn, params, structure, scores, x, target=jp.Target(flops=1.0), round_to=1)
    assert plan.score == 1 and all(kept.all() for kept in plan.keep.values())


@pytest.mark.slow
def test_whole_branches_go_when_they_may():
    fn, params, structure, scores, x = setting("gpt")
    quiet = jax.tree_util.tree_map_with_path(
        lambda path, s: s * (1e-6 if "TransformerBlock_0" in jax.tree_util.keystr(path) else 1),
        scores,
    )
    plan = jp.search(
        fn, params, structure, quiet, x, target=jp.Target(flops=0.6), minimum={"*": 0}, round_to=1,
        objective="sum",
    )  # fmt: skip
    gone = [n for n, kept in plan.keep.items() if not kept.any()]
    assert any("TransformerBlock_0" in n for n in gone)
    assert any("the branch goes" in note for note in plan.notes)
    small = jp.compact(fn, params, plan.masks, x)
    close(small, fn, params, plan.masks, x)


@pytest.mark.slow
def test_scanned_layers_compete_with_widths():
    fn, params, structure, scores, x = setting("scanned gpt")
    layers = chosen_dims(structure, "*layers")
    plan = jp.search(
        fn, params, structure, scores, x, target=HALF, dims="*layers", round_to=1, verify=False
    )
    assert list(plan.keep) == layers and plan.keep[layers[0]].sum() in (1, 2)


def test_scores_of_units():
    fn, params, structure, _, x = setting("mlp")
    units = {"up/kernel:1": np.arange(64.0), "mid/kernel:1": np.ones(48)}
    plan = jp.search(fn, params, structure, units, x, target=HALF, round_to=1)
    kept = plan.keep["up/kernel:1"]
    assert (np.diff(kept.astype(int)) >= 0).all()  # the last units are the best
    assert plan.score < 1


@pytest.mark.parametrize("cost", ["flops", "params", "bytes"])
def test_a_maximum_changes_no_prediction(cost):
    """What is known of the dense network holds at its size, not at the maximum."""
    fn, params, structure, scores, x = setting("mlp")
    plan = jp.search(
        fn, params, structure, scores, x, target=jp.Target(**{cost: 0.9}), maximum={"*": 0.5},
        round_to=1,
    )  # fmt: skip
    assert plan.predicted[cost] == pytest.approx(plan.measured[cost], rel=0.05)
    assert all(v.sum() == v.size // 2 for v in plan.keep.values())  # met without more
    assert plan.score < 0.9  # of the dense network's, not of what the maximum leaves


def test_a_maximum_and_a_speed():
    fn, params, structure, scores, x = setting("mlp")
    plan = jp.search(
        fn, params, structure, scores, x, target=jp.Target(speedup=1.1), maximum={"*": 0.5},
        device="laptop cpu", round_to=1,
    )  # fmt: skip
    assert all(v.sum() == v.size // 2 for v in plan.keep.values())
    assert plan.predicted.speedup > 1.5


def test_limits_of_all_are_those_of_the_chosen():
    """50 is more than another dimension has; that one isn't chosen."""
    fn, params, structure, scores, x = setting("mlp")
    plan = jp.search(
        fn, params, structure, scores, x, target=jp.Target(flops=0.8),
        dims="up*", minimum={"*": 50}, round_to=1,
    )  # fmt: skip
    assert list(plan.keep) == ["up/kernel:1"] and plan.keep["up/kernel:1"].sum() >= 50


@pytest.mark.parametrize("verify", [True, False])
def test_an_estimated_speed_that_is_out_of_reach(verify):
    fn, params, structure, scores, x = setting("mlp")
    with pytest.raises(ValueError, match="cannot be met.*at their least it would be speedup="):
        jp.search(
            fn, params, structure, scores, x, target=jp.Target(speedup=1000.0), device="h100",
            verify=verify,
        )  # fmt: skip


def test_what_is_not_counted_exactly_is_said():
    params = {"w": jnp.ones((8, 16)), "v": jnp.ones((16, 8))}

    def fn(p, x):
        body = lambda h: (h[0] + 1, jnp.tanh(h[1] @ p["w"]) @ p["v"])  # noqa: E731
        return jax.lax.while_loop(lambda h: h[1].sum() < 3.0 * h[0], body, (0, x))[1]

    x = jnp.ones((2, 8))
    structure = jp.infer_structure(fn, params, x)
    plan = jp.search(
        fn, params, structure, jp.magnitude(params), x, target=jp.Target(flops=0.5), round_to=1
    )
    assert any("counted as one iteration" in note for note in plan.notes)


def test_shapes_in_place_of_params():
    fn, params, structure, scores, x = setting("mlp")
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    plan = jp.search(fn, shapes, structure, scores, x, target=jp.Target(params=0.5), round_to=1)
    assert plan.measured.params <= 0.5


def test_random_keys_among_the_params_have_no_score():
    params = {"w": jnp.ones((4, 16)), "v": jnp.ones((16, 2)), "key": jax.random.key(0)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    x = jnp.ones((1, 4))
    structure = jp.infer_structure(fn, params, x)
    plan = jp.search(
        fn, params, structure, jp.magnitude(params), x, target=jp.Target(params=0.5), round_to=1
    )
    assert plan.keep["w:1"].sum() == 8


@pytest.mark.slow
def test_timed_target_is_measured_and_printed(tmp_path):
    """No time is asserted: what was measured is there, beside what was predicted."""
    fn, params, structure, scores, x = setting("mlp")
    table = jp.budget.LatencyTable(tmp_path / "times.json")
    plan = jp.search(
        fn, params, structure, scores, x, target=jp.Target(latency=10.0), dims="mid*",
        maximum={"*": 0.5}, table=table, repeats=3, round_to=16,
    )  # fmt: skip
    assert plan.measured.speedup > 0 and plan.predicted["latency"] > 0
    text = str(plan)
    assert "predicted" in text and "measured" in text and "speedup" in text
    assert len(table) > 4 and len(jp.budget.LatencyTable(tmp_path / "times.json")) == len(table)


@pytest.mark.slow
def test_a_known_device_is_estimated():
    fn, params, structure, scores, x = setting("mlp")
    target = jp.Target(speedup=1.2)
    plan = jp.search(fn, params, structure, scores, x, target=target, device="laptop cpu")
    assert plan.predicted.speedup >= 1.2
    assert any("published peaks" in note for note in plan.notes)


@pytest.mark.slow
def test_a_stage_is_a_new_search_with_those_limits(monkeypatch):
    """Same plan as a search from the beginning; what was timed is not timed again."""
    clockless(monkeypatch)
    fn, params, structure, scores, x = setting("mlp")
    options = {"round_to": 4, "repeats": 2}
    first = jp.Search(
        fn,
        params,
        structure,
        scores,
        x,
        minimum={"*": 4},
        **options,
        table=jp.budget.LatencyTable(False),
    )
    other = {name: np.random.default_rng(0).random(dim.size) for name, dim in structure.dims.items()
             if name in first.model.names}  # fmt: skip
    least = {first.model.names[0]: 32}
    again = first.stage(other, minimum=least)
    assert again.dense["latency"] == first.dense["latency"]
    plan = again.plan(HALF)
    assert plan.keep[first.model.names[0]].sum() >= 32
    fresh = jp.Search(fn, params, structure, other, x, minimum={"*": 4} | least, **options)
    chex.assert_trees_all_equal(plan.keep, fresh.plan(HALF).keep)
    whole = np.array([len(c) - 1 for c in first.model.counts])
    last = np.array([len(c) - 1 for c in again.model.counts])
    for name, total in first.model.tables.items():
        assert again.model.tables[name].at(last) == total.at(whole)


def test_a_later_time_changes_no_earlier_plan():
    """A plan owns its data: its dense costs are those that were known when it was made."""
    search = jp.Search(*setting("mlp"), round_to=1, device="h100")
    plan = search.plan(HALF, verify=False)
    before = dict(plan.dense)
    timed = search.plan(jp.Target(speedup=1.1), verify=False)
    assert "latency" in timed.dense and dict(plan.dense) == before
    plan.dense.clear()
    assert search.plan(HALF, verify=False).dense == timed.dense


@pytest.mark.parametrize("name, of", list(OBJECTIVES.items()))
def test_an_objective_is_a_name_or_its_function_and_a_stage_may_change_it(name, of):
    fn, params, structure, scores, x = setting("mlp")
    named, given = (
        jp.Search(fn, params, structure, scores, x, objective=objective, round_to=1)
        for objective in (name, of)
    )
    staged = jp.Search(fn, params, structure, scores, x, round_to=1).stage(scores, objective=name)
    plans = [search.plan(HALF).keep for search in (named, given, staged)]
    chex.assert_trees_all_equal(*plans)


def test_stages_share_what_was_measured():
    search = jp.Search(*setting("mlp"), round_to=1, device="h100")
    scores = {name: np.ones(size) for name, size in (("up/kernel:1", 64), ("mid/kernel:1", 48))}
    later = search.stage(scores, minimum={"up*": 0.5})
    later.plan(HALF)
    assert search.measured is later.measured and search.measured.points["flops"]
    assert later.plan(HALF, verify=False).keep["up/kernel:1"].sum() >= 32


def test_options_of_the_functions_are_those_of_the_class():
    wanted = inspect.signature(jp.Search).parameters.values()
    assert [p.name for p in wanted if p.kind is p.KEYWORD_ONLY] == [*api.OPTIONS]


# -------------------------------------------------------------------------------- bad input

BAD = {
    "no target": (lambda s: jp.Target(), "nothing to aim at"),
    "negative": (lambda s: jp.Target(flops=-1), "flops=-1.*above 0"),
    "slower": (lambda s: jp.Target(speedup=0.5), "speedup=0.5.*1 or more"),
    "unreachable": (
        lambda s: jp.search(*s[:-1], s[-1], target=jp.Target(flops=1e-4), round_to=1),
        "cannot be met with the 2 dimensions.*would be flops=",
    ),
    "unknown device": (
        lambda s: jp.search(*s, target=jp.Target(speedup=2), device="abacus"),
        "no figures are known of the device 'abacus'.*h100",
    ),
    "negative scores": (
        lambda s: jp.search(*s[:3], jax.tree.map(jnp.negative, s[3]), s[4], target=HALF),
        "the scores of .* are -.*jnp.abs",
    ),
    "zero scores": (
        lambda s: jp.search(*s[:3], jax.tree.map(jnp.zeros_like, s[3]), s[4], target=HALF),
        "all scores are 0",
    ),
    "scores of another tree": (
        lambda s: jp.search(*s[:3], [1.0], s[4], target=HALF),
        "scores have another structure .*wanted one like params",
    ),
    "unit scores of another size": (
        lambda s: jp.search(*s[:3], units_of(s) | {"up/kernel:1": np.ones(3)}, s[4], target=HALF),
        r"up/kernel:1 have shape \(3,\), wanted \(64,\)",
    ),
    "unknown dims": (
        lambda s: jp.search(*s, target=HALF, dims="conv*"),
        "matches no prunable dimension",
    ),
    "minimum of others": (
        lambda s: jp.search(*s, target=HALF, dims="up*", minimum={"mid*": 2}),
        r"minimum=\{'mid\*': 2\} names none of the dimensions that may change.*dims=",
    ),
    "minimum above": (
        lambda s: jp.search(*s, target=HALF, minimum={"up*": 99}),
        "minimum={'up\\*': 99}: up/kernel:1 has 64 units; wanted a number of units, or a fraction",
    ),
    "minimum above maximum": (
        lambda s: jp.search(*s, target=HALF, maximum={"up*": 9}, minimum={"*": 10}),
        "minimum of up/kernel:1 is 10, above its maximum 9",
    ),
    "infinite scores": (
        lambda s: jp.search(*s[:3], jax.tree.map(lambda x: x * jnp.inf, s[3]), s[4], target=HALF),
        "the scores of .* are (nan|inf) somewhere.*infinities",
    ),
    "a dimension without scores": (
        lambda s: jp.search(*s[:3], {"up/kernel:1": np.ones(64)}, s[4], target=HALF),
        r"none for \['mid/kernel:1'\].*dims=",
    ),
    "scores of no dimension": (
        lambda s: jp.search(*s[:3], units_of(s) | {"mdi": np.ones(3)}, s[4], target=HALF),
        r"\['mdi'\] name no dimension",
    ),
    "zero scores of units": (
        lambda s: jp.search(
            *s[:3], {n: 0 * u for n, u in units_of(s).items()}, s[4], target=HALF
        ),
        "all scores are 0",
    ),
    "scores of another shape": (
        lambda s: jp.search(*s[:3], jax.tree.map(lambda x: x[:1], s[3]), s[4], target=HALF),
        "the scores of .* have shape .* wanted .*one number for each entry",
    ),
    "params of another shape": (
        lambda s: jp.search(s[0], jax.tree.map(lambda x: x[:1], s[1]), *s[2:], target=HALF),
        "has shape .*the structure was found for .*jp.infer_structure",
    ),
    "params of another tree": (
        lambda s: jp.search(s[0], [1.0], *s[2:], target=HALF),
        "params have another structure than those .*jp.infer_structure",
    ),
    "no dims": (lambda s: jp.search(*s, target=HALF, dims=[]), 'dims is empty; write dims="\\*"'),
    "a minimum that names nothing": (
        lambda s: jp.search(*s, target=HALF, minimum={"z": 3}),
        "minimum='z' matches no prunable dimension",
    ),
    "a negative minimum": (
        lambda s: jp.search(*s, target=HALF, minimum={"*": -0.5}),
        "minimum={'\\*': -0.5}: .* wanted a number of units",
    ),
    "a NaN minimum": (
        lambda s: jp.search(*s, target=HALF, minimum={"*": float("nan")}),
        "minimum={'\\*': nan}: .* wanted a number of units",
    ),
    "a broken number of units": (
        lambda s: jp.search(*s, target=HALF, minimum={"*": 2.7}),
        "minimum={'\\*': 2.7}: .* wanted a number of units",
    ),
    "a word as a minimum": (
        lambda s: jp.search(*s, target=HALF, minimum={"*": "half"}),
        "minimum={'\\*': 'half'}: .* wanted a number of units",
    ),
    "round_to": (
        lambda s: jp.search(*s, target=HALF, round_to=0), "round_to is 0; wanted a whole number"
    ),
    "objective": (
        lambda s: jp.search(*s, target=HALF, objective="best"),
        "objective is 'best'; wanted one of .* or a function",
    ),
    "an objective of one number": (
        lambda s: jp.search(*s, target=HALF, objective=lambda whole, share: whole),
        r"objective gave an array of shape \(\) for shares of shape",
    ),
    "an objective of NaN": (
        lambda s: jp.search(*s, target=HALF, objective=lambda whole, share: share * jnp.nan),
        "wanted a finite number for each share",
    ),
    "fractions": (
        lambda s: jp.sensitivity(s[1], None, s[3], metric=lambda p: 0.0, fractions=(0.5, 1.5)),
        "ascending numbers between 0 and 1",
    ),
    "no leaf": (
        lambda s: jp.sensitivity(
            s[1], None, s[3], metric=lambda p: 0.0, where=lambda path, leaf: False
        ),
        "chooses no leaf",
    ),
    "dense below the floor": (
        lambda s: jp.prune_to_metric(*s, metric=lambda p: 0.5, floor=0.6),
        "dense network's metric is 0.5, below the floor",
    ),
    "no budget keeps the floor": (
        lambda s: jp.prune_to_metric(
            *s, metric=lambda p: float(sum((x != 0).all() for x in jax.tree.leaves(p))),
            floor=4.0, bisections=2,
        ),
        "no budget of 2 that were tried",
    ),
    "minimize": (
        lambda s: jp.prune_to_metric(*s, metric=lambda p: 1.0, floor=0.5, minimize="watts"),
        "minimize is 'watts'",
    ),
    "a stage above the maximum": (
        lambda s: jp.Search(*s, maximum={"*": 9}, device="h100").stage(s[3], minimum={"up*": 10}),
        "minimum of up/kernel:1 is 10, above its maximum 9",
    ),
    "scores of a stage": (
        lambda s: jp.Search(*s, device="h100").stage({"up/kernel:1": np.ones(64)}),
        r"none for \['mid/kernel:1'\].*dims=",
    ),
    "no targets": (lambda s: jp.pareto(*s, targets=[]), "got no targets"),
}  # fmt: skip


def units_of(s):
    """Scores of the units of every dimension that may change."""
    return {n: np.ones(d.size) for n, d in s[2].dims.items() if not d.frozen}


WRONG_KINDS = {
    "target": ({"target": 2.0}, r"target is 2.0; write target=jp.Target\(speedup=2.0\)"),
    "device": ({"target": HALF, "device": 3}, "device is 3; wanted a name among jp.budget.DEVICES"),
    "table": ({"target": HALF, "table": "t"}, "table is 't'; write table=jp.budget.LatencyTable"),
    "minimum": ({"target": HALF, "minimum": 3}, 'minimum is 3; write minimum={"\\*": 64}'),
    "dims": ({"target": HALF, "dims": None}, "dims is None; wanted names or labels"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_KINDS)
def test_what_is_of_another_kind(name):
    options, message = WRONG_KINDS[name]
    with pytest.raises(TypeError, match=message):
        jp.search(*setting("mlp"), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(setting("mlp"))


def test_nothing_prunable():
    params = {"kernel": jnp.ones((4, 3))}
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    x = jnp.ones((2, 4))
    structure = jp.infer_structure(fn, params, x)
    with pytest.raises(ValueError, match="matches no prunable dimension.*frozen"):
        jp.search(fn, params, structure, params, x, target=HALF)
