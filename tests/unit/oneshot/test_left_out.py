"""Embeddings have no inputs: the default leaves them out and says so, a ``where`` does not."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

TOKENS = jnp.arange(12) % 8
METHODS = ("sparsegpt", "alps", "obc")


def fn(p, tokens):
    return (p["embed"][tokens] + p["places"]) @ p["w"]


def model():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (8, 4), "places": (12, 4), "w": (4, 4)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    return params, jp.calibrate(fn, params, [TOKENS])


@pytest.mark.parametrize("method", METHODS)
def test_the_default_leaves_them_dense_and_says_so(method):
    params, stats = model()
    text = rf"{method} leaves dense .*: embed \(.* its rows are looked up\), places \(add at"
    with pytest.warns(UserWarning, match=text) as told:
        pruned, masks = getattr(jp.oneshot, method)(params, stats, 0.5)
    assert len(told) == 1 and told[0].filename == __file__
    assert masks["embed"].shape == masks["places"].shape == () and int(masks["w"].sum()) == 8
    np.testing.assert_array_equal(pruned["embed"], params["embed"])


def test_what_is_left_out_takes_no_share_of_the_sparsity():
    params, stats = model()
    inside = jp.unstructured(jp.global_threshold, where=lambda path, leaf: path == "w")
    with pytest.warns(UserWarning, match="leaves dense"):
        got = jp.oneshot.sparsegpt(params, stats, 0.5, pattern=jp.unstructured(jp.global_threshold))
    wanted = jp.oneshot.sparsegpt(params, stats, 0.5, pattern=inside)
    np.testing.assert_array_equal(got.masks["w"], wanted.masks["w"])


def test_a_where_of_ones_own_is_taken_at_its_word():
    params, stats = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        where = lambda path, leaf: path in stats.layouts  # noqa: E731
        jp.oneshot.sparsegpt(params, stats, 0.5, pattern=jp.n_m(2, 4, where=where))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(jp.n_m, "jp.n_m(2, 4)"), (jp.unstructured, "jp.unstructured()"), (jp.block, "jp.block(")],
)
def test_a_leaf_that_was_asked_for_is_an_error_that_names_the_pattern(pattern, name):
    given = {jp.n_m: (2, 4), jp.block: ((2, 2),), jp.unstructured: ()}[pattern]
    params, stats = model()
    asked = pattern(*given, where=lambda path, leaf: True)
    text = f"embed.*has no Gram.*leave it out with where=.*layouts in {re.escape(name)}"
    with pytest.raises(ValueError, match=text):
        jp.oneshot.sparsegpt(params, stats, 0.5, pattern=asked)


def test_masks_of_ones_own_name_no_pattern():
    params, stats = model()
    masks = jp.unstructured()(jp.magnitude(params), 0.5)
    with pytest.raises(ValueError, match="layouts in the pattern that makes masks"):
        jp.oneshot.dsnot(params, masks, stats)
