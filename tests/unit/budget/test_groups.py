"""Operations that are timed in one program."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import groups, model
from jaxprune.compaction.blocks import View
from jaxprune.costs import operations
from jaxprune.structure import infer
from tests.unit.budget.networks import NETWORKS, built, setting


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_groups_hold_every_step_once_and_all_flops(name):
    made = built(name)
    inside = [op for g in made.groups for op in operations.inside(g.steps, g.repeats)]
    assert sorted(id(op.step) for op in inside) == sorted(id(op.step) for op in made.ops)
    full = {d: d.size for d in made.axes}
    flops = sum(float(g.work(full)) for g in made.groups)
    assert flops == sum(float(op.flops(full)) for op in made.ops)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_groups_compute_what_the_network_computes(name):
    """The oracle: all groups of the outermost program, one after the other, at full size."""
    fn, params, structure, _, x = setting(name)
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, x)
    param_axes, _ = infer.copy_axes(structure.param_axes)
    program = infer.couple(closed, out_shape, params, (x,), param_axes)

    @jax.jit
    def in_groups(params, x):
        env = dict(zip(program.tape.inputs, jax.tree.leaves((params, x))))
        view = View({})
        for g in ordered(groups.groups(program.tape, []), env):
            env |= dict(zip(g.outs, groups.evaluate(g, view, [env[v] for v in g.ins])))
        return [env[v] for v in program.tape.outputs]

    wanted = jax.tree.leaves(jax.jit(fn)(params, x))
    chex.assert_trees_all_close(in_groups(params, x), wanted, rtol=2e-4, atol=2e-5)


def ordered(every, known):
    """Groups in an order in which all that they read is there: there is one, or it never ends."""
    known, left = set(known), list(every)
    while left:
        ready = [g for g in left if known.issuperset(g.ins)]
        assert ready, "two groups wait for each other"
        yield from ready
        known |= {v for g in ready for v in g.outs}
        left = [g for g in left if g not in ready]


@pytest.mark.parametrize("name", ["vit", "lstm"])
def test_groups_are_evaluated_at_other_widths(name):
    made = built(name)
    half = {d: max(1, d.size // 2) for d in made.axes}
    view = View({d: np.arange(n) for d, n in half.items()})
    for g in made.groups:
        xs = [jax.ShapeDtypeStruct(view.shape(v.axes), v.aval.dtype) for v in g.ins]
        ys = jax.eval_shape(functools.partial(groups.evaluate, g, view), xs)
        assert [y.shape for y in ys] == [view.shape(v.axes) for v in g.outs]


def test_a_loop_of_few_dimensions_is_one_group_and_one_of_many_is_not():
    loops = {n: [s.name for g in built(n).groups for s in g.steps] for n in ("lstm", "scanned gpt")}
    assert loops["lstm"].count("scan") == 2 and "dot_general" in loops["scanned gpt"]
    assert "scan" not in loops["scanned gpt"]


def test_a_norm_and_an_activation_are_a_pass_each():
    def fn(p, x):
        y = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-6) * p["scale"]
        return x + jax.nn.gelu(y @ p["up"] + p["bias"]) @ p["down"]

    params = {"scale": jnp.ones(8), "up": jnp.ones((8, 32)), "bias": jnp.ones(32)}
    params["down"] = jnp.ones((32, 8))
    x = jnp.ones((2, 8))
    structure = jp.infer_structure(fn, params, x)
    found = model.build(fn, params, (x,), structure, ["up:1"], 1, {}).groups
    names = [{s.name for s in g.steps} for g in found]
    assert [n for n in names if "dot_general" in n] == [{"dot_general"}] * 2
    norm, activation, residual = (g for g in found if g.steps[0].name != "dot_general")
    assert len(norm.ins) == 2 and not norm.dims  # x and the scale
    assert len(activation.ins) == 2 and len(activation.dims) == 1  # a product and the bias
    assert [s.name for s in residual.steps] == ["add"]


def test_names_of_groups_tell_work_apart_and_nothing_else():
    once, again = built("gpt"), built.__wrapped__("gpt")
    names = [
        [groups.name_of(g, {d: d.size for d in g.dims}) for g in m.groups] for m in (once, again)
    ]
    assert names[0] == names[1]
    assert len(set(names[0])) < len(names[0])  # two equal blocks
    g = max(once.groups, key=lambda g: len(g.dims))
    counts = {d: d.size for d in g.dims}
    fewer = counts | {g.dims[0]: 1}
    assert groups.name_of(g, counts) != groups.name_of(g, fewer)
