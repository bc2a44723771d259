"""Calls in a wrong order, masks with gaps, and results that say what they are."""

from __future__ import annotations

import re

import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp

X = jnp.ones((2, 3))
PARAMS = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
SCORES = jp.magnitude(PARAMS)


def net(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


# ------------------------------------------------------------------------------ masks with gaps


def gaps():
    """The masks of one group of ``optax.multi_transform``, and what they are without gaps."""
    tx = optax.multi_transform(
        {"pruned": jp.training.static(optax.adam(1e-3), 0.5), "dense": optax.sgd(1e-3)},
        {"up": "pruned", "down": "dense"},
    )
    masks = optax.tree_utils.tree_get(tx.init(PARAMS), "masks")
    assert isinstance(masks["down"], optax.MaskedNode)
    return masks, {**masks, "down": jnp.asarray(True)}


def test_a_leaf_that_optax_leaves_out_of_masks_is_dense():
    masks, whole = gaps()
    assert jp.density(PARAMS, masks) == jp.density(PARAMS, whole) == 0.5
    for mine, other in ((jp.apply_masks(PARAMS, m) for m in (masks, whole)),):
        assert all(jnp.array_equal(mine[name], other[name]) for name in PARAMS)
    assert jp.summary(PARAMS, masks) == jp.summary(PARAMS, whole)
    small = jp.compact(net, PARAMS, {**masks, "up": jnp.arange(8) > 3}, X)
    assert small.params["up"].shape == (3, 4)


def test_masks_with_gaps_of_other_params_name_a_leaf():
    masks, _ = gaps()
    with pytest.raises(ValueError, match="the tree of masks .* no leaf 'down' .nor 'more'"):
        jp.apply_masks({**PARAMS, "more": X}, masks)


# -------------------------------------------------------------------------------- a wrong order


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: jp.structured(SCORES, 0.5),
            "structured is a factory of patterns .* jp.structured(structure)(scores, 0.5)",
        ),
        (
            lambda: jp.structured(SCORES),
            "wants what jp.infer_structure found, got a dict; .*: jp.structured(structure)(scores,",
        ),
        (
            lambda: jp.unstructured(SCORES, 0.5),
            "unstructured is a factory of patterns .*: jp.unstructured()(scores, 0.5)",
        ),
        (lambda: jp.channel(SCORES, 0.5), "call what it makes: jp.channel()(scores, 0.5)"),
        (lambda: jp.block(SCORES, 0.5), "call what it makes: jp.block((4, 4))(scores, 0.5)"),
        (lambda: jp.n_m(SCORES, 0.5), "call what it makes: jp.n_m(2, 4)(scores, 0.5)"),
        (
            lambda: jp.threshold(SCORES, 0.5),
            "threshold is a factory of patterns .*: jp.threshold(0.1)(scores, 0.5)",
        ),
        (
            lambda: jp.training.iterative(
                train, PARAMS, jp.training.static(optax.sgd(0.1), 0.0), 0.5, rounds=1, steps=1
            ),
            "tx of iterative is a dict; the order is jp.training.iterative(train, tx, params,",
        ),
        (
            lambda: jp.training.iterative(optax.sgd(0.1), train, PARAMS, 0.5, rounds=1, steps=1),
            "train of iterative is a GradientTransformation",
        ),
    ],
)
def test_a_wrong_order_says_the_right_one(call, text):
    with pytest.raises(TypeError, match=re.escape(text).replace(r"\.\*", ".*")):
        call()


def train(params, state, start, stop):
    return params, state


# ---------------------------------------------------------------------------------- semantics


@pytest.mark.parametrize("semantics", ["masked", "kept"])
def test_a_certificate_says_which_semantics_it_is_for(semantics):
    masks = jp.infer_structure(net, PARAMS, X).masks({"up:1": jnp.arange(8) > 3})
    certificate = jp.compact(net, PARAMS, masks, X, semantics=semantics).certificate
    assert certificate.semantics == semantics
    assert str(certificate).startswith(f"semantics '{semantics}': ")
