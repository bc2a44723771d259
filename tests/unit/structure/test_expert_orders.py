"""Units of an order of their own: hidden ones for each expert, experts for each layer and group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.models.zoo.common import drawn, floats
from tests.unit.test_experts import (
    SHAPES,
    E,
    H,
    K,
    W,
    argmax,
    ragged,
    softmax_after,
    softmax_before,
)

LEFT = 4  # hidden units of each expert


def mixed(p, x):
    """Rows sorted by expert, of kernels without biases."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)
    flat = chosen.reshape(-1)
    order, sizes = jnp.argsort(flat), jnp.bincount(flat, length=E).astype(jnp.int32)
    h = jax.nn.relu(jax.lax.ragged_dot(x[order // K], p["up"], sizes))
    y = jax.lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
    return jnp.einsum("tk,tkd->td", gates, y.reshape(-1, K, W)) @ p["out"]


def relu_gathered(p, x):
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)
    h = jax.nn.relu(jnp.einsum("td,tkdf->tkf", x, p["up"][chosen]) + p["up_bias"][chosen])
    return jnp.einsum("tk,tkf,tkfd->td", gates, h, p["down"][chosen]) @ p["out"]


def of_experts(moe):
    return lambda p, x: moe(p, x) @ p["out"]


HIDDEN = {
    "one-hot": of_experts(softmax_after),
    "argmax": of_experts(argmax),
    "gathered": of_experts(softmax_before),
    "gathered, a derivative of its own": relu_gathered,
    "ragged": mixed,
}


def under(seed, rows, count, left):
    rng = np.random.default_rng(seed)
    return np.stack([np.isin(np.arange(count), rng.permutation(count)[:left])
                     for _ in range(rows)])  # fmt: skip


def parent_of(structure, name, size):
    (above,) = (n for n in structure.parents(name) if structure.dims[n].size == size)
    return above


@pytest.mark.parametrize(
    ("name", "semantics"),
    [(name, "kept") for name in HIDDEN] + [(n, "masked") for n in ("one-hot", "argmax", "ragged")],
)
def test_each_expert_loses_its_own_hidden_units(name, semantics):
    fn, x = HIDDEN[name], floats(9, W)
    params = drawn(**{n: s for n, s in SHAPES.items() if name != "ragged" or n != "up_bias"})
    structure = jp.infer_structure(fn, params, x, semantics=semantics)
    masks = structure.masks({"up:2": {parent_of(structure, "up:2", E): under(0, E, H, LEFT)}})
    small = jp.compact(fn, params, masks, x, semantics=semantics)
    assert small.params["up"].shape == (E, W, LEFT), str(small.certificate)
    masked = jp.apply_masks(params, masks)
    np.testing.assert_allclose(small.fn(small.params, x), fn(masked, x), rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda p, f: (f(p, x) ** 2).sum())
    wanted = small.restrict(slope(masked, fn))
    np.testing.assert_allclose(
        slope(small.params, small.fn)["down"], wanted["down"], rtol=1e-3, atol=1e-4
    )


def shifted(p, x):
    """The second kernel is that of another expert."""
    logits = jax.nn.softmax(x @ p["router"])
    best, worst = (jax.lax.top_k(sign * logits, K)[1] for sign in (1, -1))
    h = jnp.einsum("td,tkdf->tkf", x, p["up"][best])
    return jnp.einsum("tkf,tkfd->td", h, p["down"][worst]) @ p["out"]


def turned(p, x):
    """A token's second expert meets its first kernel."""
    chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)[1]
    h = jnp.einsum("td,tkdf->tkf", x, p["up"][chosen])
    return jnp.einsum("tkf,tkfd->td", h[:, ::-1], p["down"][chosen]) @ p["out"]


def crossed(p, x):
    """Every one of a token's experts meets every other one's kernel."""
    chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)[1]
    h = jnp.einsum("td,tkdf->tkf", x, p["up"][chosen])
    return jnp.einsum("tkf,tjfd->td", h, p["down"][chosen]) @ p["out"]


def summed(p, x):
    """A token's experts are added before the second kernel."""
    chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)[1]
    h = jnp.einsum("td,tkdf->tf", x, p["up"][chosen])
    return jnp.einsum("tf,tkfd->td", h, p["down"][chosen]) @ p["out"]


def other_groups(p, x):
    """The second product's rows are grouped otherwise."""
    chosen = jnp.argmax(x @ p["router"], -1)
    sizes = jnp.bincount(chosen, length=E).astype(jnp.int32)
    h = jax.lax.ragged_dot(x[jnp.argsort(chosen)], p["up"], sizes)
    return jax.lax.ragged_dot(h, p["down"], sizes[::-1]) @ p["out"]


def rows_moved(p, x):
    """Rows change places between both products."""
    chosen = jnp.argmax(x @ p["router"], -1)
    sizes = jnp.bincount(chosen, length=E).astype(jnp.int32)
    h = jax.lax.ragged_dot(x[jnp.argsort(chosen)], p["up"], sizes)
    return jax.lax.ragged_dot(h[::-1], p["down"], sizes) @ p["out"]


@pytest.mark.parametrize("fn", [shifted, turned, crossed, summed, other_groups, rows_moved])
def test_rows_that_meet_other_experts_units_are_no_orders(fn):
    params, x = drawn(**{n: SHAPES[n] for n in ("router", "up", "down", "out")}), floats(9, W)
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    masks = structure.masks({"up:2": {parent_of(structure, "up:2", E): under(0, E, H, LEFT)}})
    small = jp.compact(fn, params, masks, x, semantics="kept")
    assert small.params["up"].shape == (E, W, H)
    assert "tells them apart" in str(small.certificate)
    masked = fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), masked, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- experts in an order of their own


def scanned(moe, result=lambda chosen: None):
    shapes = {n: (3, *s) for n, s in SHAPES.items() if n != "out"}
    params = {"layers": drawn(**shapes), **drawn(out=(W, 3))}

    def fn(p, x):
        def layer(x, p):
            return x + moe(p, x), result(jax.lax.top_k(x @ p["router"], K)[1])

        x, chosen = jax.lax.scan(layer, x, p["layers"])
        return x @ p["out"], chosen

    return fn, params, floats(9, W)


def layer_by_layer(moe, params, x, rows):
    for k, kept in enumerate(map(np.flatnonzero, rows)):
        p = {n: leaf[k] for n, leaf in params["layers"].items()}
        x = x + moe({n: a[:, kept] if n == "router" else a[kept] for n, a in p.items()}, x)
    return x @ params["out"]


ROWS = under(1, 3, E, 4)


@pytest.mark.parametrize("moe", [softmax_after, softmax_before, ragged, argmax])
def test_each_layer_of_a_scan_loses_its_own_experts(moe):
    fn, params, x = scanned(moe)
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    name = "layers/router:2"
    masks = structure.masks({name: {parent_of(structure, name, 3): ROWS}})
    small = jp.compact(fn, params, masks, x, semantics="kept")
    assert small.params["layers"]["up"].shape == (3, 4, W, H), str(small.certificate)
    found, wanted = small.fn(small.params, x)[0], layer_by_layer(moe, params, x, ROWS)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-4)


TOLD = {
    "as they are": lambda chosen: chosen,
    "as floats": lambda chosen: chosen.astype(float),
    "in arithmetic": lambda chosen: chosen % 2,
    "compared with a number": lambda chosen: chosen == 3,
    "selected by": lambda chosen: jnp.where(chosen % 2 == 0, chosen, chosen[:, ::-1]).sum(),
    "steering": lambda chosen: jax.lax.switch(chosen[0, 0] % 2, [lambda: 1.0, lambda: 2.0]),
    "added to": lambda chosen: (chosen[..., None] + jnp.arange(E)).sum(-1),
    "in a loop": lambda chosen: jax.lax.fori_loop(0, 2, lambda _, c: c, chosen),
}


@pytest.mark.parametrize("how", TOLD)
def test_numbers_that_a_result_tells_forbid_orders(how):
    fn, params, x = scanned(softmax_after, TOLD[how])
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    name = "layers/router:2"
    masks = structure.masks({name: {parent_of(structure, name, 3): ROWS}})
    small = jp.compact(fn, params, masks, x, semantics="kept")
    assert small.params["layers"]["up"].shape[1] == E
    assert "numbers of chosen units" in str(small.certificate), str(small.certificate)


def grouped(p, x):
    """Experts in groups of which a token may use two, and two experts of these."""
    return grouped_at(p, x, x @ p["router"])


def test_each_group_loses_its_own_experts():
    params, x = drawn(router=(W, 16), up=(16, W, 3)), floats(9, W)
    structure = jp.infer_structure(grouped, params, x, semantics="kept")
    rows = under(2, 4, 4, 2)
    masks = structure.masks({"router:1.1": {"router:1.0": rows}})
    small = jp.compact(grouped, params, masks, x, semantics="kept")
    assert small.params["up"].shape == (8, W, 3), str(small.certificate)
    kept = rows.reshape(-1)
    wanted = grouped({"router": params["router"][:, kept], "up": params["up"][kept]}, x)
    np.testing.assert_allclose(small.fn(small.params, x), wanted, rtol=1e-5, atol=1e-6)


def test_whole_groups_go():
    params, x = drawn(router=(W, 16), up=(16, W, 3)), floats(9, W)
    structure = jp.infer_structure(grouped, params, x, semantics="kept")
    keep = np.array([True, False, True, True])
    small = jp.compact(grouped, params, structure.masks({"router:1.0": keep}), x, semantics="kept")

    def hidden(p, x):  # the groups that are gone have no members of any worth
        return grouped_at(p, x, jnp.where(jnp.repeat(keep, 4), x @ p["router"], -jnp.inf))

    np.testing.assert_allclose(small.fn(small.params, x), hidden(params, x), rtol=1e-5, atol=1e-6)


def grouped_at(p, x, logits):
    scores = jax.nn.sigmoid(logits)
    groups = scores.reshape(len(x), 4, -1)
    used = jax.nn.one_hot(jax.lax.top_k(jax.lax.top_k(groups, 2)[0].sum(-1), 2)[1], 4).sum(1) > 0
    allowed = jnp.where(used[..., None], groups, -jnp.inf).reshape(scores.shape)
    chosen = jax.lax.top_k(allowed, 2)[1]
    gates = jnp.take_along_axis(scores, chosen, -1)
    return jnp.einsum("tk,td,tkdf->tf", gates, x, p["up"][chosen])
