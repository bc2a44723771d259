"""Primitives inside a network: which hidden units are offered, and compact against masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

import jaxprune as jp
from jaxprune.ir import axes, tape
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
    "flip of units": (lambda h: jnp.flip(h, 2), True),
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


@pytest.mark.slow
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


def grown(h, times):
    """Doubles until the sum is large."""
    begin = (0, h)
    return lax.while_loop(
        lambda s: (s[0] < 5) & (jnp.abs(s[1]).sum() < 20 * times[0]),
        lambda s: (s[0] + 1, 2 * s[1] + 0.1 * jnp.roll(s[1], 1, 0) ** 2), begin)[1]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "removed"), [(0, 3), (2, 0)])
def test_a_loop_for_each_row_and_for_each_unit(axis, removed):
    """Under jax.vmap a while loop has a test for each row, which is then done at its own time."""
    keys = jax.random.split(jax.random.key(2), 2)
    params = {"up": jax.random.normal(keys[0], (5, 8)), "down": jax.random.normal(keys[1], (8, 2))}
    params["times"] = jnp.ones(1)

    def fn(p, x):
        h, times = jnp.tanh(x @ p["up"]), p["times"]
        return jax.vmap(lambda h: grown(h, times), axis, axis)(h) @ p["down"]

    keep = np.array([True, False, True, True, False, True, False, True])
    masks = {"up": keep[None], "down": keep[:, None], "times": True}
    small = jp.compact(fn, params, masks, X)
    assert sum(entry.removed for entry in small.certificate.entries) == removed
    assert small.certificate.check() < 1e-9
    reasons = " ".join(str(entry) for entry in small.certificate.entries)
    assert removed or "each has its own number of rounds" in reasons


ORDER = np.array([3, 1, 0, 2, 7, 6, 5, 4], np.int32)
BACK = np.argsort(ORDER).astype(np.int32)

# Orders of (4, 3, 8) units that are known while tracing, and the sizes of what can be pruned.
ORDERS = {
    "indexed": (lambda h, p: h[..., ORDER], [8]),
    "indexed by an array": (lambda h, p: h[..., jnp.asarray(ORDER)], [8]),
    "indexed from the end": (lambda h, p: h[..., ORDER - 8], [8]),
    "taken": (lambda h, p: jnp.take(h, ORDER, 2), [8]),
    "taken, clipped": (lambda h, p: jnp.take(h, ORDER, 2, mode="clip"), [8]),
    "taken as they are": (lambda h, p: h + jnp.take(h, jnp.arange(8), 2), [8]),
    "reversed": (lambda h, p: h[..., ::-1] * p["gate"], [8]),
    "there and back": (lambda h, p: h + h[..., ORDER][..., BACK], [8]),
    "with a gate": (lambda h, p: h[..., ORDER] * p["gate"], [8]),
    "both in one order": (lambda h, p: h[..., ORDER] * p["gate"][ORDER], [8]),
    "both, in two": (lambda h, p: h[..., ORDER] * p["gate"][::-1], [8]),
    "beside itself": (lambda h, p: jnp.concatenate([h, h[..., ORDER]], 2), [8]),
    "normalised": (lambda h, p: jax.nn.standardize(h[..., ORDER], 2), [8]),
    "summed up": (lambda h, p: jnp.cumsum(h[..., ORDER], 2), [8]),
    "beside positions": (lambda h, p: h[..., ORDER] * jnp.arange(8.0), [8]),
    "a few": (lambda h, p: h[..., np.array([6, 1, 3], np.int32)], [3, 5]),
    "a run": (lambda h, p: h[..., np.array([2, 3, 4], np.int32)], [2, 3, 3]),
    "deleted": (lambda h, p: jnp.delete(h, np.array([2, 5]), 2), [2, 6]),
    "halves of a reverse": (lambda h, p: h[..., ::-1][..., :4] * h[..., ::-1][..., 4:], [4]),
    "heads in reverse": (lambda h, p: h.reshape(4, 3, 2, 4)[:, :, ::-1].reshape(4, 3, 8), [2, 4]),
    "in a loop": (lambda h, p: lax.scan(lambda c, r: (c, r[..., ORDER]), 0.0, h)[1], [8]),
    "in a branch": (lambda h, p: lax.cond(
        h.sum() > 0, lambda h: h[..., ORDER], lambda h: -h[..., ORDER], h), [8]),
    "its gradient": (lambda h, p: jax.grad(lambda h: (h[..., ::-1] ** 2 * ORDER).sum())(h), [8]),
    "added to itself": (lambda h, p: h + h[..., ORDER], []),
    "twice": (lambda h, p: h[..., np.array([0, 0, 1], np.int32)], []),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDERS)
def test_units_in_a_constant_order_can_be_pruned(name):
    """Any units go, the law of restrict and expand holds, gradients are those of the masked."""
    use, sizes = ORDERS[name]
    keys = jax.random.split(jax.random.key(1), 3)
    params = {"up": jax.random.normal(keys[0], (5, 8)), "gate": jax.random.normal(keys[1], (8,))}
    width = jax.eval_shape(use, jax.ShapeDtypeStruct((4, 3, 8), jnp.float32), params).shape[-1]
    params["down"] = jax.random.normal(keys[2], (width, 2))
    fn = lambda p, x: use(jnp.tanh(x @ p["up"]), p) @ p["down"]  # noqa: E731
    structure = jp.infer_structure(fn, params, X)
    mine = [d for d in structure.dims.values() if any(s.path == "up" for s in d.slots)]
    free = [d for d in mine if not d.frozen]
    assert sorted(d.size for d in free) == sizes
    keep = {d.name: np.array([True, False, True, True, False, True, False, False])[: d.size]
            for d in free}  # fmt: skip
    masks = structure.masks(keep)
    small = jp.compact(fn, params, masks, X)
    assert small.certificate.exact and small.certificate.check() < 1e-9
    again = small.restrict(small.expand(small.params))
    jax.tree.map(np.testing.assert_array_equal, again, small.params)
    masked = jp.apply_masks(params, masks)
    grads = [jax.grad(lambda p, f=f: (f(p, X) ** 2).sum())(p)
             for f, p in ((fn, masked), (small.fn, small.params))]  # fmt: skip
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, small.restrict(grads[0]), grads[1])


def test_an_order_that_meets_another_says_so():
    fn = lambda p, x: (lambda h: h * h[..., ::-1])(x @ p["up"]) @ p["down"]  # noqa: E731
    params = {"up": jnp.ones((5, 8)), "down": jnp.ones((8, 2))}
    frozen = jp.infer_structure(fn, params, X).dims["up:1"].frozen
    assert "its units meet one another in another order: layouts that do not nest in mul" in frozen
    with pytest.raises(ValueError, match="its units meet one another in another order"):
        jp.infer_structure(fn, params, X).masks({"up:1": np.arange(8) < 3})


def test_an_order_among_the_parameters_is_not_constant():
    fn = lambda p, x: (x @ p["up"])[..., p["order"]] @ p["down"]  # noqa: E731
    params = {"up": jnp.ones((5, 8)), "down": jnp.ones((8, 2)), "order": jnp.arange(8)}
    assert "indexed" in jp.infer_structure(fn, params, X).dims["up:1"].frozen


PADS = ("edge", "linear_ramp", "maximum", "mean", "minimum", "reflect", "symmetric", "wrap")

# What moves no data along the units of (4, 3, 8), or none at all: they stay one dimension.
NOTHING = {
    **{f"pad {mode}": lambda h, m=mode: jnp.pad(h, ((0, 0), (1, 1), (0, 0)), mode=m)
       for mode in PADS},
    **{f"roll by {n}": lambda h, n=n: jnp.roll(h, n, 2) for n in (0, 8, -16)},
    "roll of positions": lambda h: jnp.roll(h, (1, 0), (1, 2)),
    "concatenate": lambda h: jnp.concatenate([h[..., :0], h, h[..., 8:]], 2),
    "one unit, no times": lambda h: jnp.concatenate([jnp.repeat(h[..., :1], 0, 2), h], 2),
    "one unit, no rows": lambda h: jnp.vstack([jnp.broadcast_to(h[:1, :, :1], (0, 3, 8)), h]),
    "one unit, no rows, called": lambda h: jnp.vstack(
        [jnp.broadcast_to(jax.jit(lambda h: (h * 2)[:1, :, :1])(h), (0, 3, 8)), h]),
    "called for another result": lambda h: jax.jit(lambda h: (h[..., :1].sum(), h + 1))(h)[1],
    "split": lambda h: jnp.split(h, [0, 8], 2)[1],
    "array_split": lambda h: jnp.concatenate(jnp.array_split(h, 5, 1), 1),
    "lax.pad": lambda h: lax.pad(h, 0.0, [(0, 0, 0)] * 3),
    "dynamic_slice": lambda h: lax.dynamic_slice(h, (0, 0, 0), h.shape),
    "sum": lambda h: h + h[..., 5:5].sum(),
    "prod": lambda h: h * h[..., :0].prod(2, keepdims=True),
    "max": lambda h: h + jnp.exp(lax.reduce_max(h[..., :0], (2,)))[..., None],
    "all": lambda h: jnp.where((h[:, :0] > 0).all(1, keepdims=True), h, 1.0),
    "cumsum": lambda h: h + jnp.cumsum(h[..., :0], 2).sum(),
    "sort": lambda h: h + jnp.sort(h[..., :0], 2).sum(),
    "reshape": lambda h: jnp.concatenate([h[:0].reshape(0, 4, 6).reshape(0, 3, 8), h], 0),
    "einsum": lambda h: h + jnp.einsum("bnd,bnc->bd", h[:, :0], h[:, :0, :3])[:, None],
    "gather": lambda h: h + h[..., jnp.zeros(0, int)].sum(),
    "scatter": lambda h: h.at[..., jnp.zeros(0, int)].add(1.0),
    "scan": lambda h: lax.scan(lambda c, row: (c + row, row), h, jnp.zeros((0, 8)))[0],
    "cond": lambda h: jnp.concatenate(
        lax.cond(h.sum() > 0, lambda h: (h, h[:0]), lambda h: (-h, h[2:2]), h)),
    "custom rule": lambda h: jnp.concatenate([jax.nn.silu(h[:0]), h], 0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTHING)
def test_what_moves_no_data_ties_and_cuts_nothing(name):
    params = {"up": jax.random.normal(jax.random.key(1), (5, 8)), "down": jnp.ones((8, 2))}
    fn = lambda p, x: NOTHING[name](jnp.tanh(x @ p["up"])) @ p["down"]  # noqa: E731
    structure = jp.infer_structure(fn, params, X)
    assert {d.name: d.size for d in structure.dims.values() if not d.frozen} == {"up:1": 8}
    small = jp.compact(fn, params, structure.masks({"up:1": np.arange(8) % 2 == 0}), X)
    assert small.params["up"].shape == (5, 4) and small.certificate.exact
    assert small.certificate.check() < 1e-9


@pytest.mark.slow
def test_an_input_without_entries_keeps_its_shape():
    params = {"up": jnp.ones((5, 8)), "more": jnp.ones((0, 8)), "down": jnp.ones((8, 2))}
    fn = lambda p, x: jnp.vstack([jnp.tanh(p["more"]), jnp.tanh(x @ p["up"])]) @ p["down"]  # noqa: E731
    structure = jp.infer_structure(fn, params, X[0])
    small = jp.compact(fn, params, structure.masks({"up:1": np.arange(8) < 3}), X[0])
    assert small.params["up"].shape == (5, 3) and small.certificate.check() < 1e-9


@pytest.mark.slow
def test_padding_with_edges_keeps_round_to():
    params = {"up": jax.random.normal(jax.random.key(1), (3, 3, 3, 64)),
              "down": jax.random.normal(jax.random.key(2), (3, 3, 64, 2))}  # fmt: skip

    def fn(p, x):
        conv = lambda x, w: lax.conv_general_dilated(  # noqa: E731
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
        h = jnp.pad(jax.nn.relu(conv(x, p["up"])), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        return conv(h, p["down"])

    x = jnp.ones((1, 6, 6, 3))
    masks = jp.structured(jp.infer_structure(fn, params, x), round_to=8)(jp.magnitude(params), 0.5)
    small = jp.compact(fn, params, masks, x)
    assert small.params["up"].shape[-1] == small.params["down"].shape[2] == 32


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
