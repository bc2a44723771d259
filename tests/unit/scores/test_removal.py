"""What a loss is without units: the network written small beside it, and what is refused."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.scores import removal
from tests.unit.scores.test_units import draw, fn, loss


@pytest.fixture(scope="module")
def found():
    params, batches = draw()
    return params, batches, jp.infer_structure(fn, params, batches[0][0])


def small(params, kept):
    """The network with fewer hidden units, sliced by hand."""
    columns = {name: params[name][..., kept] for name in ("up", "mean", "var", "bias")}
    return params | columns | {"down": params["down"][kept]}


def slowly(params, batches, worst):
    """By how much the mean loss of the sliced network rises, for each number of units."""
    means = []
    for count in range(6):
        kept = np.sort(worst[count:])
        means.append(np.mean([float(loss(small(params, kept), *b)) for b in batches]))
    return np.array(means) - means[0]


def test_curves_are_those_of_the_network_written_small(found):
    params, batches, structure = found
    (name,) = (n for n, d in structure.dims.items() if not d.frozen)
    order = {name: np.array([3.0, 1.0, 2.0, 5.0, 4.0])}
    shares = (0.2, 0.4, 0.6, 0.8, 1.0)
    scores = jp.scores.loss_units(structure, params, loss, batches, order=order, shares=shares)
    counts, rises = scores.curves[name]
    assert counts == [0, 1, 2, 3, 4, 5]
    want = slowly(params, batches, np.argsort(order[name]))
    np.testing.assert_allclose(rises, want, rtol=1e-4, atol=1e-5)
    assert scores[name].shape == (5,)
    assert (np.argsort(scores[name]) == np.argsort(order[name])).all()


def test_taylor_tells_units_apart_where_no_order_is_given(found):
    params, batches, structure = found
    scores = jp.scores.loss_units(structure, params, loss, batches)
    for name, vector in jp.scores.taylor_units(structure, params, loss, batches).items():
        assert (np.argsort(scores[name]) == np.argsort(vector)).all()


def test_only_the_first_batches_are_measured_and_one_program_serves_all(found):
    params, batches, structure = found
    order = jp.scores.taylor_units(structure, params, loss, batches)
    traced = chex.assert_max_traces(loss, n=1)
    few = jp.scores.loss_units(structure, params, traced, batches, order=order, measured=2)
    want = jp.scores.loss_units(structure, params, loss, batches[:2], order=order)
    assert few.curves == want.curves
    assert few.curves != jp.scores.loss_units(structure, params, loss, batches, order=order).curves


def test_the_loss_is_that_of_the_repaired_network(found):
    """A repair that doubles the next layer: called once for each share, with masked params."""
    params, batches, structure = found
    calls = []

    def repair(masked, masks):
        calls.append(int(masks["down"][:, 0].sum()))
        return masked | {"down": 2 * masked["down"]}

    shares, order = (0.4, 0.8), {"up:1": np.arange(5.0)}
    twice = jp.scores.loss_units(
        structure, params, loss, batches, order=order, shares=shares, repair=repair
    )
    assert calls == [3, 1]
    whole = np.mean([float(loss(params, *b)) for b in batches])
    kept = [small(params, np.arange(count, 5)) for count in (2, 4)]
    want = [np.mean([float(loss(p | {"down": 2 * p["down"]}, *b)) for b in batches]) for p in kept]
    np.testing.assert_allclose(twice.curves["up:1"][1], [0, *np.array(want) - whole], rtol=1e-4)


CURVES = st.lists(st.floats(-1, 9, width=16), min_size=1, max_size=9)


@given(CURVES, st.data())
def test_scores_add_up_to_the_largest_convex_curve_below(rises, data):
    gaps = data.draw(st.lists(st.integers(1, 4), min_size=len(rises), max_size=len(rises)))
    counts, size = np.cumsum([0, *gaps]), sum(gaps)
    rises = [0.0, *rises]
    slopes = removal._spread(removal._hull(counts.tolist(), rises), size)
    assert (np.diff(slopes) >= 0).all()  # The worst units come first.
    highest = np.maximum.accumulate(rises)
    lowest = [_below(x, counts, highest) for x in range(size + 1)]
    sums = np.concatenate([[0], np.cumsum(slopes)])
    np.testing.assert_allclose(sums, lowest, rtol=2e-3, atol=2e-3 * max(highest[-1], 1e-9))


def _below(x, counts, rises):
    """At x the lowest of all lines between two points: the oracle of the convex curve."""
    every = itertools.combinations_with_replacement(range(len(counts)), 2)
    around = [(i, j) for i, j in every if counts[i] <= x <= counts[j]]
    return min(
        rises[i] + (rises[j] - rises[i]) * (x - counts[i]) / max(counts[j] - counts[i], 1)
        for i, j in around
    )


def test_what_was_measured_ends_before_the_last_unit():
    hull = removal._hull([0, 2], [0.0, 1.0])
    np.testing.assert_allclose(removal._spread(hull, 4), 0.5, rtol=1e-3)
    assert removal._spread(removal._hull([0], [0.0]), 1) == pytest.approx(0)


def test_a_share_of_less_than_a_unit_is_one(found):
    params, batches, structure = found
    scores = jp.scores.loss_units(structure, params, loss, batches, shares=(0.01, 0.3))
    assert [counts for counts, _ in scores.curves.values()] == [[0, 1, 2]]


def nan_without(fraction):
    """A loss that is no number where so much of the hidden units has gone."""

    def found(params, x, y):
        gone = jnp.mean(params["var"] == 0)
        return jnp.where(gone >= fraction, jnp.nan, loss(params, x, y))

    return found


def test_a_branch_without_units_may_have_no_loss(found):
    params, batches, structure = found
    scores = jp.scores.loss_units(structure, params, nan_without(1.0), batches)
    ((counts, rises),) = scores.curves.values()
    assert counts[-1] == 4
    assert all(np.isfinite(v).all() for v in scores.values())


BAD = {
    "measured": ({"measured": 0}, "measured is 0; wanted at least 1 batch"),
    "no shares": ({"shares": ()}, r"shares is \(\); wanted what goes of a dimension"),
    "descending": ({"shares": (0.5, 0.25)}, "ascending, in"),
    "above one": ({"shares": (0.5, 1.5)}, "ascending, in"),
    "order": ({"order": {"up:1": jnp.ones(4)}}, r"up:1 have shape \(4,\), wanted \(5,\)"),
    "order's name": ({"order": {"in": jnp.ones(4)}}, "scores have another structure than params"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(found, case):
    params, batches, structure = found
    options, text = BAD[case]
    with pytest.raises(ValueError, match=text):
        jp.scores.loss_units(structure, params, loss, batches, **options)


def test_losses_that_are_no_numbers(found):
    params, batches, structure = found
    order = jp.scores.taylor_units(structure, params, loss, batches)
    with pytest.raises(ValueError, match="the loss without 3 of the 5 units of .* is nan"):
        jp.scores.loss_units(structure, params, nan_without(0.6), batches, order=order)
    with pytest.raises(ValueError, match="the loss of the dense network is nan"):
        jp.scores.loss_units(structure, params, nan_without(0.0), batches, order=order)
    with pytest.raises(TypeError, match="used up after one pass"):
        jp.scores.loss_units(structure, params, loss, iter(batches), order=order)
    with pytest.raises(ValueError, match="batches is empty"):
        jp.scores.loss_units(structure, params, loss, [], order=order)
    other = jax.tree.map(lambda x: x, params) | {"up": params["up"][:2]}
    with pytest.raises(ValueError, match="the structure was found for"):
        jp.scores.loss_units(structure, other, loss, batches, order=order)
