"""``semantics="kept"``: the result is the module that one would write at the small size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))


class Norms(nn.Module):
    width: int
    groups: int = 2

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(self.width, (3, 3))(x)
        h = nn.GroupNorm(self.groups)(h)
        h = nn.Dense(2 * self.width)(jnp.cos(h))
        h = nn.RMSNorm()(nn.LayerNorm()(h))
        h = h - h.mean(-1, keepdims=True)
        h = h / jnp.std(h, axis=-1, ddof=1, keepdims=True)
        return nn.Dense(4)(h.mean((1, 2)))


@pytest.mark.slow
def test_norms_over_what_is_kept_equal_the_native_module():
    big, native = Norms(8), Norms(4)
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape),
        big.init(jax.random.key(1), X),
    )
    structure = jp.infer_structure(big.apply, params, X)
    names = [n for n, d in structure.dims.items() if not d.frozen and "groups" not in d.label]
    masks = structure.masks({n: np.arange(structure.dims[n].size) % 2 == 0 for n in names})
    small = jp.compact(big.apply, params, masks, X, semantics="kept")
    fresh = native.init(jax.random.key(1), X)
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, fresh)
    np.testing.assert_allclose(
        small.fn(small.params, X), native.apply(small.params, X), rtol=1e-4, atol=1e-5
    )
    ours, theirs = (jp.cost(f, small.params, X).flops for f in (small.fn, native.apply))
    assert 0.98 * theirs < ours <= theirs  # RMSNorm subtracts a zero, which is left out
    masked = big.apply(jp.apply_masks(params, masks), X)
    assert not np.allclose(masked, small.fn(small.params, X), rtol=1e-2)
    with pytest.raises(ValueError, match="it fixes its sizes .*written at the small size"):
        small.certificate.check()


def units(p, x):
    h = jnp.tanh(x @ p["up"])
    return (h - h.mean(-1, keepdims=True)) @ p["down"]


def test_the_certificate_compares_with_the_function_at_the_small_params():
    params = {"up": jax.random.normal(jax.random.key(0), (3, 8)), "down": jnp.ones((8, 2))}
    masks, x = {"up": jnp.arange(8) < 5, "down": jnp.asarray(True)}, jnp.ones((4, 3))
    small = jp.compact(units, params, masks, x, semantics="kept")
    assert small.params["down"].shape == (5, 2)
    assert small.certificate.check(n=3) < 1e-12
    off = jp.compact(
        lambda p, x: units(p, x) * p["up"].shape[1], params, masks, x, semantics="kept"
    )
    assert off.certificate.check() == pytest.approx(3 / 5)  # 8 stays, the function has 5


def test_a_function_that_fixes_its_sizes_is_not_compared():
    params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    masks, x = {"up": jnp.arange(8) < 5, "down": jnp.asarray(True)}, jnp.ones((4, 3))
    others = {
        "[Ii]ncompatible shapes for broadcasting": lambda p, x: units(
            p | {"up": p["up"] * np.ones(8)}, x
        ),
        r"it gives \[\(4, 2\), \(5,\)\], not \[\(4, 2\), \(8,\)\]": lambda p, x: (
            units(p, x),
            jnp.zeros(p["up"].shape[1]),
        ),
    }
    for text, fn in others.items():
        small = jp.compact(fn, params, masks, x, semantics="kept")
        with pytest.raises(ValueError, match=f"it fixes its sizes \\({text}"):
            small.certificate.check()


def test_units_go_whatever_their_values():
    """Masking the bias alone leaves units that depend on the input: masked semantics keeps them."""
    params = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
    x, keep = jnp.ones((1, 3)), np.arange(8) < 2

    def fn(p, x):
        return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]

    masks = {"up": jnp.asarray(True), "bias": jnp.asarray(keep), "down": jnp.asarray(True)}
    assert jp.compact(fn, params, masks, x).params["up"].shape == (3, 8)
    small = jp.compact(fn, params, masks, x, semantics="kept")
    assert small.params["down"].shape == (2, 2)


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_variance_divides_by_what_is_left(ddof):
    """``jnp.var`` subtracts ddof from the count while it runs; of 0 nothing is left to evaluate."""
    up, down = jax.random.normal(jax.random.key(0), (2, 8, 3))

    def fn(p, x):
        return jnp.var(x @ p["up"].T, axis=-1, ddof=ddof, keepdims=True) + x @ p["down"].T[:, :1]

    params, x = {"up": up, "down": down}, jnp.ones((2, 3))
    masks = {"up": (jnp.arange(8) % 2 == 0)[:, None], "down": jnp.asarray(True)}
    small = jp.compact(fn, params, masks, x, semantics="kept")
    assert small.params["up"].shape == (4, 3)
    np.testing.assert_allclose(small.fn(small.params, x), fn(small.params, x), rtol=1e-5)


def test_other_semantics_are_refused():
    with pytest.raises(ValueError, match='semantics is \'small\'; wanted "masked" or "kept"'):
        jp.compact(lambda p: p, jnp.ones(3), jnp.ones(3, bool), semantics="small")


@pytest.mark.slow
def test_saved_models_keep_their_semantics(tmp_path):
    big = Norms(8)
    params = big.init(jax.random.key(1), X)
    structure = jp.infer_structure(big.apply, params, X)
    name = next(n for n, d in structure.dims.items() if not d.frozen and d.size == 16)
    masks = structure.masks({name: np.arange(16) < 4})
    small = jp.compact(big.apply, params, masks, X, semantics="kept")
    jp.save(small, tmp_path)
    again = jp.load(tmp_path, big.apply, params, X)
    np.testing.assert_array_equal(again.fn(again.params, X), small.fn(small.params, X))


@pytest.mark.parametrize("by", ["quotient", "factor"])
def test_a_variance_of_one_unit_is_that_of_a_module_of_one_unit(by):
    """n - 1 is zero there: nobody may divide by it in Python."""
    params = {"up": jnp.ones((3, 8)) + jnp.arange(8.0), "down": jnp.ones((8, 2))}

    def fn(p, x):
        h = x @ p["up"]
        squares = jnp.square(h - h.mean(-1, keepdims=True)).sum(-1, keepdims=True)
        return (squares / 7 if by == "quotient" else squares * (1 / 7)) + h @ p["down"]

    keep = np.arange(8) < 1
    masks = {"up": jnp.asarray(keep)[None], "down": jnp.asarray(keep)[:, None]}
    small = jp.compact(fn, params, masks, jnp.ones((1, 3)), semantics="kept")
    assert small.params["up"].shape == (3, 1)
    assert np.isnan(small.fn(small.params, jnp.ones((1, 3)))).all()  # 0 / 0, as jnp.var says, too
