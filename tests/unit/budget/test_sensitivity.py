"""Curves of a metric over what is removed of one dimension or leaf."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget.sensitivity import Sensitivity
from tests.unit.budget.networks import accuracy

NAN, INF = math.nan, math.inf
PARAMS = {"up": jnp.arange(1.0, 25).reshape(3, 8), "down": jnp.ones((8, 2))}
X = jnp.ones((1, 3))
FRACTION = r"fractions are \(.*\); wanted ascending numbers between 0 and 1"
NUMBER = "wanted one number, larger = better"


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def total(params):
    """16 for the dense network, falling with every unit that goes."""
    return fn(params, X).sum()


def sensitivity(metric=total, of=None, **options):
    options = {"fractions": (0.5,), **options}
    return jp.sensitivity(PARAMS, of, PARAMS, metric=metric, **options)


@pytest.mark.slow
def test_sensitivity_of_dimensions_and_leaves(tmp_path):
    """Both kernels have one shape, so that what is compiled for one serves the other."""
    params = {n: jax.random.normal(jax.random.key(k), (8, 8)) for k, n in enumerate(["up", "down"])}
    fn, x = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], jnp.eye(8)
    structure, scores = jp.infer_structure(fn, params, x), jp.magnitude(params)
    metric = accuracy(fn, params, x)
    by_dim = jp.sensitivity(params, structure, scores, metric=metric, fractions=(0.25, 0.9))
    by_leaf = jp.sensitivity(params, None, scores, metric=metric, fractions=(0.5,))
    assert by_dim.dense == 1 and set(by_dim.curves) == {"up:1"}
    assert set(by_leaf.curves) == {"up", "down"}
    masks = jp.structured(structure, dims="up:1")(scores, 0.9)
    assert by_dim.curves["up:1"][1] == metric(jp.apply_masks(params, masks))
    by_dim.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == by_dim
    assert json.loads((tmp_path / "s.json").read_text())["dense"] == 1


def test_allowed_fraction_is_read_off_the_curve():
    curve = Sensitivity((0.25, 0.5, 0.75), {"a": (1.0, 0.9, 0.5), "b": (0.2, 0.9, 0.9)}, 1.0)
    assert curve.allowed(0.9)["a"] == pytest.approx(0.5)
    assert curve.allowed(0.7)["a"] == pytest.approx(0.625)
    assert curve.allowed(0.9)["b"] == pytest.approx(0.03125)
    assert curve.allowed(1.5) == {"a": 0.0, "b": 0.0}


def test_nan_and_infinity_are_below_every_floor():
    curves = {"nan": (0.9, NAN, 0.9), "inf": (0.9, -INF, 0.9), "first": (NAN, 1.0, 1.0)}
    found = jp.budget.Sensitivity((0.25, 0.5, 0.75), curves, 1.0)
    assert found.allowed(0.5) == {"nan": 0.25, "inf": 0.25, "first": 0.0}
    assert jp.budget.Sensitivity((0.5,), {"a": (1.0,)}, NAN).allowed(0.5) == {"a": 0.0}


def test_a_curve_that_starts_at_infinity_has_no_line():
    assert jp.budget.Sensitivity((0.5,), {"a": (0.0,)}, INF).allowed(0.5) == {"a": 0.0}


def test_saved_sensitivity_is_strict_json(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    curves = {"a": (1.0, NAN), "b": (-INF, INF)}
    jp.budget.Sensitivity((0.25, 0.5), curves, NAN).save(tmp_path / "s.json")
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text, parse_constant=refuse)["curves"]["a"] == [1.0, None]
    again = jp.budget.Sensitivity.load(tmp_path / "s.json")
    np.testing.assert_equal(again.curves, curves)
    assert math.isnan(again.dense) and again.fractions == (0.25, 0.5)


def test_files_with_bare_nan_are_still_read(tmp_path):
    old = '{"fractions": [0.5], "curves": {"a": [NaN]}, "dense": -Infinity}'
    (tmp_path / "old.json").write_text(old)
    again = jp.budget.Sensitivity.load(tmp_path / "old.json")
    assert math.isnan(again.curves["a"][0]) and again.dense == -INF


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
}


@pytest.mark.slow
@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        call()
