"""Devices that are known by their published peaks."""

import pytest

import jaxprune as jp
from tests.unit.budget.networks import setting


def device(flops, bandwidth=1e9, tile=8):
    return jp.budget.Device("mine", flops=flops, bandwidth=bandwidth, tile=tile, source="a guess")


def test_a_type_without_a_peak_has_that_of_float32_or_the_least():
    assert device({"float32": 2e12, "float16": 1e12}).peak("int8") == 2e12
    assert device({"bfloat16": 2e12, "int8": 4e12}).peak("float32") == 2e12
    assert device({"bfloat16": 2e12, "int8": 4e12}).peak("int8") == 4e12


def test_a_device_without_float32_estimates():
    fn, params, structure, scores, x = setting("mlp")
    plan = jp.search(
        fn, params, structure, scores, x, target=jp.Target(speedup=1.0), verify=False, round_to=1,
        device=device({"bfloat16": 1e12}),
    )  # fmt: skip
    assert plan.predicted.speedup >= 1


BAD = {
    "no peaks": (lambda: device({}), ValueError, r"flops=\{\}\): wanted a peak in FLOP/s by type"),
    "one peak": (
        lambda: device(1e12),
        ValueError,
        r"'mine', flops=1000000000000.0\): wanted a peak",
    ),
    "negative peak": (
        lambda: device({"int8": -1}),
        ValueError,
        r"jp.budget.Device\('mine', flops=\{'int8': -1\}\): wanted a finite number above 0",
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
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        call()
