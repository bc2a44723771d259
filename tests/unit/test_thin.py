"""What is nearly emptied says so, and what can't be ranked or cut is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.typing import named_leaves


def network(*widths):
    """An MLP: params, fn, x, structure."""
    keys = jax.random.split(jax.random.key(0), len(widths))
    pairs = zip(keys, widths, widths[1:])
    params = [{"w": jax.random.normal(k, (i, o))} for k, i, o in pairs]

    def fn(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"])
        return x @ params[-1]["w"]

    x = jax.random.normal(keys[-1], (3, widths[0]))
    return params, fn, x, jp.infer_structure(fn, params, x)


def kept(structure, **counts):
    names = [n for n, d in structure.dims.items() if not d.frozen]
    sizes = [structure.dims[n].size for n in names]
    return structure.masks({n: np.arange(s) < c for n, s, c in zip(names, sizes, counts.values())})


# ---------------------------------------------------------------------------- nearly emptied


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "thin"),
    [((1, 10), True), ((2, 16), True), ((2, 2), False), ((3, 24), False), ((16, 16), False)],
)
def test_a_certificate_names_dimensions_that_are_nearly_emptied(left, thin):
    params, fn, x, structure = network(4, 24, 24, 2)
    small = jp.compact(fn, params, kept(structure, a=left[0], b=left[1]), x)
    assert bool(small.certificate.thin) == thin
    line = f"nearly emptied: {left[0]} of 24 units are left of 0/w:1"
    assert (line in str(small.certificate)) == thin


@pytest.mark.slow
def test_a_global_ranking_that_empties_a_layer_is_seen():
    params, fn, x, structure = network(4, 24, 24, 2)
    params[0]["w"] = params[0]["w"] * 1e-3
    params[1]["w"] = params[1]["w"] * jnp.where(jnp.arange(24) < 1, 10, 1e-3)[:, None]
    pattern = jp.structured(structure, distribution=jp.global_threshold)
    small = jp.compact(fn, params, pattern(jp.magnitude(params), 0.5), x)
    assert "nearly emptied: 1 of 24 units are left" in str(small.certificate)


def test_a_summary_names_leaves_that_are_nearly_emptied():
    params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10)), "c": jnp.ones((10, 10))}
    keep = lambda n: jnp.arange(100).reshape(10, 10) < n  # noqa: E731
    masks = {"a": keep(0), "b": keep(1), "c": keep(90)}
    notes = jp.summary(params, masks).notes
    assert notes[0] == "nothing is kept of a"
    assert notes[1].startswith("b keeps 1 of 100 entries, less than an eighth")
    assert len(notes) == 2 and "nothing is kept of a" in str(jp.summary(params, masks))
    even = {name: keep(2) for name in params}  # little of all is what was asked for
    assert jp.summary(params, even).notes == ()
    assert jp.summary(params, {**even, "a": jnp.asarray(True)}).notes == ()


def test_a_summary_of_a_function_says_so_too():
    params, fn, x, structure = network(4, 24, 24, 2)
    masks = kept(structure, a=1, b=24)
    with_loop = lambda p, x: jax.lax.while_loop(  # noqa: E731
        lambda h: h.sum() < 0, lambda h: h + 1, fn(p, x)
    )
    masks[0]["w"] = jnp.zeros((4, 24), bool)
    notes = jp.summary(params, masks, fn=with_loop, args=(x,)).notes
    assert "nothing is kept of 0/w" in notes
    assert any("one iteration" in note for note in notes)


# ------------------------------------------------------------------------------- scores, masks


@pytest.mark.slow
def test_nothing_is_removed_at_sparsity_zero():
    params, _, _, structure = network(4, 20, 26, 2)
    for round_to in (1, 3, 8, 64):
        masks = jp.structured(structure, round_to=round_to)(jp.magnitude(params), 0.0)
        assert all(k.all() for k in structure.keep(masks).values())
    masks = jp.structured(structure, round_to=8)(jp.magnitude(params), 0.1)
    assert [int(k.sum()) for k in structure.keep(masks).values() if not k.all()] == [16, 24]


def bad_scores(change):
    params, _, _, structure = network(4, 24, 24, 2)
    scores = jp.magnitude(params)
    scores[1]["w"] = change(scores[1]["w"])
    return structure, scores


@pytest.mark.slow
def test_scores_that_hold_nan_are_refused_by_name():
    structure, scores = bad_scores(lambda s: s.at[3, 5].set(jnp.nan))
    with pytest.raises(ValueError, match="the scores of 1/w hold NaN.*nan_to_num"):
        jp.structured(structure)(scores, 0.5)
    masks = jax.jit(jp.structured(structure))(scores, 0.5)  # traced NaN ranks lowest
    assert not structure.keep(masks)["1/w:1"][5]


def test_scores_of_another_shape_are_refused_by_name():
    structure, scores = bad_scores(lambda s: s[:1])
    with pytest.raises(ValueError, match=r"scores of 1/w have shape \(1, 24\), wanted \(24, 24\)"):
        jp.structured(structure)(scores, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda s: s.masks({"0/w:1": np.arange(24)}), ValueError, r"holds 2; .*np.isin\(np.arange"),
        (lambda s: s.masks(["0/w:1"]), TypeError, "wants {dimension name: booleans}, got list"),
        (lambda s: s.masks({"0 hidden": np.ones(24)}), ValueError, r"near names: \['0/w:1'\]"),
        (lambda s: s.masks({"0/w:1": np.zeros(24)}), ValueError, "keep at least 1 .*plan.masks"),
        (lambda s: s.parents("zz"), ValueError, r"'zz'; there are: \['0/w:1'"),
        (lambda s: jp.structured(s, round_to=2.5), ValueError, "round_to is 2.5; wanted a whole"),
        (lambda s: jp.structured(s, dims=[]), ValueError, r'dims is empty; write dims="\*"'),
        (lambda s: jp.structured(s, dims=None), TypeError, "dims is None; wanted names or labels"),
    ],
)
def test_clear_errors(call, error, text):
    structure = network(4, 24, 24, 2)[-1]
    with pytest.raises(error, match=text):
        call(structure)


@pytest.mark.slow
def test_shapes_are_compacted_and_cut_leaf_by_leaf():
    """The plan of shapes and masks is that of arrays; a leaf that is read later is cut alone."""
    params, fn, x, structure = network(4, 24, 24, 2)
    masks = kept(structure, a=8, b=8)
    plan = jp.compact(fn, jax.eval_shape(lambda: params), masks, x)
    small = jp.compact(fn, params, masks, x)
    assert jax.tree.map(jnp.shape, plan.params) == jax.tree.map(jnp.shape, small.params)
    assert str(plan.certificate) == str(small.certificate)
    masked = jp.apply_masks(params, masks)
    for path, leaf in named_leaves(masked):
        alone = plan.restrict({path: leaf})[path]
        np.testing.assert_array_equal(alone, dict(named_leaves(small.params))[path])
    np.testing.assert_array_equal(plan.fn(plan.restrict(masked), x), small.fn(small.params, x))
    assert plan.certificate.check(1, params=params) < 1e-12
    with pytest.raises(ValueError, match=r"check compares with the full params.*params=params"):
        plan.certificate.check(1)


def test_a_shape_whose_removed_slices_are_folded_has_to_be_an_array():
    """A unit whose inputs are masked, and whose bias is not, is a constant."""
    fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]  # noqa: E731
    params = {"up": jnp.ones((3, 6)), "bias": jnp.ones(6), "down": jnp.ones((6, 2))}
    masks = {"up": jnp.arange(6) < 4, "bias": True, "down": True}
    shapes, x = jax.eval_shape(lambda: params), jnp.ones((1, 3))
    small = jp.compact(fn, params | {"up": shapes["up"]}, masks, x)
    assert small.params["up"].shape == (3, 4)
    with pytest.raises(TypeError, match="folds removed slices of bias .* pass its array, other"):
        jp.compact(fn, shapes | {"down": params["down"]}, masks, x)
    with pytest.raises(TypeError, match="folds removed slices of"):
        jp.compact(fn, shapes, masks, x)
