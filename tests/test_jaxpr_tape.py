"""The tape: source lines are looked up when somebody asks, and then they are right."""

import jax
import jax.numpy as jnp

from jaxprune.jaxpr import compat, tape
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
        assert "layouts that do not nest in add at test_jaxpr_tape.py:" in value.axes[0].reasons[0]
