"""What sensitivities, fronts, their targets, devices and plots say to bad input."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

NAN, INF = math.nan, math.inf
PARAMS = {"up": jnp.arange(1.0, 25).reshape(3, 8), "down": jnp.ones((8, 2))}
X = jnp.ones((1, 3))
HALF = jp.Target(params=0.5)


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


def sensitivity(metric=total, of=None, **options):
    options = {"fractions": (0.5,), **options}
    return jp.sensitivity(PARAMS, of, PARAMS, metric=metric, **options)


# ------------------------------------------------------------------------------- sensitivity


def test_nan_and_infinity_are_below_every_floor():
    curves = {"nan": (0.9, NAN, 0.9), "inf": (0.9, -INF, 0.9), "first": (NAN, 1.0, 1.0)}
    found = jp.Sensitivity((0.25, 0.5, 0.75), curves, 1.0)
    assert found.allowed(0.5) == {"nan": 0.25, "inf": 0.25, "first": 0.0}
    assert jp.Sensitivity((0.5,), {"a": (1.0,)}, NAN).allowed(0.5) == {"a": 0.0}


def test_a_curve_that_starts_at_infinity_has_no_line():
    assert jp.Sensitivity((0.5,), {"a": (0.0,)}, INF).allowed(0.5) == {"a": 0.0}


def test_saved_sensitivity_is_strict_json(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    curves = {"a": (1.0, NAN), "b": (-INF, INF)}
    jp.Sensitivity((0.25, 0.5), curves, NAN).save(tmp_path / "s.json")
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text, parse_constant=refuse)["curves"]["a"] == [1.0, None]
    again = jp.Sensitivity.load(tmp_path / "s.json")
    np.testing.assert_equal(again.curves, curves)
    assert math.isnan(again.dense) and again.fractions == (0.25, 0.5)


def test_files_with_bare_nan_are_still_read(tmp_path):
    old = '{"fractions": [0.5], "curves": {"a": [NaN]}, "dense": -Infinity}'
    (tmp_path / "old.json").write_text(old)
    again = jp.Sensitivity.load(tmp_path / "old.json")
    assert math.isnan(again.curves["a"][0]) and again.dense == -INF


# ---------------------------------------------------------------------------------- fronts


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


# ------------------------------------------------------------------------- targets and devices


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.array(2), jnp.float32(2), jnp.bfloat16(2), jnp.int32(2)]
)
def test_scalars_of_all_kinds_are_targets(value):
    target = jp.Target(speedup=value)
    assert target == jp.Target(speedup=2) and hash(target) == hash(jp.Target(speedup=2))
    assert isinstance(target.speedup, int | float)


def device(flops, bandwidth=1e9, tile=8):
    return jp.Device("mine", flops=flops, bandwidth=bandwidth, tile=tile, source="a guess")


def test_a_type_without_a_peak_has_that_of_float32_or_the_least():
    assert device({"float32": 2e12, "float16": 1e12}).peak("int8") == 2e12
    assert device({"bfloat16": 2e12, "int8": 4e12}).peak("float32") == 2e12
    assert device({"bfloat16": 2e12, "int8": 4e12}).peak("int8") == 4e12


def test_a_device_without_float32_estimates():
    (plan,) = pareto([1.0], device=device({"bfloat16": 1e12})).plans
    assert plan.predicted.speedup >= 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": {}}', '{"identity": 1}', "\x00"])
def test_a_corrupt_table_is_named(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"table .*t.json can't be read .*; delete it to measure"):
        jp.LatencyTable(tmp_path / "t.json")


# -------------------------------------------------------------------------------------- plots


def test_several_patterns_of_dimensions_are_drawn():
    plt = pytest.importorskip("matplotlib.pyplot")
    every = [d.name for d in structure().dims.values()]
    together, apart = jp.plot.structure(structure(), every), jp.plot.structure(structure(), "*")
    assert together.get_title() == apart.get_title()
    plan = pareto().plans[0]
    labels = [label for label, *_ in plan.widths]
    assert len(jp.plot.widths(plan, dims=labels).get_yticklabels()) == len(labels)
    plt.close("all")


# ---------------------------------------------------------------------------------- bad input

FRACTION = r"fractions are \(.*\); wanted ascending numbers between 0 and 1"
NUMBER = "wanted one number, larger = better"
TREE = "what finetune returned does not match params: it has no leaf 'down'; return a tree like"
SERIES = r"accuracy_speedup wants \{name: \[\(speed-up, accuracy\), ...\]\}, got "

BAD = {
    "NaN fraction": (lambda: sensitivity(fractions=(NAN,)), ValueError, FRACTION),
    "falling fractions": (lambda: sensitivity(fractions=(0.5, 0.2)), ValueError, FRACTION),
    "one fraction": (
        lambda: sensitivity(fractions=0.5),
        ValueError,
        r"fractions is 0.5; wanted several: write fractions=\[0.5\]",
    ),
    "dims of no structure": (
        lambda: sensitivity(dims="up*"),
        ValueError,
        r"dims='up\*' are dimensions of a structure.*give jp.infer_structure",
    ),
    "scores in place of a structure": (
        lambda: sensitivity(of=PARAMS),
        TypeError,
        r"structure of jp.sensitivity is dict; .*write jp.sensitivity\(params, structure, scores",
    ),
    "metric of a batch": (
        lambda: sensitivity(lambda p: fn(p, X)),
        TypeError,
        rf"metric returned float32\(1, 2\); {NUMBER}",
    ),
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
        "prune_to_metric has no option 'target'; those that it hands on .*dims, minimum,.*repeats",
    ),
    "unknown option": (
        lambda: pareto(minimun={"*": 2}),
        TypeError,
        "pareto has no option 'minimun'; those that it hands on .*dims, minimum,.*repeats",
    ),
    "unknown option of a search": (
        lambda: jp.search(fn, PARAMS, structure(), PARAMS, X, target=HALF, minimun={"*": 2}),
        TypeError,
        "search has no option 'minimun'; those that it hands on to jp.Search are dims, minimum,",
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
    "text": (
        lambda: jp.Target(speedup="2"),
        TypeError,
        r"Target\(speedup='2'\): wanted a finite number of 1 or more",
    ),
    "list": (lambda: jp.Target(flops=[0.5]), TypeError, r"Target\(flops=\[0.5\]\): wanted a fin"),
    "array": (lambda: jp.Target(flops=np.ones(2)), TypeError, "wanted a finite number above 0"),
    "boolean": (lambda: jp.Target(params=True), TypeError, r"Target\(params=True\): wanted"),
    "JAX boolean": (lambda: jp.Target(params=jnp.array(True)), TypeError, "number above 0"),
    "infinite": (lambda: jp.Target(speedup=INF), ValueError, r"speedup=inf\): wanted a finite"),
    "NaN": (lambda: jp.Target(latency=NAN), ValueError, r"latency=nan\): wanted a finite"),
    "no peaks": (lambda: device({}), ValueError, r"flops=\{\}\): wanted a peak in FLOP/s by type"),
    "one peak": (
        lambda: device(1e12),
        ValueError,
        r"'mine', flops=1000000000000.0\): wanted a peak",
    ),
    "negative peak": (
        lambda: device({"int8": -1}),
        ValueError,
        r"jp.Device\('mine', flops=\{'int8': -1\}\): wanted a finite number above 0",
    ),
    "text peak": (lambda: device({"int8": "1e12"}), TypeError, r"'int8': '1e12'\}\): wanted"),
    "no bandwidth": (
        lambda: device({"int8": 1}, bandwidth=0),
        ValueError,
        r"bandwidth=0\): wanted a finite number above 0",
    ),
    "no tile": (
        lambda: device({"int8": 1}, tile=0),
        ValueError,
        r"tile=0\): wanted a finite number of 1 or more",
    ),
    "one dimension of several is unknown": (
        lambda: jp.plot.structure(structure(), dims=["*", "heads"]),
        ValueError,
        "no dimension matches 'heads'",
    ),
    "no dimensions": (
        lambda: jp.plot.structure(structure(), dims=[]),
        ValueError,
        "dims is empty; wanted names or labels",
    ),
    "curves alone": (
        lambda: jp.plot.sensitivity({"up": (0.9, 0.4)}),
        TypeError,
        r"plot.sensitivity wants what jp.sensitivity\(params, structure, .*\) returned, got dict",
    ),
    "points without a name": (
        lambda: jp.plot.accuracy_speedup([(1.4, 0.9)]),
        TypeError,
        SERIES + "list",
    ),
    "a front in place of its points": (
        lambda: jp.plot.accuracy_speedup({"a": jp.ParetoFront(())}),
        TypeError,
        SERIES + "ParetoFront",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        call()
