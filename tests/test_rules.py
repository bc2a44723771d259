"""Primitives inside a network: which hidden units are offered, and compact against masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

import jaxprune as jp
from jaxprune import axes
from jaxprune.jaxpr import tape
from jaxprune.rules import registry

X = jax.random.normal(jax.random.key(0), (4, 3, 5))
IDS = np.array([2, 0, 2], np.int32)


def pool(h):
    return lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "VALID")


def pool_gradient(h):
    return jax.grad(lambda h: (pool(h) ** 2).sum())(h)


def seen(h):
    jax.debug.callback(lambda value: None, h)
    return h


# what happens to hidden units of shape (4, 3, 8), and whether they are offered
USES = {
    "cumsum over positions": (lambda h: jnp.cumsum(h, 1), True),
    "cumsum over units": (lambda h: jnp.cumsum(h, 2), True),
    "sort of positions": (lambda h: jnp.sort(h, 1), True),
    "sort of units": (lambda h: jnp.sort(h, 2), False),
    "top_k of positions": (lambda h: lax.top_k(h.swapaxes(1, 2), 2)[0].swapaxes(1, 2), True),
    "max pooling": (pool, True),
    "gradient of max pooling": (pool_gradient, True),
    "unstack": (lambda h: jnp.stack(jnp.unstack(h, axis=1), 1), True),
    "rows by index": (lambda h: h[:, IDS], True),
    "take": (lambda h: jnp.take(h, IDS, 1), True),
    "take_along_axis": (lambda h: jnp.take_along_axis(h, jnp.zeros((1, 1, 8), int), 1), True),
    "units by index": (lambda h: h[..., IDS], False),
    "one row": (lambda h: h[:, 0], True),
    "some units": (lambda h: h[..., 2:6], True),
    "every other unit": (lambda h: h[..., ::2], True),
    "set": (lambda h: h.at[:, IDS].set(1.0), True),
    "add": (lambda h: h.at[:, IDS].add(h), True),
    "scattered units": (lambda h: jnp.zeros((4, 3, 6)).at[..., np.arange(8) % 6].add(h), True),
    "roll": (lambda h: jnp.roll(h, 3, 2), True),
    "roll and add": (lambda h: h + jnp.roll(h, 3, 2), None),
    "flip of positions": (lambda h: jnp.flip(h, 1), True),
    "flip of units": (lambda h: jnp.flip(h, 2), False),
    "repeat": (lambda h: jnp.repeat(h, 2, 2), True),
    "one_hot": (lambda h: jnp.einsum("rp,bpc->brc", jax.nn.one_hot(IDS, 3), h), True),
    "fft over positions": (lambda h: jnp.abs(jnp.fft.fft(h, axis=1)), True),
    "fft over units": (lambda h: jnp.abs(jnp.fft.fft(h, axis=2)), False),
    "reshape with dimensions": (lambda h: lax.reshape(h, (12, 8), (1, 0, 2)), True),
    "ragged_dot": (lambda h: lax.ragged_dot(
        h.reshape(12, 8), jnp.ones((2, 8, 6)), jnp.array([5, 7])), True),
    "noise": (lambda h: h * jax.random.bernoulli(jax.random.key(1), 0.5, h.shape), True),
    "debug callback": (seen, True),
    "triangular_solve": (lambda h: lax.linalg.triangular_solve(
        jnp.broadcast_to(jnp.eye(3) * 2, (4, 3, 3)), h, left_side=True), True),
    "qr": (lambda h: jnp.linalg.qr(h)[0], False),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_compact_equals_masked(name):
    use, offered = USES[name]
    width = jax.eval_shape(use, jax.ShapeDtypeStruct((4, 3, 8), jnp.float32)).shape[-1]
    keys = jax.random.split(jax.random.key(1), 2)
    params = {"up": jax.random.normal(keys[0], (5, 8)), "down": jnp.ones((width, 2))}
    fn = lambda p, x: use(jnp.tanh(x @ p["up"])) @ p["down"]  # noqa: E731
    structure = jp.infer_structure(fn, params, X)
    dims = [d for d in structure.dims.values() if any(s[:2] == ("up", 1) for s in d.slots)]
    free = [d for d in dims if not d.frozen]
    assert offered is None or bool(free) == offered, str(structure)
    keep = {d.name: np.arange(d.size) % 2 == 0 for d in free}
    small = jp.compact(fn, params, structure.masks(keep), X)
    assert small.certificate.check() < 1e-9
    jax.effects_barrier()


def attention(query, key, value):
    kernel = Primitive("dot_product_attention_fwd_wrapper")
    kernel.multiple_results = True
    kernel.def_abstract_eval(lambda q, k, v, **_: [q])
    return kernel.bind(query, key, value, layout=0)[0]


def build(fn, *shapes):
    closed = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return tape.build(closed, [tape.Value(v.aval) for v in closed.jaxpr.invars], registry.couple)


@pytest.mark.parametrize("few", [6, 2])
def test_fused_attention_passes_batch_and_heads(few):
    ran = build(attention, (4, 7, 6, 8), (4, 5, few, 8), (4, 5, few, 8))
    query, key, _ = ran.inputs
    assert [not any(leaf.reasons for leaf in axes.leaves(a)) for a in query.axes] == [
        True, False, True, False,
    ]  # fmt: skip
    heads = [leaf.size for leaf in axes.leaves(query.axes[2])]
    assert heads == ([6] if few == 6 else [2, 3])
    assert list(axes.leaves(key.axes[2]))[0] is list(axes.leaves(query.axes[2]))[0]
    assert axes.find(ran.outputs[0].axes[2]) is axes.find(query.axes[2])


def test_collectives_pass_the_axes_that_they_do_not_spread():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",))
    spec = jax.sharding.PartitionSpec()

    def body(x):
        total = lax.psum(x, "i") + lax.pmax(x, "i") * lax.axis_index("i")
        return total, lax.all_gather(x, "i", tiled=True), lax.ppermute(x, "i", [(0, 0)])

    inside = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    (eqn,) = jax.make_jaxpr(inside)(jnp.ones((4, 6))).jaxpr.eqns
    program = eqn.params["jaxpr"]
    values = [tape.Value(v.aval) for v in program.invars]
    ran = tape.build(program, values, registry.couple)
    assert not [s.name for s in ran.steps if registry.rule_of(s) is registry.OPAQUE]
    rows, columns = ran.inputs[0].axes
    assert rows.reasons and not columns.reasons
    assert all(axes.find(v.axes[1]) is axes.find(columns) for v in ran.outputs)


# Opaque on purpose. A reader finds here what freezes all that it touches.
OPAQUE = {
    "callbacks": ["io_callback", "pure_callback", "ffi_call"],
    "kernels": ["pallas_call", "custom_partitioning", "cudnn_fusion", "scaled_matmul",
                "scaled_dot", "call_exported"],
    "spread over devices": ["ragged_all_to_all", "psend", "precv"],
    "mutable arrays": ["new_ref", "get", "swap", "addupdate", "freeze", "run_state"],
    "own function at each window": ["select_and_scatter"],
    "solvers": ["custom_linear_solve", "linear_call", "spsolve"],
    "generators of words": ["threefry2x32", "philox2x32", "rng_uniform"],
}  # fmt: skip


@pytest.mark.parametrize("name", [name for names in OPAQUE.values() for name in names])
def test_what_is_opaque_on_purpose(name):
    assert name not in registry.RULES
