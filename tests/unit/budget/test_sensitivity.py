"""Curves of a metric over what is removed of one dimension or leaf."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune.budget.sensitivity import Sensitivity
from tests.unit.budget.networks import accuracy


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
