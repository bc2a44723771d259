"""Operations: their sum is what ``jp.cost`` says, at full size and at the sizes that are left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.costs import operations
from jaxprune.ir import axes
from jaxprune.structure import infer


def sds(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def read(fn, params, *args, dims=()):
    """The operations of a coupled program, and the axes of its dimensions of these sizes."""
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    program = infer.couple(closed, out_shape, params, args)
    leaves = [leaf for v in program.param_values for axis in v.axes for leaf in axes.leaves(axis)]
    free = [next(leaf for leaf in leaves if leaf.size == size) for size in dims]
    return operations.read(program.tape, free), free


def summed(found, sizes):
    alone = sum(int(operations.nbytes(v, sizes)) for v in found.alone)
    flops = sum(int(op.flops(sizes)) for op in found.operations)
    return flops, alone + sum(int(op.bytes(sizes)) for op in found.operations)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]


def mlp_params(width):
    return {"up": sds(6, width), "b": sds(width), "down": sds(width, 3)}


def layers(p, x):
    def layer(x, w):
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"] * p["scale"], x.sum()

    return lax.scan(layer, x, {"up": p["up"], "down": p["down"]})


def layers_params(width):
    return {"up": sds(5, 6, width), "down": sds(5, width, 6), "scale": sds(6)}


def lookup(p, ids):
    h = p["table"][ids]
    return h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True)) @ p["out"]


def lookup_params(width):
    return {"table": sds(11, width), "out": sds(width, 3)}


def rounds(p, x):
    return lax.while_loop(lambda c: c.sum() < 9, lambda c: jnp.tanh(c @ p["w"]), x)


def branches(p, x):
    dear, cheap = (lambda x: x @ p["w"] @ p["w"]), (lambda x: x * 2)
    return lax.cond(x.sum() > 0, dear, cheap, x)


PROGRAMS = {
    "mlp": (mlp, mlp_params(8), sds(4, 6)),
    "layers": (layers, layers_params(8), sds(4, 6)),
    "checkpoint": (jax.checkpoint(mlp), mlp_params(8), sds(4, 6)),
    "lookup": (lookup, lookup_params(8), jax.ShapeDtypeStruct((4, 2), jnp.int32)),
    "while": (rounds, {"w": sds(6, 6)}, sds(4, 6)),
    "cond": (branches, {"w": sds(6, 6)}, sds(4, 6)),
    "constants": (lambda p, x: (x + jnp.arange(6.0)) @ p["w"] + 1, {"w": sds(6, 6)}, sds(4, 6)),
    "unused": (lambda p, x: (p["b"], x * 2), {"b": sds(3), "w": sds(6, 6)}, sds(4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_operations_of_a_coupled_program_sum_up_to_its_cost(name):
    fn, params, x = PROGRAMS[name]
    cost, (found, _) = jp.cost(fn, params, x), read(fn, params, x)
    assert summed(found, {}) == (cost.flops, cost.bytes)
    assert found.notes == cost.notes


@pytest.mark.parametrize(
    "fn, params_of, x",
    [
        (mlp, mlp_params, sds(4, 6)),
        (jax.checkpoint(mlp), mlp_params, sds(4, 6)),
        (layers, layers_params, sds(4, 6)),
        (lookup, lookup_params, jax.ShapeDtypeStruct((4, 2), jnp.int32)),
    ],
)
def test_at_fewer_units_they_cost_what_the_smaller_program_does(fn, params_of, x):
    found, (width,) = read(fn, params_of(8), x, dims=(8,))
    for count in (1, 5, 8):
        small = jp.cost(fn, params_of(count), x)
        assert summed(found, {width: count}) == (small.flops, small.bytes)


def test_costs_take_many_counts_at_once():
    found, (width,) = read(mlp, mlp_params(8), sds(4, 6), dims=(8,))
    counts = np.arange(1, 9)
    flops = sum(op.flops({width: counts}) for op in found.operations if width in op.dims)
    assert (flops > 0).all() and (np.diff(flops) > 0).all()


def test_a_transform_takes_many_counts_at_once():
    """The axis that passes may be pruned; its cost is that of each count alone."""

    def spectra(p, x):
        return jnp.abs(jnp.fft.rfft((x @ p["w"]).T)).sum(1) @ p["out"]

    params = {"w": sds(6, 8), "out": sds(8, 3)}
    found, (width,) = read(spectra, params, sds(4, 6), dims=(8,))
    (fft,) = (op for op in found.operations if op.step.name == "fft")
    each = [int(fft.flops({width: n})) for n in range(1, 9)]
    assert fft.flops({width: np.arange(1, 9)}).tolist() == each


def every_step_is_needed(tape):
    needed = set(tape.outputs)
    for step in reversed(tape.steps):
        if not step.eqn.effects and needed.isdisjoint(step.outs):
            return False
        needed.update(step.ins)
    return all(every_step_is_needed(sub) for step in tape.steps for sub in step.subs)


def wasteful(p, x):
    """Half of what each call gives is dropped."""
    twice = jax.jit(lambda x: (x @ p["w"], jnp.sin(x) @ p["w"]))
    kept, _ = jax.jit(lambda x: twice(jnp.cos(x)))(x)
    jax.lax.scan(lambda c, _: (c @ p["w"], c), kept, None, 3)
    return jax.checkpoint(lambda x: twice(x)[0])(kept)


def test_a_tape_holds_no_dead_steps():
    """Liveness is decided once, as a tape is built, across the calls that it inlines."""
    params, x = {"w": sds(6, 6)}, sds(4, 6)
    closed, out_shape = jax.make_jaxpr(wasteful, return_shape=True)(params, x)
    program = infer.couple(closed, out_shape, params, (x,))
    assert every_step_is_needed(program.tape)
    assert jp.cost(wasteful, params, x).by_primitive["dot_general"] == 2 * 2 * 4 * 6 * 6
