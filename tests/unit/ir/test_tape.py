"""The tape: source lines are looked up when somebody asks, and then they are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.ir import compat, tape
from jaxprune.ir.content import COMPUTE, LARGEST, content
from jaxprune.rules import registry

X = jnp.arange(6.0).reshape(2, 3)


def taped(fn):
    closed = jax.make_jaxpr(fn)(X)
    return tape.build(closed, [tape.Value(v.aval) for v in closed.jaxpr.invars], registry.couple)


def test_no_source_line_is_looked_up_before_it_is_asked_for(monkeypatch):
    closed = jax.make_jaxpr(lambda x: jnp.sin(x) @ jnp.cos(x).T)(X)
    asked = []
    monkeypatch.setattr(compat, "source_line", lambda eqn: asked.append(eqn) or "model.py:1 (f)")
    program = tape.build(closed, [tape.Value(X.aval)], registry.couple)
    assert not asked
    last = program.steps[-1]
    assert [last.where, last.where] == ["model.py:1 (f)"] * 2
    assert asked == [last.eqn]


def test_a_step_without_a_line_of_its_own_goes_by_the_nearest_enclosing_one(monkeypatch):
    lines = {"jit": "model.py:7 (block)"}
    monkeypatch.setattr(compat, "source_line", lambda eqn: lines.get(eqn.primitive.name, ""))
    inner = jax.jit(jnp.sin)
    (step,) = taped(lambda x: inner(x)).steps
    assert (step.name, step.where) == ("sin", "model.py:7 (block)")


def test_a_conflict_of_layouts_names_the_users_line():
    flat = jax.make_jaxpr(lambda x, y: x.reshape(6) + y.reshape(6))(X, X.T)
    inputs = [tape.Value(v.aval) for v in flat.jaxpr.invars]
    tape.build(flat, inputs, registry.couple)
    for value in inputs:  # 2 x 3 and 3 x 2: no common layout
        assert "layouts that do not nest in add at test_tape.py:" in value.axes[0].reasons[0]


IDS = jnp.array([3, -1, 0, 2], jnp.int32)
HALF = jnp.array([0.5, -1.5, 2.0, 7.0], jnp.bfloat16)

CONSTANTS = {
    "iota": lambda: lax.broadcasted_iota(jnp.int32, (2, 3), 1),
    "index from the end": lambda: jnp.where(IDS < 0, IDS + 4, IDS)[:, None],
    "reversed run": lambda: (7 - jnp.arange(8)).reshape(2, 4).T[::-1],
    "reshape of another order": lambda: lax.reshape(jnp.arange(6).reshape(2, 3), (6,), (1, 0)),
    "stack": lambda: jnp.concatenate([IDS, jnp.arange(3), jnp.zeros(1, jnp.int32)])[1:7:2],
    "clamp": lambda: lax.clamp(0, IDS, 2),
    "remainder": lambda: lax.rem(IDS * 5, jnp.full(4, 3)),
    "signs": lambda: -lax.max(IDS, 1 - IDS) * lax.min(IDS, jnp.int32(1)),
    "comparisons": lambda: ((IDS > 1) & (IDS != 2)) | ~(IDS >= 0) | (IDS == 0) | (IDS <= -1),
    "half precision": lambda: (HALF * 3 - HALF).astype(jnp.int32),
    "overflow": lambda: jnp.array([200, 100], jnp.uint8) + jnp.array([100, 100], jnp.uint8),
    "squeeze": lambda: jnp.squeeze(IDS[None, :, None], (0, 2)),
    "called": lambda: jax.jit(lambda n: n + 1)(IDS),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTANTS)
def test_numbers_that_a_program_is_written_with_are_those_that_jax_computes(name):
    (output,) = taped(lambda x: CONSTANTS[name]()).outputs
    found, expected = content(output), CONSTANTS[name]()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + 1,
        lambda x: jnp.sin(jnp.arange(3.0)),  # not in the table
        lambda x: jnp.arange(LARGEST + 1),
    ],
)
def test_other_numbers_are_not_known(fn):
    (output,) = taped(fn).outputs
    assert content(output) is None and "sin" not in COMPUTE
