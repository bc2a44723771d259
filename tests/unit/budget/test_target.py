"""What is asked for: numbers of all kinds, and what is no target."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget.target import Budget

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.array(2), jnp.float32(2), jnp.bfloat16(2), jnp.int32(2)]
)
def test_scalars_of_all_kinds_are_targets(value):
    target = jp.Target(speedup=value)
    assert target == jp.Target(speedup=2) and hash(target) == hash(jp.Target(speedup=2))
    assert isinstance(target.speedup, int | float)


def test_budgets_name_what_they_lack():
    with pytest.raises(AttributeError, match="no 'watts' among"):
        _ = Budget(flops=1.0).watts


BAD = {
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
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        call()
