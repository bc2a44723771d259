"""Other units under each layer or head, as many of each: equal to the masked model all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)


def random_params(shapes):
    return {k: jnp.asarray(RNG.normal(0, 0.3, s), jnp.float32) for k, s in shapes.items()}


def rows(parent, size, count):
    kept = np.zeros((parent, size), bool)
    for row in kept:
        row[RNG.permutation(size)[:count]] = True
    return kept


def scanned(p, x):
    def layer(h, q):
        hidden = jax.nn.silu(h @ q["up"] + q["bias"])
        return h + hidden @ q["down"], hidden.mean()

    return jax.lax.scan(jax.checkpoint(layer), x, p)


SCANNED = {"up": (3, 6, 8), "bias": (3, 8), "down": (3, 8, 6)}


def attention(p, x):
    """One token attends over the rows of x; every head has key units of its own."""
    q, k = ((x @ p[n]).reshape(-1, 4, 6) for n in "qk")
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k) / 3.0)
    v = (x @ p["v"]).reshape(-1, 4, 6)
    return jnp.einsum("hts,shd->thd", weights, v).reshape(-1, 24) @ p["out"]


ATTENTION = {"q": (6, 24), "k": (6, 24), "v": (6, 24), "out": (24, 6)}

CASES = {
    "scanned": (scanned, SCANNED, "up:2", "up:0", (3, 3, 6)),
    "query and key": (attention, ATTENTION, "q:1.1", "q:1.0", (6, 12)),
    "values": (attention, ATTENTION, "v:1.1", "q:1.0", (6, 12)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_parent_keeps_units_of_its_own(case, tmp_path):
    fn, shapes, name, parent, small_shape = CASES[case]
    params = random_params(shapes)
    structure = jp.infer_structure(fn, params, X)
    name, parent = (structure_name(structure, n) for n in (name, parent))
    dim = structure.dims[name]
    assert parent in structure.parents(name)
    kept = rows(structure.dims[parent].size, dim.size, 3)
    masks = structure.masks({name: {parent: kept}})
    small = jp.compact(fn, params, masks, X)
    assert small_shape in {leaf.shape for leaf in small.params.values()}
    assert small.certificate.exact
    np.testing.assert_array_equal(small.keep[name], kept)
    assert small.certificate.check() < 1e-12

    masked = jp.apply_masks(params, masks)
    loss = lambda f: lambda p: jnp.sum(jnp.sin(jax.tree.leaves(f(p, X))[0]))  # noqa: E731
    expected, got = jax.grad(loss(fn))(masked), jax.grad(loss(small.fn))(small.params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, small.restrict(expected), got)
    jax.tree.map(np.testing.assert_array_equal, small.expand(small.params), masked)

    jp.save(small, tmp_path)
    again = jp.load(tmp_path, fn, params, X)
    jax.tree.map(close, again.fn(again.params, X), small.fn(small.params, X))
    np.testing.assert_array_equal(again.keep[name], kept)


def structure_name(structure, name):
    """Names go by the first slot; these tests say one of them."""
    return next(n for n, d in structure.dims.items() if name in map(str, d.slots))


@pytest.mark.slow
def test_unequal_counts_keep_the_larger_one():
    """Layer 0 could lose 5 units, the others 3: 3 go everywhere."""
    params = random_params(SCANNED)
    structure = jp.infer_structure(scanned, params, X)
    kept = np.concatenate([rows(1, 8, 3), rows(2, 8, 5)])
    masks = {
        "up": jnp.asarray(kept[:, None, :]),
        "bias": jnp.asarray(kept),
        "down": jnp.asarray(kept[:, :, None]),
    }
    small = jp.compact(scanned, params, masks, X)
    assert small.params["up"].shape == (3, 6, 5)
    assert small.certificate.check() < 1e-12
    with pytest.raises(ValueError, match="keeps between 3 and 5 units; keep equally many"):
        structure.masks(
            {structure_name(structure, "up:2"): {structure_name(structure, "up:0"): kept}}
        )


@pytest.mark.slow
def test_units_that_meet_across_layers_stay():
    """Here the hidden units of all layers are added: one order must do for all."""

    def fn(p, x):
        return jnp.tanh(jnp.einsum("bi,lih->bh", x, p["up"])) @ p["down"][0]

    params = random_params({"up": (3, 6, 8), "down": (1, 8, 6)})
    kept = rows(3, 8, 4)
    masks = {"up": jnp.asarray(kept[:, None, :]), "down": jnp.asarray(True)}
    small = jp.compact(fn, params, masks, X)
    assert small.params["up"].shape[2] >= kept.any(0).sum()
    assert small.certificate.check() < 1e-12


@pytest.mark.slow
def test_an_order_of_its_own_is_refused_where_positions_count():
    """A code for each position of the hidden axis tells units apart."""

    def fn(p, x):
        def layer(h, q):
            code = jnp.arange(8.0)
            return h + jnp.tanh(h @ q["up"] + code) @ q["down"], None

        return jax.lax.scan(layer, x, p)[0]

    params = random_params({"up": (3, 6, 8), "down": (3, 8, 6)})
    structure = jp.infer_structure(fn, params, X)
    names = [structure_name(structure, n) for n in ("up:2", "up:0")]
    masks = structure.masks({names[0]: {names[1]: rows(3, 8, 4)}})
    small = jp.compact(fn, params, masks, X)
    assert small.certificate.check() < 1e-12
    assert small.params["up"].shape[2] > 4


@pytest.mark.slow
def test_layers_have_one_order_for_all_units():
    """A hidden unit can't run through the layers in an order of its own."""
    params = random_params(SCANNED)
    structure = jp.infer_structure(lambda p, x: scanned(p, x)[0], params, X)
    layers, hidden = (structure_name(structure, n) for n in ("up:0", "up:2"))
    assert hidden in structure.parents(layers)
    masks = structure.masks({layers: {hidden: rows(8, 3, 2)}})
    small = jp.compact(lambda p, x: scanned(p, x)[0], params, masks, X)
    assert len(small.params["up"]) == 3 and small.certificate.check() < 1e-12


def test_bad_parents():
    structure = jp.infer_structure(scanned, random_params(SCANNED), X)
    name, parent = (structure_name(structure, n) for n in ("up:2", "up:0"))
    with pytest.raises(ValueError, match="is no parent of .*; parents are: "):
        structure.masks({name: {name: rows(8, 8, 2)}})
    with pytest.raises(ValueError, match=r"has shape \(2, 8\), wanted \(3, 8\) with at least one"):
        structure.masks({name: {parent: rows(2, 8, 2)}})
    with pytest.raises(ValueError, match="no dimension is named 'nowhere'"):
        structure.masks({"nowhere": {parent: rows(3, 8, 2)}})
