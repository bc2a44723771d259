"""The axis algebra against plain index arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.ir import axes


def test_fused_qkv_with_grouped_queries_nests_both_ways():
    flat = axes.leaf(12 * 4)
    axes.unify(flat, axes.sum_([axes.leaf(32), axes.leaf(8), axes.leaf(8)]))
    axes.unify(flat, axes.prod([axes.leaf(12), axes.leaf(4)]))
    other = axes.leaf(12 * 4)
    axes.unify(other, axes.prod([axes.leaf(12), axes.leaf(4)]))
    axes.unify(other, axes.sum_([axes.leaf(32), axes.leaf(8), axes.leaf(8)]))
    assert not any(leaf.reasons for leaf in [*axes.leaves(flat), *axes.leaves(other)])
    assert axes.show(other) == "((8+2+2)*4)"


def test_layouts_that_do_not_nest_freeze_both():
    a = axes.prod([axes.leaf(2), axes.leaf(3)])
    b = axes.prod([axes.leaf(3), axes.leaf(2)])
    axes.unify(a, b, "why")
    assert all(leaf.reasons == ["why"] for leaf in [*axes.leaves(a), *axes.leaves(b)])


def test_the_older_leaf_stays():
    old, new = axes.leaf(5), axes.leaf(5)
    axes.unify(new, old)
    assert axes.find(new) is old


def test_a_refinement_carries_the_reasons_down():
    merged = axes.leaf(6)
    axes.freeze(merged, "input")
    pieces = [axes.leaf(2), axes.leaf(3)]
    axes.unify(merged, axes.prod(pieces))
    assert [p.reasons for p in pieces] == [["input"], ["input"]]


def test_sizes_that_differ_are_an_error():
    with pytest.raises(ValueError, match="can't unify axes of sizes 2 and 3"):
        axes.unify(axes.leaf(2), axes.leaf(3))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_index_of_a_product_is_ravel_multi_index(sizes, data):
    leaves = [axes.leaf(n) for n in sizes]
    kept = {
        leaf: np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
        for leaf, n in zip(leaves, sizes, strict=True)
        if n > 1
    }
    grids = np.meshgrid(*(kept.get(leaf, np.arange(leaf.size)) for leaf in leaves), indexing="ij")
    expected = np.ravel_multi_index([g.reshape(-1) for g in grids], sizes)
    axis = axes.prod(leaves)
    np.testing.assert_array_equal(axes.index_of(axis, kept), expected)
    assert axes.size_of(axis, {leaf: len(i) for leaf, i in kept.items()}) == len(expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_units_along_a_sum_are_offsets(sizes):
    leaves = [axes.leaf(n) for n in sizes]
    axis = axes.sum_(leaves)
    start = 0
    for leaf in leaves:
        (units,) = axes.units_along(axis, leaf)
        expected = np.full(sum(sizes), -1)
        expected[start : start + leaf.size] = np.arange(leaf.size)
        np.testing.assert_array_equal(units, expected)
        start += leaf.size


@settings(max_examples=60, deadline=None)
@given(st.permutations([2, 2, 3]), st.permutations([2, 2, 3]))
def test_unified_products_index_the_same_positions(a_sizes, b_sizes):
    """Whatever the refinement, a keep set read through either side gives the same positions."""
    a, b = axes.prod(map(axes.leaf, a_sizes)), axes.prod(map(axes.leaf, b_sizes))
    axes.unify(a, b)
    free = {leaf: np.array([0]) for leaf in axes.leaves(a) if not leaf.reasons and leaf.size > 1}
    np.testing.assert_array_equal(axes.index_of(a, free), axes.index_of(b, free))


def test_parts_that_make_one_factor_together_are_that_factor():
    """``3 + 1 + 2 * 4`` are three rows of 4; parts across a row's end freeze both."""
    row = axes.leaf(4)
    pieces = [axes.leaf(3), axes.leaf(1)]
    split = axes.sum_([axes.sum_(pieces), axes.prod([axes.leaf(2), axes.leaf(4)])])
    axes.unify(split, axes.prod([axes.leaf(3), row]))
    assert list(axes.leaves(row)) == pieces and not any(p.reasons for p in axes.leaves(split))
    kept = {pieces[0]: np.array([0, 2])}
    np.testing.assert_array_equal(axes.index_of(split, kept), [0, 2, 3, 4, 6, 7, 8, 10, 11])

    across = axes.sum_([axes.leaf(3), axes.leaf(5), axes.leaf(4)])
    axes.unify(across, axes.prod([axes.leaf(3), axes.leaf(4)]), "why")
    assert all(leaf.reasons == ["why"] for leaf in axes.leaves(across))


def ordered(n):
    return st.permutations(range(n)).map(np.array)


@settings(max_examples=60, deadline=None)
@given(ordered(6), ordered(6), ordered(6), st.sets(st.integers(0, 5), min_size=1))
def test_orders_are_those_of_indexed_arrays(p, q, r, kept):
    """``p(x) ~ q(y)`` and ``z ~ r(y)``: units are followed as the entries of arrays are."""
    x, y, z = (axes.leaf(6) for _ in range(3))
    axes.unify(axes.perm(x, p), axes.perm(y, q))
    axes.unify(z, axes.perm(y, r))
    assert len({leaf for a in (x, y, z) for leaf in axes.leaves(a)}) == 1
    base = next(axes.leaves(x))
    of_x, of_y, of_z = (axes.units_along(a, base)[0] for a in (x, y, z))
    np.testing.assert_array_equal(of_x[p], of_y[q])
    np.testing.assert_array_equal(of_z, of_y[r])
    for axis, units in ((x, of_x), (y, of_y), (z, of_z)):
        found = axes.index_of(axis, {base: np.array(sorted(kept))})
        np.testing.assert_array_equal(found, np.flatnonzero(np.isin(units, list(kept))))
        assert axes.size_of(axis, {base: len(kept)}) == len(kept)


@pytest.mark.parametrize("turned", [False, True])
def test_the_older_leaf_stays_in_any_order(turned):
    old, new = axes.leaf(3), axes.leaf(3)
    order = np.array([2, 0, 1])
    axes.unify(*((axes.perm(old, order), new) if turned else (old, axes.perm(new, order))))
    assert axes.find(old) is old and axes.show(new) == "perm(3)"


def test_a_leaf_in_an_order_of_its_own_is_cut_and_factored_below_it():
    turned = np.arange(6)[::-1]
    merged = axes.leaf(6)
    axes.unify(axes.perm(merged, turned), axes.sum_([axes.leaf(2), axes.leaf(4)]))
    assert axes.show(merged) == "perm((2+4))"
    (first, second) = axes.leaves(merged)
    np.testing.assert_array_equal(axes.index_of(merged, {first: np.array([0])}), [0, 1, 2, 3, 5])
    np.testing.assert_array_equal(axes.units_along(merged, second)[0], [3, 2, 1, 0, -1, -1])
    assert axes.perm(merged, turned).kind == axes.SUM


def test_an_axis_that_meets_itself_in_another_order_is_frozen():
    axis = axes.leaf(3)
    axes.unify(axis, axes.perm(axis, np.array([0, 1, 2])), "why")
    assert not axis.reasons
    axes.unify(axis, axes.perm(axis, np.array([1, 0, 2])), "why")
    assert axis.reasons == ["its units meet one another in another order: why"]


def test_orders_of_compounds_that_differ_freeze_both():
    compounds = [axes.sum_([axes.leaf(2), axes.leaf(2)]) for _ in range(2)]
    axes.unify(compounds[0], axes.perm(compounds[1], np.array([1, 0, 2, 3])), "why")
    assert all(leaf.reasons == ["why"] for c in compounds for leaf in axes.leaves(c))


def test_sizes_may_be_arrays_of_counts():
    d, rest = axes.leaf(4), axes.leaf(2)
    axis = axes.prod([axes.perm(axes.sum_([d, rest]), np.arange(6)[::-1]), axes.leaf(3)])
    np.testing.assert_array_equal(axes.size_of(axis, {d: np.array([1, 4])}), [9, 18])
    assert axes.size_of(axis, {}) == 18
