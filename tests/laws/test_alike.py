"""Leaves that are alike go through a function together, bit for bit as each alone."""

import jax
import jax.numpy as jnp
import numpy as np
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
@given(st.lists(LEAF, min_size=1, max_size=8))
def test_masks_are_those_of_each_leaf_alone(leaves):
    scores, counts = zip(*draw(leaves))
    together = jax.jit(lambda xs: map_alike(keep_largest, xs, counts))(scores)
    for mask, x, k in zip(together, scores, counts, strict=True):
        np.testing.assert_array_equal(mask, keep_largest(x, k))


TREE = {
    "a": {"kernel": np.arange(12.0, dtype=np.float32).reshape(4, 3) % 5, "bias": np.ones(3)},
    "b": {"kernel": np.arange(12.0, dtype=np.float32).reshape(4, 3) % 7, "none": None},
    "c": {"kernel": jnp.arange(12.0, dtype=jnp.bfloat16).reshape(4, 3) % 5},
    "d": {"kernel": np.zeros((4, 0), np.float32), "step": np.int32(3)},
    "e": {"kernel": np.arange(24.0, dtype=np.float32).reshape(3, 8) % 5},
}
PATTERNS = {
    "unstructured": jp.unstructured(),
    "erk": jp.unstructured(jp.erk),
    "global": jp.unstructured(jp.global_threshold),
    "block": jp.block((1, 1)),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_patterns_are_the_same_alone_and_together(name, sparsity, monkeypatch):
    tree = jax.tree.map(jnp.asarray, TREE)
    together = jax.jit(PATTERNS[name])(tree, sparsity)
    monkeypatch.setattr(_alike, "LARGE", 0)
    alone = jax.jit(lambda scores, s: PATTERNS[name](scores, s))(tree, sparsity)
    jax.tree.map(np.testing.assert_array_equal, together, alone)


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
    """How many loops the program of a mask for each leaf holds."""
    scores = [jnp.ones((4, 4))] * leaves
    text = jax.jit(lambda xs: map_alike(keep_largest, xs, [3] * leaves)).lower(scores).as_text()
    return text.count("stablehlo.while")


def test_a_program_holds_a_loop_for_each_shape():
    assert loops(4) == loops(8) > 0


def groups(leaves):
    """How many of so many leaves of 16 entries are stacked together."""
    found = []
    jax.eval_shape(lambda xs: found.extend(_alike._groups([(x,) for x in xs])), [LEAF_16] * leaves)
    return [len(group) for group in found]


LEAF_16 = jnp.ones((4, 4))


def test_large_leaves_run_alone_and_stacks_are_bounded(monkeypatch):
    assert groups(5) == [5]
    monkeypatch.setattr(_alike, "MOST", 32)
    assert groups(5) == [2, 2, 1]
    monkeypatch.setattr(_alike, "ROWS", 1)
    assert groups(3) == [1, 1, 1]
    monkeypatch.setattr(_alike, "ROWS", 4)
    monkeypatch.setattr(_alike, "LARGE", 16)
    assert groups(3) == [1, 1, 1]


def test_leaves_at_hand_and_leaves_on_a_mesh_run_alone():
    assert _alike._groups([(LEAF_16,), (LEAF_16,)]) == [[0], [1]]
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    on_mesh = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    leaf, found = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=on_mesh), []
    jax.eval_shape(lambda xs: found.extend(_alike._groups([(x,) for x in xs])), [leaf, leaf])
    assert found == [[0], [1]]
