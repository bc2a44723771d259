"""Leaves that are alike go through a function together, bit for bit as each alone."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import _alike
from jaxprune._alike import map_alike
from jaxprune.selection import keep_largest

SHAPES = [(3, 2), (2, 3), (5,), (0, 2), (2, 2, 2), (1, 4)]
TYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
LEAF = st.tuples(st.sampled_from(SHAPES), st.sampled_from(TYPES), st.integers(0, 9))


def draw(leaves):
    """Scores with many ties, of the given shapes and types, and how many each keeps."""
    return [
        (jnp.asarray(np.random.default_rng(seed).integers(0, 4, shape), dtype), seed)
        for shape, dtype, seed in leaves
    ]


@settings(max_examples=12, deadline=None)
@given(st.lists(LEAF, min_size=1, max_size=12), st.booleans())
def test_masks_are_those_of_each_leaf_alone(leaves, any_shape):
    scores, counts = zip(*draw(leaves))
    together = jax.jit(lambda xs: map_alike(keep_largest, xs, counts, any_shape=any_shape))(scores)
    for mask, x, k in zip(together, scores, counts, strict=True):
        np.testing.assert_array_equal(mask, keep_largest(x, k))


KERNELS = st.lists(
    st.tuples(st.sampled_from([(2, 4), (4, 2), (2, 2, 2), (4, 4), (8,)]), st.sampled_from(TYPES)),
    min_size=1,
    max_size=8,
)
WAYS = {
    "unstructured": jp.unstructured(),
    "erk": jp.unstructured(jp.erk),
    "global": jp.unstructured(jp.global_threshold),
    "per output": jp.unstructured(per_output=True),
    "block": jp.block((1, 2)),
    "n:m": jp.n_m(1, 2),
    "channel": jp.channel(),
    "threshold": jp.threshold(1.5),
}


def tree_of(leaves, seed):
    """Scores with ties: kernels of the given shapes and types, and what no pattern prunes."""
    rng = np.random.default_rng(seed)
    kernels = [jnp.asarray(rng.integers(-3, 4, shape), dtype) for shape, dtype in leaves]
    return {"kernels": kernels, "none": None, "step": jnp.int32(3), "kernel": jnp.ones((4, 4))}


def alone(function, *args):
    """What a function gives where no leaf is stacked."""
    with mock.patch.object(_alike, "LARGE", 0):
        return jax.jit(lambda *args: function(*args))(*args)


@pytest.mark.filterwarnings("ignore:channel")
@settings(max_examples=12, deadline=None)
@given(KERNELS, st.sampled_from(sorted(WAYS)), st.sampled_from([0.3, 0.5]), st.integers(0, 99))
def test_every_pattern_gives_the_masks_of_leaves_alone(leaves, name, sparsity, seed):
    tree = tree_of(leaves, seed)
    together = jax.jit(lambda scores, s: WAYS[name](scores, s))(tree, sparsity)
    jax.tree.map(np.testing.assert_array_equal, together, alone(WAYS[name], tree, sparsity))


METHODS = {
    "prune": lambda inner: jp.prune(inner, jp.magnitude, 0.5),
    "rigl": lambda inner: jp.training.rigl(inner, 0.5, every=1),
    "snfs": lambda inner: jp.training.snfs(inner, 0.5, every=1),
    "sr_ste": lambda inner: jp.training.sr_ste(inner, 0.5, pattern=jp.n_m(1, 2)),
}


@settings(max_examples=6, deadline=None)
@given(KERNELS, st.sampled_from(sorted(METHODS)), st.integers(0, 99))
def test_every_update_is_that_of_leaves_alone(leaves, name, seed):
    tree = {"kernels": tree_of(leaves, seed)["kernels"], "kernel": jnp.eye(4), "none": None}
    grads = jax.tree.map(lambda w: w[::-1] / 4, tree)
    tx = METHODS[name](optax.sgd(0.5))
    state = tx.init(tree)._replace(count=jnp.int32(1))
    together = jax.jit(tx.update)(grads, state, tree)
    jax.tree.map(np.testing.assert_array_equal, together, alone(tx.update, grads, state, tree))


def test_it_may_be_mapped_scanned_and_differentiated():
    def masked(x, y):
        a, b = map_alike(keep_largest, [x, y], [2, 3])
        return jnp.sum(jnp.where(a, x, 0) ** 2 + jnp.where(b, y, 0))

    x = jnp.arange(20.0).reshape(4, 5) % 7
    each = [jax.grad(masked)(row, 2 * row) for row in x]
    np.testing.assert_array_equal(jax.vmap(jax.grad(masked))(x, 2 * x), each)
    scanned = jax.lax.scan(lambda c, row: (c, jax.grad(masked)(row, 2 * row)), 0, x)[1]
    np.testing.assert_array_equal(scanned, each)


def loops(leaves):
    """How many loops the program of masks for so many leaves holds."""
    scores = [jnp.ones((4, 4))] * leaves
    text = jax.jit(lambda xs: map_alike(keep_largest, xs, [3] * leaves)).lower(scores).as_text()
    return text.count("stablehlo.while")


def test_a_program_holds_a_loop_for_each_shape_and_one_for_the_places():
    assert loops(1) + 2 == loops(2) == loops(8) > 0


def test_one_kernel_takes_all_leaves_out_of_a_stack():
    scores = [jnp.ones((4, 4))] * 5
    masks = jax.jit(lambda xs: map_alike(keep_largest, xs, [3] * 5))
    assert "slice={" not in masks.lower(scores).compile().as_text()  # That is one at a known place.


def groups(leaves):
    """How many of so many leaves of 16 entries are stacked together, and the rows of stacks."""
    found = []
    rows = [LEAF_16] * leaves
    jax.eval_shape(lambda xs: found.extend(_alike._groups([(x,) for x in xs], False)), rows)
    return [len(members) for members, _ in found], {rows for _, rows in found}


LEAF_16 = jnp.ones((4, 4))


def test_large_leaves_run_alone_and_stacks_are_bounded(monkeypatch):
    assert groups(5) == ([5], {5})
    monkeypatch.setattr(_alike, "ROWS", 4)
    assert groups(9) == ([3, 3, 3], {3})
    assert groups(10) == ([4, 4, 2], {4})
    monkeypatch.setattr(_alike, "MOST", 32)
    assert groups(5) == ([2, 2, 1], {2})
    monkeypatch.setattr(_alike, "MOST", 8)
    assert groups(3) == ([1, 1, 1], {1})
    monkeypatch.setattr(_alike, "MOST", 64)
    monkeypatch.setattr(_alike, "LARGE", 16)
    assert groups(3) == ([1, 1, 1], {1})


def test_leaves_at_hand_and_leaves_on_a_mesh_run_alone():
    assert _alike._groups([(LEAF_16,), (LEAF_16,)], False) == [([0], 1), ([1], 1)]
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    on_mesh = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    leaf, found = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=on_mesh), []
    rows = [leaf, leaf]
    jax.eval_shape(lambda xs: found.extend(_alike._groups([(x,) for x in xs], False)), rows)
    assert found == [([0], 1), ([1], 1)]
